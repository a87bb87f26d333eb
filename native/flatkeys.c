/* Which of many flat keys a dict has, in one call. Its twin is kvpool/_pure_table.py. */
#define PY_SSIZE_T_CLEAN
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030b0000
#endif
#include <Python.h>

#include <string.h>

#include "flatkeys.h"

const char kv_which_doc[] =
    "which($module, entries, keys, lengths, most, /)\n--\n\n"
    "A bit for each of the keys that the dict `entries` has, the first in the lowest bit of the first byte.\n\n"
    "`keys` are the keys one after another, `lengths` the bytes of each, 1 to `most`, as little-endian u16.";

/* 0 or 1, or -1 with an error set. */
static int has(PyObject *entries, const char *data, size_t length) {
    PyObject *key = PyBytes_FromStringAndSize(data, (Py_ssize_t)length);
    if (!key) return -1;
    int there = PyDict_Contains(entries, key);
    Py_DECREF(key);
    return there;
}

static int fill(unsigned char *bits, PyObject *entries, const Py_buffer *keys, const Py_buffer *lengths, long most) {
    const unsigned char *sizes = lengths->buf;
    const char *data = keys->buf;
    size_t count = (size_t)lengths->len / 2, at = 0, total = (size_t)keys->len;
    for (size_t i = 0; i < count; i++) {
        size_t length = sizes[2 * i] | (size_t)sizes[2 * i + 1] << 8;
        if (length < 1 || length > (size_t)most || length > total - at) {
            PyErr_Format(PyExc_ValueError, "key %zu of %zu bytes at %zu: a key has 1 to %ld of the %zu bytes", i, length, at,
                         most, total);
            return -1;
        }
        int there = has(entries, data + at, length);
        if (there < 0) return -1;
        bits[i / 8] |= (unsigned char)(there << (i % 8));
        at += length;
    }
    if (at == total) return 0;
    PyErr_Format(PyExc_ValueError, "the lengths of %zu keys add up to %zu bytes, there are %zu", count, at, total);
    return -1;
}

PyObject *kv_which(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *entries, *result = NULL;
    Py_buffer keys, lengths;
    long most;
    if (!PyArg_ParseTuple(args, "Oy*y*l:which", &entries, &keys, &lengths, &most)) return NULL;
    if (!PyDict_Check(entries)) {
        PyErr_SetString(PyExc_TypeError, "entries are a dict");
    } else if (lengths.len % 2) {
        PyErr_Format(PyExc_ValueError, "lengths are 2 bytes each, got %zd bytes", lengths.len);
    } else if ((result = PyBytes_FromStringAndSize(NULL, (lengths.len / 2 + 7) / 8))) {
        unsigned char *bits = (unsigned char *)PyBytes_AsString(result);
        memset(bits, 0, (size_t)(lengths.len / 2 + 7) / 8);
        if (fill(bits, entries, &keys, &lengths, most) < 0) {
            Py_DECREF(result);
            result = NULL;
        }
    }
    PyBuffer_Release(&keys);
    PyBuffer_Release(&lengths);
    return result;
}
