/* libFuzzer: planes of 16-bit elements out of page lists and into them. Whatever the list, what is read and written lies inside it,
 * and the planes are those that a plain loop makes. Build and run: make fuzz. */
#include "../kvnative.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

PyMODINIT_FUNC PyInit__native(void);
static PyObject *module;

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    Py_Initialize();
    module = PyInit__native();
    if (!module) abort();
    return 0;
}

static size_t take(const uint8_t **data, size_t *size) {
    if (!*size) return 0;
    (*size)--;
    return *(*data)++;
}

static PyObject *list_of(const int64_t *pairs, size_t n) {
    PyObject *bytes = PyByteArray_FromStringAndSize((const char *)pairs, (Py_ssize_t)(16 * n));
    PyObject *view = bytes ? PyMemoryView_FromObject(bytes) : NULL;
    PyObject *flat = view ? PyObject_CallMethod(view, "cast", "s", "q") : NULL;
    Py_XDECREF(view);
    Py_XDECREF(bytes);
    if (!flat) abort();
    return flat;
}

static PyObject *call(PyObject *(*f)(PyObject *, PyObject *, PyObject *), PyObject *base, PyObject *pieces, PyObject *a,
                      PyObject *b) {
    PyObject *args = Py_BuildValue("(OOOO)", base, pieces, a, b);
    if (!args) abort();
    PyObject *done = f(module, args, NULL);
    Py_DECREF(args);
    return done;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    /* The pieces follow each other with gaps, as pages that nobody else has do; now and then the list is nonsense. */
    size_t how = take(&data, &size), odd = take(&data, &size) % 3, n = 1 + take(&data, &size) % 40, at = 0, nbytes = 0;
    int64_t pairs[2 * 40];
    for (size_t i = 0; i < n; i++) {
        size_t gap = take(&data, &size) % 7, length = take(&data, &size) % (how & 1 ? 5 : 100);
        pairs[2 * i] = (int64_t)(at += gap);
        pairs[2 * i + 1] = (int64_t)length;
        at += length, nbytes += length;
    }
    size_t after = how & 2 ? 0 : 9, base_bytes = at + after;
    if (how & 4 && n > 1) { /* out of order */
        int64_t first[2] = {pairs[0], pairs[1]};
        memcpy(pairs, pairs + 2 * (n - 1), sizeof first);
        memcpy(pairs + 2 * (n - 1), first, sizeof first);
    }
    if ((how & 0xf8) == 0xf8) pairs[2 * (n / 2)] += (int64_t)base_bytes; /* outside */
    size_t half = nbytes / 2 + (odd == 1) - (odd == 2 && nbytes > 1);

    PyObject *base = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)base_bytes);
    PyObject *into = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)base_bytes);
    PyObject *upper = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)half), *lower = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)half);
    PyObject *pieces = list_of(pairs, n);
    if (!base || !into || !upper || !lower) abort();
    unsigned char *memory = (unsigned char *)PyByteArray_AsString(base), *copy = (unsigned char *)PyByteArray_AsString(into);
    for (size_t i = 0; i < base_bytes; i++) memory[i] = size ? data[i % size] : (unsigned char)i, copy[i] = 0xA5;

    PyObject *done = call(kv_split_planes, base, pieces, upper, lower);
    if (!done) {
        if (!PyErr_ExceptionMatches(PyExc_ValueError)) abort();
        PyErr_Clear();
    } else {
        if (PyLong_AsSize_t(done) != nbytes || nbytes % 2 || half != nbytes / 2) abort();
        Py_DECREF(done);
        unsigned char *raw = malloc(nbytes + 1), *e = (unsigned char *)PyByteArray_AsString(upper), *r = (unsigned char *)PyByteArray_AsString(lower);
        if (!raw) abort();
        size_t seen = 0;
        for (size_t i = 0; i < n; i++)
            for (int64_t k = 0; k < pairs[2 * i + 1]; k++) raw[seen++] = memory[pairs[2 * i] + k];
        for (size_t i = 0; i < half; i++) {
            if (e[i] != (unsigned char)(raw[2 * i + 1] << 1 | raw[2 * i] >> 7)) abort();
            if (r[i] != (unsigned char)(raw[2 * i] << 1 | raw[2 * i + 1] >> 7)) abort();
        }
        free(raw);
        done = call(kv_join_planes, into, pieces, upper, lower);
        if (!done) abort();
        Py_DECREF(done);
        for (size_t i = 0; i < n; i++) /* what the list names is back, and is taken away again: the rest must be untouched */
            for (int64_t k = pairs[2 * i]; k < pairs[2 * i] + pairs[2 * i + 1]; k++) {
                if (copy[k] != memory[k]) abort();
                copy[k] = 0xA5;
            }
        for (size_t i = 0; i < base_bytes; i++)
            if (copy[i] != 0xA5) abort();
    }
    Py_DECREF(pieces);
    Py_DECREF(lower);
    Py_DECREF(upper);
    Py_DECREF(into);
    Py_DECREF(base);
    return 0;
}
