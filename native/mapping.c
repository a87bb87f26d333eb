/* Creating, sharing and letting go of mappings. Linux calls by name: mmap(2), memfd_create(2), madvise(2), mlock(2). */
#include "mapping.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#ifdef __linux__
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14 */
#endif
#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010 /* Linux 5.1 */
#endif
#endif

#define THP_BYTES ((size_t)2 << 20)

void kv_note(kv_notes *notes, const char *format, ...) {
    if (notes->count == sizeof notes->text / sizeof *notes->text) return;
    va_list args;
    va_start(args, format);
    vsnprintf(notes->text[notes->count++], sizeof *notes->text, format, args);
    va_end(args);
}

int kv_fail(kv_failure *failure, int errnum, const char *format, ...) {
    va_list args;
    va_start(args, format);
    failure->errnum = errnum;
    vsnprintf(failure->text, sizeof failure->text, format, args);
    va_end(args);
    return -1;
}

/* ---- life and death ---- */

static kv_mapping *mapping_new(size_t requested) {
    kv_mapping *m = calloc(1, sizeof *m);
    if (!m) return NULL;
    atomic_init(&m->users, 1);
    atomic_init(&m->holders, 2);
    m->requested = requested;
    m->fd = -1;
    m->huge = "none";
    m->owner = getpid();
    return m;
}

static void unmap(kv_mapping *m) {
    if (m->owner == getpid()) kv_cuda_unpin_range(&m->cuda, m->base);
    if (m->base) munmap(m->base, m->mapped);
    if (m->fd >= 0) close(m->fd);
    m->base = NULL;
    m->fd = -1;
}

void kv_mapping_forget(kv_mapping *m) {
    if (atomic_fetch_sub(&m->holders, 1) == 1) free(m);
}

void kv_mapping_use(kv_mapping *m) { atomic_fetch_add(&m->users, 1); }

bool kv_mapping_last_user(kv_mapping *m) { return atomic_load(&m->users) == 1; }

void kv_mapping_unuse(kv_mapping *m) {
    if (atomic_fetch_sub(&m->users, 1) != 1) return;
    unmap(m);
    kv_mapping_forget(m);
}

/* ---- getting memory ---- */

/* `nbytes` rounded up to whole pages; false where that is no size at all. */
static bool whole_pages(size_t nbytes, size_t page, size_t *rounded) {
    if (nbytes == 0 || nbytes > (size_t)PTRDIFF_MAX - page) return false;
    *rounded = (nbytes + page - 1) / page * page;
    return true;
}

static void unwind(kv_mapping *m) {
    int saved = errno;
    unmap(m);
    errno = saved;
}

static int map_fd(kv_mapping *m, size_t bytes) {
    void *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, m->fd, 0);
    if (base == MAP_FAILED) return -1;
    m->base = base;
    m->nbytes = m->mapped = bytes;
    return 0;
}

/* Makes every page present now, so that running out is an error here and no SIGBUS later. -1 with errno. */
static int populate(kv_mapping *m) {
#ifdef __linux__
    while (madvise(m->base, m->mapped, MADV_POPULATE_WRITE) != 0) {
        if (errno == EINTR || errno == EAGAIN) continue;
        if (errno == EINVAL) goto touch; /* Linux before 5.14 */
        return -1;
    }
    return 0;
touch:
    if (m->fd >= 0) {
        errno = posix_fallocate(m->fd, 0, (off_t)m->mapped);
        if (errno) return -1;
    }
#endif
    for (size_t at = 0; at < m->mapped; at += m->page_bytes) ((volatile unsigned char *)m->base)[at] = 0;
    return 0;
}

static int enough_memory(const kv_arena_options *o, size_t bytes, kv_failure *failure) {
    char source[160];
    size_t available = kv_memory_available(source, sizeof source);
    if (bytes <= available) return 0;
    return kv_fail(failure, 0,
                   "asked for an arena of %zu bytes, but only %zu bytes are available (%s): ask for less, free memory, "
                   "or raise the limit (the container's memory limit, systemd's MemoryMax)",
                   o->nbytes, available, source);
}

#ifdef __linux__

/* True when the kernel's setting (the word in brackets) lets madvise(MADV_HUGEPAGE) work; `setting` gets the line. */
static bool thp_allowed(const char *path, char *setting, size_t size) {
    FILE *file = fopen(path, "re");
    snprintf(setting, size, "unreadable");
    if (!file) return false;
    if (fgets(setting, (int)size, file)) setting[strcspn(setting, "\n")] = 0;
    fclose(file);
    return !strstr(setting, "[never]") && !strstr(setting, "[deny]") && strchr(setting, '[');
}

static int advise_thp(kv_mapping *m, kv_notes *notes) {
    const char *path = m->fd >= 0 ? "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
                                  : "/sys/kernel/mm/transparent_hugepage/enabled";
    char setting[128];
    if (m->mapped < THP_BYTES) {
        kv_note(notes, "no huge pages: the arena (%zu bytes) is smaller than one huge page (%zu)", m->mapped, THP_BYTES);
        return -1;
    }
    if (!thp_allowed(path, setting, sizeof setting)) {
        kv_note(notes, "no transparent huge pages: %s is \"%s\" (write \"advise\" or \"madvise\" there to allow them)",
                path, setting);
        return -1;
    }
    if (madvise(m->base, m->mapped, MADV_HUGEPAGE) != 0) {
        kv_note(notes, "no transparent huge pages: madvise(MADV_HUGEPAGE): %s", strerror(errno));
        return -1;
    }
    m->huge = "thp";
    return 0;
}

