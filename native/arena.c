/* Arena and View: Python's hands on a kv_mapping. Memory is unmapped when its last user lets go, never before. */
#include "kvnative.h"

#include <errno.h>
#include <string.h>

typedef struct {
    PyObject_HEAD
    kv_mapping *mapping; /* never NULL: the arena is a holder to its end, a user until it is closed */
    PyObject *notes;     /* tuple of str */
    bool closed;
} Arena;

typedef struct {
    PyObject_HEAD
    kv_mapping *mapping;
    size_t offset, nbytes;
} View;

static PyTypeObject *view_type;

static void unuse(kv_mapping *mapping) {
    if (!kv_mapping_last_user(mapping)) {
        kv_mapping_unuse(mapping);
        return;
    }
    Py_BEGIN_ALLOW_THREADS /* unmapping a large arena takes a while */
    kv_mapping_unuse(mapping);
    Py_END_ALLOW_THREADS
}

static void free_object(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF((PyObject *)type);
}

static int fill_buffer(kv_mapping *m, PyObject *exporter, size_t offset, size_t nbytes, Py_buffer *view, int flags) {
    return PyBuffer_FillInfo(view, exporter, m->base + offset, (Py_ssize_t)nbytes, m->readonly, flags);
}

/* ---- View ---- */

static void view_dealloc(PyObject *object) {
    unuse(((View *)object)->mapping);
    free_object(object);
}

static int view_getbuffer(PyObject *object, Py_buffer *view, int flags) {
    View *self = (View *)object;
    return fill_buffer(self->mapping, object, self->offset, self->nbytes, view, flags);
}

static Py_ssize_t view_length(PyObject *object) { return (Py_ssize_t)((View *)object)->nbytes; }

static PyObject *view_nbytes(PyObject *object, void *closure) {
    (void)closure;
    return PyLong_FromSize_t(((View *)object)->nbytes);
}

static PyObject *view_offset(PyObject *object, void *closure) {
    (void)closure;
    return PyLong_FromSize_t(((View *)object)->offset);
}

static PyObject *view_readonly(PyObject *object, void *closure) {
    (void)closure;
    return PyBool_FromLong(((View *)object)->mapping->readonly);
}

static PyObject *view_dlpack_device(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return Py_BuildValue("(ii)", 1, 0);
}

/* 0: what the consumer asked of the device and of a copy can be had. */
static int check_dlpack_wishes(PyObject *stream, PyObject *device, PyObject *copy) {
    if (stream != Py_None) {
        PyErr_SetString(PyExc_ValueError, "host memory has no streams: stream must be None");
        return -1;
    }
    if (device != Py_None) {
        int type, id;
        if (!PyArg_ParseTuple(device, "ii;dl_device must be a pair of integers", &type, &id)) return -1;
        if (type != 1 || id != 0) {
            PyErr_Format(PyExc_BufferError, "the memory is on device (1, 0), asked for (%d, %d)", type, id);
            return -1;
        }
    }
    int wants_copy = copy == Py_None ? 0 : PyObject_IsTrue(copy);
    if (wants_copy > 0) PyErr_SetString(PyExc_BufferError, "a view is never copied: ask with copy=None or copy=False");
    return wants_copy ? -1 : 0;
}

static PyObject *view_dlpack(PyObject *object, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"stream", "max_version", "dl_device", "copy", NULL};
    PyObject *stream = Py_None, *version = Py_None, *device = Py_None, *copy = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$OOOO:__dlpack__", names, &stream, &version, &device, &copy))
        return NULL;
    if (check_dlpack_wishes(stream, device, copy) < 0) return NULL;
    int major = 0, minor = 0;
    if (version != Py_None && !PyArg_ParseTuple(version, "ii;max_version must be a pair of integers", &major, &minor))
        return NULL;
    View *self = (View *)object;
    if (self->mapping->readonly && major < 1) {
        PyErr_SetString(PyExc_BufferError,
                        "the memory is read-only, which only DLPack 1.0 can say: the consumer asked for an older one");
        return NULL;
    }
    return kv_dlpack_capsule(self->mapping, self->mapping->base + self->offset, self->nbytes, self->mapping->readonly,
                             major >= 1);
}

