/* This level is AVX-512 with the parts that Skylake servers brought (F, BW, DQ, VL). */

#if defined(__x86_64__)

#include "level.h"

#define LEVEL avx512
#define W 16
#define ROWS 8
#define VECS 2
#define PROWS 8
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#include "layers.h"
#include "products.h"
#pragma GCC pop_options

static int usable(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}
REGISTER_LEVEL("avx512", 1, 20, usable)

#endif
