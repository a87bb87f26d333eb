/* The table itself. Growing: every insertion moves some slots of the old array to a larger one, and a key is in the one that its place is
 * in: so the larger one fills in order, page after page. New keys all over it would take a page fault each, thousands in one call. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "keytable.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define XXH_INLINE_ALL
#include "third_party/xxhash.h"

/* 8 moved: the old array, three quarters full, gets no fuller than seven eighths. */
enum { FIRST_SLOTS = 64, MOVED_PER_ADD = 8 };
/* Slots given back to the system at once behind the cursor: 1 MiB. */
static const size_t RELEASED = ((size_t)1 << 20) / sizeof(uint64_t);

static int slots_init(kv_slots *slots, size_t count) {
    slots->mask = count - 1;
    slots->used = 0;
    /* Zero pages of the kernel: nothing is touched before it is used. */
    void *items = mmap(NULL, count * sizeof(uint64_t), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    slots->items = items == MAP_FAILED ? NULL : items;
    return slots->items ? 0 : -1;
}

static void slots_free(kv_slots *slots) {
    if (slots->items) munmap(slots->items, (slots->mask + 1) * sizeof(uint64_t));
    slots->items = NULL;
}

static uint32_t tag_of(const kv_keytable *table, kv_key key) {
    return (uint32_t)XXH3_64bits_withSeed(key.data, key.length, table->seed);
}

static kv_key_segment *segment_of(const kv_keytable *table, uint32_t row) { return table->segments[row / KV_KEY_ROWS]; }

kv_key kv_keytable_key(const kv_keytable *table, uint32_t row) {
    const kv_key_segment *segment = segment_of(table, row);
    const unsigned char *inline_key = segment->key[row % KV_KEY_ROWS];
    kv_key key = {inline_key, segment->length[row % KV_KEY_ROWS]};
    if (key.length > KV_KEY_INLINE) memcpy(&key.data, inline_key, sizeof key.data);
    return key;
}

static bool same(const kv_keytable *table, uint32_t row, kv_key key) {
    kv_key other = kv_keytable_key(table, row);
    return other.length == key.length && memcmp(other.data, key.data, key.length) == 0;
}

/* The slot of `key`, or the mask + 1. */
static size_t slot_of_key(const kv_keytable *table, const kv_slots *slots, kv_key key, uint32_t tag) {
    for (size_t i = tag & slots->mask;; i = (i + 1) & slots->mask) {
        uint64_t item = slots->items[i];
        if (!item) return slots->mask + 1;
        if ((uint32_t)(item >> 32) == tag && same(table, (uint32_t)item - 1, key)) return i;
    }
}

/* How far `slot` of the old array is behind the next one to move; what is moved is `left` or more. */
static size_t ahead(const kv_keytable *table, size_t slot) { return (slot - table->cursor) & table->old.mask; }

/* The array that a key with this tag is in, if it is known, and the only one. */
static const kv_slots *slots_of(const kv_keytable *table, uint32_t tag) {
    return table->old.items && ahead(table, tag & table->old.mask) < table->left ? &table->old : &table->now;
}

static int64_t find_one(const kv_keytable *table, kv_key key, uint32_t tag) {
    const kv_slots *slots = slots_of(table, tag);
    size_t at = slot_of_key(table, slots, key, tag);
    return at <= slots->mask ? (int64_t)(uint32_t)slots->items[at] - 1 : -1;
}

/* Asks the processor for the row of the first slot with this tag. */
static void prefetch_row(const kv_keytable *table, const kv_slots *slots, uint32_t tag) {
    for (size_t i = tag & slots->mask; slots->items[i]; i = (i + 1) & slots->mask) {
        if ((uint32_t)(slots->items[i] >> 32) != tag) continue;
        uint32_t row = (uint32_t)slots->items[i] - 1;
        const kv_key_segment *segment = segment_of(table, row);
        __builtin_prefetch(&segment->length[row % KV_KEY_ROWS]);
        __builtin_prefetch(segment->key[row % KV_KEY_ROWS]);
        return;
    }
}

size_t kv_keytable_find(const kv_keytable *table, const kv_key *keys, size_t count, int32_t *out) {
    uint32_t tags[KV_KEY_BATCH];
    for (size_t i = 0; i < count; i++) {
        tags[i] = tag_of(table, keys[i]);
        const kv_slots *slots = slots_of(table, tags[i]);
        __builtin_prefetch(&slots->items[tags[i] & slots->mask]);
    }
    for (size_t i = 0; i < count; i++) prefetch_row(table, slots_of(table, tags[i]), tags[i]);
    for (size_t i = 0; i < count; i++) {
        int64_t row = find_one(table, keys[i], tags[i]);
        if (row < 0) return i;
        out[i] = (int32_t)row;
    }
    return count;
}

static void put_item(kv_slots *slots, uint64_t item) {
    size_t i = (item >> 32) & slots->mask;
    while (slots->items[i]) i = (i + 1) & slots->mask;
    slots->items[i] = item;
    slots->used++;
}

static void drop_slot(kv_slots *slots, size_t hole) {
    /* What follows without a gap moves up, unless it would stand before its own place: no tombstones. */
    for (size_t i = hole;;) {
        i = (i + 1) & slots->mask;
        uint64_t item = slots->items[i];
        if (!item) break;
        if (((i - (item >> 32)) & slots->mask) < ((i - hole) & slots->mask)) continue;
        slots->items[hole] = item;
        hole = i;
    }
    slots->items[hole] = 0;
    slots->used--;
}

/* Moves at least `count` slots, and stops at an empty one: no run of slots is ever split between the two arrays. */
static void move_slots(kv_keytable *table, size_t count) {
    kv_slots *old = &table->old;
    while (table->left) {
        uint64_t item = old->items[table->cursor];
        if (!item && !count) return;
        if (item) {
            old->items[table->cursor] = 0;
            put_item(&table->now, item);
        }
        __builtin_prefetch(&table->now.items[(old->items[(table->cursor + 8) & old->mask] >> 32) & table->now.mask]);
        table->cursor = (table->cursor + 1) & old->mask;
        table->left--;
        table->moved++;
        if (count) count--;
        if (table->cursor % RELEASED == 0 && table->moved >= RELEASED) {
            size_t start = (table->cursor + old->mask + 1 - RELEASED) & old->mask;
            madvise(old->items + start, RELEASED * sizeof(uint64_t), MADV_DONTNEED); /* all zero already */
        }
    }
    slots_free(old);
}

/* Moves the last run of slots of the old array: one more could not be put behind it. */
static void move_last(kv_keytable *table) {
    kv_slots *old = &table->old;
    while (table->left) {
        size_t last = (table->cursor + table->left - 1) & old->mask;
        uint64_t item = old->items[last];
        if (!item) return; /* the gap before the run: the end of what is left from now on */
        old->items[last] = 0;
        put_item(&table->now, item);
        table->left--;
    }
    slots_free(old);
}

static void put_new(kv_keytable *table, uint64_t item) {
    kv_slots *old = &table->old;
    if (slots_of(table, (uint32_t)(item >> 32)) == old) {
        size_t home = (item >> 32) & old->mask, at = home;
        while (old->items[at]) at = (at + 1) & old->mask;
        if (ahead(table, at) < table->left && ahead(table, at) >= ahead(table, home)) {
            old->items[at] = item;
            old->used++;
            return;
        }
        move_last(table);
    }
    put_item(&table->now, item);
}

static int make_room(kv_keytable *table) {
    if (table->old.items) move_slots(table, MOVED_PER_ADD);
    size_t room = table->now.mask + 1;
    if ((table->now.used + 1) * 4 <= room * 3) return 0;
    if (table->old.items) move_slots(table, table->left); /* cannot be: it was moved long before */
    kv_slots larger;
    if (slots_init(&larger, room * 2) < 0) return -1;
    table->old = table->now;
    table->now = larger;
    table->left = room;
    table->moved = 0;
    table->cursor = 0;
    while (table->old.items[table->cursor]) table->cursor++;
    return 0;
}

static int new_row(kv_keytable *table, uint32_t *row) {
    if (table->free_row != KV_NO_ROW) {
        *row = table->free_row;
        memcpy(&table->free_row, segment_of(table, *row)->key[*row % KV_KEY_ROWS], sizeof table->free_row);
        return 0;
    }
    if (table->high == INT32_MAX) return -1;
    if (table->high == table->segment_count * KV_KEY_ROWS) {
        if (table->segment_count == table->segment_room) {
            size_t room = table->segment_room ? table->segment_room * 2 : 16;
            kv_key_segment **segments = realloc(table->segments, room * sizeof *segments);
            if (!segments) return -1;
            table->segments = segments;
            table->segment_room = room;
        }
        kv_key_segment *segment = calloc(1, sizeof *segment);
        if (!segment) return -1;
        table->segments[table->segment_count++] = segment;
    }
    *row = table->high++;
    return 0;
}

static void free_row(kv_keytable *table, uint32_t row) {
    kv_key_segment *segment = segment_of(table, row);
    segment->length[row % KV_KEY_ROWS] = 0;
    memcpy(segment->key[row % KV_KEY_ROWS], &table->free_row, sizeof table->free_row);
    table->free_row = row;
}

int kv_keytable_add(kv_keytable *table, kv_key key, int32_t *out) {
    uint32_t tag = tag_of(table, key), row;
    if (find_one(table, key, tag) >= 0) return 0;
    unsigned char *copy = NULL;
    if (key.length > KV_KEY_INLINE && !(copy = malloc(key.length))) return -1;
    if (make_room(table) < 0 || new_row(table, &row) < 0) {
        free(copy);
        return -1;
    }
    kv_key_segment *segment = segment_of(table, row);
    segment->length[row % KV_KEY_ROWS] = (unsigned char)key.length;
    if (copy) {
        memcpy(copy, key.data, key.length);
        memcpy(segment->key[row % KV_KEY_ROWS], &copy, sizeof copy);
        table->long_bytes += key.length;
    } else {
        memcpy(segment->key[row % KV_KEY_ROWS], key.data, key.length);
    }
    put_new(table, (uint64_t)tag << 32 | (row + 1));
    table->count++;
    *out = (int32_t)row;
    return 1;
}

bool kv_keytable_live(const kv_keytable *table, int64_t number) {
    return number >= 0 && number < table->high &&
           segment_of(table, (uint32_t)number)->length[number % KV_KEY_ROWS] != 0;
}

void kv_keytable_remove(kv_keytable *table, uint32_t row) {
    kv_key key = kv_keytable_key(table, row);
    uint32_t tag = tag_of(table, key);
    kv_slots *slots = slots_of(table, tag) == &table->old ? &table->old : &table->now;
    drop_slot(slots, slot_of_key(table, slots, key, tag));
    if (key.length > KV_KEY_INLINE) {
        table->long_bytes -= key.length;
        free((void *)key.data);
    }
    free_row(table, row);
    table->count--;
}

size_t kv_keytable_bytes(const kv_keytable *table) {
    size_t slots = table->now.mask + 1 + (table->old.items ? table->left : 0);
    return slots * sizeof(uint64_t) + table->segment_count * sizeof(kv_key_segment) +
           table->segment_room * sizeof *table->segments + table->long_bytes + sizeof *table;
}

int kv_keytable_init(kv_keytable *table, uint64_t seed) {
    memset(table, 0, sizeof *table);
    table->free_row = KV_NO_ROW;
    table->seed = seed;
    return slots_init(&table->now, FIRST_SLOTS);
}

void kv_keytable_free(kv_keytable *table) {
    for (uint32_t row = 0; table->long_bytes && row < table->high; row++) {
        if (segment_of(table, row)->length[row % KV_KEY_ROWS] > KV_KEY_INLINE)
            free((void *)kv_keytable_key(table, row).data);
    }
    for (size_t i = 0; i < table->segment_count; i++) free(table->segments[i]);
    free(table->segments);
    slots_free(&table->now);
    slots_free(&table->old);
}
