/* Memory without Python: mapping, huge pages, locking, CUDA registration. Nothing here needs the GIL. */
#ifndef KV_MAPPING_H
#define KV_MAPPING_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

typedef enum { KV_OFF, KV_AUTO, KV_REQUIRE } kv_choice;

/* What did not work although it was asked for with "auto": told to the caller, never silent. */
typedef struct {
    size_t count;
    char text[8][320];
} kv_notes;

void kv_note(kv_notes *notes, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Why a mapping could not be made: errnum 0 means "not enough memory" by our own count. */
typedef struct {
    int errnum;
    char text[640];
} kv_failure;

/* Always returns -1, so that a caller can `return kv_fail(...)`. */
int kv_fail(kv_failure *failure, int errnum, const char *format, ...) __attribute__((format(printf, 3, 4)));

typedef struct {
    bool pinned;
    void *context;     /* CUcontext the range was registered in */
    bool retained;     /* the context is device 0's primary one, retained by us */
} kv_cuda_pin;

/* 0, or -1 with the reason in `why`. */
int kv_cuda_pin_range(kv_cuda_pin *pin, void *base, size_t bytes, char *why, size_t why_size);
void kv_cuda_unpin_range(kv_cuda_pin *pin, void *base);

/* Bytes that can be allocated now without swapping or meeting a cgroup limit; `source` names the tightest bound.
 * SIZE_MAX when the system does not say. */
size_t kv_memory_available(char *source, size_t source_size);

typedef struct {
    size_t nbytes;
    kv_choice huge, lock, cuda;
    bool memfd, populate;
    const char *name;
} kv_arena_options;

/*
 * One mapping and who needs it. `users` are those who may touch the bytes: the open arena, each view, exported
 * buffer and DLPack tensor; the memory goes with the last of them. `holders` keep this struct itself: the arena
 * object, and all users together. Both counts are atomic, so a DLPack consumer may let go on any thread, without
 * the GIL.
 */
typedef struct {
    atomic_size_t users, holders;
    unsigned char *base;
    size_t requested;  /* bytes asked for */
    size_t nbytes;     /* bytes that may be used */
    size_t mapped;     /* bytes to unmap: nbytes rounded up to whole pages */
    size_t page_bytes;
    int fd;            /* memfd, or -1 */
    const char *huge;  /* "hugetlb", "thp" or "none" */
    bool locked, readonly;
    pid_t owner;       /* a forked child must leave the parent's CUDA registration alone */
    kv_cuda_pin cuda;
} kv_mapping;

/* Both return a mapping with one user and two holders (the users' and the arena's), or NULL. */
kv_mapping *kv_mapping_create(const kv_arena_options *options, kv_notes *notes, kv_failure *failure);
kv_mapping *kv_mapping_attach(int fd, size_t nbytes, kv_failure *failure);

void kv_mapping_use(kv_mapping *mapping);
void kv_mapping_unuse(kv_mapping *mapping);      /* unmaps when it was the last user */
bool kv_mapping_last_user(kv_mapping *mapping);  /* a hint: unmapping may take long, release the GIL */
void kv_mapping_forget(kv_mapping *mapping);     /* a holder lets go of the struct */

#endif
