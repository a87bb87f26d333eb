/* Vectored, non-blocking sends and receives over page lists: one Python call moves up to `budget` bytes. */
#include "kvnative.h"

#include <errno.h>
#include <sys/socket.h>

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0 /* macOS; CPython ignores SIGPIPE anyway */
#endif

/* IOV_MAX is 1,024 on Linux and macOS. */
#define IOV_LIMIT 1024
/* One receive of at most 256 KiB measured 18% faster than 1 MiB: the copy stays in the cache. */
#define RECV_BYTES ((size_t)256 << 10)

typedef ssize_t (*kv_transfer)(int fd, struct iovec *items, size_t count);

static ssize_t send_some(int fd, struct iovec *items, size_t count) {
    if (count == 1) return send(fd, items->iov_base, items->iov_len, MSG_NOSIGNAL | MSG_DONTWAIT);
    struct msghdr message = {.msg_iov = items};
    message.msg_iovlen = count; /* its type differs between systems */
    return sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static ssize_t recv_some(int fd, struct iovec *items, size_t count) {
    if (count == 1) return recv(fd, items->iov_base, items->iov_len, MSG_DONTWAIT);
    struct msghdr message = {.msg_iov = items};
    message.msg_iovlen = count;
    return recvmsg(fd, &message, MSG_DONTWAIT);
}

typedef struct {
    size_t nbytes; /* moved */
    int error;     /* errno, 0 when none */
    bool end;      /* the peer has ended the stream */
} kv_moved;

/* Moves until everything is moved, the socket would block, or it fails. Runs without the GIL. */
static kv_moved move(int fd, kv_iovs *iovs, kv_transfer transfer, size_t per_call) {
    kv_moved moved = {0};
    struct iovec *items = iovs->items;
    size_t count = iovs->count;
    while (count) {
        size_t n = 0, bytes = 0;
        while (n < count && n < IOV_LIMIT && bytes < per_call) bytes += items[n++].iov_len;
        size_t excess = bytes > per_call ? bytes - per_call : 0;
        items[n - 1].iov_len -= excess;
        ssize_t result = transfer(fd, items, n);
        int error = errno;
        items[n - 1].iov_len += excess;
        if (result < 0) {
            if (error == EINTR) continue;
            if (error != EAGAIN && error != EWOULDBLOCK) moved.error = error;
            return moved;
        }
        if (result == 0) {
            moved.end = true;
            return moved;
        }
        moved.nbytes += (size_t)result;
        size_t left = (size_t)result;
        while (count && left >= items->iov_len) {
            left -= items->iov_len;
            items++, count--;
        }
        if (left) {
            items->iov_base = (unsigned char *)items->iov_base + left;
            items->iov_len -= left;
        }
    }
    return moved;
}

static PyObject *os_error(int error) {
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static int position_error(const char *what, size_t position, size_t nbytes) {
    PyErr_Format(PyExc_ValueError, "%s is %zu, but there are only %zu bytes", what, position, nbytes);
    return -1;
}

int kv_take_budget(size_t budget) {
    if (budget) return 0;
    PyErr_SetString(PyExc_ValueError, "budget must be at least 1 byte");
    return -1;
}

const char kv_send_pages_doc[] =
    "send_pages($module, /, fd, head, base, pieces, start, budget=1048576)\n--\n\n"
    "Send bytes of the message head ++ pages from position start on, without blocking.\n\n"
    "Stops when all is sent, the socket would block or budget bytes are sent; returns the bytes this call sent.";

int kv_gather_message(kv_iovs *iovs, const Py_buffer *head, const kv_pages *pages, size_t start, size_t budget) {
    size_t head_bytes = (size_t)head->len;
    if (start > head_bytes + pages->nbytes) return position_error("start", start, head_bytes + pages->nbytes);
    size_t at = start; /* in the message */
    if (at < head_bytes) {
        size_t take = head_bytes - at < budget ? head_bytes - at : budget;
        if (kv_iovs_add(iovs, (unsigned char *)head->buf + at, take) < 0) return -1;
        at += take;
        budget -= take;
    }
    size_t from = at - head_bytes;
    if (budget == 0) return 0;
    size_t stop = budget < pages->nbytes - from ? from + budget : pages->nbytes;
    return kv_iovs_add_pages(iovs, pages, from, stop);
}

PyObject *kv_send_pages(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"fd", "head", "base", "pieces", "start", "budget", NULL};
    PyObject *fd_object, *base, *pieces;
    Py_buffer head = {0};
    kv_pages pages;
    size_t start, budget = KV_DEFAULT_BUDGET;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Oy*OOO&|O&:send_pages", names, &fd_object, &head, &base, &pieces,
                                     kv_size_converter, &start, kv_size_converter, &budget))
        return NULL;
    kv_moved moved = {0};
    bool ok = false;
    int fd = PyObject_AsFileDescriptor(fd_object);
    if (fd >= 0 && kv_take_budget(budget) == 0 && kv_pages_get(&pages, base, pieces, false) == 0) {
        kv_iovs iovs;
        kv_iovs_init(&iovs);
        ok = kv_gather_message(&iovs, &head, &pages, start, budget) == 0;
        if (ok) {
            Py_BEGIN_ALLOW_THREADS
            moved = move(fd, &iovs, send_some, SIZE_MAX);
            Py_END_ALLOW_THREADS
        }
        kv_iovs_free(&iovs);
        kv_pages_release(&pages);
    }
    PyBuffer_Release(&head);
    if (!ok) return NULL;
    if (moved.error) return os_error(moved.error);
    return PyLong_FromSize_t(moved.nbytes);
}

