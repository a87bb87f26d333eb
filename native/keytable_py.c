/* kvpool._native: KeyTable, Python's hands on a kv_keytable. Its twin is kvpool/_pure_table.py. */
#define PY_SSIZE_T_CLEAN
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030b0000
#endif
#include <Python.h>

#include <string.h>

#include "flatkeys.h"
#include "keytable.h"

typedef struct {
    PyObject_HEAD
    kv_keytable table;
} KeyTable;

/* Keys as the caller gave them: a list of bytes, or one buffer of keys of equal width. */
typedef struct {
    PyObject *list;
    Py_buffer packed;
    size_t width, count;
} Keys;

static int bad_length(size_t length) {
    PyErr_Format(PyExc_ValueError, "a key has 1 to %d bytes, got %zu", KV_KEY_MOST, length);
    return -1;
}

static int keys_get(Keys *keys, PyObject *object, Py_ssize_t width) {
    memset(keys, 0, sizeof *keys);
    if (width == 0) {
        if (!PyList_Check(object)) {
            PyErr_SetString(PyExc_TypeError, "keys are a list of bytes, or a buffer with a width");
            return -1;
        }
        keys->list = object;
        keys->count = (size_t)PyList_Size(object);
        return 0;
    }
    if (width < 0 || width > KV_KEY_MOST) return bad_length((size_t)width);
    if (PyObject_GetBuffer(object, &keys->packed, PyBUF_SIMPLE) < 0) return -1;
    if (keys->packed.len % width) {
        PyErr_Format(PyExc_ValueError, "%zd bytes are no whole keys of %zd", keys->packed.len, width);
        PyBuffer_Release(&keys->packed);
        return -1;
    }
    keys->width = (size_t)width;
    keys->count = (size_t)(keys->packed.len / width);
    return 0;
}

static void keys_release(Keys *keys) {
    if (keys->width) PyBuffer_Release(&keys->packed);
}

static int key_of(PyObject *object, kv_key *key) {
    char *data;
    Py_ssize_t length;
    if (PyBytes_AsStringAndSize(object, &data, &length) < 0) return -1;
    if (length < 1 || length > KV_KEY_MOST) return bad_length((size_t)length);
    *key = (kv_key){(const unsigned char *)data, (size_t)length};
    return 0;
}

static int keys_at(const Keys *keys, size_t index, kv_key *key) {
    if (keys->width) {
        *key = (kv_key){(const unsigned char *)keys->packed.buf + index * keys->width, keys->width};
        return 0;
    }
    PyObject *item = PyList_GetItem(keys->list, (Py_ssize_t)index);
    return item ? key_of(item, key) : -1;
}

/* An int32 buffer of at least `count` numbers. */
static int numbers_get(Py_buffer *buffer, PyObject *object, size_t count, int flags) {
    if (PyObject_GetBuffer(object, buffer, flags) < 0) return -1;
    if (buffer->len % 4 == 0 && (size_t)buffer->len / 4 >= count) return 0;
    PyErr_Format(PyExc_ValueError, "%zu numbers of 4 bytes do not fit a buffer of %zd bytes", count, buffer->len);
    PyBuffer_Release(buffer);
    return -1;
}

static int parse(PyObject *args, const char *format, Keys *keys, Py_buffer *out) {
    PyObject *object, *numbers;
    Py_ssize_t width;
    if (!PyArg_ParseTuple(args, format, &object, &width, &numbers)) return -1;
    if (keys_get(keys, object, width) < 0) return -1;
    if (numbers_get(out, numbers, keys->count, PyBUF_WRITABLE) == 0) return 0;
    keys_release(keys);
    return -1;
}

static PyObject *keytable_find(PyObject *object, PyObject *args) {
    const kv_keytable *table = &((KeyTable *)object)->table;
    Keys keys;
    Py_buffer out;
    if (parse(args, "OnO:find", &keys, &out) < 0) return NULL;
    int32_t *numbers = out.buf;
    size_t found = 0;
    bool failed = false, all = true;
    while (found < keys.count && all && !failed) {
        kv_key batch[KV_KEY_BATCH];
        size_t size = keys.count - found < KV_KEY_BATCH ? keys.count - found : KV_KEY_BATCH;
        for (size_t i = 0; i < size && !failed; i++) failed = keys_at(&keys, found + i, &batch[i]) < 0;
        if (failed) break;
        size_t known = kv_keytable_find(table, batch, size, numbers + found);
        all = known == size;
        found += known;
    }
    keys_release(&keys);
    PyBuffer_Release(&out);
    return failed ? NULL : PyLong_FromSize_t(found);
}

