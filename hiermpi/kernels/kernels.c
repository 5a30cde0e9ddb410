/* Compiles layers.h once per instruction set; Python picks the best that the processor has (see __init__.py). */

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(x) JOIN(x, LEVEL)

/* GCC and clang vectors of 4, 8 and 16 floats, aligned and not, and integers as wide. */
#define VECTORS(w)                                                                     \
    typedef float vec##w __attribute__((vector_size(4 * w)));                          \
    typedef float vecu##w __attribute__((vector_size(4 * w), aligned(4), may_alias)); \
    typedef int32_t veci##w __attribute__((vector_size(4 * w)));                       \
    typedef uint32_t vecn##w __attribute__((vector_size(4 * w)));
VECTORS(4)
VECTORS(8)
VECTORS(16)

/* What is done with the tiles of a product: see products.h. */
enum { WRITE, ADD, GELU, SLOPE };

/* Per level: W floats in a register, and ROWS x VECS registers that hold a tile of a product. ROWS divides 16. */
#define LEVEL plain
#define W 4
#define ROWS 4
#define VECS 2
#define PROWS 4
#define VEC vec4
#define VECU vecu4
#define VECI veci4
#define VECN vecn4
#include "layers.h"
#include "products.h"
#include "undefine.h"

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define LEVEL avx2
#define W 8
#define ROWS 4
#define VECS 2
#define PROWS 4
#define VEC vec8
#define VECU vecu8
#define VECI veci8
#define VECN vecn8
#include "layers.h"
#include "products.h"
#include "undefine.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define LEVEL avx512
#define W 16
#define ROWS 8
#define VECS 2
#define PROWS 8
#define VEC vec16
#define VECU vecu16
#define VECI veci16
#define VECN vecn16
#include "layers.h"
#include "products.h"
#include "undefine.h"
#pragma GCC pop_options

#endif

/* 2: AVX-512; 1: AVX2; 0: whatever the compiler's baseline is */
int supported_level(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}
