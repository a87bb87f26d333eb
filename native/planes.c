/* 16-bit floats as two planes: what a codec can shrink, and what it cannot. */
#include "kvnative.h"

#include <string.h>


/*
 * bfloat16 is sign, 8 bits of exponent, 7 of mantissa. Turned left by one bit the exponent is the upper byte, and the
 * lower one holds what is as good as random.
 */
static void split_block(const unsigned char *in, unsigned char *exponents, unsigned char *rest, size_t count) {
    for (size_t i = 0; i < count; i++) {
        uint16_t x;
        memcpy(&x, in + 2 * i, 2);
        x = (uint16_t)(x << 1 | x >> 15);
        exponents[i] = (unsigned char)(x >> 8);
        rest[i] = (unsigned char)x;
    }
}

static void join_block(const unsigned char *exponents, const unsigned char *rest, unsigned char *out, size_t count) {
    for (size_t i = 0; i < count; i++) {
        uint16_t x = (uint16_t)(exponents[i] << 8 | rest[i]);
        x = (uint16_t)(x >> 1 | x << 15);
        memcpy(out + 2 * i, &x, 2);
    }
}

/* Moves through runs of any length, two bytes at a time: an element may lie across two of them. */
static void through(const kv_iovs *iovs, unsigned char *exponents, unsigned char *rest, bool split) {
    unsigned char block[2];
    size_t filled = 0, item = 0, at = 0;
    while (item < iovs->count) {
        /* whole elements of a run, without a copy of it */
        unsigned char *run = (unsigned char *)iovs->items[item].iov_base + at;
        size_t left = iovs->items[item].iov_len - at;
        if (filled == 0 && left >= 2) {
            size_t count = left / 2;
            if (split) split_block(run, exponents, rest, count);
            else join_block(exponents, rest, run, count);
            exponents += count, rest += count;
            at += 2 * count;
        } else if (left) { /* the first or the second byte of an element that lies across runs */
            if (!split && filled == 0) join_block(exponents, rest, block, 1);
            if (split) block[filled] = *run;
            else *run = block[filled];
            at++;
            if (++filled == 2) {
                if (split) split_block(block, exponents, rest, 1);
                exponents++, rest++;
                filled = 0;
            }
        }
        if (at == iovs->items[item].iov_len) item++, at = 0;
    }
}

static PyObject *planes(PyObject *args, PyObject *kwargs, bool split) {
    static char *names[] = {"base", "pieces", "exponents", "rest", NULL};
    PyObject *base, *pieces;
    Py_buffer exponents = {0}, rest = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, split ? "OOw*w*:split_planes" : "OOy*y*:join_planes", names, &base,
                                     &pieces, &exponents, &rest))
        return NULL;
    PyObject *result = NULL;
    kv_pages pages;
    if (kv_pages_get(&pages, base, pieces, !split) == 0) {
        kv_iovs iovs;
        kv_iovs_init(&iovs);
        if (pages.nbytes % 2 || (size_t)exponents.len != pages.nbytes / 2 || (size_t)rest.len != pages.nbytes / 2) {
            PyErr_Format(PyExc_ValueError, "%zu bytes of 16-bit elements have two planes of %zu bytes, got %zd and %zd",
                         pages.nbytes, pages.nbytes / 2, exponents.len, rest.len);
        } else if (kv_iovs_add_pages(&iovs, &pages, 0, SIZE_MAX) == 0) {
            if (iovs.nbytes == pages.nbytes) {
                Py_BEGIN_ALLOW_THREADS
                through(&iovs, exponents.buf, rest.buf, split);
                Py_END_ALLOW_THREADS
                result = PyLong_FromSize_t(pages.nbytes);
            } else {
                PyErr_SetString(PyExc_RuntimeError, "the pieces changed during the call");
            }
        }
        kv_iovs_free(&iovs);
        kv_pages_release(&pages);
    }
    PyBuffer_Release(&exponents);
    PyBuffer_Release(&rest);
    return result;
}

const char kv_split_planes_doc[] =
    "split_planes($module, /, base, pieces, exponents, rest)\n--\n\n"
    "Take the bfloat16 elements of a page list apart: exponents, and sign with mantissa. Returns the bytes read.";

PyObject *kv_split_planes(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    return planes(args, kwargs, true);
}

const char kv_join_planes_doc[] =
    "join_planes($module, /, base, pieces, exponents, rest)\n--\n\n"
    "Put them together again, into a page list. Returns the bytes written.";

PyObject *kv_join_planes(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    return planes(args, kwargs, false);
}
