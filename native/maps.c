/* Page lists in a form that needs no Python while bytes move, and sets of received ranges. */
#include "engine.h"

#ifdef KV_ENGINE
#include <stdlib.h>
#include <string.h>

static kv_map *new_map(size_t count) {
    kv_map *map = malloc(sizeof *map + 2 * count * sizeof(size_t));
    if (!map) return (kv_map *)PyErr_NoMemory();
    memset(map, 0, sizeof *map);
    map->count = count;
    map->offsets = (size_t *)(map + 1);
    map->ends = map->offsets + count;
    return map;
}

/* Of the piece (offset, length): most lists have one, and an array for each costs more than all else that is done with it. */
static kv_map *one_piece(PyObject *base, PyObject *piece, bool writable) {
    Py_ssize_t offset, length;
    if (!PyArg_ParseTuple(piece, "nn", &offset, &length)) return NULL;
    kv_map *map = new_map(length ? 1 : 0);
    if (!map) return NULL;
    if (PyObject_GetBuffer(base, &map->base, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) < 0) {
        kv_map_free(map);
        return NULL;
    }
    if (offset < 0 || length < 0 || offset > map->base.len || length > map->base.len - offset) {
        PyErr_Format(PyExc_ValueError, "offset %zd, length %zd does not fit a base of %zd bytes", offset, length, map->base.len);
        kv_map_free(map);
        return NULL;
    }
    map->nbytes = (size_t)length;
    if (length) map->offsets[0] = (size_t)offset, map->ends[0] = map->nbytes;
    return map;
}

kv_map *kv_map_get(PyObject *base, PyObject *pieces, bool writable) {
    if (PyTuple_Check(pieces)) return one_piece(base, pieces, writable);
    kv_pages pages;
    if (kv_pages_get(&pages, base, pieces, writable) < 0) return NULL;
    kv_iovs iovs; /* joins neighbours */
    kv_iovs_init(&iovs);
    kv_map *map = NULL;
    if (kv_iovs_add_pages(&iovs, &pages, 0, SIZE_MAX) == 0) map = new_map(iovs.count);
    if (map) {
        for (size_t i = 0; i < iovs.count; i++) {
            map->offsets[i] = (size_t)((unsigned char *)iovs.items[i].iov_base - (unsigned char *)pages.base.buf);
            map->nbytes += iovs.items[i].iov_len;
            map->ends[i] = map->nbytes;
        }
        map->base = pages.base; /* moves: released by kv_map_free */
        memset(&pages.base, 0, sizeof pages.base);
    }
    kv_iovs_free(&iovs);
    kv_pages_release(&pages);
    return map;
}

void kv_map_free(kv_map *map) {
    while (map) {
        kv_map *next = map->next;
        PyBuffer_Release(&map->base);
        free(map);
        map = next;
    }
}

size_t kv_map_iovs(const kv_map *map, size_t start, size_t stop, struct iovec *items, size_t room, size_t *nbytes) {
    size_t low = 0, high = map->count; /* the first piece that ends behind start */
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (map->ends[middle] > start) high = middle;
        else low = middle + 1;
    }
    size_t n = 0, moved = start;
    for (size_t i = low; i < map->count && n < room && moved < stop; i++) {
        size_t begin = i ? map->ends[i - 1] : 0, end = map->ends[i] < stop ? map->ends[i] : stop;
        items[n].iov_base = (unsigned char *)map->base.buf + map->offsets[i] + (moved - begin);
        items[n++].iov_len = end - moved;
        moved = end;
    }
    *nbytes = moved - start;
    return n;
}

/* ---- ranges ---- */

/* The first range whose stop is at least `at`. */
static size_t first_touching(const kv_ranges *set, uint64_t at) {
    size_t low = 0, high = set->count;
    if (high && set->items[high - 1][1] < at) return high; /* bytes mostly arrive in order */
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (set->items[middle][1] >= at) high = middle;
        else low = middle + 1;
    }
    return low;
}

uint64_t kv_ranges_covered(const kv_ranges *set, uint64_t start, uint64_t stop) {
    uint64_t covered = 0;
    for (size_t i = first_touching(set, start); i < set->count && set->items[i][0] < stop; i++) {
        uint64_t low = set->items[i][0] > start ? set->items[i][0] : start;
        uint64_t high = set->items[i][1] < stop ? set->items[i][1] : stop;
        if (high > low) covered += high - low;
    }
    return covered;
}

int kv_ranges_add(kv_ranges *set, uint64_t start, uint64_t stop) {
    size_t first = first_touching(set, start), last = first;
    while (last < set->count && set->items[last][0] <= stop) {
        if (set->items[last][0] < start) start = set->items[last][0];
        if (set->items[last][1] > stop) stop = set->items[last][1];
        last++;
    }
    if (first == last) {
        if (set->count == KV_MAX_RANGES) return -1;
        if (set->count == set->capacity) {
            size_t capacity = set->capacity ? set->capacity * 2 : 8;
            void *items = realloc(set->items, capacity * sizeof *set->items);
            if (!items) return -1;
            set->items = items;
            set->capacity = capacity;
        }
        memmove(set->items + first + 1, set->items + first, (set->count - first) * sizeof *set->items);
        set->count++;
    } else {
        memmove(set->items + first + 1, set->items + last, (set->count - last) * sizeof *set->items);
        set->count -= last - first - 1;
    }
    set->items[first][0] = start;
    set->items[first][1] = stop;
    return 0;
}

void kv_ranges_free(kv_ranges *set) {
    free(set->items);
    *set = (kv_ranges){0};
}
#else
typedef int kv_no_maps;
#endif
