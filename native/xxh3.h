/*
 * XXH3 in the widest vectors this processor has. xxhash.h chooses its vectors when it is compiled; a wheel must run on
 * every x86-64, so xxh3_impl.h is compiled once per instruction set and the choice is made when the module is loaded.
 */
#ifndef KV_XXH3_H
#define KV_XXH3_H

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

typedef struct {
    const char *name;
    void *(*create)(void); /* aligned as XXH3 needs it; NULL when there is no memory */
    void (*destroy)(void *state);
    void (*reset)(void *state, uint64_t seed);
    void (*update)(void *state, const void *data, size_t nbytes);
    /* All of them in turn; the next one is fetched meanwhile: memory that is scattered in pages stops the processor's own look ahead. */
    void (*update_each)(void *state, const struct iovec *items, size_t count);
    uint64_t (*digest)(const void *state);
    uint64_t (*one_shot)(const void *data, size_t nbytes, uint64_t seed);
} kv_xxh3;

extern const kv_xxh3 kv_xxh3_baseline;
#if defined(__x86_64__)
extern const kv_xxh3 kv_xxh3_avx2, kv_xxh3_avx512;
#endif

const kv_xxh3 *kv_xxh3_best(void);

#endif
