/* Incoming: a transfer on its way in, as Python has it. */
#include "engine_types.h"

#ifdef KV_ENGINE
#include <stdlib.h>
#include <string.h>

static int compare_in(const void *a, const void *b) {
    const kv_in_slot *x = a, *y = b;
    int left = x->layer << 16 | x->tensor, right = y->layer << 16 | y->tensor;
    return left < right ? -1 : left > right;
}

static void free_incoming(kv_incoming *in) {
    for (size_t i = 0; i < in->slot_count; i++) {
        kv_map_free(in->slots[i].map);
        kv_ranges_free(&in->slots[i].applied);
    }
    free(in->slots);
    free(in->pending);
    free(in);
}

static int fill_in_slot(kv_in_slot *slot, PyObject *item) {
    unsigned short layer, tensor;
    unsigned long long nbytes;
    PyObject *base, *pieces;
    if (!PyTuple_Check(item) || !PyArg_ParseTuple(item, "HHKOO", &layer, &tensor, &nbytes, &base, &pieces)) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "slots are tuples (layer, tensor, nbytes, base, pieces)");
        return -1;
    }
    slot->layer = layer;
    slot->tensor = tensor;
    slot->nbytes = nbytes;
    slot->map = kv_map_get(base, pieces, true);
    if (!slot->map) return -1;
    if (slot->map->nbytes >= nbytes) return 0;
    PyErr_Format(PyExc_ValueError, "layer %d tensor %d has %llu bytes, its pages hold %zu", layer, tensor, nbytes,
                 slot->map->nbytes);
    return -1;
}

PyObject *kv_group_incoming(PyObject *self, PyObject *args) {
    const char *transfer;
    Py_ssize_t transfer_bytes;
    PyObject *slots;
    long long tag;
    unsigned long long total, window, granted;
    int unchecked, eager;
    if (!PyArg_ParseTuple(args, "y#O!LKKKpp:incoming", &transfer, &transfer_bytes, &PyList_Type, &slots, &tag, &total,
                          &window, &granted, &unchecked, &eager) ||
        check_transfer(transfer_bytes) < 0)
        return NULL;
    Incoming *object = (Incoming *)new_object(kv_incoming_type);
    if (!object) return NULL;
    Py_INCREF(self);
    object->owner = (Group *)self;
    kv_group *group = object->owner->group;
    size_t count = (size_t)PyList_Size(slots);
    kv_incoming *in = object->in = calloc(1, sizeof *in);
    if (in) in->slots = calloc(count ? count : 1, sizeof *in->slots);
    if (!in || !in->slots) {
        if (in) in->closed = true;
        Py_DECREF((PyObject *)object);
        return PyErr_NoMemory();
    }
    in->group = group;
    in->closed = true;
    in->tag = tag;
    in->total = total;
    in->window = window;
    in->granted = granted;
    in->allow_unchecked = unchecked;
    in->eager = eager;
    memcpy(in->transfer, transfer, 16);
    for (size_t i = 0; i < count; i++) {
        in->slot_count = i + 1;
        if (fill_in_slot(&in->slots[i], PyList_GetItem(slots, (Py_ssize_t)i)) < 0) {
            Py_DECREF((PyObject *)object);
            return NULL;
        }
    }
    qsort(in->slots, count, sizeof *in->slots, compare_in);
    kv_lock(group->engine);
    if (kv_incoming_find(group, in->transfer)) {
        kv_unlock(group->engine);
        PyErr_SetString(PyExc_ValueError, "this transfer comes in over this link already");
        Py_DECREF((PyObject *)object);
        return NULL;
    }
    in->closed = false;
    in->next = group->incoming[kv_bucket(in->transfer)];
    group->incoming[kv_bucket(in->transfer)] = in;
    kv_unlock(group->engine);
    return (PyObject *)object;
}

static void close_incoming(kv_incoming *in) {
    Py_BEGIN_ALLOW_THREADS
    kv_lock(in->group->engine);
    kv_incoming_close(in);
    kv_unlock(in->group->engine);
    Py_END_ALLOW_THREADS
}

static void incoming_dealloc(PyObject *object) {
    Incoming *self = (Incoming *)object;
    kv_incoming *in = self->in;
    if (in && !(in->group && forked(in->group))) {
        if (!in->closed) close_incoming(in);
        free_incoming(in);
    }
    Py_XDECREF((PyObject *)self->owner);
    free_object(object);
}

