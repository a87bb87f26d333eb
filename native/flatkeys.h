/* Which of many flat keys a dict has; see flatkeys.c. */
#ifndef KV_FLATKEYS_H
#define KV_FLATKEYS_H

#include <Python.h>

extern const char kv_which_doc[];
PyObject *kv_which(PyObject *module, PyObject *args);

#endif
