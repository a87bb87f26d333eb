/* Many flat keys in one call; see flatkeys.c. */
#ifndef KV_FLATKEYS_H
#define KV_FLATKEYS_H

#include <Python.h>

extern const char kv_which_doc[], kv_pack_keys_doc[], kv_cut_keys_doc[], kv_flags_doc[];
PyObject *kv_which(PyObject *module, PyObject *args);
PyObject *kv_pack_keys(PyObject *module, PyObject *args);
PyObject *kv_cut_keys(PyObject *module, PyObject *args);
PyObject *kv_flags(PyObject *module, PyObject *args);

#endif
