/* Engine and Group: the threads and the links, as Python has them. */
#include "engine_types.h"
#include "tls.h"

#ifdef KV_ENGINE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

PyTypeObject *kv_group_type, *kv_conn_type, *kv_outgoing_type, *kv_incoming_type;

/* ---- Engine ---- */

static PyObject *engine_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"threads", NULL};
    int threads = 1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|i:Engine", names, &threads)) return NULL;
    Engine *self = (Engine *)new_object(type);
    if (!self) return NULL;
    self->engine = kv_engine_new(threads);
    if (!self->engine) {
        Py_DECREF((PyObject *)self);
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return (PyObject *)self;
}

static void engine_dealloc(PyObject *object) {
    kv_engine *engine = ((Engine *)object)->engine;
    if (engine) {
        Py_BEGIN_ALLOW_THREADS
        kv_engine_free(engine);
        Py_END_ALLOW_THREADS
    }
    free_object(object);
}

static PyObject *engine_fileno(PyObject *self, PyObject *unused) {
    (void)unused;
    return PyLong_FromLong(((Engine *)self)->engine->event_fd);
}

static PyObject *engine_stop(PyObject *self, PyObject *unused) {
    (void)unused;
    Py_BEGIN_ALLOW_THREADS
    kv_engine_stop(((Engine *)self)->engine);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *engine_threads(PyObject *self, void *unused) {
    (void)unused;
    kv_engine *engine = ((Engine *)self)->engine;
    kv_lock(engine);
    int count = engine->thread_count;
    kv_unlock(engine);
    return PyLong_FromLong(count);
}

/* What drain() takes out of the engine at once. */
typedef struct taken {
    struct taken *next;
    int64_t tag;
    bool acked;
    uint64_t (*rows)[5]; /* applied: layer, tensor, start, stop, first_ns; acked: layer, tensor, bytes */
    size_t row_count;
    uint64_t *done;
    size_t done_count;
} taken;

/* Under the mutex: later, making Python objects may run code that ends the transfer. */
static taken *take_applied(kv_incoming *in) {
    taken *entry = calloc(1, sizeof *entry);
    if (entry) entry->rows = malloc((in->pending_count + 1) * sizeof *entry->rows);
    if (!entry || !entry->rows) return free(entry), NULL;
    entry->tag = in->tag;
    entry->row_count = in->pending_count;
    for (size_t i = 0; i < in->pending_count; i++) {
        const kv_applied *range = &in->pending[i];
        uint64_t row[5] = {range->slot->layer, range->slot->tensor, range->start, range->stop, range->slot->first_ns};
        memcpy(entry->rows[i], row, sizeof row);
    }
    in->pending_count = 0;
    return entry;
}

static taken *take_acked(kv_outgoing *out) {
    size_t rows = 0;
    for (size_t i = 0; i < out->slot_count; i++) rows += out->slots[i].acked_new > 0;
    taken *entry = calloc(1, sizeof *entry);
    if (entry) entry->rows = malloc((rows + 1) * sizeof *entry->rows);
    if (!entry || !entry->rows) return free(entry), NULL;
    entry->tag = out->tag;
    entry->acked = true;
    for (size_t i = 0; i < out->slot_count; i++) {
        kv_out_slot *slot = &out->slots[i];
        if (!slot->acked_new) continue;
        uint64_t row[5] = {slot->layer, slot->tensor, slot->acked_new};
        memcpy(entry->rows[entry->row_count++], row, sizeof row);
        slot->acked_new = 0;
    }
    entry->done = out->done;
    entry->done_count = out->done_count;
    out->done = NULL;
    out->done_count = out->done_capacity = 0;
    return entry;
}

static PyObject *taken_tuple(const taken *entry) {
    PyObject *rows = PyList_New(0), *keys = entry->acked ? PyList_New(0) : NULL;
    bool bad = !rows || (entry->acked && !keys);
    for (size_t i = 0; !bad && i < entry->row_count; i++) {
        const uint64_t *row = entry->rows[i];
        int layer = (int)row[0], tensor = (int)row[1];
        unsigned long long start = row[2], stop = row[3];
        bad = append(rows, entry->acked ? Py_BuildValue("(iiK)", layer, tensor, start)
                                        : Py_BuildValue("(iiKKd)", layer, tensor, start, stop, (double)row[4] / 1e9)) < 0;
    }
    for (size_t i = 0; !bad && i < entry->done_count; i++)
        bad = append(keys, PyLong_FromUnsignedLongLong(entry->done[i])) < 0;
    if (bad) {
        Py_XDECREF(rows);
        Py_XDECREF(keys);
        return NULL;
    }
    if (!entry->acked) return Py_BuildValue("(iLN)", KV_EV_APPLIED, (long long)entry->tag, rows);
    return Py_BuildValue("(iLNN)", KV_EV_ACKED, (long long)entry->tag, rows, keys);
}

static PyObject *event_tuple(const kv_event *event) {
    const char *head = (const char *)event->head;
    Py_ssize_t head_bytes = KV_HEADER_BYTES, data_bytes = (Py_ssize_t)event->nbytes;
    if (event->kind == KV_EV_BAD) head_bytes = 0;
    return Py_BuildValue("(iLiy#y#)", event->kind, (long long)event->tag, event->detail, head, head_bytes,
                         (const char *)event->data, data_bytes);
}

static PyObject *engine_drain(PyObject *self, PyObject *unused) {
    (void)unused;
    kv_engine *engine = ((Engine *)self)->engine;
    taken *first = NULL;
    kv_map *garbage = NULL;
    bool no_memory = false;
    uint64_t count;
    kv_lock(engine);
    if (engine->signalled) (void)!read(engine->event_fd, &count, sizeof count);
    engine->signalled = false;
    kv_event *events = engine->first_event;
    engine->first_event = NULL;
    engine->last_event = &engine->first_event;
    for (kv_outgoing *out; (out = engine->ready_out) && !no_memory;) {
        taken *entry = take_acked(out);
        no_memory = !entry;
        if (no_memory) break;
        entry->next = first;
        first = entry;
        engine->ready_out = out->next_ready;
        out->ready = false;
        while (out->garbage) {
            kv_map *map = out->garbage;
            out->garbage = map->next;
            map->next = garbage;
            garbage = map;
        }
    }
    for (kv_incoming *in; (in = engine->ready_in) && !no_memory;) {
        taken *entry = take_applied(in);
        no_memory = !entry;
        if (no_memory) break;
        entry->next = first;
        first = entry;
        engine->ready_in = in->next_ready;
        in->ready = false;
    }
    for (size_t i = 0; i < engine->conn_capacity; i++) {
        kv_conn *conn = engine->conns[i];
        if (!conn) continue;
        conn->up_bytes = 0;
        if (conn->paused) {
            conn->paused = false;
            kv_kick(conn);
        }
    }
    kv_unlock(engine);

    PyObject *list = no_memory ? PyErr_NoMemory() : PyList_New(0);
    while (first) {
        taken *entry = first;
        first = entry->next;
        if (list && append(list, taken_tuple(entry)) < 0) Py_CLEAR(list);
        free(entry->done);
        free(entry->rows);
        free(entry);
    }
    while (events) {
        kv_event *event = events;
        events = event->next;
        if (list && append(list, event_tuple(event)) < 0) Py_CLEAR(list);
        free(event);
    }
    kv_map_free(garbage); /* last: releasing may run Python code */
    return list;
}

static PyObject *engine_adopt(PyObject *self, PyObject *args) {
    int fd;
    long long tag;
    PyObject *limits_object, *tls = Py_None;
    if (!PyArg_ParseTuple(args, "iOL|O:adopt", &fd, &limits_object, &tag, &tls)) return NULL;
    uint32_t limits[KV_TYPES] = {0};
    if (kv_take_limits(limits_object, limits) < 0) return NULL;
    Conn *conn = (Conn *)new_object(kv_conn_type);
    if (!conn) return NULL;
    Py_INCREF(self);
    conn->owner = (Engine *)self;
    kv_stream *stream;
    if (tls == Py_None) {
        stream = kv_plain_stream(fd);
    } else {
        kv_tls_records *records = kv_tls_hand_over(tls, fd);
        if (!records) {
            Py_DECREF((PyObject *)conn);
            return NULL;
        }
        conn->tls = Py_NewRef(tls);
        stream = kv_tls_stream(records);
    }
    if (!stream) {
        Py_DECREF((PyObject *)conn);
        return PyErr_NoMemory();
    }
    conn->conn = kv_conn_new(((Engine *)self)->engine, stream, tag, limits);
    if (conn->conn) return (PyObject *)conn;
    Py_DECREF((PyObject *)conn);
    return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *engine_group(PyObject *self, PyObject *unused) {
    (void)unused;
    Group *group = (Group *)new_object(kv_group_type);
    if (!group) return NULL;
    Py_INCREF(self);
    group->owner = (Engine *)self;
    group->group = calloc(1, sizeof *group->group);
    if (!group->group) {
        Py_DECREF((PyObject *)group);
        return PyErr_NoMemory();
    }
    group->group->engine = ((Engine *)self)->engine;
    return (PyObject *)group;
}

static PyMethodDef engine_methods[] = {
    {"fileno", engine_fileno, METH_NOARGS, "fileno($self)\n--\n\nReadable when drain() has something."},
    {"stop", engine_stop, METH_NOARGS, "stop($self)\n--\n\nEnd the threads; nothing moves afterwards. Idempotent."},
    {"drain", engine_drain, METH_NOARGS, "drain($self)\n--\n\nWhat has happened since, as tuples (kind, tag, ...)."},
    {"adopt", engine_adopt, METH_VARARGS,
     "adopt($self, fd, limits, tag, tls=None, /)\n--\n\nA connection over this non-blocking socket, which is the engine's "
     "from now on, error or not; with `tls` after its handshake over the records of that object."},
    {"group", engine_group, METH_NOARGS, "group($self)\n--\n\nThe connections and transfers of one link."},
    {NULL, NULL, 0, NULL},
};
static PyObject *engine_operations(PyObject *self, void *unused) {
    (void)unused;
    kv_engine *engine = ((Engine *)self)->engine;
    kv_lock(engine);
    unsigned long long count = engine->operations;
    kv_unlock(engine);
    return PyLong_FromUnsignedLongLong(count);
}

static PyGetSetDef engine_members[] = {
    {"threads", engine_threads, NULL, "I/O threads that run.", NULL},
    {"operations", engine_operations, NULL, "Sends and receives so far.", NULL},
    {0},
};
static PyType_Slot engine_slots[] = {
    {Py_tp_doc, "Engine(threads=1)\n--\n\nI/O threads, started as connections come."},
    {Py_tp_new, engine_new},
    {Py_tp_dealloc, engine_dealloc},
    {Py_tp_methods, engine_methods},
    {Py_tp_getset, engine_members},
    {0, NULL},
};
static PyType_Spec engine_spec = {
    .name = "kvtransport._native.Engine", .basicsize = sizeof(Engine), .flags = Py_TPFLAGS_DEFAULT, .slots = engine_slots};

/* ---- Group ---- */

static void group_dealloc(PyObject *object) {
    Group *self = (Group *)object;
    free(self->group); /* whoever was in it held a reference and has left */
    Py_XDECREF((PyObject *)self->owner);
    free_object(object);
}

static PyMethodDef group_methods[] = {
    {"outgoing", kv_group_outgoing, METH_VARARGS,
     "outgoing($self, transfer, slots, tag, priority, checksum, /)\n--\n\nA transfer to send; slots: [(layer, tensor)]."},
    {"incoming", kv_group_incoming, METH_VARARGS,
     "incoming($self, transfer, slots, tag, total, window, granted, unchecked, eager, /)\n--\n\n"
     "A transfer to receive; slots: [(layer, tensor, nbytes, base, pieces)]."},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot group_slots[] = {{Py_tp_doc, "The connections and transfers of one link."},
                                    {Py_tp_dealloc, group_dealloc}, {Py_tp_methods, group_methods}, {0, NULL}};
static PyType_Spec group_spec = {.name = "kvtransport._native.Group", .basicsize = sizeof(Group),
                                 .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, .slots = group_slots};

int kv_add_engine_types(PyObject *module) {
    kv_engine_xxh3 = kv_xxh3_best();
    struct {
        PyType_Spec *spec;
        PyTypeObject **type;
        const char *name;
    } types[] = {{&engine_spec, NULL, "Engine"},
                 {&group_spec, &kv_group_type, "Group"},
                 {&kv_conn_spec, &kv_conn_type, "Conn"},
                 {&kv_outgoing_spec, &kv_outgoing_type, "Outgoing"},
                 {&kv_incoming_spec, &kv_incoming_type, "Incoming"}};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        PyObject *type = PyType_FromSpec(types[i].spec);
        if (!type) return -1;
        if (types[i].type) *types[i].type = (PyTypeObject *)type; /* lives as long as the process */
        int result = PyModule_AddObjectRef(module, types[i].name, type);
        if (!types[i].type) Py_DECREF(type);
        if (result < 0) return -1;
    }
    return 0;
}
#else
int kv_add_engine_types(PyObject *module) {
    (void)module;
    return 0;
}
#endif
