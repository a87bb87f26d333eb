/* kvtransport._native: byte loops without the GIL, and memory to move them through. Its twin is kvtransport/_pure.py. */
#include "engine.h"

static PyMethodDef functions[] = {
    {"send_pages", KV_METHOD(kv_send_pages), METH_VARARGS | METH_KEYWORDS, kv_send_pages_doc},
    {"recv_pages", KV_METHOD(kv_recv_pages), METH_VARARGS | METH_KEYWORDS, kv_recv_pages_doc},
    {"hash_pages", KV_METHOD(kv_hash_pages), METH_VARARGS | METH_KEYWORDS, kv_hash_pages_doc},
    {"hash_each", KV_METHOD(kv_hash_each), METH_VARARGS | METH_KEYWORDS, kv_hash_each_doc},
    {"copy_pages", KV_METHOD(kv_copy_pages), METH_VARARGS | METH_KEYWORDS, kv_copy_pages_doc},
    {"split_planes", KV_METHOD(kv_split_planes), METH_VARARGS | METH_KEYWORDS, kv_split_planes_doc},
    {"join_planes", KV_METHOD(kv_join_planes), METH_VARARGS | METH_KEYWORDS, kv_join_planes_doc},
    {"tls_version", kv_tls_version, METH_NOARGS, kv_tls_version_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "kvtransport._native",
    .m_doc = "Native byte loops and memory of kvtransport; use kvtransport.buffers.",
    .m_size = -1,
    .m_methods = functions,
};

PyMODINIT_FUNC PyInit__native(void) {
    PyObject *module = PyModule_Create(&definition);
    if (!module) return NULL;
    if (kv_add_arena_types(module) == 0 && kv_add_hasher_type(module) == 0 && kv_add_engine_types(module) == 0 &&
        kv_add_tls_types(module) == 0)
        return module;
    Py_DECREF(module);
    return NULL;
}
