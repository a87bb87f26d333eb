/* Checksums and copies of page lists. XXH3 is xxhash's (third_party/xxhash.h), compiled in. */
#include "kvnative.h"

#include <string.h>

#include "xxh3.h"

static const kv_xxh3 *xxh3;

/* ---- copy ---- */

const char kv_copy_pages_doc[] =
    "copy_pages($module, /, dst_base, dst_pieces, src_base, src_pieces)\n--\n\n"
    "Copy the bytes of one page list into another of the same length; returns the bytes copied.\n\n"
    "Where the two share memory at different positions, the bytes left there are unspecified.";

static void copy_iovs(const kv_iovs *to, const kv_iovs *from) {
    size_t t = 0, f = 0, t_at = 0, f_at = 0;
    while (t < to->count) { /* both hold equally many bytes */
        size_t t_left = to->items[t].iov_len - t_at, f_left = from->items[f].iov_len - f_at;
        size_t take = t_left < f_left ? t_left : f_left;
        memmove((unsigned char *)to->items[t].iov_base + t_at, (unsigned char *)from->items[f].iov_base + f_at, take);
        t_at += take, f_at += take;
        if (t_at == to->items[t].iov_len) t++, t_at = 0;
        if (f_at == from->items[f].iov_len) f++, f_at = 0;
    }
}

static int copy(const kv_pages *to, const kv_pages *from) {
    if (to->nbytes != from->nbytes) {
        PyErr_Format(PyExc_ValueError, "cannot copy %zu bytes into pages of %zu bytes", from->nbytes, to->nbytes);
        return -1;
    }
    kv_iovs to_iovs, from_iovs;
    kv_iovs_init(&to_iovs);
    kv_iovs_init(&from_iovs);
    int result = kv_iovs_add_pages(&to_iovs, to, 0, SIZE_MAX);
    if (result == 0) result = kv_iovs_add_pages(&from_iovs, from, 0, SIZE_MAX);
    if (result == 0 && to_iovs.nbytes != from_iovs.nbytes) {
        PyErr_SetString(PyExc_RuntimeError, "the pieces changed during the call");
        result = -1;
    }
    if (result == 0) {
        PyThreadState *save = to->nbytes > KV_GIL_BYTES ? PyEval_SaveThread() : NULL;
        copy_iovs(&to_iovs, &from_iovs);
        if (save) PyEval_RestoreThread(save);
    }
    kv_iovs_free(&to_iovs);
    kv_iovs_free(&from_iovs);
    return result;
}

PyObject *kv_copy_pages(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"dst_base", "dst_pieces", "src_base", "src_pieces", NULL};
    PyObject *dst_base, *dst_pieces, *src_base, *src_pieces, *result = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO:copy_pages", names, &dst_base, &dst_pieces, &src_base,
                                     &src_pieces))
        return NULL;
    kv_pages to, from;
    if (kv_pages_get(&to, dst_base, dst_pieces, true) < 0) return NULL;
    if (kv_pages_get(&from, src_base, src_pieces, false) == 0) {
        if (copy(&to, &from) == 0) result = PyLong_FromSize_t(to.nbytes);
        kv_pages_release(&from);
    }
    kv_pages_release(&to);
    return result;
}

/* ---- hash ---- */

const char kv_hash_pages_doc[] =
    "hash_pages($module, /, base, pieces, seed=0)\n--\n\n"
    "xxh3_64 of the bytes of a page list.";

static void hash_iovs(void *state, const kv_iovs *iovs) {
    PyThreadState *save = iovs->nbytes > KV_GIL_BYTES ? PyEval_SaveThread() : NULL;
    xxh3->update_each(state, iovs->items, iovs->count);
    if (save) PyEval_RestoreThread(save);
}

static uint64_t hash_run(const struct iovec *run, uint64_t seed) {
    PyThreadState *save = run->iov_len > KV_GIL_BYTES ? PyEval_SaveThread() : NULL;
    uint64_t digest = xxh3->one_shot(run->iov_base, run->iov_len, seed);
    if (save) PyEval_RestoreThread(save);
    return digest;
}

