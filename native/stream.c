/* The plain TCP stream of the engine. */
#include "engine.h"

#ifdef KV_ENGINE
#include <errno.h>
#include <limits.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/socket.h>

static ssize_t plain_readv(kv_stream *stream, struct iovec *items, size_t count) {
    ssize_t n;
    if (count == 1) {
        n = recv(stream->fd, items->iov_base, items->iov_len, MSG_DONTWAIT);
    } else {
        struct msghdr message = {.msg_iov = items, .msg_iovlen = count};
        n = recvmsg(stream->fd, &message, MSG_DONTWAIT);
    }
    return n < 0 ? -errno : n;
}

static ssize_t plain_writev(kv_stream *stream, struct iovec *items, size_t count) {
    ssize_t n;
    if (count == 1) {
        n = send(stream->fd, items->iov_base, items->iov_len, MSG_DONTWAIT | MSG_NOSIGNAL);
    } else {
        struct msghdr message = {.msg_iov = items, .msg_iovlen = count};
        n = sendmsg(stream->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    }
    return n < 0 ? -errno : n;
}

static void plain_shutdown(kv_stream *stream) { shutdown(stream->fd, SHUT_WR); }

static void plain_destroy(kv_stream *stream) { free(stream); }

static const kv_stream_ops PLAIN = {
    .readv = plain_readv, .writev = plain_writev, .shutdown = plain_shutdown, .destroy = plain_destroy};

kv_stream *kv_plain_stream(int fd) {
    kv_stream *stream = calloc(1, sizeof *stream);
    if (stream) *stream = (kv_stream){.ops = &PLAIN, .fd = fd};
    return stream;
}

unsigned kv_round_trip_us(int fd) {
    struct tcp_info info;
    socklen_t nbytes = sizeof info;
    if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &nbytes) < 0) return UINT_MAX; /* not a TCP socket */
    if (nbytes < offsetof(struct tcp_info, tcpi_min_rtt) + sizeof info.tcpi_min_rtt) return UINT_MAX;
    return info.tcpi_min_rtt;
}
#else
typedef int kv_no_stream;
#endif
