/* The engine's Python types: thin, positional arguments only; kvtransport/io/engine.py is their user. */
#include "engine.h"
#include "tls.h"

#ifdef KV_ENGINE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include <linux/sockios.h>

typedef struct {
    PyObject_HEAD
    kv_engine *engine;
} Engine;

typedef struct {
    PyObject_HEAD
    Engine *owner;
    kv_group *group;
} Group;

typedef struct {
    PyObject_HEAD
    Engine *owner;
    Group *joined;
    PyObject *tls; /* whose records the connection uses, or NULL */
    kv_conn *conn;
} Conn;

typedef struct {
    PyObject_HEAD
    Group *owner;
    kv_outgoing *out;
} Outgoing;

typedef struct {
    PyObject_HEAD
    Group *owner;
    kv_incoming *in;
} Incoming;

static PyTypeObject *group_type, *conn_type, *outgoing_type, *incoming_type;

static void free_object(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF((PyObject *)type);
}

static PyObject *new_object(PyTypeObject *type) { return PyType_GenericAlloc(type, 0); }

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

static int append(PyObject *list, PyObject *item) {
    if (!item) return -1;
    int result = PyList_Append(list, item);
    Py_DECREF(item);
    return result;
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

static int take_limits(PyObject *object, uint32_t *limits) {
    if (!PyTuple_Check(object) || PyTuple_Size(object) != KV_TYPES) {
        PyErr_Format(PyExc_TypeError, "limits must be a tuple of %d integers", KV_TYPES);
        return -1;
    }
    for (int i = 0; i < KV_TYPES; i++) {
        unsigned long limit = PyLong_AsUnsignedLong(PyTuple_GetItem(object, i));
        if (PyErr_Occurred()) return -1;
        if (limit > UINT32_MAX) {
            PyErr_Format(PyExc_ValueError, "limit %d is over 2^32-1", i);
            return -1;
        }
        limits[i] = (uint32_t)limit;
    }
    return 0;
}

static PyObject *engine_adopt(PyObject *self, PyObject *args) {
    int fd;
    long long tag;
    PyObject *limits_object, *tls = Py_None;
    if (!PyArg_ParseTuple(args, "iOL|O:adopt", &fd, &limits_object, &tag, &tls)) return NULL;
    uint32_t limits[KV_TYPES] = {0};
    if (take_limits(limits_object, limits) < 0) return NULL;
    Conn *conn = (Conn *)new_object(conn_type);
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
    Group *group = (Group *)new_object(group_type);
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

/* ---- Conn ---- */

static void conn_dealloc(PyObject *object) {
    Conn *self = (Conn *)object;
    if (self->conn) {
        Py_BEGIN_ALLOW_THREADS
        kv_conn_free(self->conn);
        Py_END_ALLOW_THREADS
    }
    Py_XDECREF(self->tls); /* its records were in use until now */
    Py_XDECREF((PyObject *)self->joined);
    Py_XDECREF((PyObject *)self->owner);
    free_object(object);
}

static PyObject *conn_join(PyObject *object, PyObject *group) {
    Conn *self = (Conn *)object;
    if (!Py_IS_TYPE(group, group_type) || ((Group *)group)->owner != self->owner || self->joined) {
        PyErr_SetString(PyExc_TypeError, "a connection joins one group of its own engine, once");
        return NULL;
    }
    Py_INCREF(group);
    self->joined = (Group *)group;
    kv_lock(self->conn->engine);
    kv_conn_join(self->conn, self->joined->group);
    kv_unlock(self->conn->engine);
    Py_RETURN_NONE;
}

static PyObject *conn_limit(PyObject *object, PyObject *tuple) {
    Conn *self = (Conn *)object;
    uint32_t limits[KV_TYPES] = {0};
    if (take_limits(tuple, limits) < 0) return NULL;
    kv_lock(self->conn->engine);
    memcpy(self->conn->limits, limits, sizeof limits);
    kv_unlock(self->conn->engine);
    Py_RETURN_NONE;
}

static PyObject *conn_send(PyObject *self, PyObject *data) {
    char *bytes;
    Py_ssize_t nbytes;
    if (PyBytes_AsStringAndSize(data, &bytes, &nbytes) < 0) return NULL;
    if (nbytes == 0) return PyLong_FromLong(0);
    kv_bytes *frame = malloc(sizeof *frame + (size_t)nbytes);
    if (!frame) return PyErr_NoMemory();
    frame->next = NULL;
    frame->nbytes = (size_t)nbytes;
    memcpy(frame->data, bytes, (size_t)nbytes);
    size_t waiting;
    Py_BEGIN_ALLOW_THREADS
    waiting = kv_conn_send(((Conn *)self)->conn, frame);
    Py_END_ALLOW_THREADS
    return PyLong_FromSize_t(waiting);
}

static PyObject *conn_finish(PyObject *self, PyObject *unused) {
    (void)unused;
    kv_conn_finish(((Conn *)self)->conn);
    Py_RETURN_NONE;
}

static PyObject *conn_close(PyObject *self, PyObject *args) {
    int abort = 0;
    if (!PyArg_ParseTuple(args, "|p:close", &abort)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    kv_conn_close(((Conn *)self)->conn, abort);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *conn_stats(PyObject *self, PyObject *unused) {
    (void)unused;
    kv_conn *conn = ((Conn *)self)->conn;
    kv_lock(conn->engine);
    unsigned long long sent = conn->sent_bytes, received = conn->received_bytes, control = conn->control_bytes;
    bool heard = conn->heard;
    int load = conn->blocked ? 2 : conn->out != KV_OUT_NONE;
    conn->heard = false;
    kv_unlock(conn->engine);
    return Py_BuildValue("(KKKOi)", sent, received, control, heard ? Py_True : Py_False, load);
}

/* Options of a socket, while it is open: b"" afterwards. */
static PyObject *conn_getsockopt(PyObject *self, PyObject *args) {
    int level, option;
    unsigned char value[256];
    unsigned int wanted;
    if (!PyArg_ParseTuple(args, "iiI:getsockopt", &level, &option, &wanted)) return NULL;
    socklen_t size = wanted < sizeof value ? wanted : sizeof value;
    kv_conn *conn = ((Conn *)self)->conn;
    kv_lock(conn->engine);
    int result = conn->stream ? getsockopt(conn->stream->fd, level, option, value, &size) : (size = 0, 0);
    int error = errno;
    kv_unlock(conn->engine);
    if (result == 0) return PyBytes_FromStringAndSize((const char *)value, (Py_ssize_t)size);
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *conn_setsockopt(PyObject *self, PyObject *args) {
    int level, option;
    const char *value;
    Py_ssize_t size;
    if (!PyArg_ParseTuple(args, "iiy#:setsockopt", &level, &option, &value, &size)) return NULL;
    kv_conn *conn = ((Conn *)self)->conn;
    kv_lock(conn->engine);
    int result = conn->stream ? setsockopt(conn->stream->fd, level, option, value, (socklen_t)size) : 0;
    int error = errno;
    kv_unlock(conn->engine);
    if (result == 0) Py_RETURN_NONE;
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

/* A parked connection takes no more chunks; it looks for one when it is not any more. */
static PyObject *conn_park(PyObject *self, PyObject *parked) {
    int park = PyObject_IsTrue(parked);
    if (park < 0) return NULL;
    kv_conn *conn = ((Conn *)self)->conn;
    kv_lock(conn->engine);
    conn->parked = park;
    if (!park && !conn->closed && !conn->lost && !conn->writing && !conn->blocked) kv_kick(conn);
    kv_unlock(conn->engine);
    Py_RETURN_NONE;
}

static PyObject *conn_unsent(PyObject *self, PyObject *unused) {
    (void)unused;
    kv_conn *conn = ((Conn *)self)->conn;
    int bytes = 0;
    kv_lock(conn->engine);
    if (conn->stream && ioctl(conn->stream->fd, SIOCOUTQ, &bytes) < 0) bytes = 0;
    kv_unlock(conn->engine);
    return PyLong_FromLong(bytes);
}

static PyObject *conn_serial(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLongLong(((Conn *)self)->conn->serial);
}

static PyMethodDef conn_methods[] = {
    {"limit", conn_limit, METH_O, "limit($self, limits, /)\n--\n\nLargest payloads by frame type, of headers from now on."},
    {"join", conn_join, METH_O, "join($self, group, /)\n--\n\nBecome one of the group's connections."},
    {"send", conn_send, METH_O, "send($self, frame, /)\n--\n\nQueue a control frame; returns the bytes that wait."},
    {"finish", conn_finish, METH_NOARGS,
     "finish($self)\n--\n\nSend what is queued, then the end of the stream; throw away what comes."},
    {"close", conn_close, METH_VARARGS,
     "close($self, abort=False, /)\n--\n\nClose; when this returns nothing is read or written any more. Idempotent."},
    {"getsockopt", conn_getsockopt, METH_VARARGS,
     "getsockopt($self, level, option, nbytes, /)\n--\n\nb\"\" when it is closed."},
    {"setsockopt", conn_setsockopt, METH_VARARGS,
     "setsockopt($self, level, option, value, /)\n--\n\nNothing happens when it is closed."},
    {"park", conn_park, METH_O, "park($self, parked, /)\n--\n\nTake no chunk from now on, or take them again."},
    {"unsent", conn_unsent, METH_NOARGS, "unsent($self)\n--\n\nBytes that the peer has not acknowledged."},
    {"stats", conn_stats, METH_NOARGS,
     "stats($self)\n--\n\n(bytes sent, bytes received, control bytes waiting, heard since the last call, load: 0 idle, 1 sending, 2 "
     "the peer takes nothing now)"},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef conn_members[] = {{"serial", conn_serial, NULL, "Its number in the engine.", NULL}, {0}};
static PyType_Slot conn_slots[] = {
    {Py_tp_doc, "One connection of an Engine."}, {Py_tp_dealloc, conn_dealloc}, {Py_tp_methods, conn_methods},
    {Py_tp_getset, conn_members}, {0, NULL},
};
static PyType_Spec conn_spec = {.name = "kvtransport._native.Conn", .basicsize = sizeof(Conn),
                                .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, .slots = conn_slots};

/* ---- Group ---- */

static void group_dealloc(PyObject *object) {
    Group *self = (Group *)object;
    free(self->group); /* whoever was in it held a reference and has left */
    Py_XDECREF((PyObject *)self->owner);
    free_object(object);
}

static int get_transfer(const char *bytes, Py_ssize_t nbytes) {
    (void)bytes;
    if (nbytes == 16) return 0;
    PyErr_Format(PyExc_ValueError, "a transfer is named by 16 bytes, got %zd", nbytes);
    return -1;
}

static int compare_out(const void *a, const void *b) {
    const kv_out_slot *x = a, *y = b;
    int left = x->layer << 16 | x->tensor, right = y->layer << 16 | y->tensor;
    return left < right ? -1 : left > right;
}

static int compare_in(const void *a, const void *b) {
    const kv_in_slot *x = a, *y = b;
    int left = x->layer << 16 | x->tensor, right = y->layer << 16 | y->tensor;
    return left < right ? -1 : left > right;
}

static PyObject *group_outgoing(PyObject *self, PyObject *args) {
    const char *transfer;
    Py_ssize_t transfer_bytes;
    PyObject *slots;
    long long tag;
    int priority, checksum;
    if (!PyArg_ParseTuple(args, "y#O!Lip:outgoing", &transfer, &transfer_bytes, &PyList_Type, &slots, &tag, &priority,
                          &checksum) ||
        get_transfer(transfer, transfer_bytes) < 0)
        return NULL;
    Outgoing *object = (Outgoing *)new_object(outgoing_type);
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

static PyObject *group_incoming(PyObject *self, PyObject *args) {
    const char *transfer;
    Py_ssize_t transfer_bytes;
    PyObject *slots;
    long long tag;
    unsigned long long total, window, granted;
    int unchecked, eager;
    if (!PyArg_ParseTuple(args, "y#O!LKKKpp:incoming", &transfer, &transfer_bytes, &PyList_Type, &slots, &tag, &total,
                          &window, &granted, &unchecked, &eager) ||
        get_transfer(transfer, transfer_bytes) < 0)
        return NULL;
    Incoming *object = (Incoming *)new_object(incoming_type);
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

static PyMethodDef group_methods[] = {
    {"outgoing", group_outgoing, METH_VARARGS,
     "outgoing($self, transfer, slots, tag, priority, checksum, /)\n--\n\nA transfer to send; slots: [(layer, tensor)]."},
    {"incoming", group_incoming, METH_VARARGS,
     "incoming($self, transfer, slots, tag, total, window, granted, unchecked, eager, /)\n--\n\n"
     "A transfer to receive; slots: [(layer, tensor, nbytes, base, pieces)]."},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot group_slots[] = {{Py_tp_doc, "The connections and transfers of one link."},
                                    {Py_tp_dealloc, group_dealloc}, {Py_tp_methods, group_methods}, {0, NULL}};
static PyType_Spec group_spec = {.name = "kvtransport._native.Group", .basicsize = sizeof(Group),
                                 .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, .slots = group_slots};

/* ---- Outgoing ---- */

static bool forked(const kv_group *group) { return group->engine->pid != getpid(); }

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
static PyType_Spec outgoing_spec = {.name = "kvtransport._native.Outgoing", .basicsize = sizeof(Outgoing),
                                    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                                    .slots = outgoing_slots};

/* ---- Incoming ---- */

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
static PyType_Spec incoming_spec = {.name = "kvtransport._native.Incoming", .basicsize = sizeof(Incoming),
                                    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                                    .slots = incoming_slots};

int kv_add_engine_types(PyObject *module) {
    kv_engine_xxh3 = kv_xxh3_best();
    struct {
        PyType_Spec *spec;
        PyTypeObject **type;
        const char *name;
    } types[] = {{&engine_spec, NULL, "Engine"},
                 {&group_spec, &group_type, "Group"},
                 {&conn_spec, &conn_type, "Conn"},
                 {&outgoing_spec, &outgoing_type, "Outgoing"},
                 {&incoming_spec, &incoming_type, "Incoming"}};
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
