/* Preloaded into a peer: every TCP socket it makes runs the congestion control named in KVBENCH_CONGESTION, if any.
 *
 * Accepted sockets inherit that of the listening one. The alternative, the system's default, would be everyone's.
 * And the process is killed with the one that started it: while it is frozen it cannot see the end of its input.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>

__attribute__((constructor)) static void end_with_parent(void) { prctl(PR_SET_PDEATHSIG, SIGKILL); }

int socket(int domain, int type, int protocol) {
    static int (*real)(int, int, int);
    if (!real) real = (int (*)(int, int, int))dlsym(RTLD_NEXT, "socket");
    int fd = real(domain, type, protocol);
    const char *name = getenv("KVBENCH_CONGESTION");
    int kind = type & ~(SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0 || !name || kind != SOCK_STREAM || (domain != AF_INET && domain != AF_INET6)) return fd;
    if (setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, name, (socklen_t)strlen(name))) {
        perror(name);
        exit(1); /* a figure under another congestion control would be a lie */
    }
    return fd;
}