PyObject *kv_hash_pages(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"base", "pieces", "seed", NULL};
    PyObject *base, *pieces, *result = NULL;
    uint64_t seed = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|O&:hash_pages", names, &base, &pieces, kv_u64_converter, &seed))
        return NULL;
    kv_pages pages;
    if (kv_pages_get(&pages, base, pieces, false) < 0) return NULL;
    kv_iovs iovs;
    kv_iovs_init(&iovs);
    if (kv_iovs_add_pages(&iovs, &pages, 0, SIZE_MAX) == 0) {
        void *state;
        if (iovs.count == 1) { /* one run of memory: the one-shot form is faster than the streaming one */
            result = PyLong_FromUnsignedLongLong(hash_run(iovs.items, seed));
        } else if ((state = xxh3->create())) {
            xxh3->reset(state, seed);
            hash_iovs(state, &iovs);
            result = PyLong_FromUnsignedLongLong(xxh3->digest(state));
            xxh3->destroy(state);
        } else {
            PyErr_NoMemory();
        }
    }
    kv_iovs_free(&iovs);
    kv_pages_release(&pages);
    return result;
}

const char kv_hash_each_doc[] =
    "hash_each($module, /, base, pieces, sizes, out, seed=0)\n--\n\n"
    "xxh3_64 of each of the parts of `sizes` bytes (int64) that a page list is cut into, into `out` (uint64).";

/* The parts lie one after another in the iovecs. */
static void hash_parts(void *state, const kv_iovs *iovs, const int64_t *sizes, size_t count, uint64_t *out,
                       uint64_t seed) {
    size_t at = 0, used = 0;
    for (size_t i = 0; i < count; i++) {
        size_t left = (size_t)sizes[i];
        while (at < iovs->count && used == iovs->items[at].iov_len) at++, used = 0;
        if (at == iovs->count || left <= iovs->items[at].iov_len - used) {
            const unsigned char *data = left ? (const unsigned char *)iovs->items[at].iov_base + used : (const void *)"";
            out[i] = xxh3->one_shot(data, left, seed);
            used += left;
            continue;
        }
        xxh3->reset(state, seed);
        while (left) {
            size_t take = iovs->items[at].iov_len - used;
            if (take > left) take = left;
            xxh3->update(state, (const unsigned char *)iovs->items[at].iov_base + used, take);
            left -= take, used += take;
            if (left) at++, used = 0; /* no iovec is empty */
        }
        out[i] = xxh3->digest(state);
    }
}

static int hash_each(const kv_pages *pages, const Py_buffer *sizes, const Py_buffer *out, uint64_t seed) {
    size_t count = (size_t)sizes->len / 8, total = 0;
    const int64_t *each = sizes->buf;
    for (size_t i = 0; i < count; i++) {
        if (each[i] < 0 || (size_t)each[i] > pages->nbytes - total) {
            PyErr_Format(PyExc_ValueError, "part %zu of %lld bytes is not in the page list", i, (long long)each[i]);
            return -1;
        }
        total += (size_t)each[i];
    }
    if (total != pages->nbytes || sizes->len % 8 || out->len != sizes->len) {
        PyErr_Format(PyExc_ValueError, "%zu parts of %zu bytes and %zd bytes for their sums do not go with a page list of %zu",
                     count, total, out->len, pages->nbytes);
        return -1;
    }
    kv_iovs iovs;
    kv_iovs_init(&iovs);
    void *state = NULL;
    int result = kv_iovs_add_pages(&iovs, pages, 0, SIZE_MAX);
    if (result == 0 && iovs.nbytes != total) {
        PyErr_SetString(PyExc_RuntimeError, "the pieces changed during the call");
        result = -1;
    } else if (result == 0 && !(state = xxh3->create())) {
        PyErr_NoMemory();
        result = -1;
    }
    if (result == 0) {
        PyThreadState *save = total > KV_GIL_BYTES ? PyEval_SaveThread() : NULL;
        hash_parts(state, &iovs, each, count, out->buf, seed);
        if (save) PyEval_RestoreThread(save);
    }
    if (state) xxh3->destroy(state);
    kv_iovs_free(&iovs);
    return result;
}

PyObject *kv_hash_each(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"base", "pieces", "sizes", "out", "seed", NULL};
    PyObject *base, *pieces;
    Py_buffer sizes, out;
    uint64_t seed = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOy*w*|O&:hash_each", names, &base, &pieces, &sizes, &out,
                                     kv_u64_converter, &seed))
        return NULL;
    kv_pages pages;
    int result = kv_pages_get(&pages, base, pieces, false);
    if (result == 0) {
        result = hash_each(&pages, &sizes, &out, seed);
        kv_pages_release(&pages);
    }
    PyBuffer_Release(&sizes);
    PyBuffer_Release(&out);
    if (result < 0) return NULL;
    Py_RETURN_NONE;
}

typedef struct {
    PyObject_HEAD
    void *state; /* on its own: it must be aligned to 64 bytes */
    bool busy;   /* an update is running without the GIL */
} Hasher;

static int hasher_enter(Hasher *self) {
    if (!self->busy) {
        self->busy = true;
        return 0;
    }
    PyErr_SetString(PyExc_RuntimeError, "this Hasher is in use by another thread: give each thread its own");
    return -1;
}