static int memfd(const char *name, unsigned flags) {
    char shorter[200]; /* the kernel takes 249 bytes */
    snprintf(shorter, sizeof shorter, "%s", name);
    return memfd_create(shorter, MFD_CLOEXEC | MFD_ALLOW_SEALING | flags);
}

/* From here on nobody can shrink the file under a reader (SIGBUS) or map it writable a second time. */
static void seal(kv_mapping *m, kv_notes *notes) {
    int sizes = F_SEAL_SHRINK | F_SEAL_GROW;
    if (fcntl(m->fd, F_ADD_SEALS, sizes | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL) == 0) return;
    if (fcntl(m->fd, F_ADD_SEALS, sizes | F_SEAL_SEAL) == 0) {
        kv_note(notes, "other processes could map the arena writable: F_SEAL_FUTURE_WRITE needs Linux 5.1");
        return;
    }
    kv_note(notes, "the arena cannot be attached to: its memfd takes no seals: %s", strerror(errno));
}

static size_t default_huge_page(void) {
    FILE *file = fopen("/proc/meminfo", "re");
    if (!file) return 0;
    char line[128];
    size_t kib = 0;
    while (fgets(line, sizeof line, file) && sscanf(line, "Hugepagesize: %zu kB", &kib) != 1) {
    }
    fclose(file);
    return kib * 1024;
}

/* Pages of the hugetlb pool: mmap reserves them, so an empty pool is an error here. -1 with a note. */
static int map_hugetlb(kv_mapping *m, const kv_arena_options *o, kv_notes *notes) {
    size_t page = default_huge_page(), bytes;
    if (page == 0 || o->nbytes < page) {
        kv_note(notes, "no hugetlb pages: %s", page ? "the arena is smaller than one" : "this kernel has none");
        return -1;
    }
    if (!whole_pages(o->nbytes, page, &bytes)) return -1;
    m->fd = memfd(o->name, MFD_HUGETLB);
    m->page_bytes = page;
    if (m->fd < 0 || ftruncate(m->fd, (off_t)bytes) != 0 || map_fd(m, bytes) != 0 || (o->populate && populate(m) != 0)) {
        kv_note(notes, "no hugetlb pages: %s (%zu pages of %zu bytes needed: sysctl vm.nr_hugepages)", strerror(errno),
                bytes / page, page);
        unwind(m);
        return -1;
    }
    m->huge = "hugetlb";
    return 0;
}

static int map_shared(kv_mapping *m, const kv_arena_options *o, size_t bytes, kv_notes *notes) {
    (void)notes;
    m->fd = memfd(o->name, 0);
    if (m->fd < 0 || ftruncate(m->fd, (off_t)bytes) != 0) return -1;
    return map_fd(m, bytes);
}

#else

static int advise_thp(kv_mapping *m, kv_notes *notes) {
    (void)m;
    kv_note(notes, "no huge pages: not supported on this system");
    return -1;
}

static void seal(kv_mapping *m, kv_notes *notes) { (void)m, (void)notes; }

static int map_hugetlb(kv_mapping *m, const kv_arena_options *o, kv_notes *notes) {
    (void)m, (void)o, (void)notes;
    return -1;
}

static int map_anonymous(kv_mapping *m, size_t bytes);

static int map_shared(kv_mapping *m, const kv_arena_options *o, size_t bytes, kv_notes *notes) {
    (void)o;
    kv_note(notes, "no memfd on this system: the memory cannot be attached to by another process");
    return map_anonymous(m, bytes);
}

#endif

/* Aligned to 2 MiB, so that transparent huge pages fit from the first byte to the last. */
static int map_anonymous(kv_mapping *m, size_t bytes) {
    if (bytes > (size_t)PTRDIFF_MAX - THP_BYTES) return errno = ENOMEM, -1;
    size_t slack = bytes >= THP_BYTES ? THP_BYTES : 0;
    unsigned char *base = mmap(NULL, bytes + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) return -1;
    if (slack) {
        size_t before = (THP_BYTES - (uintptr_t)base % THP_BYTES) % THP_BYTES;
        if (before) munmap(base, before);
        if (slack - before) munmap(base + before + bytes, slack - before);
        base += before;
    }
    m->base = base;
    m->nbytes = m->mapped = bytes;
    return 0;
}

