/* Outgoing: a transfer on its way out, as Python has it. */
#include "engine_types.h"

#ifdef KV_ENGINE
#include <stdlib.h>
#include <string.h>

static int compare_out(const void *a, const void *b) {
    const kv_out_slot *x = a, *y = b;
    int left = x->layer << 16 | x->tensor, right = y->layer << 16 | y->tensor;
    return left < right ? -1 : left > right;
}

PyObject *kv_group_outgoing(PyObject *self, PyObject *args) {
    const char *transfer;
    Py_ssize_t transfer_bytes;
    PyObject *slots;
    long long tag;
    int priority, checksum;
    if (!PyArg_ParseTuple(args, "y#O!Lip:outgoing", &transfer, &transfer_bytes, &PyList_Type, &slots, &tag, &priority,
                          &checksum) ||
        check_transfer(transfer_bytes) < 0)
        return NULL;
    Outgoing *object = (Outgoing *)new_object(kv_outgoing_type);
    if (!object) return NULL;
    Py_INCREF(self);
    object->owner = (Group *)self;
    kv_group *group = object->owner->group;
    size_t count = (size_t)PyList_Size(slots);
    kv_outgoing *out = object->out = calloc(1, sizeof *out);
    if (out) out->slots = calloc(count ? count : 1, sizeof *out->slots);
    if (!out || !out->slots) {
        if (out) out->closed = true; /* it is in no list */
        Py_DECREF((PyObject *)object);
        return PyErr_NoMemory();
    }
    out->group = group;
    out->closed = true;
    out->tag = tag;
    out->priority = priority;
    out->checksum = checksum;
    out->chunk_bytes = 1;
    out->allowed = UINT64_MAX;
    memcpy(out->transfer, transfer, 16);
    for (size_t i = 0; i < count; i++) {
        unsigned short layer, tensor;
        PyObject *slot = PyList_GetItem(slots, (Py_ssize_t)i);
        if (!PyTuple_Check(slot) || !PyArg_ParseTuple(slot, "HH", &layer, &tensor)) {
            if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "slots are tuples (layer, tensor)");
            Py_DECREF((PyObject *)object);
            return NULL;
        }
        out->slots[i].layer = layer;
        out->slots[i].tensor = tensor;
    }
    out->slot_count = count;
    qsort(out->slots, count, sizeof *out->slots, compare_out);
    kv_lock(group->engine);
    if (kv_outgoing_find(group, out->transfer)) {
        kv_unlock(group->engine);
        PyErr_SetString(PyExc_ValueError, "this transfer goes out over this link already");
        Py_DECREF((PyObject *)object);
        return NULL;
    }
    out->closed = false;
    out->next = group->outgoing[kv_bucket(out->transfer)];
    group->outgoing[kv_bucket(out->transfer)] = out;
    kv_unlock(group->engine);
    return (PyObject *)object;
}

static kv_map *take_garbage(kv_outgoing *out) {
    kv_map *garbage = out->garbage;
    out->garbage = NULL;
    return garbage;
}

static void close_outgoing(kv_outgoing *out) {
    kv_map *garbage;
    Py_BEGIN_ALLOW_THREADS
    kv_lock(out->group->engine);
    kv_outgoing_close(out);
    garbage = take_garbage(out);
    kv_unlock(out->group->engine);
    Py_END_ALLOW_THREADS
    kv_map_free(garbage);
}

static void outgoing_dealloc(PyObject *object) {
    Outgoing *self = (Outgoing *)object;
    kv_outgoing *out = self->out;
    if (out && !(out->group && forked(out->group))) {
        if (!out->closed) close_outgoing(out);
        for (size_t i = 0; i < out->slot_count; i++) free(out->slots[i].spans);
        kv_map_free(out->garbage);
        free(out->slots);
        free(out->retries);
        free(out->done);
        free(out);
    }
    Py_XDECREF((PyObject *)self->owner);
    free_object(object);
}

