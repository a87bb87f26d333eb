/* LD_PRELOAD: a kernel that seals TLS for one descriptor, as far as its callers see. It takes the keys and notes record types;
 * what is sent stays plain, and the test seals it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <string.h>
#include <sys/socket.h>

int kernel_fd = -1, refuses;
unsigned char info[64];
int info_bytes, record_type;

int setsockopt(int fd, int level, int name, const void *value, socklen_t nbytes) {
    int (*real)(int, int, int, const void *, socklen_t) = (int (*)(int, int, int, const void *, socklen_t))dlsym(RTLD_NEXT, "setsockopt");
    if (fd != kernel_fd) return real(fd, level, name, value, nbytes);
    if (level == 6 && name == 31) return nbytes == 3 && !memcmp(value, "tls", 3) ? 0 : -1; /* TCP_ULP */
    if (level != 282 || name != 1) return real(fd, level, name, value, nbytes);
    if (refuses || nbytes > sizeof info) return -1; /* TLS_TX */
    memcpy(info, value, nbytes);
    info_bytes = (int)nbytes;
    return 0;
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags) {
    ssize_t (*real)(int, const struct msghdr *, int) = (ssize_t (*)(int, const struct msghdr *, int))dlsym(RTLD_NEXT, "sendmsg");
    struct msghdr plain = *message;
    struct cmsghdr *head = fd == kernel_fd && message->msg_controllen ? CMSG_FIRSTHDR(message) : NULL;
    if (head && head->cmsg_level == 282 && head->cmsg_type == 1 && head->cmsg_len == CMSG_LEN(1)) { /* TLS_SET_RECORD_TYPE */
        record_type = *CMSG_DATA(head);
        plain.msg_control = NULL;
        plain.msg_controllen = 0;
    }
    return real(fd, &plain, flags);
}