static PyObject *keytable_add(PyObject *object, PyObject *args) {
    kv_keytable *table = &((KeyTable *)object)->table;
    Keys keys;
    Py_buffer out;
    if (parse(args, "OnO:add", &keys, &out) < 0) return NULL;
    int32_t *numbers = out.buf;
    size_t done = 0;
    bool failed = false;
    for (; done < keys.count && !failed; done++) {
        kv_key key;
        failed = keys_at(&keys, done, &key) < 0;
        int result = failed ? 0 : kv_keytable_add(table, key, numbers + done);
        if (!failed && result == 0) PyErr_Format(PyExc_ValueError, "key %zu is in the table already", done);
        if (!failed && result < 0) PyErr_NoMemory();
        failed = failed || result != 1;
        if (failed) break;
    }
    if (failed)
        while (done > 0) kv_keytable_remove(table, (uint32_t)numbers[--done]);
    keys_release(&keys);
    PyBuffer_Release(&out);
    if (failed) return NULL;
    Py_RETURN_NONE;
}

static PyObject *keytable_absent(PyObject *object, PyObject *args) {
    const kv_keytable *table = &((KeyTable *)object)->table;
    PyObject *list;
    Py_ssize_t width;
    Keys keys;
    if (!PyArg_ParseTuple(args, "On:absent", &list, &width) || keys_get(&keys, list, width) < 0) return NULL;
    size_t absent = 0;
    bool failed = false;
    for (; absent < keys.count; absent++) {
        kv_key key;
        int32_t number;
        failed = keys_at(&keys, absent, &key) < 0;
        if (failed || kv_keytable_find(table, &key, 1, &number)) break;
    }
    keys_release(&keys);
    return failed ? NULL : PyLong_FromSize_t(absent);
}

static PyObject *not_live(long long number) {
    return PyErr_Format(PyExc_ValueError, "no key has the number %lld", number);
}

static PyObject *keytable_remove(PyObject *object, PyObject *argument) {
    kv_keytable *table = &((KeyTable *)object)->table;
    long number = PyLong_AsLong(argument);
    if (number == -1 && PyErr_Occurred()) return NULL;
    if (!kv_keytable_live(table, number)) return not_live(number);
    kv_keytable_remove(table, (uint32_t)number);
    Py_RETURN_NONE;
}

static PyObject *keytable_remove_all(PyObject *object, PyObject *argument) {
    kv_keytable *table = &((KeyTable *)object)->table;
    Py_buffer buffer;
    if (numbers_get(&buffer, argument, 0, PyBUF_SIMPLE) < 0) return NULL;
    const int32_t *numbers = buffer.buf;
    size_t count = (size_t)buffer.len / 4, done = 0;
    for (; done < count && kv_keytable_live(table, numbers[done]); done++)
        kv_keytable_remove(table, (uint32_t)numbers[done]);
    PyObject *result = done == count ? Py_NewRef(Py_None) : not_live(numbers[done]);
    PyBuffer_Release(&buffer);
    return result;
}

static PyObject *keytable_key(PyObject *object, PyObject *argument) {
    const kv_keytable *table = &((KeyTable *)object)->table;
    long number = PyLong_AsLong(argument);
    if (number == -1 && PyErr_Occurred()) return NULL;
    if (!kv_keytable_live(table, number)) return not_live(number);
    kv_key key = kv_keytable_key(table, (uint32_t)number);
    return PyBytes_FromStringAndSize((const char *)key.data, (Py_ssize_t)key.length);
}

static PyObject *keytable_keys(PyObject *object, PyObject *argument) {
    const kv_keytable *table = &((KeyTable *)object)->table;
    Py_buffer buffer;
    if (numbers_get(&buffer, argument, 0, PyBUF_SIMPLE) < 0) return NULL;
    const int32_t *numbers = buffer.buf;
    Py_ssize_t count = buffer.len / 4;
    PyObject *list = PyList_New(count);
    for (Py_ssize_t i = 0; list && i < count; i++) {
        PyObject *item = NULL;
        if (kv_keytable_live(table, numbers[i])) {
            kv_key key = kv_keytable_key(table, (uint32_t)numbers[i]);
            item = PyBytes_FromStringAndSize((const char *)key.data, (Py_ssize_t)key.length);
        } else {
            not_live(numbers[i]);
        }
        if (!item || PyList_SetItem(list, i, item) < 0) {
            Py_DECREF(list);
            list = NULL;
        }
    }
    PyBuffer_Release(&buffer);
    return list;
}

static PyObject *keytable_get(PyObject *object, PyObject *argument) {
    kv_key key;
    int32_t number;
    if (key_of(argument, &key) < 0) return NULL;
    return PyLong_FromLong(kv_keytable_find(&((KeyTable *)object)->table, &key, 1, &number) ? number : -1);
}

static Py_ssize_t keytable_length(PyObject *object) { return (Py_ssize_t)((KeyTable *)object)->table.count; }

static PyObject *keytable_high(PyObject *object, void *closure) {
    (void)closure;
    return PyLong_FromUnsignedLong(((KeyTable *)object)->table.high);
}

