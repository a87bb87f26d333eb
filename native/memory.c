/* How much memory there is: /proc/meminfo and the cgroup (v1 and v2) this process is in. */
#include "mapping.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifdef __linux__

static bool read_number(const char *path, uint64_t *value) {
    FILE *file = fopen(path, "re");
    if (!file) return false;
    bool ok = fscanf(file, "%" SCNu64, value) == 1; /* "max" does not parse: no limit */
    fclose(file);
    return ok;
}

/* The number after a line's first word, which must be `key`; 0 when there is none. */
static uint64_t read_field(const char *path, const char *key) {
    FILE *file = fopen(path, "re");
    if (!file) return 0;
    char line[256];
    uint64_t value = 0;
    size_t length = strlen(key);
    while (fgets(line, sizeof line, file)) {
        if (strncmp(line, key, length) == 0) {
            value = strtoull(line + length, NULL, 10);
            break;
        }
    }
    fclose(file);
    return value;
}

typedef struct {
    const char *root, *limit, *usage, *reclaimable;
} cgroup_files;

static const cgroup_files V1 = {"/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
                                "total_inactive_file "};
static const cgroup_files V2 = {"/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file "};

/* Lowers *available to the room left under this group and each of its parents. */
static void bound_by_cgroup(const cgroup_files *files, char *group, size_t *available, char *source, size_t size) {
    char path[1024];
    for (;;) {
        uint64_t limit, usage;
        snprintf(path, sizeof path, "%s%s/%s", files->root, group, files->limit);
        if (read_number(path, &limit)) {
            snprintf(path, sizeof path, "%s%s/%s", files->root, group, files->usage);
            if (read_number(path, &usage)) {
                snprintf(path, sizeof path, "%s%s/memory.stat", files->root, group);
                uint64_t cache = read_field(path, files->reclaimable);
                uint64_t used = usage > cache ? usage - cache : 0;
                uint64_t room = limit > used ? limit - used : 0;
                if (room < *available) {
                    *available = (size_t)room;
                    snprintf(source, size, "memory limit %" PRIu64 " of cgroup %.100s", limit, *group ? group : "/");
                }
            }
        }
        char *slash = strrchr(group, '/');
        if (!slash) return;
        *slash = 0;
    }
}

static void bound_by_cgroups(size_t *available, char *source, size_t size) {
    FILE *file = fopen("/proc/self/cgroup", "re");
    if (!file) return;
    char line[512];
    while (fgets(line, sizeof line, file)) { /* hierarchy:controllers:/path */
        line[strcspn(line, "\n")] = 0;
        char *controllers = strchr(line, ':');
        char *group = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!group) continue;
        *group++ = 0;
        controllers++;
        if (strcmp(group, "/") == 0) *group = 0;
        if (*controllers == 0) bound_by_cgroup(&V2, group, available, source, size);
        else if (strcmp(controllers, "memory") == 0) bound_by_cgroup(&V1, group, available, source, size);
    }
    fclose(file);
}

size_t kv_memory_available(char *source, size_t source_size) {
    size_t available = SIZE_MAX;
    uint64_t kib = read_field("/proc/meminfo", "MemAvailable:");
    snprintf(source, source_size, "unknown");
    if (kib) {
        available = (size_t)kib * 1024;
        snprintf(source, source_size, "MemAvailable in /proc/meminfo");
    }
    bound_by_cgroups(&available, source, source_size);
    return available;
}

#else

size_t kv_memory_available(char *source, size_t source_size) {
    /* macOS has no cheap count of free memory; its total is still a bound that catches a wrong unit. */
    long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    snprintf(source, source_size, "physical memory");
    return pages > 0 && page > 0 ? (size_t)pages * (size_t)page : SIZE_MAX;
}

#endif