const char kv_recv_pages_doc[] =
    "recv_pages($module, /, fd, base, pieces, start, tail=None, tail_start=0, budget=1048576)\n--\n\n"
    "Receive into pages from position start on, then into tail from tail_start on, without blocking.\n\n"
    "Stops when all is there, the socket would block or budget bytes came; returns the bytes this call received.\n"
    "Raises EOFError when the peer has ended the stream and this call received nothing.";

int kv_gather_room(kv_iovs *iovs, const kv_pages *pages, size_t start, const Py_buffer *tail, size_t tail_start,
                   size_t budget) {
    if (start > pages->nbytes) return position_error("start", start, pages->nbytes);
    if (tail_start > (size_t)tail->len) return position_error("tail_start", tail_start, (size_t)tail->len);
    size_t stop = budget < pages->nbytes - start ? start + budget : pages->nbytes;
    if (kv_iovs_add_pages(iovs, pages, start, stop) < 0) return -1;
    budget -= stop - start;
    size_t rest = (size_t)tail->len - tail_start;
    return rest ? kv_iovs_add(iovs, (unsigned char *)tail->buf + tail_start, rest < budget ? rest : budget) : 0;
}

PyObject *kv_recv_pages(PyObject *module, PyObject *args, PyObject *kwargs) {
    (void)module;
    static char *names[] = {"fd", "base", "pieces", "start", "tail", "tail_start", "budget", NULL};
    PyObject *fd_object, *base, *pieces, *tail_object = Py_None;
    kv_pages pages;
    size_t start, tail_start = 0, budget = KV_DEFAULT_BUDGET;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO&|OO&O&:recv_pages", names, &fd_object, &base, &pieces,
                                     kv_size_converter, &start, &tail_object, kv_size_converter, &tail_start,
                                     kv_size_converter, &budget))
        return NULL;
    int fd = PyObject_AsFileDescriptor(fd_object);
    if (fd < 0 || kv_take_budget(budget) < 0) return NULL;
    Py_buffer tail = {0};
    if (tail_object != Py_None && PyObject_GetBuffer(tail_object, &tail, PyBUF_WRITABLE) < 0) return NULL;
    kv_moved moved = {0};
    bool ok = false;
    if (kv_pages_get(&pages, base, pieces, true) == 0) {
        kv_iovs iovs;
        kv_iovs_init(&iovs);
        ok = kv_gather_room(&iovs, &pages, start, &tail, tail_start, budget) == 0;
        if (ok) {
            Py_BEGIN_ALLOW_THREADS
            moved = move(fd, &iovs, recv_some, RECV_BYTES);
            Py_END_ALLOW_THREADS
        }
        kv_iovs_free(&iovs);
        kv_pages_release(&pages);
    }
    PyBuffer_Release(&tail);
    if (!ok) return NULL;
    if (moved.error) return os_error(moved.error);
    if (moved.end && moved.nbytes == 0) {
        PyErr_SetString(PyExc_EOFError, "the peer has ended the stream");
        return NULL;
    }
    return PyLong_FromSize_t(moved.nbytes);
}
