/* XXH3 with AVX512; called only where the processor has it. Empty on other architectures. */
#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f"))), apply_to = function)
#else
#pragma GCC target("avx512f")
#endif

#include <immintrin.h>

#define XXH_VECTOR 3 /* XXH_AVX512 */
#define KV_XXH3_TABLE kv_xxh3_avx512
#define KV_XXH3_NAME "avx512"
#include "xxh3_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else
typedef int kv_no_avx512; /* a translation unit must not be empty */
#endif