static PyObject *incoming_applied(PyObject *self, PyObject *unused) {
    (void)unused;
    kv_incoming *in = ((Incoming *)self)->in;
    PyObject *list = PyList_New(0);
    if (!list) return NULL;
    for (size_t i = 0; i < in->slot_count; i++) {
        kv_in_slot *slot = &in->slots[i];
        kv_lock(in->group->engine);
        size_t count = slot->applied.count;
        uint64_t(*items)[2] = malloc((count ? count : 1) * sizeof *items);
        if (items && count) memcpy(items, slot->applied.items, count * sizeof *items);
        kv_unlock(in->group->engine);
        bool bad = !items;
        if (bad) PyErr_NoMemory();
        for (size_t k = 0; !bad && k < count; k++)
            bad = append(list, Py_BuildValue("(iiKK)", (int)slot->layer, (int)slot->tensor,
                                             (unsigned long long)items[k][0], (unsigned long long)items[k][1])) < 0;
        free(items);
        if (bad) {
            Py_DECREF(list);
            return NULL;
        }
    }
    return list;
}

static PyObject *incoming_stats(PyObject *self, PyObject *unused) {
    (void)unused;
    kv_incoming *in = ((Incoming *)self)->in;
    kv_lock(in->group->engine);
    unsigned long long chunks = in->chunks, verified = in->verified, duplicates = in->duplicate_bytes;
    unsigned long long applied = in->applied_bytes, granted = in->granted;
    kv_unlock(in->group->engine);
    return Py_BuildValue("(KKKKK)", chunks, verified, duplicates, applied, granted);
}

static PyObject *incoming_place(PyObject *self, PyObject *args) {
    unsigned short layer, tensor;
    unsigned long long start, attempt;
    Py_buffer data;
    if (!PyArg_ParseTuple(args, "HHKy*K:place", &layer, &tensor, &start, &data, &attempt)) return NULL;
    kv_incoming *in = ((Incoming *)self)->in;
    kv_in_slot *slot = kv_in_slot_find(in, layer, tensor);
    uint64_t nbytes = (uint64_t)data.len, credit = 0;
    int code = KV_PLACE_ODD + KV_ODD_SLOT;
    if (slot && (start > slot->nbytes || nbytes > slot->nbytes - start)) code = KV_PLACE_ODD + KV_ODD_BOUNDS;
    else if (slot) { /* with the GIL: it is what keeps others from closing */
        kv_lock(in->group->engine);
        code = kv_incoming_place(in, slot, start, data.buf, (size_t)nbytes, attempt, &credit);
        kv_unlock(in->group->engine);
    }
    PyBuffer_Release(&data);
    return Py_BuildValue("(iK)", code, (unsigned long long)credit);
}

static PyObject *incoming_close(PyObject *self, PyObject *unused) {
    (void)unused;
    close_incoming(((Incoming *)self)->in);
    Py_RETURN_NONE;
}

static PyMethodDef incoming_methods[] = {
    {"applied", incoming_applied, METH_NOARGS,
     "applied($self)\n--\n\nRanges in place: [(layer, tensor, start, stop)]."},
    {"stats", incoming_stats, METH_NOARGS,
     "stats($self)\n--\n\n(chunks, chunks verified, duplicate bytes, bytes applied, bytes granted)"},
    {"place", incoming_place, METH_VARARGS,
     "place($self, layer, tensor, start, data, attempt, /)\n--\n\nDecoded, verified bytes to their place: (what became of it, "
     "credit to tell or 0)."},
    {"close", incoming_close, METH_NOARGS,
     "close($self)\n--\n\nEnd; when this returns nothing is written to the granted memory any more. Idempotent."},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot incoming_slots[] = {{Py_tp_doc, "A transfer on its way in."}, {Py_tp_dealloc, incoming_dealloc},
                                       {Py_tp_methods, incoming_methods}, {0, NULL}};
PyType_Spec kv_incoming_spec = {.name = "kvtransport._native.Incoming", .basicsize = sizeof(Incoming),
                                    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                                    .slots = incoming_slots};
#else
typedef int kv_no_incoming_type;
#endif
