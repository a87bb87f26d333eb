/* libFuzzer: page lists from a caller. Whatever the numbers are, every byte that is touched lies inside the base, and the
 * bytes are those that a plain loop over the list gives. Build and run: make fuzz. */
#include "../kvnative.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

PyMODINIT_FUNC PyInit__native(void);
static PyObject *module, *cast;

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    Py_Initialize();
    module = PyInit__native();
    cast = PyUnicode_FromString("cast");
    if (!module || !cast) abort();
    return 0;
}

static size_t take(const uint8_t **data, size_t *size, size_t width) {
    size_t value = 0;
    for (size_t i = 0; i < width && *size; i++, (*data)++, (*size)--) value = value << 8 | **data;
    return value;
}

/* Pairs as the fuzzer chose them: two bytes each, and now and then any 64 bits. */
static size_t make_pairs(int64_t *pairs, size_t most, const uint8_t **data, size_t *size) {
    size_t n = 0;
    while (n < most && *size > 2) {
        size_t wide = (**data & 15) == 15 ? 8 : 2;
        take(data, size, 1);
        pairs[2 * n] = (int64_t)take(data, size, wide);
        pairs[2 * n + 1] = (int64_t)take(data, size, wide == 8 ? 8 : 1);
        n++;
    }
    return n;
}

static PyObject *list_of(const int64_t *pairs, size_t n, bool flat) {
    PyObject *bytes = PyByteArray_FromStringAndSize((const char *)pairs, (Py_ssize_t)(16 * n));
    PyObject *view = bytes ? PyMemoryView_FromObject(bytes) : NULL, *shaped = NULL;
    if (view && (flat || n == 0)) shaped = PyObject_CallMethod(view, "cast", "s", "q");
    if (view && !flat && n) shaped = PyObject_CallMethod(view, "cast", "s(nn)", "q", (Py_ssize_t)n, (Py_ssize_t)2);
    Py_XDECREF(view);
    Py_XDECREF(bytes);
    return shaped;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    unsigned how = (unsigned)take(&data, &size, 1);
    size_t base_bytes = take(&data, &size, 2) % 5000, start = take(&data, &size, how & 1 ? 8 : 2);
    size_t stop = take(&data, &size, 2), budget = 1 + take(&data, &size, 2);
    int64_t pairs[2 * 64];
    size_t n = make_pairs(pairs, 64, &data, &size);
    PyObject *base = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)base_bytes);
    PyObject *pieces = list_of(pairs, n, how & 2);
    if (!base || !pieces) abort();
    unsigned char *memory = (unsigned char *)PyByteArray_AsString(base);
    for (size_t i = 0; i < base_bytes; i++) memory[i] = (unsigned char)(i * 131 + (i >> 8));

    kv_pages pages;
    if (kv_pages_get(&pages, base, pieces, how & 4) < 0) {
        if (!PyErr_Occurred()) abort();
        PyErr_Clear();
    } else {
        unsigned char head[64] = {7};
        Py_buffer other = {.buf = head, .len = (Py_ssize_t)(how & 63)};
        kv_iovs iovs;
        kv_iovs_init(&iovs);
        int rc = how & 8 ? kv_gather_message(&iovs, &other, &pages, start, budget)
               : how & 16 ? kv_gather_room(&iovs, &pages, start, &other, stop, budget)
               : start <= pages.nbytes && start <= stop ? kv_iovs_add_pages(&iovs, &pages, start, stop) : 0;
        if (rc < 0) {
            if (!PyErr_Occurred()) abort();
            PyErr_Clear();
        }
        size_t total = 0;
        volatile unsigned char sink = 0;
        for (size_t i = 0; i < iovs.count; i++) {
            const unsigned char *at = iovs.items[i].iov_base;
            for (size_t k = 0; k < iovs.items[i].iov_len; k++) sink ^= at[k]; /* AddressSanitizer looks */
            total += iovs.items[i].iov_len;
        }
        if (total != iovs.nbytes) abort();
        if (rc == 0 && !(how & 24)) { /* the plain loop */
            size_t seen = 0, place = 0, within = 0;
            for (size_t i = 0; i < pages.count; i++)
                for (int64_t k = 0; k < pairs[2 * i + 1]; k++, seen++) {
                    if (seen < start || seen >= stop || start > pages.nbytes || start > stop) continue;
                    while (place < iovs.count && within == iovs.items[place].iov_len) place++, within = 0;
                    if (place == iovs.count) abort();
                    if ((unsigned char *)iovs.items[place].iov_base + within != memory + pairs[2 * i] + k) abort();
                    within++, total--;
                }
            if (total) abort();
        }
        kv_iovs_free(&iovs);
        kv_pages_release(&pages);
        PyObject *args = Py_BuildValue("(OO)", base, pieces), *digest = args ? kv_hash_pages(module, args, NULL) : NULL;
        if (!digest) PyErr_Clear();
        Py_XDECREF(digest);
        Py_XDECREF(args);
        PyObject *copy = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)base_bytes);
        args = copy ? Py_BuildValue("(OOOO)", copy, pieces, base, pieces) : NULL;
        PyObject *done = args ? kv_copy_pages(module, args, NULL) : NULL;
        if (done)
            for (size_t i = 0; i < n; i++)
                if (memcmp(PyByteArray_AsString(copy) + pairs[2 * i], memory + pairs[2 * i], (size_t)pairs[2 * i + 1])) abort();
        if (!done) PyErr_Clear();
        Py_XDECREF(done);
        Py_XDECREF(args);
        Py_XDECREF(copy);
    }
    Py_DECREF(pieces);
    Py_DECREF(base);
    return 0;
}
