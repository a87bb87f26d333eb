/* XXH3 with AVX2; called only where the processor has it. Empty on other architectures. */
#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif

#include <immintrin.h>

#define XXH_VECTOR 2 /* XXH_AVX2 */
#define KV_XXH3_TABLE kv_xxh3_avx2
#define KV_XXH3_NAME "avx2"
#include "xxh3_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else
typedef int kv_no_avx2; /* a translation unit must not be empty */
#endif