static PyMethodDef view_methods[] = {
    {"__dlpack__", KV_METHOD(view_dlpack), METH_VARARGS | METH_KEYWORDS,
     "A DLPack capsule of uint8[nbytes], without a copy."},
    {"__dlpack_device__", view_dlpack_device, METH_NOARGS, "(1, 0): the host."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef view_getset[] = {
    {"nbytes", view_nbytes, NULL, "Bytes.", NULL},
    {"offset", view_offset, NULL, "Position in the arena, in bytes.", NULL},
    {"readonly", view_readonly, NULL, "True when the memory may not be written.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot view_slots[] = {
    {Py_tp_doc, "A piece of an arena: buffer protocol and DLPack. Keeps the memory mapped."},
    {Py_tp_dealloc, view_dealloc},
    {Py_tp_methods, view_methods},
    {Py_tp_getset, view_getset},
    {Py_sq_length, view_length},
    {Py_bf_getbuffer, view_getbuffer},
    {0, NULL},
};

static PyType_Spec view_spec = {
    .name = "kvtransport._native.View",
    .basicsize = sizeof(View),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = view_slots,
};

/* ---- Arena: making one ---- */

static int choice_converter(PyObject *object, void *result) {
    static const struct {
        const char *name;
        kv_choice choice;
    } choices[] = {{"off", KV_OFF}, {"auto", KV_AUTO}, {"require", KV_REQUIRE}};
    if (PyUnicode_Check(object)) {
        for (size_t i = 0; i < sizeof choices / sizeof *choices; i++) {
            if (PyUnicode_CompareWithASCIIString(object, choices[i].name) == 0) {
                *(kv_choice *)result = choices[i].choice;
                return 1;
            }
        }
    }
    PyErr_Format(PyExc_ValueError, "expected \"auto\", \"require\" or \"off\", got %R", object);
    return 0;
}

static PyObject *raise_failure(const kv_failure *failure) {
    if (failure->errnum == 0 || failure->errnum == ENOMEM) {
        PyErr_SetString(PyExc_MemoryError, failure->text);
    } else if (failure->errnum == EINVAL) {
        PyErr_SetString(PyExc_ValueError, failure->text);
    } else {
        PyObject *args = Py_BuildValue("(is)", failure->errnum, failure->text);
        if (args) {
            PyErr_SetObject(PyExc_OSError, args);
            Py_DECREF(args);
        }
    }
    return NULL;
}

static PyObject *notes_tuple(const kv_notes *notes) {
    PyObject *tuple = PyTuple_New((Py_ssize_t)notes->count);
    for (size_t i = 0; tuple && i < notes->count; i++) {
        PyObject *text = PyUnicode_DecodeFSDefault(notes->text[i]);
        if (!text || PyTuple_SetItem(tuple, (Py_ssize_t)i, text) < 0) Py_CLEAR(tuple);
    }
    return tuple;
}

/* Takes over the mapping, also when it fails. */
static PyObject *arena_around(PyTypeObject *type, kv_mapping *mapping, const kv_notes *notes) {
    PyObject *tuple = notes_tuple(notes);
    Arena *self = tuple ? (Arena *)PyType_GenericAlloc(type, 0) : NULL;
    if (!self) {
        Py_XDECREF(tuple);
        unuse(mapping);
        kv_mapping_forget(mapping);
        return NULL;
    }
    self->mapping = mapping;
    self->notes = tuple;
    return (PyObject *)self;
}

static PyObject *arena_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"nbytes", "huge", "lock", "memfd", "cuda", "populate", "name", NULL};
    kv_arena_options options = {.huge = KV_AUTO, .lock = KV_AUTO, .cuda = KV_AUTO, .name = "kvtransport"};
    int memfd = 1, populate = 1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&|$O&O&pO&ps:Arena", names, kv_size_converter, &options.nbytes,
                                     choice_converter, &options.huge, choice_converter, &options.lock, &memfd,
                                     choice_converter, &options.cuda, &populate, &options.name))
        return NULL;
    options.memfd = memfd;
    options.populate = populate;
    kv_notes notes = {.count = 0};
    kv_failure failure;
    kv_mapping *mapping;
    Py_BEGIN_ALLOW_THREADS
    mapping = kv_mapping_create(&options, &notes, &failure);
    Py_END_ALLOW_THREADS
    return mapping ? arena_around(type, mapping, &notes) : raise_failure(&failure);
}

