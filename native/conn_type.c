/* Conn: one connection, as Python has it. */
#include "engine_types.h"
#include "tls.h"

#ifdef KV_ENGINE
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <string.h>
#include <errno.h>
#include <stdlib.h>
#include <linux/sockios.h>

int kv_take_limits(PyObject *object, uint32_t *limits) {
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
    if (!Py_IS_TYPE(group, kv_group_type) || ((Group *)group)->owner != self->owner || self->joined) {
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
    if (kv_take_limits(tuple, limits) < 0) return NULL;
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
PyType_Spec kv_conn_spec = {.name = "kvtransport._native.Conn", .basicsize = sizeof(Conn),
                                .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, .slots = conn_slots};
#else
typedef int kv_no_conn_type;
#endif
