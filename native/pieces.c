/* Page lists -> iovecs. Every bound is checked here, while the GIL is held, before a byte moves. */
#include "kvnative.h"

#include <stdint.h>
#include <string.h>

int kv_size_converter(PyObject *object, void *result) {
    Py_ssize_t value = PyNumber_AsSsize_t(object, PyExc_OverflowError);
    if (value == -1 && PyErr_Occurred()) return 0;
    if (value < 0) {
        PyErr_Format(PyExc_ValueError, "a size or position cannot be negative, got %zd", value);
        return 0;
    }
    *(size_t *)result = (size_t)value;
    return 1;
}

int kv_u64_converter(PyObject *object, void *result) {
    unsigned long long value = PyLong_AsUnsignedLongLong(object);
    if (value == (unsigned long long)-1 && PyErr_Occurred()) return 0;
    *(uint64_t *)result = value;
    return 1;
}

static void load_piece(const kv_pages *pages, size_t index, int64_t *offset, int64_t *length) {
    memcpy(offset, pages->pairs + 16 * index, 8);
    memcpy(length, pages->pairs + 16 * index + 8, 8);
}

static bool piece_fits(int64_t offset, int64_t length, Py_ssize_t base) {
    return offset >= 0 && length >= 0 && offset <= base && length <= base - offset;
}

static bool is_int64(const Py_buffer *buffer) {
    const char *format = buffer->format ? buffer->format : "B";
    if (*format == '@' || *format == '=' || *format == '<') format++;
    return buffer->itemsize == 8 && (*format == 'q' || *format == 'l' || *format == 'n') && format[1] == 0;
}

static int get_pieces(kv_pages *pages, PyObject *pieces) {
    if (PyObject_GetBuffer(pieces, &pages->pieces, PyBUF_ND | PyBUF_FORMAT) < 0) return -1;
    const Py_buffer *view = &pages->pieces;
    bool shape = view->ndim == 2 ? view->shape[1] == 2 : view->ndim == 1 && view->shape[0] % 2 == 0;
    if (!shape || !is_int64(view)) {
        PyErr_Format(PyExc_TypeError,
                     "pieces must be C-contiguous int64 pairs (offset, length) of shape (n, 2), got %d dimension(s) of "
                     "format \"%s\"",
                     view->ndim, view->format ? view->format : "B");
        return -1;
    }
    pages->pairs = view->buf;
    pages->count = (size_t)view->len / 16;
    Py_ssize_t base = pages->base.len;
    int64_t total = 0, offset, length;
    for (size_t i = 0; i < pages->count; i++) {
        load_piece(pages, i, &offset, &length);
        if (!piece_fits(offset, length, base)) {
            PyErr_Format(PyExc_ValueError, "piece %zu: offset %lld, length %lld does not fit a base of %zd bytes", i,
                         (long long)offset, (long long)length, base);
            return -1;
        }
        if (__builtin_add_overflow(total, length, &total)) {
            PyErr_Format(PyExc_ValueError, "piece %zu: the pieces add up to more than 2^63-1 bytes", i);
            return -1;
        }
    }
    pages->nbytes = (size_t)total;
    return 0;
}

int kv_pages_get(kv_pages *pages, PyObject *base, PyObject *pieces, bool writable) {
    memset(pages, 0, sizeof *pages);
    if (base == Py_None) {
        if (pieces == Py_None) return 0;
        PyErr_SetString(PyExc_TypeError, "pieces were given without a base");
        return -1;
    }
    if (PyObject_GetBuffer(base, &pages->base, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) < 0) return -1;
    if (pieces == Py_None) {
        pages->count = 1;
        pages->nbytes = (size_t)pages->base.len;
        return 0;
    }
    if (get_pieces(pages, pieces) == 0) return 0;
    kv_pages_release(pages);
    return -1;
}

void kv_pages_release(kv_pages *pages) {
    /* A Py_buffer of zeros is released without effect. */
    PyBuffer_Release(&pages->pieces);
    PyBuffer_Release(&pages->base);
}

void kv_iovs_init(kv_iovs *iovs) {
    iovs->items = iovs->inline_items;
    iovs->count = iovs->nbytes = 0;
    iovs->capacity = sizeof iovs->inline_items / sizeof *iovs->inline_items;
}

void kv_iovs_free(kv_iovs *iovs) {
    if (iovs->items != iovs->inline_items) PyMem_Free(iovs->items);
}

static int grow(kv_iovs *iovs) {
    size_t capacity = iovs->capacity * 4, bytes = capacity * sizeof *iovs->items;
    bool inlined = iovs->items == iovs->inline_items;
    struct iovec *items = PyMem_Realloc(inlined ? NULL : iovs->items, bytes);
    if (!items) {
        PyErr_NoMemory();
        return -1;
    }
    if (inlined) memcpy(items, iovs->inline_items, sizeof iovs->inline_items);
    iovs->items = items;
    iovs->capacity = capacity;
    return 0;
}

int kv_iovs_add(kv_iovs *iovs, void *data, size_t nbytes) {
    if (nbytes == 0) return 0;
    iovs->nbytes += nbytes;
    if (iovs->count) {
        struct iovec *last = &iovs->items[iovs->count - 1];
        if ((unsigned char *)last->iov_base + last->iov_len == (unsigned char *)data) {
            last->iov_len += nbytes;
            return 0;
        }
    }
    if (iovs->count == iovs->capacity && grow(iovs) < 0) return -1;
    iovs->items[iovs->count++] = (struct iovec){.iov_base = data, .iov_len = nbytes};
    return 0;
}

int kv_iovs_add_pages(kv_iovs *iovs, const kv_pages *pages, size_t start, size_t stop) {
    unsigned char *base = pages->base.buf;
    if (stop > pages->nbytes) stop = pages->nbytes;
    if (start >= stop) return 0;
    if (!pages->pairs) return kv_iovs_add(iovs, base + start, stop - start);
    size_t skip = start, left = stop - start;
    for (size_t i = 0; i < pages->count && left; i++) {
        int64_t offset, length;
        load_piece(pages, i, &offset, &length);
        /* Again: another thread that needs no GIL may have written to the array since the first check. */
        if (!piece_fits(offset, length, pages->base.len)) {
            PyErr_Format(PyExc_RuntimeError, "piece %zu changed during the call", i);
            return -1;
        }
        size_t here = (size_t)length;
        if (skip >= here) {
            skip -= here;
            continue;
        }
        size_t take = here - skip < left ? here - skip : left;
        if (kv_iovs_add(iovs, base + offset + skip, take) < 0) return -1;
        skip = 0;
        left -= take;
    }
    return 0;
}