static PyObject *arena_attach(PyObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"fd", "nbytes", NULL};
    PyObject *fd_object;
    size_t nbytes;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO&:attach", names, &fd_object, kv_size_converter, &nbytes))
        return NULL;
    int fd = PyObject_AsFileDescriptor(fd_object);
    if (fd < 0) return NULL;
    kv_notes notes = {.count = 0};
    kv_failure failure;
    kv_mapping *mapping = kv_mapping_attach(fd, nbytes, &failure);
    return mapping ? arena_around((PyTypeObject *)type, mapping, &notes) : raise_failure(&failure);
}

/* ---- Arena: using and closing it ---- */

static int check_open(Arena *self) {
    if (!self->closed) return 0;
    PyErr_SetString(PyExc_ValueError, "the arena is closed");
    return -1;
}

static void close_arena(Arena *self) {
    if (self->closed) return;
    self->closed = true;
    unuse(self->mapping);
}

static void arena_dealloc(PyObject *object) {
    Arena *self = (Arena *)object;
    if (self->mapping) {
        close_arena(self);
        kv_mapping_forget(self->mapping);
    }
    Py_XDECREF(self->notes);
    free_object(object);
}

static int arena_getbuffer(PyObject *object, Py_buffer *view, int flags) {
    Arena *self = (Arena *)object;
    view->obj = NULL;
    if (check_open(self) < 0 || fill_buffer(self->mapping, object, 0, self->mapping->nbytes, view, flags) < 0) return -1;
    kv_mapping_use(self->mapping);
    return 0;
}

static void arena_releasebuffer(PyObject *object, Py_buffer *view) {
    (void)view;
    unuse(((Arena *)object)->mapping);
}

static PyObject *arena_view(PyObject *object, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"offset", "length", NULL};
    Arena *self = (Arena *)object;
    size_t offset, length;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O&O&:view", names, kv_size_converter, &offset, kv_size_converter,
                                     &length))
        return NULL;
    if (check_open(self) < 0) return NULL;
    size_t nbytes = self->mapping->nbytes;
    if (offset > nbytes || length > nbytes - offset)
        return PyErr_Format(PyExc_ValueError, "offset %zu, length %zu does not fit an arena of %zu bytes", offset, length,
                            nbytes);
    View *view = (View *)PyType_GenericAlloc(view_type, 0);
    if (!view) return NULL;
    kv_mapping_use(self->mapping);
    view->mapping = self->mapping;
    view->offset = offset;
    view->nbytes = length;
    return (PyObject *)view;
}

static PyObject *arena_close(PyObject *object, PyObject *unused) {
    (void)unused;
    close_arena((Arena *)object);
    Py_RETURN_NONE;
}

static PyObject *arena_enter(PyObject *object, PyObject *unused) {
    (void)unused;
    if (check_open((Arena *)object) < 0) return NULL;
    return Py_NewRef(object);
}

static PyObject *arena_exit(PyObject *object, PyObject *args) {
    (void)args;
    close_arena((Arena *)object);
    Py_RETURN_NONE;
}

static PyObject *arena_fd(PyObject *object, void *closure) {
    (void)closure;
    Arena *self = (Arena *)object;
    if (check_open(self) < 0) return NULL;
    return PyLong_FromLong(self->mapping->fd);
}

static PyObject *arena_closed(PyObject *object, void *closure) {
    (void)closure;
    return PyBool_FromLong(((Arena *)object)->closed);
}