static int map_memory(kv_mapping *m, const kv_arena_options *o, kv_notes *notes, kv_failure *failure) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), bytes;
    if (!whole_pages(o->nbytes, page, &bytes))
        return kv_fail(failure, EINVAL, "asked for an arena of %zu bytes: at least 1 and at most %zu are possible",
                       o->nbytes, (size_t)PTRDIFF_MAX - page);
    if (o->huge != KV_OFF && o->memfd && map_hugetlb(m, o, notes) == 0) return 0;
    if (enough_memory(o, bytes, failure) != 0) return -1;
    m->page_bytes = page;
    if ((o->memfd ? map_shared(m, o, bytes, notes) : map_anonymous(m, bytes)) != 0)
        return kv_fail(failure, errno, "asked for an arena of %zu bytes: mapping it failed: %s", o->nbytes,
                       strerror(errno));
    if (o->huge != KV_OFF && advise_thp(m, notes) != 0 && o->huge == KV_REQUIRE)
        return kv_fail(failure, ENOTSUP, "huge=\"require\", but %s; use huge=\"auto\" to do without",
                       notes->count ? notes->text[notes->count - 1] : "there are no huge pages");
    if (o->populate && populate(m) != 0)
        return kv_fail(failure, errno, "asked for an arena of %zu bytes: the memory ran out while it was populated: %s",
                       o->nbytes, strerror(errno));
    return 0;
}

static int lock_memory(kv_mapping *m, const kv_arena_options *o, kv_notes *notes, kv_failure *failure) {
    if (o->lock == KV_OFF) return 0;
    if (mlock(m->base, m->mapped) == 0) {
        m->locked = true;
        return 0;
    }
    int error = errno;
    struct rlimit limit = {0};
    getrlimit(RLIMIT_MEMLOCK, &limit);
    char text[256];
    snprintf(text, sizeof text,
             "%zu bytes cannot be locked: %s; RLIMIT_MEMLOCK is %llu bytes: raise it (ulimit -l, systemd's "
             "LimitMEMLOCK=infinity) or grant CAP_IPC_LOCK",
             m->mapped, strerror(error), (unsigned long long)limit.rlim_cur);
    if (o->lock == KV_REQUIRE) return kv_fail(failure, error, "lock=\"require\", but %s", text);
    kv_note(notes, "not locked: %s", text);
    return 0;
}

static int pin_memory(kv_mapping *m, const kv_arena_options *o, kv_notes *notes, kv_failure *failure) {
    char why[256];
    if (o->cuda == KV_OFF || kv_cuda_pin_range(&m->cuda, m->base, m->mapped, why, sizeof why) == 0) return 0;
    if (o->cuda == KV_REQUIRE)
        return kv_fail(failure, ENODEV, "cuda=\"require\", but the arena cannot be registered with CUDA: %s", why);
    kv_note(notes, "not registered with CUDA: %s", why);
    return 0;
}

kv_mapping *kv_mapping_create(const kv_arena_options *o, kv_notes *notes, kv_failure *failure) {
    kv_mapping *m = mapping_new(o->nbytes);
    if (!m) {
        kv_fail(failure, 0, "out of memory");
        return NULL;
    }
    if (map_memory(m, o, notes, failure) != 0 || lock_memory(m, o, notes, failure) != 0 ||
        pin_memory(m, o, notes, failure) != 0) {
        unmap(m);
        free(m);
        return NULL;
    }
    if (m->fd >= 0) seal(m, notes);
    return m;
}

/* ---- another process's arena, read-only ---- */

kv_mapping *kv_mapping_attach(int fd, size_t nbytes, kv_failure *failure) {
#ifdef __linux__
    struct stat status;
    if (fstat(fd, &status) != 0) {
        kv_fail(failure, errno, "attach: descriptor %d: %s", fd, strerror(errno));
        return NULL;
    }
    if (nbytes == 0 || nbytes > (size_t)status.st_size) {
        kv_fail(failure, EINVAL, "attach: asked for %zu bytes, descriptor %d has %lld", nbytes, fd,
                (long long)status.st_size);
        return NULL;
    }
    int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0 || !(seals & F_SEAL_SHRINK)) {
        kv_fail(failure, EINVAL,
                "attach: descriptor %d is not the memfd of an arena: it is not sealed against shrinking, so reading it "
                "could kill this process (SIGBUS)",
                fd);
        return NULL;
    }
    kv_mapping *m = mapping_new(nbytes);
    if (!m) {
        kv_fail(failure, 0, "out of memory");
        return NULL;
    }
    m->readonly = true;
    m->nbytes = nbytes;
    m->page_bytes = (size_t)status.st_blksize; /* hugetlbfs says its page size here */
    m->huge = m->page_bytes > (size_t)sysconf(_SC_PAGESIZE) ? "hugetlb" : "none";
    if (!whole_pages(nbytes, m->page_bytes, &m->mapped)) m->mapped = nbytes;
    m->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    void *base = m->fd < 0 ? MAP_FAILED : mmap(NULL, m->mapped, PROT_READ, MAP_SHARED, m->fd, 0);
    if (base == MAP_FAILED) {
        kv_fail(failure, errno, "attach: mapping %zu bytes of descriptor %d: %s", nbytes, fd, strerror(errno));
        unmap(m);
        free(m);
        return NULL;
    }
    m->base = base;
    return m;
#else
    (void)nbytes;
    kv_fail(failure, ENOTSUP, "attach: descriptor %d: arenas are shared between processes on Linux only", fd);
    return NULL;
#endif
}
