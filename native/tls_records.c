/* Records of TLS 1.3 (RFC 8446, 5): sealed from and opened into iovecs. Without Python; runs without the GIL. */
#include "tls.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0
#endif
#ifndef EKEYEXPIRED
#define EKEYEXPIRED EPROTO
#endif

/* A few connections' buffers stay in the second-level cache; larger ones measured slower. */
#define SMALL_BYTES (KV_TLS_RECORD + 256)
#define BUFFER_BYTES ((size_t)128 << 10)
/* Short records are opened aside: only application data may ever be written to the caller's memory, and what else comes
 * after the handshake is short. */
#define ASIDE_BYTES ((size_t)2048)

#define FEW_RUNS ((size_t)3)
#define MAX_IDLE 32

enum { ALERT = 21, HANDSHAKE = 22, DATA = 23 };
enum { SOL_TLS_ = 282, TLS_TX_ = 1, TLS_SET_RECORD_TYPE_ = 1 }; /* linux/tls.h, linux/socket.h */
enum { NEW_SESSION_TICKET = 4, KEY_UPDATE = 24 };

struct kv_tls_suite {
    unsigned number;
    int key_bytes, hash_bytes, kernel_cipher;
};

static const struct kv_tls_suite SUITES[] = {
    {0x1301, 16, 32, 51}, /* TLS_AES_128_GCM_SHA256 */
    {0x1302, 32, 48, 52}, /* TLS_AES_256_GCM_SHA384 */
    {0x1303, 32, 32, 54}, /* TLS_CHACHA20_POLY1305_SHA256 */
};

const struct kv_tls_suite *kv_tls_suite_of(unsigned number) {
    for (size_t i = 0; i < sizeof SUITES / sizeof *SUITES; i++)
        if (SUITES[i].number == (number & 0xffff)) return &SUITES[i];
    return NULL;
}

size_t kv_tls_suite_hash_bytes(const struct kv_tls_suite *suite) { return (size_t)suite->hash_bytes; }

static const void *suite_cipher(const kv_openssl *o, const struct kv_tls_suite *suite) {
    switch (suite->number) {
    case 0x1301: return o->EVP_aes_128_gcm();
    case 0x1302: return o->EVP_aes_256_gcm();
    default: return o->EVP_chacha20_poly1305();
    }
}

/* ---- keys ---- */

/* HKDF-Expand-Label with an empty context (7.1); every output here fits one block of the hash. */
static int expand_label(const kv_openssl *o, const struct kv_tls_suite *suite, const unsigned char *secret,
                        const char *label, unsigned char *out, size_t nbytes) {
    unsigned char info[64], block[64];
    size_t n = strlen(label), at = 0;
    info[at++] = 0, info[at++] = (unsigned char)nbytes;
    info[at++] = (unsigned char)(6 + n);
    memcpy(info + at, "tls13 ", 6), at += 6;
    memcpy(info + at, label, n), at += n;
    info[at++] = 0; /* context */
    info[at++] = 1; /* first block */
    unsigned size = 0;
    const void *digest = suite->hash_bytes == 48 ? o->EVP_sha384() : o->EVP_sha256();
    if (!o->HMAC(digest, secret, suite->hash_bytes, info, at, block, &size) || size < nbytes) return -1;
    memcpy(out, block, nbytes);
    o->OPENSSL_cleanse(block, sizeof block);
    return 0;
}

static int way_key(const kv_tls_records *r, const kv_tls_way *way, unsigned char *key) {
    return expand_label(r->o, r->suite, way->secret, "key", key, (size_t)r->suite->key_bytes);
}

/* Key and IV from the secret in `way`. */
static int way_set(kv_tls_records *r, kv_tls_way *way, bool sealing) {
    unsigned char key[32];
    int result = -1;
    if (way_key(r, way, key) == 0 && expand_label(r->o, r->suite, way->secret, "iv", way->iv, sizeof way->iv) == 0 &&
        r->o->EVP_CipherInit_ex(way->cipher, suite_cipher(r->o, r->suite), NULL, key, way->iv, sealing) == 1)
        result = 0;
    r->o->OPENSSL_cleanse(key, sizeof key);
    way->sequence = 0;
    return result;
}