static PyObject *outgoing_accept(PyObject *self, PyObject *args) {
    unsigned long long chunk_bytes, credit;
    if (!PyArg_ParseTuple(args, "KK:accept", &chunk_bytes, &credit)) return NULL;
    kv_outgoing *out = ((Outgoing *)self)->out;
    kv_lock(out->group->engine);
    if (!out->closed) {
        out->accepted = true;
        out->chunk_bytes = chunk_bytes ? chunk_bytes : 1;
        if (credit > out->credit) out->credit = credit;
        kv_update_turn(out);
        if (out->level) kv_kick_group(out->group, SIZE_MAX);
    }
    kv_unlock(out->group->engine);
    Py_RETURN_NONE;
}

static PyObject *outgoing_allow(PyObject *self, PyObject *limit) {
    unsigned long long allowed = PyLong_AsUnsignedLongLong(limit);
    if (allowed == (unsigned long long)-1 && PyErr_Occurred()) return NULL;
    kv_outgoing *out = ((Outgoing *)self)->out;
    kv_lock(out->group->engine);
    if (!out->closed) {
        out->allowed = allowed;
        kv_update_turn(out);
        if (out->level) kv_kick_group(out->group, SIZE_MAX);
    }
    kv_unlock(out->group->engine);
    Py_RETURN_NONE;
}

static kv_out_slot *slot_of(kv_outgoing *out, unsigned layer, unsigned tensor) {
    kv_out_slot *slot = kv_out_slot_find(out, layer, tensor);
    if (!slot) PyErr_Format(PyExc_KeyError, "layer %u tensor %u", layer, tensor);
    return slot;
}

static PyObject *add_span(kv_outgoing *out, unsigned layer, unsigned tensor, uint64_t start, uint64_t nbytes, PyObject *base,
                          PyObject *pieces) {
    kv_out_slot *slot = slot_of(out, layer, tensor);
    if (!slot) return NULL;
    kv_map *map = kv_map_get(base, pieces, false);
    if (!map) return NULL;
    bool coded = nbytes > 0, fits = !coded || (out->checksum && nbytes <= out->chunk_bytes && map->nbytes <= KV_MAX_CODED);
    if (!map->nbytes || !fits || out->closed) {
        kv_map_free(map);
        PyErr_SetString(PyExc_ValueError, "nothing to add, more than a chunk, or the transfer is closed");
        return NULL;
    }
    kv_lock(out->group->engine);
    kv_span *span = kv_outgoing_add(out, slot, start, start + (coded ? nbytes : map->nbytes), map, coded);
    uint64_t key = span ? span->key : 0;
    kv_unlock(out->group->engine);
    if (span) return PyLong_FromUnsignedLongLong(key);
    kv_map_free(map);
    return PyErr_NoMemory();
}

static PyObject *outgoing_add(PyObject *self, PyObject *args) {
    unsigned short layer, tensor;
    unsigned long long start;
    PyObject *base, *pieces;
    if (!PyArg_ParseTuple(args, "HHKOO:add", &layer, &tensor, &start, &base, &pieces)) return NULL;
    return add_span(((Outgoing *)self)->out, layer, tensor, start, 0, base, pieces);
}

static PyObject *outgoing_add_coded(PyObject *self, PyObject *args) {
    unsigned short layer, tensor;
    unsigned long long start, nbytes;
    PyObject *payload;
    if (!PyArg_ParseTuple(args, "HHKKO:add_coded", &layer, &tensor, &start, &nbytes, &payload)) return NULL;
    return add_span(((Outgoing *)self)->out, layer, tensor, start, nbytes ? nbytes : UINT64_MAX, payload, Py_None);
}

static int range_arguments(PyObject *self, PyObject *args, kv_out_slot **slot, uint64_t *start, uint64_t *stop) {
    unsigned short layer, tensor;
    unsigned long long from, to;
    if (!PyArg_ParseTuple(args, "HHKK", &layer, &tensor, &from, &to)) return -1;
    *start = from;
    *stop = to;
    *slot = slot_of(((Outgoing *)self)->out, layer, tensor);
    return *slot ? 0 : -1;
}

