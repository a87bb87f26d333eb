/*
 * Keys of 1 to 64 bytes to small numbers and back: open addressing, linear probing, growing a few slots per insertion.
 * No Python here; see keytable_py.c. Not thread-safe.
 */
#ifndef KV_KEYTABLE_H
#define KV_KEYTABLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { KV_KEY_INLINE = 32, KV_KEY_MOST = 64, KV_KEY_ROWS = 4096, KV_KEY_BATCH = 32 };

typedef struct {
    const unsigned char *data;
    size_t length;
} kv_key;

/* A slot is 0 when empty, else the low half of the key's hash above its number + 1. */
typedef struct {
    uint64_t *items;
    size_t mask, used;
} kv_slots;

/* length 0: the row is free, its key holds the next free one. A longer key than fits is a pointer to a copy. */
typedef struct {
    unsigned char length[KV_KEY_ROWS];
    unsigned char key[KV_KEY_ROWS][KV_KEY_INLINE];
} kv_key_segment;

typedef struct {
    kv_slots now, old; /* old.items is NULL unless the table is growing */
    size_t cursor, left, moved; /* of old: the next slot to move, how many are left from there, and how many were before */
    kv_key_segment **segments;
    size_t segment_count, segment_room;
    uint32_t high;      /* numbers below this have been given out at least once */
    uint32_t free_row;  /* first free number below high, or KV_NO_ROW */
    size_t count, long_bytes;
    uint64_t seed;
} kv_keytable;

#define KV_NO_ROW UINT32_MAX

int kv_keytable_init(kv_keytable *table, uint64_t seed); /* -1: no memory */
void kv_keytable_free(kv_keytable *table);
/* Numbers of the leading keys that are known; returns how many. count <= KV_KEY_BATCH. */
size_t kv_keytable_find(const kv_keytable *table, const kv_key *keys, size_t count, int32_t *out);
/* 1: added, its number in *out; 0: it was known already; -1: no memory, nothing changed. */
int kv_keytable_add(kv_keytable *table, kv_key key, int32_t *out);
bool kv_keytable_live(const kv_keytable *table, int64_t number);
void kv_keytable_remove(kv_keytable *table, uint32_t number); /* a live number */
kv_key kv_keytable_key(const kv_keytable *table, uint32_t number); /* of a live number */
size_t kv_keytable_bytes(const kv_keytable *table);

#endif
