/* These are the matrix products, compiled once per instruction set like layers.h, whose loads and stores they use.
 *
 * A product is c[M,N] = a b with a[r,k] at r * ars + k * aks and b[k,j] at k * bks + j * bjs, where bks or bjs is 1.
 * Panels of b, PCOLS columns wide, are copied so that they are read in order and stay in the level 2 cache; each is
 * used for all rows of a, PROWS at a time, whose tile of c is held in registers. The method is that of Goto and van de
 * Geijn, Anatomy of high-performance matrix multiplication (2008), without the blocking that larger caches and smaller
 * matrices make unnecessary. While a tile is computed, its memory in c and a part of the next panel are prefetched.
 * Elementwise operations that follow a product are done while the tile is still in registers.
 *
 * Every element is the sum over k in order, by one fused multiply-add for each k: it does not depend on its position in
 * the matrix, nor on the number of rows.
 */

#define PVECS 3
#define PCOLS (W * PVECS)
#define PACKED_STRIDE 512
#define AHEAD 16

/* The arrays to which tiles are written. The argument `end` of a product says how: c = ab, c += ab, c = gelu(ab + bias)
 * with its slope, or c = ab * slope with its column sums. */
typedef struct {
    float *c;
    long ldc; /* the stride of rows of c and of slope */
    float *slope;
    const float *bias;
    float *sums;
} NAME(Result);

/* The cache lines of the next panel that are still to be prefetched, a few for every AHEAD steps along k. */
typedef struct {
    const char *line;
    long rows, stride, lines; /* rows left, bytes from one row to the next, lines of each row */
    long place, each;         /* the line within the row, and the number of lines at a time */
} NAME(Ahead);

INLINE void NAME(fetch)(NAME(Ahead) *next) {
    for (long i = 0; i < next->each && next->rows > 0; i++) {
        __builtin_prefetch(next->line + 64 * next->place, 0, 2);
        if (++next->place == next->lines) {
            next->place = 0;
            next->line += next->stride;
            next->rows--;
        }
    }
}

/* Prefetch the memory of row r of a tile. This is done row by row between the steps along k, as all rows at once would
 * delay other loads. */
INLINE void NAME(fetch_place)(const NAME(Result) *to, long r, long j, const int end, const int vecs) {
    for (int v = 0; v < vecs; v++) {
        const long at = r * to->ldc + j + W * v;
        __builtin_prefetch(to->c + at, 1, 3);
        if (end == GELU) __builtin_prefetch(to->slope + at, 1, 3);
        if (end == SLOPE) __builtin_prefetch(to->slope + at, 0, 3);
    }
}

INLINE VEC NAME(load_up_to)(const float *p, long n) { return n >= W ? NAME(load)(p) : NAME(load_part)(p, n); }
INLINE void NAME(store_up_to)(float *p, VEC x, long n) {
    if (n >= W)
        NAME(store)(p, x);
    else
        NAME(store_part)(p, x, n);
}

/* Write one register of a finished tile: row r, from column j on, of which `left` columns exist. */
INLINE void NAME(finish)(const NAME(Result) *to, long r, long j, long left, VEC x, VEC *sum, const int end) {
    const long at = r * to->ldc + j;
    VEC slope;
    if (end == ADD) x += NAME(load_up_to)(to->c + at, left);
    if (end == GELU) {
        x = NAME(gelu)(x + NAME(load_up_to)(to->bias + j, left), &slope);
        NAME(store_up_to)(to->slope + at, slope, left);
    }
    if (end == SLOPE) {
        x *= NAME(load_up_to)(to->slope + at, left);
        *sum += x;
    }
    NAME(store_up_to)(to->c + at, x, left);
}

/* Compute rows r..r+rows of a panel's columns, which begin at column j; `a` points to row r. */
INLINE void NAME(product_tile)(const NAME(Result) *to, long r, long j, const float *a, long ars, long aks,
                               const float *panel, long K, long width, NAME(Ahead) *next, VEC *sums, const int end,
                               const int rows, const int vecs) {
    VEC acc[PROWS][PVECS];
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < vecs; v++) acc[i][v] = (VEC){0};
    for (long first = 0; first < K; first += AHEAD) {
        const long last = first + AHEAD < K ? first + AHEAD : K;
        NAME(fetch)(next);
        if (first < AHEAD * rows) NAME(fetch_place)(to, r + first / AHEAD, j, end, vecs);
        for (long k = first; k < last; k++) {
            VEC x[PVECS];
            for (int v = 0; v < vecs; v++) x[v] = NAME(load)(panel + (k * vecs + v) * W);
            for (int i = 0; i < rows; i++) {
                const VEC y = NAME(splat)(a[i * ars + k * aks]);
                for (int v = 0; v < vecs; v++) acc[i][v] += y * x[v];
            }
        }
    }
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < vecs; v++) NAME(finish)(to, r + i, j + W * v, width - W * v, acc[i][v], sums + v, end);
}

/* Compute all rows of a panel's columns; `packed` has the rows of a packed PROWS at a time, or is NULL. */
INLINE void NAME(product_rows)(const NAME(Result) *to, long j, const float *a, long ars, long aks, const float *packed,
                               const float *panel, long M, long K, long width, NAME(Ahead) *next, const int end,
                               const int vecs) {
    VEC sums[PVECS];
    for (int v = 0; v < vecs; v++) sums[v] = (VEC){0};
    long r = 0;
    if (packed)
        for (; r + PROWS <= M; r += PROWS)
            NAME(product_tile)(to, r, j, packed + r * K, 1, PROWS, panel, K, width, next, sums, end, PROWS, vecs);
    for (; r + PROWS <= M; r += PROWS)
        NAME(product_tile)(to, r, j, a + r * ars, ars, aks, panel, K, width, next, sums, end, PROWS, vecs);
    for (; r + 2 <= M; r += 2)
        NAME(product_tile)(to, r, j, a + r * ars, ars, aks, panel, K, width, next, sums, end, 2, vecs);
    if (r < M) NAME(product_tile)(to, r, j, a + r * ars, ars, aks, panel, K, width, next, sums, end, 1, vecs);
    for (int v = 0; v < vecs && end == SLOPE; v++) {
        const long left = width - W * v;
        NAME(store_up_to)(to->sums + j + W * v, NAME(load_up_to)(to->sums + j + W * v, left) + sums[v], left);
    }
}

