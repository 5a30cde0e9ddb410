/* This header has what every level (instruction set) needs. A level is one file that defines its sizes, includes
 * layers.h and products.h, and registers itself. levels.c keeps the list, from which Python takes the best level that
 * the processor has. */

#ifndef HIERMPI_LEVEL_H
#define HIERMPI_LEVEL_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(x) JOIN(x, LEVEL)
#define INLINE static inline __attribute__((always_inline))

/* These are the vectors of GCC and clang: 4, 8 and 16 floats, aligned and unaligned, and integers of the same width. */
#define VECTORS(w)                                                                    \
    typedef float vec##w __attribute__((vector_size(4 * w)));                         \
    typedef float vecu##w __attribute__((vector_size(4 * w), aligned(4), may_alias)); \
    typedef int32_t veci##w __attribute__((vector_size(4 * w)));                      \
    typedef uint32_t vecn##w __attribute__((vector_size(4 * w)));
VECTORS(4)
VECTORS(8)
VECTORS(16)
#define VEC JOIN_WIDTH(vec, W)
#define VECU JOIN_WIDTH(vecu, W)
#define VECI JOIN_WIDTH(veci, W)
#define VECN JOIN_WIDTH(vecn, W)
#define JOIN_WIDTH(a, w) JOIN_WIDTH_(a, w)
#define JOIN_WIDTH_(a, w) a##w

/* These constants say what is done with the tiles of a product, see products.h. */
enum { WRITE, ADD, GELU, SLOPE };

struct level {
    const char *name;
    long floats;        /* the number in a register */
    long own_products;  /* whether products.h is faster than a tuned BLAS, see hiermpi bench kernels */
    long preference;    /* Python takes the greatest of the levels that the processor has */
    int (*usable)(void);
    struct level *next;
};

void add_level(struct level *level);

/* This macro registers the level of a file when the library is loaded. */
#define REGISTER_LEVEL(name, own_products, preference, usable)                           \
    static struct level this_level = {name, W, own_products, preference, usable, NULL};  \
    __attribute__((constructor)) static void register_this_level(void) { add_level(&this_level); }

#endif
