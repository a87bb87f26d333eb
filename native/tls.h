/*
 * TLS 1.3 (RFC 8446) below the frames: OpenSSL shakes hands, then records are sealed and opened here with its ciphers,
 * straight from and into page lists. SSL_write and SSL_read copy every byte once more and cost a system call a record;
 * doing without them measured 1.3 times their goodput.
 *
 * After the handshake the two directions share nothing but `update_wanted`: one thread may read while another writes.
 */
#ifndef KV_TLS_H
#define KV_TLS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "openssl.h"

#define KV_TLS_HEADER 5
#define KV_TLS_TAG 16
#define KV_TLS_PLAIN ((size_t)1 << 14)             /* content of a record, at most */
#define KV_TLS_RECORD (KV_TLS_HEADER + KV_TLS_PLAIN + 256) /* a record, at most */
#define KV_TLS_MAX_HASH 48
/* AES-GCM keys are good for 2^24.5 full records (RFC 8446, 5.5); they are renewed well before. */
#define KV_TLS_UPDATE_RECORDS ((uint64_t)1 << 23)

/* The table of OpenSSL's functions; NULL where it is not there, with the reason in *why. Needs the GIL. */
const kv_openssl *kv_openssl_get(const char **why);

/* One direction. */
typedef struct {
    void *cipher; /* EVP_CIPHER_CTX */
    unsigned char secret[KV_TLS_MAX_HASH], iv[12];
    uint64_t sequence;
} kv_tls_way;

typedef struct kv_tls_records {
    const kv_openssl *o;
    int fd;
    const struct kv_tls_suite *suite;
    kv_tls_way rx, tx;
    uint64_t update_records; /* keys are renewed after so many */
    atomic_bool update_wanted;
    /* receiving: bytes [in_at, in_end) of `in` are not opened yet; [plain_at, plain_end) of `plain`, which is a record
     * opened where it lies in `in` before in_at, are not delivered */
    unsigned char *in, *plain;
    size_t in_at, in_end, in_capacity, plain_at, plain_end;
    bool ended;    /* the peer has ended the stream */
    int rx_error;  /* errno, for good */
    int idle;      /* records without data in a row */
    int alert;     /* the peer's alert, -1: none */
    const char *why;
    /* sending: bytes [out_at, out_end) are sealed and not sent */
    unsigned char *out;
    size_t out_at, out_end, out_capacity;
    bool shut;
    bool kernel; /* the kernel seals what is sent (kTLS) */
    uint64_t kernel_records; /* it made so many */
} kv_tls_records;

/* NULL where the cipher suite (its IANA number) is none of TLS 1.3's that are supported. */
const struct kv_tls_suite *kv_tls_suite_of(unsigned number);
size_t kv_tls_suite_hash_bytes(const struct kv_tls_suite *suite);

/* Traffic secrets of hash_bytes each. -1: no memory, or a cipher that OpenSSL does not give; then free all the same. */
int kv_tls_records_init(kv_tls_records *r, const kv_openssl *o, int fd, const struct kv_tls_suite *suite,
                        const unsigned char *rx_secret, const unsigned char *tx_secret);
void kv_tls_records_free(kv_tls_records *r);
/* Lets the kernel seal what is sent, where it can. False: it cannot, and nothing has changed. */
bool kv_tls_try_kernel(kv_tls_records *r);

/* Bytes moved; 0 at the end of the stream (readv), -errno; -EAGAIN: would block. -EPROTO, -EBADMSG: see `why`, `alert`. */
ssize_t kv_tls_readv(kv_tls_records *r, const struct iovec *items, size_t count);
ssize_t kv_tls_writev(kv_tls_records *r, const struct iovec *items, size_t count);
/* Send on what writev took and kept: 0 when nothing is kept, else -errno. */
int kv_tls_flush(kv_tls_records *r);
/* Whether readv has something to say without the descriptor being readable. */
bool kv_tls_pending(const kv_tls_records *r);
static inline size_t kv_tls_kept(const kv_tls_records *r) { return r->out_end - r->out_at; }
/* Seals close_notify behind what is kept; what the socket does not take now stays kept. */
void kv_tls_shutdown(kv_tls_records *r);

/* tls_stream.c: the engine's view. NULL: no memory. */
struct kv_stream;
struct kv_stream *kv_tls_stream(kv_tls_records *records);

#endif
