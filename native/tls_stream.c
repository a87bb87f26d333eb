/* TLS records as a stream of the I/O engine. */
#include "engine.h"

#ifdef KV_ENGINE
#include <stdlib.h>
#include <sys/socket.h>

#include "tls.h"

typedef struct {
    kv_stream stream;
    kv_tls_records *records; /* of a Tls object, which outlives the stream */
} tls_stream;

static ssize_t tls_readv(kv_stream *stream, struct iovec *items, size_t count) {
    return kv_tls_readv(((tls_stream *)stream)->records, items, count);
}
static ssize_t tls_writev(kv_stream *stream, struct iovec *items, size_t count) {
    return kv_tls_writev(((tls_stream *)stream)->records, items, count);
}
static int tls_flush(kv_stream *stream) {
    kv_tls_records *records = ((tls_stream *)stream)->records;
    int result = kv_tls_flush(records);
    if (result == 0 && records->shut) shutdown(stream->fd, SHUT_WR); /* close_notify is out */
    return result;
}
static bool tls_pending(kv_stream *stream) { return kv_tls_pending(((tls_stream *)stream)->records); }
static void tls_shutdown(kv_stream *stream) {
    kv_tls_records *records = ((tls_stream *)stream)->records;
    kv_tls_shutdown(records);
    if (kv_tls_kept(records) == 0) shutdown(stream->fd, SHUT_WR);
}
static void tls_destroy(kv_stream *stream) { free(stream); }

/* Not exclusive: after the handshake the two directions share nothing that is not atomic. */
static const kv_stream_ops TLS = {.readv = tls_readv,
                                  .writev = tls_writev,
                                  .flush = tls_flush,
                                  .pending = tls_pending,
                                  .shutdown = tls_shutdown,
                                  .destroy = tls_destroy};

kv_stream *kv_tls_stream(kv_tls_records *records) {
    tls_stream *stream = calloc(1, sizeof *stream);
    if (!stream) return NULL;
    *stream = (tls_stream){.stream = {.ops = &TLS, .fd = records->fd}, .records = records};
    return &stream->stream;
}
#else
typedef int kv_no_tls_stream;
#endif
