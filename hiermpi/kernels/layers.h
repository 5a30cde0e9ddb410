/* These are the kernels, compiled once per instruction set: plain.c, avx2.c and so on include this file, each with its
 * own sizes.
 *
 * All arithmetic on rows goes through vectors of W floats, the tail of a row included (padded with zeros in a
 * register), so the result of an element never depends on where in a row or slice it stands. The code is compiled
 * without -ffast-math, so that a NaN or an infinity in the input reaches the output.
 *
 * The shapes are B sequences of T tokens, N = B * T rows, C channels, H heads of size D = C / H, and V rows of the
 * token table. All arrays are C-contiguous. layers.py is the specification.
 */

INLINE VEC NAME(load)(const float *p) { return *(const VECU *)p; }
INLINE void NAME(store)(float *p, VEC x) { *(VECU *)p = x; }
/* Load or store the first n < W elements of a vector; elements beyond them are loaded as zero. */
#if W == 16
INLINE VEC NAME(load_part)(const float *p, long n) { return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
INLINE void NAME(store_part)(float *p, VEC x, long n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), x); }
#else
INLINE VEC NAME(load_part)(const float *p, long n) {
    VEC x = {0};
    memcpy(&x, p, 4 * (size_t)(n & (W - 1)));
    return x;
}
INLINE void NAME(store_part)(float *p, VEC x, long n) { memcpy(p, &x, 4 * (size_t)(n & (W - 1))); }
#endif
INLINE VEC NAME(splat)(float x) { return x - (VEC){0}; }
INLINE VEC NAME(choose)(VECI mask, VEC yes, VEC no) { return (VEC)((mask & (VECI)yes) | (~mask & (VECI)no)); }
INLINE VEC NAME(larger)(VEC a, VEC b) { return NAME(choose)(a > b, a, b); }
/* Return the sum of the elements: the halves are added, then their halves, and so on down to one element. */
INLINE float NAME(sum)(VEC x) {
#if W == 16
    vec8 low, high;
    memcpy(&low, &x, 32);
    memcpy(&high, (char *)&x + 32, 32);
    low += high;
#elif W == 8
    vec8 low = x;
#endif
#if W >= 8
    vec4 a, b;
    memcpy(&a, &low, 16);
    memcpy(&b, (char *)&low + 16, 16);
    a += b;
#else
    vec4 a = x;
#endif
    a += __builtin_shuffle(a, (veci4){2, 3, 0, 1});
    return a[0] + a[1];
}
INLINE vec4 NAME(larger4)(vec4 a, vec4 b) {
    const veci4 mask = a > b;
    return (vec4)((mask & (veci4)a) | (~mask & (veci4)b));
}
INLINE float NAME(largest)(VEC x) {
    vec4 a, b, c;
    memcpy(&a, &x, 16);
    for (int i = 4; i < W; i += 4) {
        memcpy(&b, (char *)&x + 4 * i, 16);
        a = NAME(larger4)(b, a);
    }
    c = __builtin_shuffle(a, (veci4){2, 3, 0, 1});
    a = NAME(larger4)(c, a);
    return a[1] > a[0] ? a[1] : a[0];
}

/* Return exp(x) with a relative error below 2e-7, by Cody-Waite reduction and a minimax polynomial. NaN gives NaN; the
 * argument is clamped to the range of normal numbers. */
