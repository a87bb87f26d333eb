/* SSE2 on x86-64, NEON on aarch64: what every processor of the kind has. And the choice among all. */
#define KV_XXH3_TABLE kv_xxh3_baseline
#define KV_XXH3_NAME "baseline"
#include "xxh3_impl.h"

const kv_xxh3 *kv_xxh3_best(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) return &kv_xxh3_avx512;
    if (__builtin_cpu_supports("avx2")) return &kv_xxh3_avx2;
#endif
    return &kv_xxh3_baseline;
}
