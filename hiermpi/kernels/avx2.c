/* This level is AVX2 with fused multiply-adds, which x86 processors have had since about 2013. */

#if defined(__x86_64__)

#include "level.h"

#define LEVEL avx2
#define W 8
#define ROWS 4
#define VECS 2
#define PROWS 4
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#include "layers.h"
#include "products.h"
#pragma GCC pop_options

static int usable(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
REGISTER_LEVEL("avx2", 0, 10, usable)

#endif
