/* DLPack capsules (https://dmlc.github.io/dlpack, structures of versions 0 and 1): numpy and torch take them unread. */
#include "kvnative.h"

#include <stdint.h>
#include <stdlib.h>

typedef struct {
    void *data;
    struct {
        int32_t type, id;
    } device;
    int32_t ndim;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} DLTensor;

typedef struct DLManagedTensor {
    DLTensor tensor;
    void *context;
    void (*deleter)(struct DLManagedTensor *);
} DLManagedTensor;

typedef struct DLManagedTensorVersioned {
    uint32_t major, minor;
    void *context;
    void (*deleter)(struct DLManagedTensorVersioned *);
    uint64_t flags;
    DLTensor tensor;
} DLManagedTensorVersioned;

enum { DL_CPU = 1, DL_UINT = 1, DL_READ_ONLY = 1 };

/* One allocation: the structure a consumer sees, and what it points to. */
typedef struct {
    union {
        DLManagedTensor plain;
        DLManagedTensorVersioned versioned;
    } managed;
    int64_t shape, stride;
    kv_mapping *mapping;
} shared_tensor;

static void let_go(shared_tensor *shared) {
    kv_mapping_unuse(shared->mapping);
    free(shared);
}

/* Consumers call these on any thread, with or without the GIL: nothing of Python is touched. */
static void delete_plain(DLManagedTensor *managed) { let_go(managed->context); }
static void delete_versioned(DLManagedTensorVersioned *managed) { let_go(managed->context); }

/* A capsule that was consumed has been renamed, and its deleter is the consumer's to call. */
static void destroy_capsule(PyObject *capsule) {
    if (PyCapsule_IsValid(capsule, "dltensor") || PyCapsule_IsValid(capsule, "dltensor_versioned"))
        let_go(PyCapsule_GetContext(capsule));
}

PyObject *kv_dlpack_capsule(kv_mapping *mapping, void *data, size_t nbytes, bool readonly, bool versioned) {
    shared_tensor *shared = calloc(1, sizeof *shared);
    if (!shared) return PyErr_NoMemory();
    shared->shape = (int64_t)nbytes;
    shared->stride = 1;
    shared->mapping = mapping;
    DLTensor tensor = {
        .data = data,
        .device = {DL_CPU, 0},
        .ndim = 1,
        .dtype = {DL_UINT, 8, 1},
        .shape = &shared->shape,
        .strides = &shared->stride,
    };
    PyObject *capsule;
    if (versioned) {
        shared->managed.versioned = (DLManagedTensorVersioned){
            .major = 1, .minor = 0, .context = shared, .deleter = delete_versioned,
            .flags = readonly ? DL_READ_ONLY : 0, .tensor = tensor};
        capsule = PyCapsule_New(&shared->managed.versioned, "dltensor_versioned", NULL);
    } else {
        shared->managed.plain = (DLManagedTensor){.tensor = tensor, .context = shared, .deleter = delete_plain};
        capsule = PyCapsule_New(&shared->managed.plain, "dltensor", NULL);
    }
    if (!capsule) {
        free(shared);
        return NULL;
    }
    kv_mapping_use(mapping);
    PyCapsule_SetContext(capsule, shared);
    PyCapsule_SetDestructor(capsule, destroy_capsule);
    return capsule;
}
