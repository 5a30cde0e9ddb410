/* Matrix products, once per instruction set like body.h, whose loads and stores they use.
 *
 * c[M,N] (+)= a b with a[r,k] at r * ars + k * aks and b[k,j] at k * bks + j * bjs, one of bks, bjs being 1. Panels of
 * b, PCOLS columns wide, are copied so that they are read in order and stay in the level 2 cache; each is used for all
 * rows of a, PROWS at a time, whose tile of c is held in registers. (Goto and van de Geijn, Anatomy of high-performance
 * matrix multiplication, 2008, without the blocking that larger caches and smaller matrices make unnecessary.)
 *
 * Every element is the sum over k in order, by one fused multiply-add each: it does not depend on where in the matrix
 * it stands, nor on how many rows there are.
 */

#define PVECS 3
#define PCOLS (W * PVECS)
#define PACKED_STRIDE 512

/* Rows r..r+rows of a panel's columns; `width` columns of c are stored. */
INLINE void NAME(product_tile)(float *c, long ldc, const float *a, long ars, long aks, const float *panel, long K,
                               long width, long add, const int rows, const int vecs) {
    VEC acc[PROWS][PVECS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vecs; v++) acc[r][v] = (VEC){0};
    for (long k = 0; k < K; k++) {
        VEC x[PVECS];
        for (int v = 0; v < vecs; v++) x[v] = NAME(load)(panel + (k * vecs + v) * W);
        for (int r = 0; r < rows; r++) {
            VEC y = NAME(splat)(a[r * ars + k * aks]);
            for (int v = 0; v < vecs; v++) acc[r][v] += y * x[v];
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vecs; v++) {
            float *to = c + r * ldc + W * v;
            const long left = width - W * v;
            if (left >= W)
                NAME(store)(to, add ? NAME(load)(to) + acc[r][v] : acc[r][v]);
            else
                NAME(store_part)(to, add ? NAME(load_part)(to, left) + acc[r][v] : acc[r][v], left);
        }
}

/* packed: of a's rows, PROWS at a time, or NULL */
INLINE void NAME(product_rows)(float *c, long ldc, const float *a, long ars, long aks, const float *packed,
                               const float *panel, long M, long K, long width, long add, const int vecs) {
    long r = 0;
    if (packed)
        for (; r + PROWS <= M; r += PROWS)
            NAME(product_tile)(c + r * ldc, ldc, packed + r * K, 1, PROWS, panel, K, width, add, PROWS, vecs);
    for (; r + PROWS <= M; r += PROWS)
        NAME(product_tile)(c + r * ldc, ldc, a + r * ars, ars, aks, panel, K, width, add, PROWS, vecs);
    for (; r + 2 <= M; r += 2)
        NAME(product_tile)(c + r * ldc, ldc, a + r * ars, ars, aks, panel, K, width, add, 2, vecs);
    if (r < M) NAME(product_tile)(c + r * ldc, ldc, a + r * ars, ars, aks, panel, K, width, add, 1, vecs);
}

/* panel[k, 0..cols) = b[k, j0..j0+width), zero beyond the width */
INLINE void NAME(product_panel)(float *panel, const float *b, long bks, long bjs, long K, long width, long cols) {
    if (width < cols) memset(panel, 0, 4 * (size_t)(K * cols));
    if (bjs == 1) {
        for (long k = 0; k < K; k++) memcpy(panel + k * cols, b + k * bks, 4 * (size_t)width);
        return;
    }
    NAME(transpose)(panel, cols, b, bjs, width, K);
}

/* packed[r * K + k * PROWS + i] = a[r + i, k] for all full tiles of a transposed a whose stride is a multiple of 2 KB:
 * read along k, it would fall into two sets of the cache. A cache line of a at a time. */
INLINE void NAME(product_pack)(float *packed, const float *a, long aks, long M, long K) {
    long r = 0;
    for (; r + 16 <= M; r += 16)
        for (long k = 0; k < K; k++)
            for (long i = 0; i < 16; i += PROWS) memcpy(packed + (r + i) * K + k * PROWS, a + r + i + k * aks, 4 * PROWS);
    for (; r + PROWS <= M; r += PROWS)
        for (long k = 0; k < K; k++) memcpy(packed + r * K + k * PROWS, a + r + k * aks, 4 * PROWS);
}

/* scratch holds K * (PCOLS + M) floats, K * PCOLS where a is not packed */
void NAME(product)(float *c, const float *a, const float *b, float *scratch, long M, long N, long K, long ldc, long ars,
                   long aks, long bks, long bjs, long add) {
    float *packed = ars == 1 && aks % PACKED_STRIDE == 0 && N > PCOLS ? scratch + K * PCOLS : NULL;
    if (packed) NAME(product_pack)(packed, a, aks, M, K);
    for (long j = 0; j < N; j += PCOLS) {
        const long width = N - j < PCOLS ? N - j : PCOLS;
        const long vecs = (width + W - 1) / W;
        NAME(product_panel)(scratch, b + j * bjs, bks, bjs, K, width, vecs * W);
        if (vecs == 3)
            NAME(product_rows)(c + j, ldc, a, ars, aks, packed, scratch, M, K, width, add, 3);
        else if (vecs == 2)
            NAME(product_rows)(c + j, ldc, a, ars, aks, packed, scratch, M, K, width, add, 2);
        else
            NAME(product_rows)(c + j, ldc, a, ars, aks, packed, scratch, M, K, width, add, 1);
    }
}

#undef PVECS
#undef PCOLS
#undef PACKED_STRIDE