static int way_update(kv_tls_records *r, kv_tls_way *way, bool sealing) {
    unsigned char next[KV_TLS_MAX_HASH];
    if (expand_label(r->o, r->suite, way->secret, "traffic upd", next, (size_t)r->suite->hash_bytes) < 0) return -1;
    memcpy(way->secret, next, sizeof next);
    r->o->OPENSSL_cleanse(next, sizeof next);
    return way_set(r, way, sealing);
}

int kv_tls_records_init(kv_tls_records *r, const kv_openssl *o, int fd, const struct kv_tls_suite *suite,
                        const unsigned char *rx_secret, const unsigned char *tx_secret) {
    *r = (kv_tls_records){.o = o, .fd = fd, .suite = suite, .alert = -1, .update_records = KV_TLS_UPDATE_RECORDS};
    memcpy(r->rx.secret, rx_secret, (size_t)suite->hash_bytes);
    memcpy(r->tx.secret, tx_secret, (size_t)suite->hash_bytes);
    r->rx.cipher = o->EVP_CIPHER_CTX_new();
    r->tx.cipher = o->EVP_CIPHER_CTX_new();
    /* Small until bytes flow: a peer that has only just shaken hands costs little. */
    r->in_capacity = r->out_capacity = SMALL_BYTES;
    r->in = malloc(r->in_capacity);
    r->out = malloc(r->out_capacity);
    if (!r->rx.cipher || !r->tx.cipher || !r->in || !r->out) return -1;
    return way_set(r, &r->rx, false) < 0 || way_set(r, &r->tx, true) < 0 ? -1 : 0;
}

void kv_tls_records_free(kv_tls_records *r) {
    if (!r->o) return;
    r->o->OPENSSL_cleanse(r->rx.secret, sizeof r->rx.secret);
    r->o->OPENSSL_cleanse(r->tx.secret, sizeof r->tx.secret);
    r->o->EVP_CIPHER_CTX_free(r->rx.cipher);
    r->o->EVP_CIPHER_CTX_free(r->tx.cipher);
    free(r->in);
    free(r->out);
    *r = (kv_tls_records){0};
}

/* Starts a record: nonce (5.3), and its header as additional data. */
static bool begin(const kv_tls_records *r, kv_tls_way *way, const unsigned char *header) {
    unsigned char nonce[12];
    int n;
    memcpy(nonce, way->iv, sizeof nonce);
    for (int i = 0; i < 8; i++) nonce[11 - i] ^= (unsigned char)(way->sequence >> (8 * i));
    way->sequence++;
    return r->o->EVP_CipherInit_ex(way->cipher, NULL, NULL, NULL, nonce, -1) == 1 &&
           r->o->EVP_CipherUpdate(way->cipher, NULL, &n, header, KV_TLS_HEADER) == 1;
}

/* ---- a place in iovecs ---- */

typedef struct {
    const struct iovec *items;
    size_t count, at; /* at: in the first */
    size_t left;      /* bytes */
} cursor;

static cursor cursor_of(const struct iovec *items, size_t count) {
    cursor c = {.items = items, .count = count};
    for (size_t i = 0; i < count; i++) c.left += items[i].iov_len;
    return c;
}

/* The next run of at most `nbytes` bytes (at least one where any are left); moves past it. */
static unsigned char *take(cursor *c, size_t nbytes, size_t *got) {
    while (c->at == c->items->iov_len) c->items++, c->count--, c->at = 0;
    size_t here = c->items->iov_len - c->at;
    *got = here < nbytes ? here : nbytes;
    unsigned char *data = (unsigned char *)c->items->iov_base + c->at;
    c->at += *got;
    c->left -= *got;
    return data;
}

/* Whether the next `nbytes` lie in so few pieces that a call to the cipher for each is cheaper than a copy. */
static bool in_few_runs(const cursor *c, size_t nbytes) {
    size_t here = c->items->iov_len - c->at;
    for (size_t i = 0; i < FEW_RUNS && i < c->count; i++) {
        if (here >= nbytes) return true;
        if (here % 16) return false; /* the ciphers' fast loops want whole blocks */
        nbytes -= here;
        here = i + 1 < c->count ? c->items[i + 1].iov_len : 0;
    }
    return false;
}

