/* Shared by the files of kvtransport._native. Stable ABI of CPython 3.11: one wheel serves every later version. */
#ifndef KV_NATIVE_H
#define KV_NATIVE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#define PY_SSIZE_T_CLEAN
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030b0000
#endif
#include <Python.h>

#include <stdbool.h>
#include <sys/uio.h>

#include "mapping.h"

/* Below this, releasing the GIL costs more than it gives. */
#define KV_GIL_BYTES ((size_t)64 << 10)

/* METH_KEYWORDS functions have a third argument that PyCFunction does not name. */
#define KV_METHOD(function) ((PyCFunction)(void (*)(void))(function))

/* ---- pieces.c: page lists as iovecs ---- */

/* A page list as the caller gave it, held for the time of one call. */
typedef struct {
    Py_buffer base, pieces;
    const unsigned char *pairs; /* count pairs of int64 (offset, length), maybe unaligned; NULL: all of base */
    size_t count;
    size_t nbytes; /* sum of the lengths */
} kv_pages;

/* iovecs of some bytes of page lists, in order; neighbours in memory are joined. */
typedef struct {
    struct iovec *items;
    size_t count, capacity, nbytes;
    struct iovec inline_items[32];
} kv_iovs;

/*
 * Takes the buffers and checks every piece against the base: afterwards all of them may be touched. `base` None is
 * the empty list, `pieces` None all of base. Returns -1 with ValueError, TypeError or BufferError, holding nothing.
 */
int kv_pages_get(kv_pages *pages, PyObject *base, PyObject *pieces, bool writable);
void kv_pages_release(kv_pages *pages);

void kv_iovs_init(kv_iovs *iovs);
int kv_iovs_add(kv_iovs *iovs, void *data, size_t nbytes);
/* Appends bytes [start, stop) of the list, stop clipped to its end. -1 with MemoryError or RuntimeError. */
int kv_iovs_add_pages(kv_iovs *iovs, const kv_pages *pages, size_t start, size_t stop);
void kv_iovs_free(kv_iovs *iovs);

/* ---- sockets.c: what one call moves ---- */

#define KV_DEFAULT_BUDGET ((size_t)1 << 20)
int kv_take_budget(size_t budget); /* -1 with ValueError for 0 */
/* The iovecs of head ++ pages from `start`, at most `budget` bytes of them. -1 with an exception. */
int kv_gather_message(kv_iovs *iovs, const Py_buffer *head, const kv_pages *pages, size_t start, size_t budget);
/* The iovecs of pages from `start`, then of tail from `tail_start`, at most `budget` bytes of them. */
int kv_gather_room(kv_iovs *iovs, const kv_pages *pages, size_t start, const Py_buffer *tail, size_t tail_start,
                   size_t budget);

/* O& converters: an integer 0..2^63-1 into size_t, 0..2^64-1 into uint64_t. */
int kv_size_converter(PyObject *object, void *result);
int kv_u64_converter(PyObject *object, void *result);

/* ---- the functions and types of the module ---- */

PyObject *kv_send_pages(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *kv_recv_pages(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *kv_hash_pages(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *kv_hash_each(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *kv_copy_pages(PyObject *module, PyObject *args, PyObject *kwargs);

PyObject *kv_split_planes(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *kv_join_planes(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *kv_tls_version(PyObject *module, PyObject *unused);

extern const char kv_split_planes_doc[], kv_join_planes_doc[], kv_tls_version_doc[];
extern const char kv_send_pages_doc[], kv_recv_pages_doc[], kv_hash_pages_doc[], kv_hash_each_doc[], kv_copy_pages_doc[];

int kv_add_arena_types(PyObject *module);
int kv_add_hasher_type(PyObject *module);
int kv_add_tls_types(PyObject *module);
/* The records of a Tls object for the engine, which alone uses them from now on while the object lives. NULL with an
 * exception where it is none, has not shaken hands, is in use, or is on another descriptor. */
struct kv_tls_records *kv_tls_hand_over(PyObject *tls, int fd);

/* A DLPack capsule of uint8[nbytes] at `data`; becomes a user of the mapping. */
PyObject *kv_dlpack_capsule(kv_mapping *mapping, void *data, size_t nbytes, bool readonly, bool versioned);

#endif