INLINE VEC NAME(vexp)(VEC x) {
    const VEC low = NAME(splat)(-87.33654f), high = NAME(splat)(88.37626f);
#if W == 16
    x = _mm512_min_ps(high, _mm512_max_ps(low, x)); /* where an operand is NaN, these return the second */
    VEC n = _mm512_roundscale_ps(x * 1.44269504f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    x = NAME(choose)(x < low, low, x);
    x = NAME(choose)(x > high, high, x);
    const VEC magic = NAME(splat)(12582912.0f);
    VEC n = (x * 1.44269504f + magic) - magic;
#endif
    VEC r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    VEC p = NAME(splat)(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
#if W == 16
    return _mm512_scalef_ps(p, n);
#else
    VECI power = (__builtin_convertvector(n, VECI) + 127) << 23;
    return p * (VEC)power;
#endif
}

/* Return 1 / x for 1 <= x < 2^127 and NaN, within an ulp or two. */
INLINE VEC NAME(inverse)(VEC x) {
#if W == 16
    VEC y = _mm512_rcp14_ps(x);
    return y * (2.0f - x * y);
#else
    return 1.0f / x;
#endif
}

/* Return 32 well-mixed bits of each element (Wellons' lowbias32; layers.py is the specification). */
INLINE VECN NAME(mix)(VECN x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ (x >> 16);
}

/* Return, for each lane, 0 where element first + lane is dropped and `factor` where it is kept. */
INLINE VEC NAME(kept)(uint32_t first, uint64_t key, uint32_t threshold, float factor) {
    VECN i;
    for (int l = 0; l < W; l++) i[l] = l;
    i = NAME(mix)(NAME(mix)((i + first) ^ (uint32_t)key) ^ (uint32_t)(key >> 32));
    return NAME(choose)((VECI)(i >= threshold), NAME(splat)(factor), (VEC){0});
}

/* Drop elements of x[B,n] in place: element i of sequence b by the bits of i under keys[b]. */
void NAME(dropout)(float *x, const uint64_t *keys, long B, long n, uint32_t threshold, float factor) {
    const long full = n & ~(W - 1L), rest = n - full;
    for (long b = 0; b < B; b++) {
        float *row = x + b * n;
        for (long i = 0; i < full; i += W)
            NAME(store)(row + i, NAME(load)(row + i) * NAME(kept)((uint32_t)i, keys[b], threshold, factor));
        if (rest)
            NAME(store_part)(row + full, NAME(load_part)(row + full, rest) *
                                             NAME(kept)((uint32_t)full, keys[b], threshold, factor), rest);
    }
}

/* Compute x[n,:] = wte[inputs[n],:] + wpe[n % T,:]. */
void NAME(embed_forward)(float *x, const int32_t *inputs, const float *wte, const float *wpe, long N, long T, long C) {
    for (long n = 0; n < N; n++) {
        const float *a = wte + inputs[n] * C, *b = wpe + (n % T) * C;
        for (long c = 0; c < C; c++) x[n * C + c] = a[c] + b[c];
    }
}

/* Compute dwte[inputs[n],:] += dx[n,:] and dwpe[n % T,:] += dx[n,:] in the order of n. */
void NAME(embed_backward)(float *dwte, float *dwpe, const float *dx, const int32_t *inputs, long N, long T, long C) {
    for (long n = 0; n < N; n++) {
        float *a = dwte + inputs[n] * C, *b = dwpe + (n % T) * C;
        const float *d = dx + n * C;
        for (long c = 0; c < C; c++) {
            a[c] += d[c];
            b[c] += d[c];
        }
    }
}

INLINE void NAME(norm_row)(float *out, float *mean, float *rstd, const float *x, const float *weight,
                           const float *bias, long C) {
    const long full = C & ~(W - 1L), rest = C - full;
    VEC s = {0};
    for (long c = 0; c < full; c += W) s += NAME(load)(x + c);
    if (rest) s += NAME(load_part)(x + full, rest);
    const float m = NAME(sum)(s) / (float)C;
    VEC q = {0};
    for (long c = 0; c < full; c += W) {
        VEC d = NAME(load)(x + c) - m;
        q += d * d;
    }
    if (rest) {
        VEC d = NAME(load_part)(x + full, rest) - m;
        VEC padded = {0};
        memcpy(&padded, &d, 4 * (size_t)rest);
        q += padded * padded;
    }
    const float r = 1.0f / sqrtf(NAME(sum)(q) / (float)C + 1e-5f);
    for (long c = 0; c < full; c += W)
        NAME(store)(out + c, (NAME(load)(x + c) - m) * r * NAME(load)(weight + c) + NAME(load)(bias + c));
    if (rest)
        NAME(store_part)(out + full, (NAME(load_part)(x + full, rest) - m) * r * NAME(load_part)(weight + full, rest) +
                                         NAME(load_part)(bias + full, rest), rest);
    *mean = m;
    *rstd = r;
}

/* Compute out = layer norm of x, and keep mean[N] and rstd[N] for the backward pass. */
void NAME(norm_forward)(float *out, float *mean, float *rstd, const float *x, const float *weight, const float *bias,
                        long N, long C) {
    for (long n = 0; n < N; n++)
        NAME(norm_row)(out + n * C, mean + n, rstd + n, x + n * C, weight, bias, C);
}

/* Compute sum = residual + branch + branch_bias, and out = layer norm of sum. */
void NAME(residual_norm_forward)(float *sum, float *out, float *mean, float *rstd, const float *residual,
                                 const float *branch, const float *branch_bias, const float *weight, const float *bias,
                                 long N, long C) {
    for (long n = 0; n < N; n++) {
        float *s = sum + n * C;
        const float *a = residual + n * C, *b = branch + n * C;
        for (long c = 0; c < C; c++) s[c] = a[c] + (b[c] + branch_bias[c]);
        NAME(norm_row)(out + n * C, mean + n, rstd + n, s, weight, bias, C);
    }
}

/* Add the gradients of layer norm to dx, dweight and dbias; with `fresh`, dx is written instead. Unless dbranch is
 * NULL, the column sums of the new dx are added to it: the bias gradient of the branch whose output is added to x. */
void NAME(norm_backward)(float *dx, float *dweight, float *dbias, float *dbranch, const float *dout, const float *x,
                         const float *mean, const float *rstd, const float *weight, long N, long C, long fresh) {
    const long full = C & ~(W - 1L), rest = C - full;
    for (long n = 0; n < N; n++) {
        const float *d = dout + n * C, *row = x + n * C;
        float *o = dx + n * C;
        const float m = mean[n], r = rstd[n];
        VEC s1 = {0}, s2 = {0};
        for (long c = 0; c < full; c += W) {
            VEC g = NAME(load)(d + c), xhat = (NAME(load)(row + c) - m) * r, gw = g * NAME(load)(weight + c);
            s1 += gw;
            s2 += gw * xhat;
            NAME(store)(dweight + c, NAME(load)(dweight + c) + g * xhat);
            NAME(store)(dbias + c, NAME(load)(dbias + c) + g);
        }
        if (rest) {
            VEC g = NAME(load_part)(d + full, rest), xhat = (NAME(load_part)(row + full, rest) - m) * r;
            VEC gw = g * NAME(load_part)(weight + full, rest);
            s1 += gw;
            s2 += gw * xhat;
            NAME(store_part)(dweight + full, NAME(load_part)(dweight + full, rest) + g * xhat, rest);
            NAME(store_part)(dbias + full, NAME(load_part)(dbias + full, rest) + g, rest);
        }
        const float a = NAME(sum)(s1) / (float)C, b = NAME(sum)(s2) / (float)C;
        for (long c = 0; c < full; c += W) {
            VEC xhat = (NAME(load)(row + c) - m) * r, gw = NAME(load)(d + c) * NAME(load)(weight + c);
            VEC g = (gw - a - xhat * b) * r;
            if (!fresh) g += NAME(load)(o + c);
            NAME(store)(o + c, g);
            if (dbranch) NAME(store)(dbranch + c, NAME(load)(dbranch + c) + g);
        }
        if (rest) {
            VEC xhat = (NAME(load_part)(row + full, rest) - m) * r;
            VEC gw = NAME(load_part)(d + full, rest) * NAME(load_part)(weight + full, rest);
            VEC g = (gw - a - xhat * b) * r;
            if (!fresh) g += NAME(load_part)(o + full, rest);
            NAME(store_part)(o + full, g, rest);
            if (dbranch) NAME(store_part)(dbranch + full, NAME(load_part)(dbranch + full, rest) + g, rest);
        }
    }
}

/* Compute db[c] += sum over n of dy[n,c], in the order of n. */
void NAME(column_sums)(float *db, const float *dy, long N, long C) {
    for (long n = 0; n < N; n++)
        for (long c = 0; c < C; c++) db[c] += dy[n * C + c];
}

/* Return gelu(h) in the tanh form, which is h * sigmoid(2 u) with u = sqrt(2/pi) (h + 0.044715 h^3), and set *slope to
 * gelu'(h). */
INLINE VEC NAME(gelu)(VEC h, VEC *slope) {
    const VEC square = h * h;
    const VEC s = NAME(inverse)(1.0f + NAME(vexp)(h * (-1.5957691216f - 0.0713548163f * square)));
    const VEC active = h * s;
    *slope = s + active * (1.0f - s) * (1.5957691216f + 0.2140644489f * square);
    return active;
}

/* Compute out = gelu(h + bias); h becomes gelu'(h + bias). */
void NAME(gelu_forward)(float *out, float *h, const float *bias, long N, long C) {
    const long full = C & ~(W - 1L), rest = C - full;
    VEC slope;
    for (long n = 0; n < N; n++) {
        float *row = h + n * C, *o = out + n * C;
        for (long c = 0; c < full; c += W) {
            NAME(store)(o + c, NAME(gelu)(NAME(load)(row + c) + NAME(load)(bias + c), &slope));
            NAME(store)(row + c, slope);
        }
        if (rest) {
            const VEC x = NAME(load_part)(row + full, rest) + NAME(load_part)(bias + full, rest);
            NAME(store_part)(o + full, NAME(gelu)(x, &slope), rest);
            NAME(store_part)(row + full, slope, rest);
        }
    }
}

/* Compute dh *= slope, where dh is the gradient of the output before, and add the column sums of dh to dbias. */
void NAME(gelu_backward)(float *dh, float *dbias, const float *slope, long N, long C) {
    for (long n = 0; n < N; n++)
        for (long c = 0; c < C; c++) {
            const float g = dh[n * C + c] * slope[n * C + c];
            dh[n * C + c] = g;
            dbias[c] += g;
        }
}

/* Compute a tile of ROWS x (W * vecs) of c = sum over k0 <= k < k1 of a[r * ars + k * aks] * b[k * ldb + :]. Attention
 * spends most of its time here. */
INLINE void NAME(tile)(float *c, long ldc, const float *a, long ars, long aks, const float *b, long ldb, long k0,
                       long k1, const int vecs) {
    VEC acc[ROWS][VECS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < vecs; v++) acc[r][v] = (VEC){0};
    for (long k = k0; k < k1; k++) {
        VEC x[VECS];
        for (int v = 0; v < vecs; v++) x[v] = NAME(load)(b + k * ldb + W * v);
        for (int r = 0; r < ROWS; r++) {
            VEC y = NAME(splat)(a[r * ars + k * aks]);
            for (int v = 0; v < vecs; v++) acc[r][v] += y * x[v];
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < vecs; v++) NAME(store)(c + r * ldc + W * v, acc[r][v]);
}

/* Compute ROWS rows of c in `width` columns, a multiple of W, tile by tile. */
INLINE void NAME(stripe)(float *c, long ldc, const float *a, long ars, long aks, const float *b, long ldb, long k0,
                         long k1, long width) {
    long j = 0;
    for (; j + W * VECS <= width; j += W * VECS) NAME(tile)(c + j, ldc, a, ars, aks, b + j, ldb, k0, k1, VECS);
    for (; j < width; j += W) NAME(tile)(c + j, ldc, a, ars, aks, b + j, ldb, k0, k1, 1);
}

/* Copy D columns of T rows, with a bias added and multiplied by a factor, into Tp rows of stride Dp, with zeros beyond.
 * */
INLINE void NAME(pack)(float *out, const float *in, long stride, const float *bias, float factor, long T, long Tp,
                       long D, long Dp) {
    const long full = D & ~(W - 1L), rest = D - full;
    for (long t = 0; t < T; t++) {
        const float *from = in + t * stride;
        float *to = out + t * Dp;
        for (long d = 0; d < full; d += W) {
            VEC x = NAME(load)(from + d);
            NAME(store)(to + d, (bias ? x + NAME(load)(bias + d) : x) * factor);
        }
        if (rest) {
            VEC x = NAME(load_part)(from + full, rest);
            NAME(store)(to + full, (bias ? x + NAME(load_part)(bias + full, rest) : x) * factor);
        }
        for (long d = full + (rest ? W : 0); d < Dp; d += W) NAME(store)(to + d, (VEC){0});
    }
    memset(out + T * Dp, 0, 4 * (size_t)((Tp - T) * Dp));
}

/* Compute out[c * ldo + r] = in[r * ldi + c] for a matrix of `rows` x `cols`, in blocks of four by four. */
INLINE void NAME(transpose)(float *out, long ldo, const float *in, long ldi, long rows, long cols) {
    long r = 0;
    for (; r + 4 <= rows; r += 4) {
        const float *p = in + r * ldi;
        long c = 0;
        for (; c + 4 <= cols; c += 4) {
            vec4 x0 = *(const vecu4 *)(p + c), x1 = *(const vecu4 *)(p + ldi + c);
            vec4 x2 = *(const vecu4 *)(p + 2 * ldi + c), x3 = *(const vecu4 *)(p + 3 * ldi + c);
            vec4 y0 = __builtin_shuffle(x0, x1, (veci4){0, 4, 1, 5}), y1 = __builtin_shuffle(x2, x3, (veci4){0, 4, 1, 5});
            vec4 y2 = __builtin_shuffle(x0, x1, (veci4){2, 6, 3, 7}), y3 = __builtin_shuffle(x2, x3, (veci4){2, 6, 3, 7});
            float *to = out + c * ldo + r;
            *(vecu4 *)to = __builtin_shuffle(y0, y1, (veci4){0, 1, 4, 5});
            *(vecu4 *)(to + ldo) = __builtin_shuffle(y0, y1, (veci4){2, 3, 6, 7});
            *(vecu4 *)(to + 2 * ldo) = __builtin_shuffle(y2, y3, (veci4){0, 1, 4, 5});
            *(vecu4 *)(to + 3 * ldo) = __builtin_shuffle(y2, y3, (veci4){2, 3, 6, 7});
        }
        for (; c < cols; c++)
            for (long i = 0; i < 4; i++) out[c * ldo + r + i] = p[i * ldi + c];
    }
    for (; r < rows; r++)
        for (long c = 0; c < cols; c++) out[c * ldo + r] = in[r * ldi + c];
}

/* Compute the softmax of s[0..i] in place, with zeros behind it up to `end`. */
INLINE void NAME(softmax_row)(float *s, long i, long end) {
    const long last = i & ~(W - 1L);
    VECI lane;
    for (int l = 0; l < W; l++) lane[l] = l;
    const VECI inside = lane <= (int)(i - last);
    VEC m = NAME(splat)(s[0]);
    for (long j = 0; j < last; j += W) m = NAME(larger)(NAME(load)(s + j), m);
    m = NAME(larger)(NAME(choose)(inside, NAME(load)(s + last), m), m);
    const float top = NAME(largest)(m);
    VEC total = {0};
    for (long j = 0; j < last; j += W) {
        VEC e = NAME(vexp)(NAME(load)(s + j) - top);
        NAME(store)(s + j, e);
        total += e;
    }
    VEC e = NAME(choose)(inside, NAME(vexp)(NAME(load)(s + last) - top), (VEC){0});
    NAME(store)(s + last, e);
    total += e;
    const float inverse = 1.0f / NAME(sum)(total);
    for (long j = 0; j <= last; j += W) NAME(store)(s + j, NAME(load)(s + j) * inverse);
    for (long j = last + W; j < end; j += W) NAME(store)(s + j, (VEC){0});
}

/* Compute out = row r of the probabilities of head h with dropout, up to `end`. Column j is element (h * T + r) * T + j
 * of the sequence. */
INLINE void NAME(drop_row)(float *out, const float *in, long end, long T, long h, long r, uint64_t key,
                           uint32_t threshold, float factor) {
    const uint32_t first = (uint32_t)((h * T + r) * T);
    for (long j = 0; j < end; j += W)
        NAME(store)(out + j, NAME(load)(in + j) * NAME(kept)(first + (uint32_t)j, key, threshold, factor));
}

/* Prefetch rows t..t+ROWS of T, of n floats each, for reading, or for writing with `write`. */
INLINE void NAME(fetch_rows)(const float *in, long stride, long t, long T, long n, const int write) {
    for (long i = t; i < t + ROWS && i < T; i++)
        for (long j = 0; j < n; j += 16)
            if (write)
                __builtin_prefetch(in + i * stride + j, 1, 3);
            else
                __builtin_prefetch(in + i * stride + j, 0, 2);
}

/* Compute causal attention. qkv[N,3C] is the product without its bias; p[B,H,Tp,Tp] keeps the probabilities (before
 * dropout), Tp = T rounded up to 16; scratch holds 4 * Tp * Dp + Tp * Tp floats, Dp = D rounded up to 16. keys[B] and a
 * threshold above 0 drop probabilities. */
void NAME(attention_forward)(float *out, float *p, const float *qkv, const float *bias, float *scratch, long B, long T,
                             long H, long D, const uint64_t *keys, uint32_t threshold, float factor) {
    const long C = H * D, Tp = (T + 15) & ~15L, Dp = (D + 15) & ~15L;
    float *q = scratch, *k = q + Tp * Dp, *kt = k + Tp * Dp, *v = kt + Tp * Dp, *dropped = v + Tp * Dp;
    const float scale = 1.0f / sqrtf((float)D);
    for (long b = 0; b < B; b++)
        for (long h = 0; h < H; h++) {
            const float *base = qkv + b * T * 3 * C + h * D;
            float *s = p + (b * H + h) * Tp * Tp, *result = out + b * T * C + h * D;
            const long rows = b * H + h + 1 < B * H ? T : 0; /* rows of the next head, which are prefetched meanwhile */
            const float *next = h + 1 < H ? base + D : qkv + (b + 1) * T * 3 * C;
            NAME(pack)(q, base, 3 * C, bias + h * D, scale, T, Tp, D, Dp);
            NAME(pack)(k, base + C, 3 * C, bias + C + h * D, 1.0f, T, Tp, D, Dp);
            NAME(pack)(v, base + 2 * C, 3 * C, bias + 2 * C + h * D, 1.0f, T, Tp, D, Dp);
            NAME(transpose)(kt, Tp, k, Dp, Tp, Dp);
            float *o = k; /* k is not needed any more */
            for (long i = 0; i < Tp; i += ROWS) {
                const long end = (i + ROWS + 15) & ~15L;
                for (long part = 0; part < 3; part++) NAME(fetch_rows)(next + part * C, 3 * C, i, rows, D, 0);
                NAME(fetch_rows)(s + Tp * Tp, Tp, i, rows, end, 1);
                NAME(stripe)(s + i * Tp, Tp, q + i * Dp, Dp, 1, kt, Tp, 0, D, end);
                for (long r = i; r < i + ROWS; r++) NAME(softmax_row)(s + r * Tp, r, end);
                NAME(fetch_rows)(result, C, i, T, D, 1);
                const float *used = s + i * Tp;
                if (threshold) {
                    for (long r = i; r < i + ROWS; r++)
                        NAME(drop_row)(dropped + (r - i) * Tp, s + r * Tp, end, T, h, r, keys[b], threshold, factor);
                    used = dropped;
                }
                NAME(stripe)(o + i * Dp, Dp, used, Tp, 1, v, Dp, 0, i + ROWS, Dp);
            }
            for (long t = 0; t < T; t++) memcpy(result + t * C, o + t * Dp, 4 * (size_t)D);
        }
}

/* Compute dqkv[N,3C], and add to dbias, from dout[N,C] and what the forward pass kept. Nothing is added for the key
 * bias: a constant per row does not change the softmax. scratch holds 8 * Tp * Dp + 2 * Tp * Tp floats. */
void NAME(attention_backward)(float *dqkv, float *dbias, const float *dout, const float *p, const float *qkv,
                              const float *bias, float *scratch, long B, long T, long H, long D, const uint64_t *keys,
                              uint32_t threshold, float factor) {
    const long C = H * D, Tp = (T + 15) & ~15L, Dp = (D + 15) & ~15L, size = Tp * Dp;
    float *q = scratch, *k = q + size, *v = k + size, *vt = v + size, *g = vt + size;
    float *dq = g + size, *dk = dq + size, *dv = dk + size, *ds = dv + size;
    float *dropped = ds + Tp * Tp;
    const float scale = 1.0f / sqrtf((float)D);
    for (long b = 0; b < B; b++)
        for (long h = 0; h < H; h++) {
            const float *base = qkv + b * T * 3 * C + h * D;
            const float *s = p + (b * H + h) * Tp * Tp, *grown = dout + b * T * C + h * D;
            float *result = dqkv + b * T * 3 * C + h * D;
            const long rows = b * H + h + 1 < B * H ? T : 0;
            const float *next = h + 1 < H ? base + D : qkv + (b + 1) * T * 3 * C;
            const float *next_grown = h + 1 < H ? grown + D : dout + (b + 1) * T * C;
            NAME(pack)(q, base, 3 * C, bias + h * D, scale, T, Tp, D, Dp);
            NAME(pack)(k, base + C, 3 * C, bias + C + h * D, 1.0f, T, Tp, D, Dp);
            NAME(pack)(v, base + 2 * C, 3 * C, bias + 2 * C + h * D, 1.0f, T, Tp, D, Dp);
            NAME(pack)(g, grown, C, NULL, 1.0f, T, Tp, D, Dp);
            NAME(transpose)(vt, Tp, v, Dp, Tp, Dp);
            for (long i = 0; i < Tp; i += ROWS) {
                const long end = (i + ROWS + 15) & ~15L;
                for (long part = 0; part < 3; part++) NAME(fetch_rows)(next + part * C, 3 * C, i, rows, D, 0);
                NAME(fetch_rows)(next_grown, C, i, rows, D, 0);
                NAME(fetch_rows)(s + Tp * Tp, Tp, i, rows, end, 0);
                NAME(stripe)(ds + i * Tp, Tp, g + i * Dp, Dp, 1, vt, Tp, 0, D, end);
                for (long r = i; r < i + ROWS; r++) {
                    float *row = ds + r * Tp;
                    const float *prob = s + r * Tp;
                    VEC total = {0};
                    if (threshold) {
                        NAME(drop_row)(dropped + r * Tp, prob, end, T, h, r, keys[b], threshold, factor);
                        NAME(drop_row)(row, row, end, T, h, r, keys[b], threshold, factor);
                    }
                    for (long j = 0; j < end; j += W) total += NAME(load)(row + j) * NAME(load)(prob + j);
                    const float mean = NAME(sum)(total);
                    for (long j = 0; j < end; j += W)
                        NAME(store)(row + j, (NAME(load)(row + j) - mean) * NAME(load)(prob + j));
                }
                NAME(stripe)(dq + i * Dp, Dp, ds + i * Tp, Tp, 1, k, Dp, 0, i + ROWS, Dp);
            }
            for (long j = 0; j < Tp; j += ROWS) {
                for (long part = 0; part < 3; part++) NAME(fetch_rows)(result + part * C, 3 * C, j, T, D, 1);
                NAME(stripe)(dk + j * Dp, Dp, ds + j, 1, Tp, q, Dp, j, Tp, Dp);
                NAME(stripe)(dv + j * Dp, Dp, (threshold ? dropped : s) + j, 1, Tp, g, Dp, j, Tp, Dp);
            }
            for (long t = 0; t < T; t++) {
                float *row = result + t * 3 * C;
                for (long d = 0; d < D; d += W) {
                    const VEC x = NAME(load)(dq + t * Dp + d) * scale, y = NAME(load)(dv + t * Dp + d);
                    const VEC z = NAME(load)(dk + t * Dp + d);
                    float *to = row + d, *xs = dbias + h * D + d, *ys = xs + 2 * C;
                    if (d + W <= D) {
                        NAME(store)(to, x);
                        NAME(store)(to + C, z);
                        NAME(store)(to + 2 * C, y);
                        NAME(store)(xs, NAME(load)(xs) + x);
                        NAME(store)(ys, NAME(load)(ys) + y);
                    } else {
                        NAME(store_part)(to, x, D - d);
                        NAME(store_part)(to + C, z, D - d);
                        NAME(store_part)(to + 2 * C, y, D - d);
                        NAME(store_part)(xs, NAME(load_part)(xs, D - d) + x, D - d);
                        NAME(store_part)(ys, NAME(load_part)(ys, D - d) + y, D - d);
                    }
                }
            }
        }
}

/* Return the sum of the losses of N rows; rows with the target -1 are ignored. With `gradient`, logits become
 * softmax - onehot. */
double NAME(cross_entropy)(float *logits, const int32_t *targets, long N, long V, long gradient) {
    const long full = V & ~(W - 1L), rest = V - full;
    double loss = 0.0;
    for (long n = 0; n < N; n++) {
        float *row = logits + n * V;
        const int32_t target = targets[n];
        if (target < 0) {
            if (gradient) memset(row, 0, 4 * (size_t)V);
            continue;
        }
        VEC m = NAME(splat)(row[0]);
        for (long c = 0; c < full; c += W) m = NAME(larger)(NAME(load)(row + c), m);
        float top = NAME(largest)(m);
        for (long c = full; c < V; c++) top = row[c] > top ? row[c] : top;
        const float hit = row[target];
        VEC total = {0};
        for (long c = 0; c < full; c += W) {
            VEC e = NAME(vexp)(NAME(load)(row + c) - top);
            if (gradient) NAME(store)(row + c, e);
            total += e;
        }
        if (rest) {
            VEC e = NAME(vexp)(NAME(load_part)(row + full, rest) - top), padded = {0};
            memcpy(&padded, &e, 4 * (size_t)rest);
            if (gradient) NAME(store_part)(row + full, e, rest);
            total += padded;
        }
        const float s = NAME(sum)(total);
        loss += log((double)s) + (double)top - (double)hit;
        if (gradient) {
            const float inverse = 1.0f / s;
            for (long c = 0; c < V; c++) row[c] *= inverse;
            row[target] -= 1.0f;
        }
    }
    return loss;
}

/* Apply AdamW to n elements; `scale` multiplies the gradients, and `shrink` = 1 - learning rate * decay the parameters.
 * */
void NAME(adamw)(float *out, float *out_m, float *out_v, const float *p, const float *g, const float *m,
                 const float *v, long n, float scale, float beta1, float beta2, float step_size,
                 float root_correction, float eps, float shrink) {
    /* out may be p itself, but never overlaps it otherwise */
#pragma GCC ivdep
    for (long i = 0; i < n; i++) {
        const float x = g[i] * scale;
        const float m1 = beta1 * m[i] + (1.0f - beta1) * x;
        const float v1 = beta2 * v[i] + (1.0f - beta2) * (x * x);
        out_m[i] = m1;
        out_v[i] = v1;
        out[i] = p[i] * shrink - step_size * (m1 / (sqrtf(v1) * root_correction + eps));
    }
}

/* Compute sums[b] = sum of squares of x from bounds[b,0] to bounds[b,1], in double, in a fixed order. */
void NAME(block_sums)(double *sums, const float *x, const int64_t *bounds, long n) {
    for (long b = 0; b < n; b++) {
        double lane[8] = {0};
        const long start = bounds[2 * b], stop = bounds[2 * b + 1];
        long i = start;
        for (; i + 8 <= stop; i += 8)
            for (int l = 0; l < 8; l++) lane[l] += (double)x[i + l] * (double)x[i + l];
        for (int l = 0; i + l < stop; l++) lane[l] += (double)x[i + l] * (double)x[i + l];
        sums[b] = ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
    }
}

/* Compute out[i] = sum over b of buffers[b][i] for start <= i < stop, added in the order of b, in pieces that stay in
 * the cache. Buffer b begins at b * stride. */
#define SUM_OVER_BUFFERS(name, type)                                                                               \
    void NAME(name)(type *restrict out, const type *restrict buffers, long stride, long count, long start, long stop) { \
        const long piece = 16384 / sizeof(type);                                                                   \
        for (long first = start; first < stop; first += piece) {                                                   \
            const long last = first + piece < stop ? first + piece : stop;                                         \
            memcpy(out + first, buffers + first, sizeof(type) * (size_t)(last - first));                           \
            for (long b = 1; b < count; b++) {                                                                     \
                const type *x = buffers + b * stride;                                                              \
                for (long i = first; i < last; i++) out[i] += x[i];                                                \
            }                                                                                                      \
        }                                                                                                          \
    }
SUM_OVER_BUFFERS(sum_buffers, float)
SUM_OVER_BUFFERS(sum_integers, int64_t)
#undef SUM_OVER_BUFFERS

/* Add the integer nearest to x[i] * scale (ties to even) to sums[i], or write it there with `fresh`; `scale` is a power
 * of two. Return whether any |x[i]| is not below `limit` or is NaN, whose conversion would silently give a wrong
 * integer. */
long NAME(add_fixed)(int64_t *restrict sums, const float *restrict x, long n, float scale, float limit, long fresh) {
    int bad = 0;
    for (long i = 0; i < n; i++) {
        const float v = x[i] * scale, magic = copysignf(8388608.0f, v);
        const float near = (v + magic) - magic;
        const float whole = fabsf(v) < 8388608.0f ? near : v;
        bad |= !(fabsf(x[i]) < limit);
        sums[i] = (fresh ? 0 : sums[i]) + (int64_t)whole;
    }
    return bad;
}

/* Compute out[i] = sums[i] * unit. */
void NAME(from_fixed)(float *restrict out, const int64_t *restrict sums, long n, double unit) {
    for (long i = 0; i < n; i++) out[i] = (float)((double)sums[i] * unit);
}

/* Do `rounds` times 12 W multiply-adds on registers, as fast as the processor can. The result has no meaning. */
double NAME(multiply_adds)(long rounds) {
    volatile float half = 0.5f;
    const VEC x = NAME(splat)(half);
    VEC acc[12];
    for (int i = 0; i < 12; i++) acc[i] = NAME(splat)((float)i);
    for (long k = 0; k < rounds; k++)
        for (int i = 0; i < 12; i++) acc[i] = acc[i] * x + x;
    VEC total = {0};
    for (int i = 0; i < 12; i++) total += acc[i];
    return NAME(sum)(total);
}