static PyObject *arena_readonly(PyObject *object, void *closure) {
    (void)closure;
    return PyBool_FromLong(((Arena *)object)->mapping->readonly);
}

static PyObject *arena_nbytes(PyObject *object, void *closure) {
    (void)closure;
    return PyLong_FromSize_t(((Arena *)object)->mapping->nbytes);
}

static Py_ssize_t arena_length(PyObject *object) { return (Py_ssize_t)((Arena *)object)->mapping->nbytes; }

static PyObject *arena_live_views(PyObject *object, void *closure) {
    (void)closure;
    Arena *self = (Arena *)object;
    return PyLong_FromSize_t(atomic_load(&self->mapping->users) - (self->closed ? 0 : 1));
}

static PyObject *arena_info(PyObject *object, void *closure) {
    (void)closure;
    const Arena *self = (Arena *)object;
    const kv_mapping *m = self->mapping;
    PyObject *notes = PySequence_List(self->notes);
    if (!notes) return NULL;
    return Py_BuildValue("{s:K,s:K,s:K,s:s,s:N,s:N,s:i,s:N}", "requested", (unsigned long long)m->requested, "nbytes",
                         (unsigned long long)m->nbytes, "page_bytes", (unsigned long long)m->page_bytes, "huge", m->huge,
                         "locked", PyBool_FromLong(m->locked), "cuda", PyBool_FromLong(m->cuda.pinned), "fd", m->fd,
                         "notes", notes);
}

static PyMethodDef arena_methods[] = {
    {"attach", KV_METHOD(arena_attach), METH_VARARGS | METH_KEYWORDS | METH_CLASS,
     "attach($type, /, fd, nbytes)\n--\n\nMap another arena's memfd, read-only."},
    {"view", KV_METHOD(arena_view), METH_VARARGS | METH_KEYWORDS,
     "view($self, /, offset, length)\n--\n\nA View of these bytes."},
    {"close", arena_close, METH_NOARGS,
     "close($self, /)\n--\n\nGive no more views; the memory is unmapped when the last one is gone."},
    {"__enter__", arena_enter, METH_NOARGS, NULL},
    {"__exit__", arena_exit, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef arena_getset[] = {
    {"fd", arena_fd, NULL, "The memfd, or -1.", NULL},
    {"closed", arena_closed, NULL, "True after close().", NULL},
    {"readonly", arena_readonly, NULL, "True when attached.", NULL},
    {"nbytes", arena_nbytes, NULL, "Usable bytes: the request rounded up to whole pages.", NULL},
    {"live_views", arena_live_views, NULL, "Views, exported buffers and DLPack tensors alive.", NULL},
    {"info", arena_info, NULL, "What was asked for, what it became, and why (dict).", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot arena_slots[] = {
    {Py_tp_doc,
     "Arena(nbytes, *, huge='auto', lock='auto', memfd=True, cuda='auto', populate=True, name='kvtransport')\n--\n\n"
     "Page-aligned host memory that can be shared, locked and registered with CUDA."},
    {Py_tp_new, arena_new},
    {Py_tp_dealloc, arena_dealloc},
    {Py_tp_methods, arena_methods},
    {Py_tp_getset, arena_getset},
    {Py_sq_length, arena_length},
    {Py_bf_getbuffer, arena_getbuffer},
    {Py_bf_releasebuffer, arena_releasebuffer},
    {0, NULL},
};

static PyType_Spec arena_spec = {
    .name = "kvtransport._native.Arena",
    .basicsize = sizeof(Arena),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = arena_slots,
};

int kv_add_arena_types(PyObject *module) {
    PyObject *view = PyType_FromSpec(&view_spec);
    if (!view) return -1;
    view_type = (PyTypeObject *)view; /* kept: one module per process */
    if (PyModule_AddObjectRef(module, "View", view) < 0) return -1;
    PyObject *arena = PyType_FromSpec(&arena_spec);
    if (!arena) return -1;
    int result = PyModule_AddObjectRef(module, "Arena", arena);
    Py_DECREF(arena);
    return result;
}
