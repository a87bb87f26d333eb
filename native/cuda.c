/*
 * Page-locking for CUDA through the driver API, found at run time: the extension builds and runs without CUDA.
 * Prototypes after NVIDIA's CUDA Driver API reference (cuMemHostRegister, cuCtxPushCurrent, ...).
 */
#include "mapping.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>

enum { CUDA_OK = 0, HOST_REGISTER_PORTABLE = 1 };

static struct {
    void *library;
    int (*init)(unsigned);
    int (*current)(void **);
    int (*device_get)(int *, int);
    int (*primary_retain)(void **, int);
    int (*primary_release)(int);
    int (*push)(void *);
    int (*pop)(void **);
    int (*host_register)(void *, size_t, unsigned);
    int (*host_unregister)(void *);
    int (*error_name)(int, const char **);
    const char *missing;
} cuda;

static pthread_once_t cuda_once = PTHREAD_ONCE_INIT;

static void cuda_load(void) {
    cuda.library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!cuda.library) {
        cuda.missing = "libcuda.so.1 cannot be loaded (no NVIDIA driver here)";
        return;
    }
    const struct {
        void *slot;
        const char *name;
    } wanted[] = {
        {&cuda.init, "cuInit"},
        {&cuda.current, "cuCtxGetCurrent"},
        {&cuda.device_get, "cuDeviceGet"},
        {&cuda.primary_retain, "cuDevicePrimaryCtxRetain"},
        {&cuda.primary_release, "cuDevicePrimaryCtxRelease_v2"},
        {&cuda.push, "cuCtxPushCurrent_v2"},
        {&cuda.pop, "cuCtxPopCurrent_v2"},
        {&cuda.host_register, "cuMemHostRegister_v2"},
        {&cuda.host_unregister, "cuMemHostUnregister"},
        {&cuda.error_name, "cuGetErrorName"},
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        void *symbol = dlsym(cuda.library, wanted[i].name);
        if (!symbol) {
            cuda.missing = wanted[i].name;
            return;
        }
        *(void **)wanted[i].slot = symbol; /* POSIX's own idiom for function pointers from dlsym */
    }
}

static int explain(int result, const char *call, char *why, size_t why_size) {
    const char *name = NULL;
    cuda.error_name(result, &name);
    snprintf(why, why_size, "%s: %s (CUresult %d)", call, name ? name : "unknown", result);
    return -1;
}

int kv_cuda_pin_range(kv_cuda_pin *pin, void *base, size_t bytes, char *why, size_t why_size) {
    pthread_once(&cuda_once, cuda_load);
    if (cuda.missing) {
        snprintf(why, why_size, "%s%s", cuda.library ? "libcuda.so.1 lacks " : "", cuda.missing);
        return -1;
    }
    int result = cuda.init(0);
    if (result != CUDA_OK) return explain(result, "cuInit", why, why_size);
    result = cuda.current(&pin->context);
    if (result != CUDA_OK) return explain(result, "cuCtxGetCurrent", why, why_size);
    int device = 0;
    if (!pin->context) {
        result = cuda.device_get(&device, 0);
        if (result != CUDA_OK) return explain(result, "cuDeviceGet(0)", why, why_size);
        result = cuda.primary_retain(&pin->context, device);
        if (result != CUDA_OK) return explain(result, "cuDevicePrimaryCtxRetain", why, why_size);
        pin->retained = true;
    }
    result = cuda.push(pin->context);
    if (result == CUDA_OK) {
        void *popped;
        /* portable: pinned for every context of the process, not only this one */
        result = cuda.host_register(base, bytes, HOST_REGISTER_PORTABLE);
        cuda.pop(&popped);
    }
    if (result == CUDA_OK) {
        pin->pinned = true;
        return 0;
    }
    if (pin->retained) cuda.primary_release(device);
    *pin = (kv_cuda_pin){0};
    return explain(result, "cuMemHostRegister", why, why_size);
}

void kv_cuda_unpin_range(kv_cuda_pin *pin, void *base) {
    if (!pin->pinned) return;
    void *popped;
    /* At process exit the driver may be gone already (CUDA_ERROR_DEINITIALIZED): nothing is left to undo then. */
    if (cuda.push(pin->context) == CUDA_OK) {
        cuda.host_unregister(base);
        cuda.pop(&popped);
    }
    if (pin->retained) {
        int device;
        if (cuda.device_get(&device, 0) == CUDA_OK) cuda.primary_release(device);
    }
    *pin = (kv_cuda_pin){0};
}