static PyObject *hasher_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"seed", NULL};
    uint64_t seed = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|O&:Hasher", names, kv_u64_converter, &seed)) return NULL;
    Hasher *self = (Hasher *)PyType_GenericAlloc(type, 0);
    if (!self) return NULL;
    self->state = xxh3->create();
    if (!self->state) {
        Py_DECREF((PyObject *)self);
        return PyErr_NoMemory();
    }
    xxh3->reset(self->state, seed);
    return (PyObject *)self;
}

static void hasher_dealloc(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    void *state = ((Hasher *)object)->state;
    if (state) xxh3->destroy(state);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF((PyObject *)type);
}

static PyObject *hasher_update_range(Hasher *self, PyObject *base, PyObject *pieces, size_t start, size_t stop) {
    kv_pages pages;
    if (kv_pages_get(&pages, base, pieces, false) < 0) return NULL;
    if (stop == SIZE_MAX) stop = pages.nbytes;
    int result = -1;
    kv_iovs iovs;
    kv_iovs_init(&iovs);
    if (start > stop || stop > pages.nbytes) {
        PyErr_Format(PyExc_ValueError, "bytes %zu to %zu of pages that hold %zu", start, stop, pages.nbytes);
    } else if (kv_iovs_add_pages(&iovs, &pages, start, stop) == 0 && hasher_enter(self) == 0) {
        hash_iovs(self->state, &iovs);
        self->busy = false;
        result = 0;
    }
    kv_iovs_free(&iovs);
    kv_pages_release(&pages);
    if (result < 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *hasher_update(PyObject *self, PyObject *buffer) {
    if (buffer == Py_None) return PyErr_Format(PyExc_TypeError, "a bytes-like object is required, not None");
    return hasher_update_range((Hasher *)self, buffer, Py_None, 0, SIZE_MAX);
}

static PyObject *hasher_update_pages(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"base", "pieces", "start", "stop", NULL};
    PyObject *base, *pieces;
    size_t start, stop;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO&O&:update_pages", names, &base, &pieces, kv_size_converter,
                                     &start, kv_size_converter, &stop))
        return NULL;
    return hasher_update_range((Hasher *)self, base, pieces, start, stop);
}

static PyObject *hasher_intdigest(PyObject *object, PyObject *unused) {
    (void)unused;
    Hasher *self = (Hasher *)object;
    if (hasher_enter(self) < 0) return NULL;
    uint64_t digest = xxh3->digest(self->state);
    self->busy = false;
    return PyLong_FromUnsignedLongLong(digest);
}

static PyObject *hasher_reset(PyObject *object, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"seed", NULL};
    Hasher *self = (Hasher *)object;
    uint64_t seed = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|O&:reset", names, kv_u64_converter, &seed)) return NULL;
    if (hasher_enter(self) < 0) return NULL;
    xxh3->reset(self->state, seed);
    self->busy = false;
    Py_RETURN_NONE;
}

static PyMethodDef hasher_methods[] = {
    {"update", hasher_update, METH_O, "update($self, buffer, /)\n--\n\nAdd the bytes of a C-contiguous buffer."},
    {"update_pages", KV_METHOD(hasher_update_pages), METH_VARARGS | METH_KEYWORDS,
     "update_pages($self, /, base, pieces, start, stop)\n--\n\nAdd bytes [start, stop) of a page list."},
    {"intdigest", hasher_intdigest, METH_NOARGS, "intdigest($self, /)\n--\n\nxxh3_64 of what was added so far."},
    {"reset", KV_METHOD(hasher_reset), METH_VARARGS | METH_KEYWORDS,
     "reset($self, /, seed=0)\n--\n\nStart again, with this seed."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot hasher_slots[] = {
    {Py_tp_doc, "Hasher(seed=0)\n--\n\nStreaming xxh3_64."},
    {Py_tp_new, hasher_new},
    {Py_tp_dealloc, hasher_dealloc},
    {Py_tp_methods, hasher_methods},
    {0, NULL},
};

static PyType_Spec hasher_spec = {
    .name = "kvtransport._native.Hasher",
    .basicsize = sizeof(Hasher),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = hasher_slots,
};

int kv_add_hasher_type(PyObject *module) {
    xxh3 = kv_xxh3_best();
    PyObject *type = PyType_FromSpec(&hasher_spec);
    if (!type) return -1;
    int result = PyModule_AddObjectRef(module, "Hasher", type);
    Py_DECREF(type);
    return result < 0 ? result : PyModule_AddStringConstant(module, "hash_vectors", xxh3->name);
}