static PyObject *outgoing_ack(PyObject *self, PyObject *args) {
    kv_out_slot *slot;
    uint64_t start, stop;
    if (range_arguments(self, args, &slot, &start, &stop) < 0) return NULL;
    kv_outgoing *out = ((Outgoing *)self)->out;
    int result;
    Py_BEGIN_ALLOW_THREADS
    kv_lock(out->group->engine);
    result = out->closed ? 0 : kv_outgoing_ack(out, slot, start, stop);
    if (out->ready) kv_signal(out->group->engine);
    kv_unlock(out->group->engine);
    Py_END_ALLOW_THREADS
    if (result < 0) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *outgoing_resend(PyObject *self, PyObject *args) {
    kv_out_slot *slot;
    uint64_t start, stop, bytes;
    if (range_arguments(self, args, &slot, &start, &stop) < 0) return NULL;
    kv_outgoing *out = ((Outgoing *)self)->out;
    kv_lock(out->group->engine);
    bytes = out->closed ? 0 : kv_outgoing_resend(out, slot, start, stop);
    kv_unlock(out->group->engine);
    return PyLong_FromUnsignedLongLong(bytes);
}

static PyObject *outgoing_requeue(PyObject *self, PyObject *serial_object) {
    uint64_t serial;
    if (!kv_u64_converter(serial_object, &serial) || PyErr_Occurred()) return NULL;
    kv_outgoing *out = ((Outgoing *)self)->out;
    kv_lock(out->group->engine);
    uint64_t bytes = out->closed ? 0 : kv_outgoing_requeue(out, serial);
    kv_unlock(out->group->engine);
    return PyLong_FromUnsignedLongLong(bytes);
}

static PyObject *outgoing_swap(PyObject *self, PyObject *args) {
    unsigned short layer, tensor;
    unsigned long long start;
    PyObject *base, *pieces;
    if (!PyArg_ParseTuple(args, "HHKOO:swap", &layer, &tensor, &start, &base, &pieces)) return NULL;
    kv_outgoing *out = ((Outgoing *)self)->out;
    kv_out_slot *slot = slot_of(out, layer, tensor);
    if (!slot) return NULL;
    kv_map *map = kv_map_get(base, pieces, false), *garbage;
    if (!map) return NULL;
    bool there, fits = true;
    Py_BEGIN_ALLOW_THREADS
    kv_lock(out->group->engine);
    kv_span *span = out->closed ? NULL : kv_span_find(slot, start);
    there = span != NULL;
    if (span) {
        fits = map->nbytes == span->stop - span->start;
        if (fits) kv_span_swap(span, map);
    }
    garbage = take_garbage(out);
    kv_unlock(out->group->engine);
    Py_END_ALLOW_THREADS
    if (!there || !fits) kv_map_free(map);
    kv_map_free(garbage);
    if (!fits) return PyErr_Format(PyExc_ValueError, "the pages must hold as many bytes as before");
    return PyBool_FromLong(there);
}

static PyObject *outgoing_uncut(PyObject *self, PyObject *args) {
    unsigned short layer, tensor;
    unsigned long long start;
    if (!PyArg_ParseTuple(args, "HHK:uncut", &layer, &tensor, &start)) return NULL;
    kv_outgoing *out = ((Outgoing *)self)->out;
    kv_out_slot *slot = slot_of(out, layer, tensor);
    if (!slot) return NULL;
    kv_lock(out->group->engine);
    const kv_span *span = out->closed ? NULL : kv_span_find(slot, start);
    uint64_t left = span ? span->stop - span->cut : 0;
    kv_unlock(out->group->engine);
    return PyLong_FromUnsignedLongLong(left);
}

static PyObject *outgoing_hold(PyObject *self, PyObject *unused) {
    (void)unused;
    kv_outgoing *out = ((Outgoing *)self)->out;
    kv_lock(out->group->engine);
    out->accepted = false;
    if (!out->closed) kv_update_turn(out);
    kv_unlock(out->group->engine);
    Py_RETURN_NONE;
}

static PyObject *outgoing_stats(PyObject *self, PyObject *unused) {
    (void)unused;
    kv_outgoing *out = ((Outgoing *)self)->out;
    kv_lock(out->group->engine);
    unsigned long long chunks = out->chunks, cut = out->cut_bytes, resent = out->resent_bytes, inflight = out->inflight;
    unsigned long long left = out->credit > out->used ? out->credit - out->used : 0;
    uint64_t since = out->stalled_since, stalled = out->stalled_ns;
    kv_unlock(out->group->engine);
    double now_stalled = since ? (double)(kv_now_ns() - since) / 1e9 : 0.0;
    return Py_BuildValue("(KKKKKdd)", chunks, cut, resent, inflight, left, now_stalled, (double)stalled / 1e9);
}

static PyObject *outgoing_stalled(PyObject *self, PyObject *unused) {
    (void)unused;
    kv_outgoing *out = ((Outgoing *)self)->out;
    kv_lock(out->group->engine);
    uint64_t since = out->stalled_since;
    kv_unlock(out->group->engine);
    return PyFloat_FromDouble(since ? (double)(kv_now_ns() - since) / 1e9 : 0.0);
}

static PyObject *outgoing_close(PyObject *self, PyObject *unused) {
    (void)unused;
    close_outgoing(((Outgoing *)self)->out);
    Py_RETURN_NONE;
}

static PyMethodDef outgoing_methods[] = {
    {"accept", outgoing_accept, METH_VARARGS,
     "accept($self, chunk_bytes, credit, /)\n--\n\nChunks may be cut from now on; credit is absolute."},
    {"allow", outgoing_allow, METH_O,
     "allow($self, limit, /)\n--\n\nThis side's own limit of bytes sent since the start, beside credit; none at first."},
    {"add", outgoing_add, METH_VARARGS,
     "add($self, layer, tensor, start, base, pieces, /)\n--\n\nBytes that are ready; returns the key of the span."},
    {"add_coded", outgoing_add_coded, METH_VARARGS,
     "add_coded($self, layer, tensor, start, nbytes, payload, /)\n--\n\nAs add, of bytes that became `payload`: one chunk."},
    {"ack", outgoing_ack, METH_VARARGS, "ack($self, layer, tensor, start, stop, /)\n--\n\nThese bytes were acknowledged."},
    {"resend", outgoing_resend, METH_VARARGS,
     "resend($self, layer, tensor, start, stop, /)\n--\n\nSend chunks in this range again; returns their bytes."},
    {"requeue", outgoing_requeue, METH_O,
     "requeue($self, serial, /)\n--\n\nSend again what this connection had; returns the bytes."},
    {"swap", outgoing_swap, METH_VARARGS,
     "swap($self, layer, tensor, start, base, pieces, /)\n--\n\nThe bytes of the span that starts there lie here now; "
     "when this returns the old place is not read any more. False: there is no such span."},
    {"uncut", outgoing_uncut, METH_VARARGS,
     "uncut($self, layer, tensor, start, /)\n--\n\nBytes that were never sent of the span that starts there."},
    {"hold", outgoing_hold, METH_NOARGS, "hold($self)\n--\n\nSend nothing until accept() is called again."},
    {"stalled", outgoing_stalled, METH_NOARGS,
     "stalled($self)\n--\n\nSeconds for which there has been work and no credit."},
    {"stats", outgoing_stats, METH_NOARGS,
     "stats($self)\n--\n\n(chunks, bytes, resent bytes, bytes on their way, credit left, seconds without credit now, "
     "seconds without credit before)"},
    {"close", outgoing_close, METH_NOARGS,
     "close($self)\n--\n\nEnd; when this returns no source is read any more. Idempotent."},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot outgoing_slots[] = {{Py_tp_doc, "A transfer on its way out."}, {Py_tp_dealloc, outgoing_dealloc},
                                       {Py_tp_methods, outgoing_methods}, {0, NULL}};
PyType_Spec kv_outgoing_spec = {.name = "kvtransport._native.Outgoing", .basicsize = sizeof(Outgoing),
                                    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                                    .slots = outgoing_slots};
#else
typedef int kv_no_outgoing_type;
#endif
