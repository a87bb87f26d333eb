/* Many flat keys in one call: packed, cut again, looked up in a dict, and the answer. The twin is kvpool/_pure_table.py. */
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

const char kv_pack_keys_doc[] =
    "pack_keys($module, keys, most, /)\n--\n\n"
    "A list of byte strings one after another, and the bytes of each, 1 to `most`, as little-endian u16: what which() takes.";

static int pack(PyObject *keys, Py_ssize_t count, long most, unsigned char *sizes, char *data, size_t *total) {
    size_t at = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *key = PyList_GetItem(keys, i); /* borrowed */
        if (!key) return -1;
        if (!PyBytes_CheckExact(key)) {
            PyErr_Format(PyExc_ValueError, "key %zd is not bytes", i);
            return -1;
        }
        Py_ssize_t length = PyBytes_Size(key);
        if (length < 1 || length > most) {
            PyErr_Format(PyExc_ValueError, "key %zd of %zd bytes: a key has 1 to %ld", i, length, most);
            return -1;
        }
        if (data) memcpy(data + at, PyBytes_AsString(key), (size_t)length);
        sizes[2 * i] = (unsigned char)(length & 0xff);
        sizes[2 * i + 1] = (unsigned char)(length >> 8);
        at += (size_t)length;
    }
    *total = at;
    return 0;
}

PyObject *kv_pack_keys(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *keys, *data = NULL, *lengths = NULL, *result = NULL;
    long most;
    size_t total;
    if (!PyArg_ParseTuple(args, "O!l:pack_keys", &PyList_Type, &keys, &most)) return NULL;
    if (most < 1 || most > 0xffff) {
        PyErr_Format(PyExc_ValueError, "a key of %ld bytes has no length of 2 bytes", most);
        return NULL;
    }
    /* Nothing below runs Python code, so the list stays as it is. */
    Py_ssize_t count = PyList_Size(keys);
    lengths = PyBytes_FromStringAndSize(NULL, 2 * count);
    if (!lengths || pack(keys, count, most, (unsigned char *)PyBytes_AsString(lengths), NULL, &total) < 0) goto out;
    data = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)total);
    if (!data) goto out;
    if (pack(keys, count, most, (unsigned char *)PyBytes_AsString(lengths), PyBytes_AsString(data), &total) < 0) goto out;
    result = PyTuple_Pack(2, data, lengths);
out:
    Py_XDECREF(data);
    Py_XDECREF(lengths);
    return result;
}

const char kv_cut_keys_doc[] =
    "cut_keys($module, keys, lengths, /)\n--\n\n"
    "The keys that are one after another in `keys`, each of the bytes that `lengths` says, little-endian u16, as a list.";

PyObject *kv_cut_keys(PyObject *module, PyObject *args) {
    (void)module;
    Py_buffer keys, lengths;
    if (!PyArg_ParseTuple(args, "y*y*:cut_keys", &keys, &lengths)) return NULL;
    const unsigned char *sizes = lengths.buf;
    size_t count = (size_t)lengths.len / 2, at = 0, total = (size_t)keys.len;
    PyObject *result = NULL;
    for (size_t i = 0; i < count; i++) at += sizes[2 * i] | (size_t)sizes[2 * i + 1] << 8;
    if (lengths.len % 2 || at != total) {
        PyErr_Format(PyExc_ValueError, "the lengths of %zu keys add up to %zu bytes, there are %zu", count, at, total);
    } else if ((result = PyList_New((Py_ssize_t)count))) {
        at = 0;
        for (size_t i = 0; i < count; i++) {
            size_t length = sizes[2 * i] | (size_t)sizes[2 * i + 1] << 8;
            PyObject *key = PyBytes_FromStringAndSize((const char *)keys.buf + at, (Py_ssize_t)length);
            if (!key || PyList_SetItem(result, (Py_ssize_t)i, key) < 0) { /* takes the key, error or not */
                Py_DECREF(result);
                result = NULL;
                break;
            }
            at += length;
        }
    }
    PyBuffer_Release(&keys);
    PyBuffer_Release(&lengths);
    return result;
}

const char kv_flags_doc[] =
    "flags($module, bits, count, /)\n--\n\n"
    "The first `count` bits as a list of bools; the first is the lowest bit of the first byte.";

PyObject *kv_flags(PyObject *module, PyObject *args) {
    (void)module;
    Py_buffer bits;
    Py_ssize_t count;
    if (!PyArg_ParseTuple(args, "y*n:flags", &bits, &count)) return NULL;
    const unsigned char *data = bits.buf;
    PyObject *result = NULL;
    if (count < 0 || bits.len != count / 8 + (count % 8 != 0)) {
        PyErr_Format(PyExc_ValueError, "%zd bits are not %zd bytes", count, bits.len);
    } else if ((result = PyList_New(count))) {
        for (Py_ssize_t i = 0; i < count; i++) {
            PyObject *flag = data[i / 8] >> (i % 8) & 1 ? Py_True : Py_False;
            Py_INCREF(flag);
            if (PyList_SetItem(result, i, flag) < 0) {
                Py_DECREF(result);
                result = NULL;
                break;
            }
        }
    }
    PyBuffer_Release(&bits);
    return result;
}