static void copy_in(unsigned char *data, cursor *from, size_t nbytes) {
    while (nbytes) {
        size_t n;
        const unsigned char *place = take(from, nbytes, &n);
        memcpy(data, place, n);
        data += n, nbytes -= n;
    }
}

static void copy_out(cursor *to, const unsigned char *data, size_t nbytes) {
    while (nbytes) {
        size_t n;
        unsigned char *place = take(to, nbytes, &n);
        memcpy(place, data, n);
        data += n, nbytes -= n;
    }
}

static bool grow(unsigned char **buffer, size_t *capacity) {
    if (*capacity >= BUFFER_BYTES) return false;
    unsigned char *larger = realloc(*buffer, BUFFER_BYTES);
    if (!larger) return false; /* the small one serves */
    *buffer = larger;
    *capacity = BUFFER_BYTES;
    return true;
}

/* ---- sending ---- */

/* Seals `nbytes` of `from` as one record behind what is kept; there is room. */
static bool seal(kv_tls_records *r, unsigned char type, cursor *from, size_t nbytes) {
    size_t length = nbytes + 1 + KV_TLS_TAG;
    unsigned char *out = r->out + r->out_end;
    const unsigned char header[KV_TLS_HEADER] = {DATA, 3, 3, (unsigned char)(length >> 8), (unsigned char)length};
    memcpy(out, header, sizeof header);
    if (!begin(r, &r->tx, header)) return false;
    int n;
    size_t at = KV_TLS_HEADER;
    bool straight = nbytes && in_few_runs(from, nbytes);
    if (!straight) copy_in(out + at, from, nbytes);
    for (size_t left = nbytes; left;) {
        size_t run = left;
        const unsigned char *data = straight ? take(from, left, &run) : out + at;
        if (r->o->EVP_CipherUpdate(r->tx.cipher, out + at, &n, data, (int)run) != 1) return false;
        at += run, left -= run;
    }
    if (r->o->EVP_CipherUpdate(r->tx.cipher, out + at, &n, &type, 1) != 1 ||
        r->o->EVP_CipherFinal_ex(r->tx.cipher, out + at + 1, &n) != 1 ||
        r->o->EVP_CIPHER_CTX_ctrl(r->tx.cipher, KV_EVP_AEAD_GET_TAG, KV_TLS_TAG, out + at + 1) != 1)
        return false;
    r->out_end += KV_TLS_HEADER + length;
    return true;
}

static bool seal_bytes(kv_tls_records *r, unsigned char type, const void *data, size_t nbytes) {
    const struct iovec item = {(void *)(uintptr_t)data, nbytes};
    cursor from = cursor_of(&item, 1);
    return seal(r, type, &from, nbytes);
}

static size_t out_room(const kv_tls_records *r) { return r->out_capacity - r->out_end; }

/* Our keys' time is up, or the peer asks for new ones (4.6.3). */
static int update_keys(kv_tls_records *r) {
    if (r->tx.sequence < r->update_records && !atomic_load(&r->update_wanted)) return 0;
    atomic_store(&r->update_wanted, false);
    const unsigned char message[] = {KEY_UPDATE, 0, 0, 1, 0};
    return seal_bytes(r, HANDSHAKE, message, sizeof message) && way_update(r, &r->tx, true) == 0 ? 0 : -EIO;
}

int kv_tls_flush(kv_tls_records *r) {
    while (r->out_at < r->out_end) {
        ssize_t n = send(r->fd, r->out + r->out_at, r->out_end - r->out_at, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0) {
            if (errno == EINTR) continue;
            return errno == EWOULDBLOCK ? -EAGAIN : -errno;
        }
        r->out_at += (size_t)n;
    }
    r->out_at = r->out_end = 0;
    if (r->shut) shutdown(r->fd, SHUT_WR);
    return 0;
}

