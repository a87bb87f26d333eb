/* The Python objects of the I/O engine: thin, positional arguments only; kvtransport/engine/native.py is their user. */
#ifndef KV_ENGINE_TYPES_H
#define KV_ENGINE_TYPES_H

#include "engine.h"

#ifdef KV_ENGINE

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

/* Set by kv_add_engine_types; they live as long as the process. */
extern PyTypeObject *kv_group_type, *kv_conn_type, *kv_outgoing_type, *kv_incoming_type;
extern PyType_Spec kv_conn_spec, kv_outgoing_spec, kv_incoming_spec;

/* Methods of Group that make transfers. */
PyObject *kv_group_outgoing(PyObject *self, PyObject *args);
PyObject *kv_group_incoming(PyObject *self, PyObject *args);

/* Largest payloads by frame type from a tuple; -1 with an exception. */
int kv_take_limits(PyObject *object, uint32_t *limits);

static inline void free_object(PyObject *object) {
    PyTypeObject *type = Py_TYPE(object);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF((PyObject *)type);
}

static inline PyObject *new_object(PyTypeObject *type) { return PyType_GenericAlloc(type, 0); }

static inline int append(PyObject *list, PyObject *item) {
    if (!item) return -1;
    int result = PyList_Append(list, item);
    Py_DECREF(item);
    return result;
}

static inline bool forked(const kv_group *group) { return group->engine->pid != getpid(); }

static inline int check_transfer(Py_ssize_t nbytes) {
    if (nbytes == 16) return 0;
    PyErr_Format(PyExc_ValueError, "a transfer is named by 16 bytes, got %zd", nbytes);
    return -1;
}

#endif
#endif