static PyObject *keytable_nbytes(PyObject *object, void *closure) {
    (void)closure;
    return PyLong_FromSize_t(kv_keytable_bytes(&((KeyTable *)object)->table));
}

static PyObject *keytable_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"seed", NULL};
    unsigned long long seed = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "K:KeyTable", names, &seed)) return NULL;
    KeyTable *self = (KeyTable *)PyType_GenericAlloc(type, 0);
    if (!self) return NULL;
    if (kv_keytable_init(&self->table, seed) == 0) return (PyObject *)self;
    Py_DECREF((PyObject *)self);
    return PyErr_NoMemory();
}

static void keytable_dealloc(PyObject *object) {
    kv_keytable_free(&((KeyTable *)object)->table);
    PyTypeObject *type = Py_TYPE(object);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF((PyObject *)type);
}

static PyMethodDef keytable_methods[] = {
    {"find", keytable_find, METH_VARARGS,
     "find($self, keys, width, out, /)\n--\n\nNumbers of the leading keys that are known, into out; how many they are."},
    {"add", keytable_add, METH_VARARGS,
     "add($self, keys, width, out, /)\n--\n\nGive new keys numbers; ValueError, adding none, when one is known."},
    {"absent", keytable_absent, METH_VARARGS,
     "absent($self, keys, width, /)\n--\n\nHow many of the leading keys are not known."},
    {"remove_all", keytable_remove_all, METH_O,
     "remove_all($self, numbers, /)\n--\n\nForget keys, in order; ValueError at the first number that has none."},
    {"remove", keytable_remove, METH_O, "remove($self, number, /)\n--\n\nForget a key; its number is given out again."},
    {"key", keytable_key, METH_O, "key($self, number, /)\n--\n\nThe key with this number."},
    {"keys", keytable_keys, METH_O,
     "keys($self, numbers, /)\n--\n\nThe keys with these numbers; ValueError when one of them has none."},
    {"get", keytable_get, METH_O, "get($self, key, /)\n--\n\nIts number, or -1."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef keytable_getset[] = {
    {"high", keytable_high, NULL, "All numbers given out so far are below this.", NULL},
    {"nbytes", keytable_nbytes, NULL, "Bytes of memory it takes.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot keytable_slots[] = {
    {Py_tp_doc, "KeyTable(seed)\n--\n\nKeys of 1 to 64 bytes to small numbers and back."},
    {Py_tp_new, keytable_new},
    {Py_tp_dealloc, keytable_dealloc},
    {Py_tp_methods, keytable_methods},
    {Py_tp_getset, keytable_getset},
    {Py_sq_length, keytable_length},
    {0, NULL},
};

static PyType_Spec keytable_spec = {
    .name = "kvpool._native.KeyTable",
    .basicsize = sizeof(KeyTable),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = keytable_slots,
};

static PyObject *ancestors(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *all, *room;
    Py_buffer parents, out;
    long node;
    if (!PyArg_ParseTuple(args, "OlO:ancestors", &all, &node, &room)) return NULL;
    if (numbers_get(&parents, all, 0, PyBUF_SIMPLE) < 0) return NULL;
    if (numbers_get(&out, room, 0, PyBUF_WRITABLE) < 0) {
        PyBuffer_Release(&parents);
        return NULL;
    }
    const int32_t *above = parents.buf;
    int32_t *found = out.buf;
    size_t count = (size_t)parents.len / 4, most = (size_t)out.len / 4, done = 0;
    while (node >= 0 && (size_t)node < count && done < most && above[node] >= 0) {
        node = above[node];
        found[done++] = (int32_t)node;
    }
    PyBuffer_Release(&parents);
    PyBuffer_Release(&out);
    return PyLong_FromSize_t(done);
}

static PyMethodDef functions[] = {
    {"ancestors", ancestors, METH_VARARGS,
     "ancestors($module, parents, node, out, /)\n--\n\n"
     "The nearest ancestors of a node into out, as far as it has room or they go (a parent below 0); how many they are."},
    {"which", kv_which, METH_VARARGS, kv_which_doc},
    {"pack_keys", kv_pack_keys, METH_VARARGS, kv_pack_keys_doc},
    {"cut_keys", kv_cut_keys, METH_VARARGS, kv_cut_keys_doc},
    {"flags", kv_flags, METH_VARARGS, kv_flags_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "kvpool._native",
    .m_doc = "The hash table of the pool's index, and lookups of flat keys; use kvpool.table.",
    .m_size = -1,
    .m_methods = functions,
};

PyMODINIT_FUNC PyInit__native(void) {
    PyObject *module = PyModule_Create(&definition);
    PyObject *type = module ? PyType_FromSpec(&keytable_spec) : NULL;
    if (type && PyModule_AddObjectRef(module, "KeyTable", type) == 0) {
        Py_DECREF(type);
        return module;
    }
    Py_XDECREF(type);
    Py_XDECREF(module);
    return NULL;
}