static ssize_t kernel_writev(kv_tls_records *r, const struct iovec *items, size_t count) {
    /* Kernels before 6.14 cannot renew keys: rather lose the connection, which the link replaces. */
    if (r->kernel_records >= r->update_records || atomic_load(&r->update_wanted)) return -EKEYEXPIRED;
    struct msghdr message = {.msg_iov = (struct iovec *)(uintptr_t)items};
    message.msg_iovlen = count < 1024 ? count : 1024;
    for (;;) {
        ssize_t n = sendmsg(r->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n >= 0) {
            r->kernel_records += ((uint64_t)n + KV_TLS_PLAIN - 1) / KV_TLS_PLAIN; /* none goes on into the next call's bytes */
            return n;
        }
        if (errno != EINTR) return errno == EWOULDBLOCK ? -EAGAIN : -errno;
    }
}

/* An alert has another record type, which the kernel is told beside it. One that does not fit now is not sent. */
static void kernel_alert(kv_tls_records *r, const unsigned char *alert) {
    union {
        struct cmsghdr head;
        char room[CMSG_SPACE(1)];
    } control = {.room = {0}};
    struct iovec item = {.iov_base = (void *)(uintptr_t)alert, .iov_len = 2};
    struct msghdr message = {.msg_iov = &item, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = CMSG_LEN(1)};
    control.head.cmsg_level = SOL_TLS_, control.head.cmsg_type = TLS_SET_RECORD_TYPE_, control.head.cmsg_len = CMSG_LEN(1);
    *CMSG_DATA(&control.head) = ALERT;
    sendmsg(r->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

ssize_t kv_tls_writev(kv_tls_records *r, const struct iovec *items, size_t count) {
    if (r->shut) return -EPIPE;
    if (r->kernel) return kernel_writev(r, items, count);
    int result = kv_tls_flush(r);
    if (result < 0) return result;
    cursor from = cursor_of(items, count);
    size_t total = from.left;
    if (total > SMALL_BYTES) grow(&r->out, &r->out_capacity);
    while (from.left) {
        if (out_room(r) < KV_TLS_RECORD) {
            result = kv_tls_flush(r);
            if (result == -EAGAIN) break; /* what is sealed stays kept */
            if (result < 0) return result;
        }
        result = update_keys(r);
        if (result < 0) return result;
        if (out_room(r) < KV_TLS_RECORD) continue;
        if (!seal(r, DATA, &from, from.left < KV_TLS_PLAIN ? from.left : KV_TLS_PLAIN)) return -EIO;
    }
    result = kv_tls_flush(r);
    if (result < 0 && result != -EAGAIN) return result;
    return total == from.left ? -EAGAIN : (ssize_t)(total - from.left);
}

void kv_tls_shutdown(kv_tls_records *r) {
    if (r->shut) return;
    const unsigned char close_notify[] = {1, 0};
    if (r->kernel) kernel_alert(r, close_notify);
    else if (out_room(r) >= 64 || kv_tls_flush(r) == 0) seal_bytes(r, ALERT, close_notify, 2);
    r->shut = true;
    kv_tls_flush(r);
}

/* ---- receiving ---- */

static int fail(kv_tls_records *r, int error, const char *why) {
    r->why = why;
    r->rx_error = error;
    return -error;
}

/* What a verified record holds that is not application data. */
static int other(kv_tls_records *r, unsigned char type, const unsigned char *data, size_t nbytes) {
    if (type == ALERT) {
        if (nbytes != 2) return fail(r, EPROTO, "an alert of a wrong length");
        r->ended = true;
        if (data[1] == 0) return 0; /* close_notify */
        r->alert = data[1];
        return fail(r, EPROTO, "the peer sent an alert");
    }
    if (type != HANDSHAKE || nbytes == 0) return fail(r, EPROTO, "a record of an unknown type");
    for (size_t at = 0; at < nbytes;) {
        if (nbytes - at < 4) return fail(r, EPROTO, "a handshake message in pieces");
        size_t length = (size_t)data[at + 1] << 16 | (size_t)data[at + 2] << 8 | data[at + 3];
        if (length > nbytes - at - 4) return fail(r, EPROTO, "a handshake message in pieces");
        const unsigned char *body = data + at + 4;
        unsigned char message = data[at];
        at += 4 + length;
        if (message == NEW_SESSION_TICKET) continue; /* sessions are not resumed */
        if (message != KEY_UPDATE || length != 1 || body[0] > 1 || at != nbytes)
            return fail(r, EPROTO, "an unexpected handshake message");
        if (way_update(r, &r->rx, false) < 0) return fail(r, EIO, "OpenSSL cannot renew the keys");
        if (body[0] == 1) atomic_store(&r->update_wanted, true);
    }
    return 0;
}

/* Decrypts `nbytes` sealed bytes of a record to `to` (NULL: where they are), and the one behind them to *last; whether
 * the tag is right. */
static bool open_sealed(kv_tls_records *r, unsigned char *record, cursor *to, size_t nbytes, unsigned char *last) {
    unsigned char *sealed = record + KV_TLS_HEADER;
    int n;
    if (!begin(r, &r->rx, record)) return false;
    for (size_t left = nbytes; left;) {
        size_t run = left;
        unsigned char *place = to ? take(to, left, &run) : sealed;
        if (r->o->EVP_CipherUpdate(r->rx.cipher, place, &n, sealed, (int)run) != 1) return false;
        sealed += run, left -= run;
    }
    unsigned char none[KV_TLS_TAG];
    return r->o->EVP_CipherUpdate(r->rx.cipher, last, &n, sealed, 1) == 1 &&
           r->o->EVP_CIPHER_CTX_ctrl(r->rx.cipher, KV_EVP_AEAD_SET_TAG, KV_TLS_TAG, sealed + 1) == 1 &&
           r->o->EVP_CipherFinal_ex(r->rx.cipher, none, &n) == 1;
}

/* Opens the first whole record: 1 when there was one, 0 when there is none, -errno. Data goes straight to `to`, or stays
 * in its place as `plain`. */
static int open_record(kv_tls_records *r, cursor *to) {
    size_t have = r->in_end - r->in_at;
    if (have < KV_TLS_HEADER) return 0;
    unsigned char *record = r->in + r->in_at, *body = record + KV_TLS_HEADER;
    size_t length = (size_t)record[3] << 8 | record[4];
    if (record[0] != DATA) return fail(r, EPROTO, "a record that is not encrypted");
    if (length < 1 + KV_TLS_TAG || length > KV_TLS_PLAIN + 256) return fail(r, EPROTO, "a record of a wrong length");
    if (have < KV_TLS_HEADER + length) return 0;
    size_t content = length - 1 - KV_TLS_TAG;
    unsigned char type;
    bool straight = content > ASIDE_BYTES && content <= to->left && content <= KV_TLS_PLAIN && in_few_runs(to, content);
    cursor before = *to;
    if (!open_sealed(r, record, straight ? to : NULL, content, &type))
        return fail(r, EBADMSG, "a record that does not verify");
    r->in_at += KV_TLS_HEADER + length;
    if (straight && type == DATA) {
        r->idle = 0;
        return 1;
    }
    if (straight) { /* padding, or no data: rare, looked at aside; what was written to the place is written again */
        *to = before;
        copy_in(body, &before, content);
    }
    while (type == 0 && content) type = body[--content]; /* zeros are padding (5.4) */
    if (content > KV_TLS_PLAIN) return fail(r, EPROTO, "a record of a wrong length");
    /* Records that bring nothing cost their sender little and this side a decryption each. */
    r->idle = type == DATA && content ? 0 : r->idle + 1;
    if (r->idle > MAX_IDLE) return fail(r, EPROTO, "too many records without data");
    if (type != DATA) {
        int result = other(r, type, body, content);
        return result < 0 ? result : 1;
    }
    r->plain = body;
    r->plain_at = 0;
    r->plain_end = content;
    return 1;
}

/* Bytes from the socket: 1, 0 at its end, -errno. */
static int fill(kv_tls_records *r) {
    if (r->in_at == r->in_end) r->in_at = r->in_end = 0;
    if (r->in_capacity - r->in_end < KV_TLS_RECORD && r->in_at) {
        memmove(r->in, r->in + r->in_at, r->in_end - r->in_at);
        r->in_end -= r->in_at;
        r->in_at = 0;
    }
    for (;;) {
        size_t room = r->in_capacity - r->in_end;
        ssize_t n = recv(r->fd, r->in + r->in_end, room, MSG_DONTWAIT);
        if (n > 0) {
            r->in_end += (size_t)n;
            if ((size_t)n == room) grow(&r->in, &r->in_capacity); /* more is waiting */
            return 1;
        }
        if (n == 0) return 0;
        if (errno != EINTR) return errno == EWOULDBLOCK ? -EAGAIN : -errno;
    }
}

ssize_t kv_tls_readv(kv_tls_records *r, const struct iovec *items, size_t count) {
    cursor to = cursor_of(items, count);
    size_t total = to.left;
    while (to.left) {
        if (r->plain_at < r->plain_end) {
            size_t have = r->plain_end - r->plain_at, n = have < to.left ? have : to.left;
            copy_out(&to, r->plain + r->plain_at, n);
            r->plain_at += n;
            continue;
        }
        int result = r->rx_error ? -r->rx_error : r->ended ? 0 : open_record(r, &to);
        if (result > 0) continue;
        if (result == 0 && !r->ended) {
            result = fill(r);
            if (result > 0) continue;
            if (result == 0) {
                /* Without close_notify: cut off, or killed. The frames above know whether anything is missing. */
                r->ended = true;
                if (r->in_at < r->in_end) result = fail(r, ECONNRESET, "the stream ended in the middle of a record");
            } else if (result != -EAGAIN) {
                r->rx_error = -result;
            }
        }
        return total == to.left ? result : (ssize_t)(total - to.left);
    }
    return (ssize_t)total;
}

bool kv_tls_pending(const kv_tls_records *r) {
    if (r->plain_at < r->plain_end || r->ended || r->rx_error) return true;
    size_t have = r->in_end - r->in_at;
    if (have < KV_TLS_HEADER) return false;
    const unsigned char *record = r->in + r->in_at;
    return have >= KV_TLS_HEADER + ((size_t)record[3] << 8 | record[4]) || record[0] != DATA;
}

/* ---- kernel TLS ---- */

#ifdef __linux__
#include <netinet/in.h>
#include <netinet/tcp.h>
#ifndef TCP_ULP
#define TCP_ULP 31
#endif

bool kv_tls_try_kernel(kv_tls_records *r) {
    /* struct tls12_crypto_info_*: version, cipher, iv, key, salt, record sequence; GCM's salt is the IV's first 4 bytes. */
    unsigned char info[4 + 12 + 32 + 4 + 8] = {0}, key[32];
    size_t at = 0;
    const uint16_t version = 0x0304, cipher = (uint16_t)r->suite->kernel_cipher;
    if (kv_tls_kept(r) || r->shut || setsockopt(r->fd, IPPROTO_TCP, TCP_ULP, "tls", 3)) return false;
    size_t salt = r->suite->number == 0x1303 ? 0 : 4;
    memcpy(info, &version, 2), memcpy(info + 2, &cipher, 2), at = 4;
    memcpy(info + at, r->tx.iv + salt, 12 - salt), at += 12 - salt;
    if (way_key(r, &r->tx, key) < 0) return false;
    memcpy(info + at, key, (size_t)r->suite->key_bytes), at += (size_t)r->suite->key_bytes;
    memcpy(info + at, r->tx.iv, salt), at += salt;
    for (int i = 0; i < 8; i++) info[at++] = (unsigned char)(r->tx.sequence >> (56 - 8 * i));
    r->kernel = setsockopt(r->fd, SOL_TLS_, TLS_TX_, info, (socklen_t)at) == 0;
    r->o->OPENSSL_cleanse(info, sizeof info);
    r->o->OPENSSL_cleanse(key, sizeof key);
    return r->kernel;
}
#else
bool kv_tls_try_kernel(kv_tls_records *r) {
    (void)r;
    return false;
}
#endif
