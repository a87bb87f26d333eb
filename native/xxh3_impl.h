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
static uint64_t digest(const void *state) { return XXH3_64bits_digest(state); }
static uint64_t one_shot(const void *data, size_t nbytes, uint64_t seed) {
    return XXH3_64bits_withSeed(data, nbytes, seed);
}

const kv_xxh3 KV_XXH3_TABLE = {KV_XXH3_NAME, create, destroy, reset, update, digest, one_shot};