/* Copy panel[k, 0..cols) = b[k, 0..width), with zeros beyond the width. */
INLINE void NAME(product_panel)(float *panel, const float *b, long bks, long bjs, long K, long width, long cols) {
    if (width < cols) memset(panel, 0, 4 * (size_t)(K * cols));
    if (bjs != 1) {
        NAME(transpose)(panel, cols, b, bjs, width, K);
        return;
    }
    for (long k = 0; k < K; k++)
        for (long v = 0; v < width; v += W)
            NAME(store_up_to)(panel + k * cols + v, NAME(load_up_to)(b + k * bks + v, width - v), width - v);
}

/* Copy packed[r * K + k * PROWS + i] = a[r + i, k] for all full tiles, a cache line of a at a time. This is for a
 * transposed a whose stride is a multiple of 2 KB: read along k, it would use two sets of the cache alone. */
INLINE void NAME(product_pack)(float *packed, const float *a, long aks, long M, long K) {
    long r = 0;
    for (; r + 16 <= M; r += 16)
        for (long k = 0; k < K; k++) {
            __builtin_prefetch(a + r + 16 + k * aks, 0, 2);
            for (long i = 0; i < 16; i += PROWS) memcpy(packed + (r + i) * K + k * PROWS, a + r + i + k * aks, 4 * PROWS);
        }
    for (; r + PROWS <= M; r += PROWS)
        for (long k = 0; k < K; k++) memcpy(packed + r * K + k * PROWS, a + r + k * aks, 4 * PROWS);
}

/* Return the cache lines of `width` columns of b, spread over the tiles that use the panel before them. */
INLINE NAME(Ahead) NAME(ahead_of)(const float *b, long bks, long bjs, long M, long K, long width) {
    const long turns = (M / PROWS + 1) * ((K + AHEAD - 1) / AHEAD);
    const long rows = bjs == 1 ? K : width, columns = bjs == 1 ? width : K, lines = (columns + 15) / 16;
    return (NAME(Ahead)){(const char *)b, rows, 4 * (bjs == 1 ? bks : bjs), lines, 0, (rows * lines + turns - 1) / turns};
}

/* Compute a product with any end. scratch holds K * (PCOLS + M) floats, or K * PCOLS where a is not packed. */
INLINE void NAME(products)(const NAME(Result) *to, const float *a, const float *b, float *scratch, long M, long N,
                           long K, long ars, long aks, long bks, long bjs, const int end) {
    float *packed = ars == 1 && aks % PACKED_STRIDE == 0 && N > PCOLS ? scratch + K * PCOLS : NULL;
    if (packed) NAME(product_pack)(packed, a, aks, M, K);
    for (long j = 0; j < N; j += PCOLS) {
        const long width = N - j < PCOLS ? N - j : PCOLS, after = N - j - width < PCOLS ? N - j - width : PCOLS;
        const long vecs = (width + W - 1) / W;
        NAME(Ahead) next = NAME(ahead_of)(b + (j + width) * bjs, bks, bjs, M, K, after);
        NAME(product_panel)(scratch, b + j * bjs, bks, bjs, K, width, vecs * W);
        if (vecs == 3)
            NAME(product_rows)(to, j, a, ars, aks, packed, scratch, M, K, width, &next, end, 3);
        else if (vecs == 2)
            NAME(product_rows)(to, j, a, ars, aks, packed, scratch, M, K, width, &next, end, 2);
        else
            NAME(product_rows)(to, j, a, ars, aks, packed, scratch, M, K, width, &next, end, 1);
    }
}

/* Compute c = a b, or c += a b with `add`. */
void NAME(product)(float *c, const float *a, const float *b, float *scratch, long M, long N, long K, long ldc, long ars,
                   long aks, long bks, long bjs, long add) {
    const NAME(Result) to = {c, ldc, NULL, NULL, NULL};
    if (add)
        NAME(products)(&to, a, b, scratch, M, N, K, ars, aks, bks, bjs, ADD);
    else
        NAME(products)(&to, a, b, scratch, M, N, K, ars, aks, bks, bjs, WRITE);
}

/* Compute out = gelu(a b + bias) and slope = gelu'(a b + bias); all matrices are C-contiguous. */
void NAME(product_gelu)(float *out, float *slope, const float *a, const float *b, const float *bias, float *scratch,
                        long M, long N, long K) {
    const NAME(Result) to = {out, N, slope, bias, NULL};
    NAME(products)(&to, a, b, scratch, M, N, K, K, 1, N, 1, GELU);
}

/* Compute out = (a b^T) * slope, and add its column sums to dbias; all matrices are C-contiguous, b is b[N,K]. */
void NAME(product_slope)(float *out, float *dbias, const float *a, const float *b, const float *slope, float *scratch,
                         long M, long N, long K) {
    const NAME(Result) to = {out, N, (float *)slope, NULL, dbias};
    NAME(products)(&to, a, b, scratch, M, N, K, K, 1, 1, K, SLOPE);
}

#undef PVECS
#undef PCOLS
#undef PACKED_STRIDE
#undef AHEAD
