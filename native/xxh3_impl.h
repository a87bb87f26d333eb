/* The body of xxh3_*.c: define KV_XXH3_TABLE and KV_XXH3_NAME (and XXH_VECTOR) before including it. */
#define XXH_INLINE_ALL
#include "third_party/xxhash.h"

#include "xxh3.h"

static void *create(void) {
    XXH3_state_t *state = XXH3_createState();
    if (state) XXH3_64bits_reset(state);
    return state;
}
static void destroy(void *state) { XXH3_freeState(state); }
static void reset(void *state, uint64_t seed) { XXH3_64bits_reset_withSeed(state, seed); }
static void update(void *state, const void *data, size_t nbytes) { XXH3_64bits_update(state, data, nbytes); }
#define FETCH_STEP 1024 /* measured: 4096 fetches too late, a whole piece at once stalls */
static void update_each(void *state, const struct iovec *items, size_t count) {
    for (size_t i = 0; i < count; i++) {
        const char *data = items[i].iov_base, *next = i + 1 < count ? items[i + 1].iov_base : NULL;
        size_t nbytes = items[i].iov_len, ahead = next ? items[i + 1].iov_len : 0;
        if (!ahead) {
            XXH3_64bits_update(state, data, nbytes);
            continue;
        }
        for (size_t at = 0; at < nbytes; at += FETCH_STEP) {
            size_t take = nbytes - at < FETCH_STEP ? nbytes - at : FETCH_STEP;
            size_t stop = at + take < ahead ? at + take : ahead;
            for (size_t line = at; line < stop; line += 64) __builtin_prefetch(next + line, 0, 2);
            XXH3_64bits_update(state, data + at, take);
        }
    }
}
static uint64_t digest(const void *state) { return XXH3_64bits_digest(state); }
static uint64_t one_shot(const void *data, size_t nbytes, uint64_t seed) {
    return XXH3_64bits_withSeed(data, nbytes, seed);
}

const kv_xxh3 KV_XXH3_TABLE = {KV_XXH3_NAME, create, destroy, reset, update, update_each, digest, one_shot};
