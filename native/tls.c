/* The Python side of TLS: contexts, handshakes by OpenSSL, and records over page lists. See tls.h. */
#include "kvnative.h"

#include <ctype.h>
#include <errno.h>
#include <string.h>

#include "tls.h"

static struct {
    bool tried;
    kv_openssl table;
    const char *missing;
    char why[128];
} openssl;

const kv_openssl *kv_openssl_get(const char **why) {
    if (!openssl.tried) {
        openssl.missing = kv_openssl_load(&openssl.table, openssl.why, sizeof openssl.why);
        openssl.tried = true;
    }
    *why = openssl.missing;
    return openssl.missing ? NULL : &openssl.table;
}

const char kv_tls_version_doc[] =
    "tls_version($module, /)\n--\n\n"
    "The version of OpenSSL; raises ImportError where it is not there.";

PyObject *kv_tls_version(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    const char *why;
    const kv_openssl *o = kv_openssl_get(&why);
    if (o) return PyUnicode_FromString(o->OpenSSL_version(0));
    PyErr_Format(PyExc_ImportError, "OpenSSL 3 is not there: %s", why);
    return NULL;
}

/* OSError(EPROTO, reason): the newest error of OpenSSL's queue, which is emptied. */
static PyObject *protocol_error(const kv_openssl *o, const char *what, const char *detail) {
    const char *reason = o ? o->ERR_reason_error_string(o->ERR_peek_last_error()) : NULL;
    if (o) o->ERR_clear_error();
    PyObject *text = detail ? PyUnicode_FromFormat("%s: %s (%s)", what, reason ? reason : "failed", detail)
                            : PyUnicode_FromFormat("%s%s%s", what, reason ? ": " : "", reason ? reason : "");
    PyObject *arguments = text ? Py_BuildValue("(iN)", EPROTO, text) : NULL;
    if (arguments) PyErr_SetObject(PyExc_OSError, arguments);
    Py_XDECREF(arguments);
    return NULL;
}

/* ---- TlsContext ---- */

typedef struct {
    PyObject_HEAD
    void *ctx;
    bool server;
} context_object;

static PyObject *context_type, *tls_type;

/* One handshake runs on a thread at a time; its secrets come through the callback. */
typedef struct {
    unsigned char client[KV_TLS_MAX_HASH], server[KV_TLS_MAX_HASH];
    size_t client_bytes, server_bytes;
} secrets;
static _Thread_local secrets *shaking;

static size_t from_hex(const char *text, unsigned char *out, size_t room) {
    size_t n = 0;
    for (; isxdigit((unsigned char)text[0]) && isxdigit((unsigned char)text[1]) && n < room; text += 2, n++) {
        unsigned byte = 0;
        for (int i = 0; i < 2; i++) {
            int c = tolower((unsigned char)text[i]);
            byte = byte << 4 | (unsigned)(c <= '9' ? c - '0' : c - 'a' + 10);
        }
        out[n] = (unsigned char)byte;
    }
    return n;
}

/* "LABEL CLIENT_RANDOM SECRET", in hexadecimal (SSL_CTX_set_keylog_callback(3)); nothing is logged anywhere. */
static void on_secret(const void *ssl, const char *line) {
    (void)ssl;
    const char *space = strchr(line, ' '), *secret = space ? strchr(space + 1, ' ') : NULL;
    if (!secret || !shaking) return;
    size_t label = (size_t)(space - line);
    if (label == 23 && !memcmp(line, "CLIENT_TRAFFIC_SECRET_0", label))
        shaking->client_bytes = from_hex(secret + 1, shaking->client, sizeof shaking->client);
    else if (label == 23 && !memcmp(line, "SERVER_TRAFFIC_SECRET_0", label))
        shaking->server_bytes = from_hex(secret + 1, shaking->server, sizeof shaking->server);
}

/* Never asks on a terminal: a key that needs a passphrase is an error. */
static int no_passphrase(char *buffer, int size, int writing, void *argument) {
    (void)buffer, (void)size, (void)writing, (void)argument;
    return -1;
}

typedef int (*certificate_use)(const kv_openssl *o, void *ctx, void *certificate, bool first);

static int use_own(const kv_openssl *o, void *ctx, void *certificate, bool first) {
    if (first) return o->SSL_CTX_use_certificate(ctx, certificate) == 1 ? 0 : -1;
    if (o->SSL_CTX_ctrl(ctx, KV_SSL_CTRL_EXTRA_CHAIN_CERT, 0, certificate) != 1) return -1;
    return 1; /* taken over */
}

static int use_authority(const kv_openssl *o, void *ctx, void *certificate, bool first) {
    (void)first;
    if (o->X509_STORE_add_cert(o->SSL_CTX_get_cert_store(ctx), certificate) != 1) return -1;
    return o->SSL_CTX_add_client_CA(ctx, certificate) == 1 ? 0 : -1;
}

/* Every certificate of a PEM text. */
static int each_certificate(const kv_openssl *o, void *ctx, const Py_buffer *pem, certificate_use use, const char *what) {
    void *bio = o->BIO_new_mem_buf(pem->buf, (int)pem->len), *certificate;
    if (!bio) return PyErr_NoMemory(), -1;
    int count = 0, result = 0;
    while (result == 0 && (certificate = o->PEM_read_bio_X509(bio, NULL, (void *)no_passphrase, NULL))) {
        int used = use(o, ctx, certificate, count++ == 0);
        if (used != 1) o->X509_free(certificate);
        if (used < 0) protocol_error(o, what, NULL), result = -1;
    }
    o->BIO_free(bio);
    if (result == 0 && count == 0) protocol_error(o, what, "no certificate in PEM form"), result = -1;
    o->ERR_clear_error();
    return result;
}

static int use_key(const kv_openssl *o, void *ctx, const Py_buffer *pem) {
    void *bio = o->BIO_new_mem_buf(pem->buf, (int)pem->len);
    void *key = bio ? o->PEM_read_bio_PrivateKey(bio, NULL, (void *)no_passphrase, NULL) : NULL;
    if (bio) o->BIO_free(bio);
    if (!key) return protocol_error(o, "private key", NULL), -1;
    bool fine = o->SSL_CTX_use_PrivateKey(ctx, key) == 1 && o->SSL_CTX_check_private_key(ctx) == 1;
    o->EVP_PKEY_free(key);
    if (!fine) protocol_error(o, "private key", NULL);
    return fine ? 0 : -1;
}

static int configure(const kv_openssl *o, void *ctx, const Py_buffer *certificate, const Py_buffer *key,
                     const Py_buffer *authority, int verify, const char *suites) {
    if (o->SSL_CTX_ctrl(ctx, KV_SSL_CTRL_SET_MIN_PROTO, KV_TLS1_3, NULL) != 1) return protocol_error(o, "TLS 1.3", NULL), -1;
    if (o->SSL_CTX_set_ciphersuites(ctx, suites) != 1) return protocol_error(o, "cipher suites", suites), -1;
    /* No session is resumed: each has fresh keys, and nothing needs to be kept. */
    o->SSL_CTX_set_options(ctx, KV_SSL_OP_NO_TICKET | KV_SSL_OP_NO_RENEGOTIATION);
    o->SSL_CTX_set_num_tickets(ctx, 0);
    o->SSL_CTX_ctrl(ctx, KV_SSL_CTRL_SESS_CACHE_MODE, 0, NULL);
    o->SSL_CTX_set_keylog_callback(ctx, on_secret);
    o->SSL_CTX_set_verify(ctx, verify, NULL);
    if (certificate->buf && each_certificate(o, ctx, certificate, use_own, "certificate") < 0) return -1;
    if (key->buf && use_key(o, ctx, key) < 0) return -1;
    return authority->buf ? each_certificate(o, ctx, authority, use_authority, "authority") : 0;
}

static PyObject *context_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"server", "certificate", "key", "authority", "verify", "suites", NULL};
    int server, verify;
    Py_buffer certificate = {0}, key = {0}, authority = {0};
    const char *suites, *why;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "pz*z*z*is:TlsContext", names, &server, &certificate, &key, &authority,
                                     &verify, &suites))
        return NULL;
    PyObject *self = NULL;
    const kv_openssl *o = kv_openssl_get(&why);
    if (!o) {
        PyErr_Format(PyExc_ImportError, "OpenSSL 3 is not there: %s", why);
    } else {
        static const int modes[] = {0, KV_SSL_VERIFY_PEER, KV_SSL_VERIFY_PEER | KV_SSL_VERIFY_FAIL_IF_NO_PEER_CERT};
        o->ERR_clear_error();
        void *ctx = o->SSL_CTX_new(server ? o->TLS_server_method() : o->TLS_client_method());
        if (verify < 0 || verify > 2) PyErr_SetString(PyExc_ValueError, "verify is 0, 1 or 2");
        else if (!ctx) protocol_error(o, "TLS context", NULL);
        else if (configure(o, ctx, &certificate, &key, &authority, modes[verify], suites) == 0)
            self = ((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
        if (self) ((context_object *)self)->ctx = ctx, ((context_object *)self)->server = server;
        else if (ctx) o->SSL_CTX_free(ctx);
    }
    PyBuffer_Release(&certificate);
    PyBuffer_Release(&key);
    PyBuffer_Release(&authority);
    return self;
}

static void context_dealloc(PyObject *self) {
    context_object *context = (context_object *)self;
    PyTypeObject *type = Py_TYPE(self);
    if (context->ctx) openssl.table.SSL_CTX_free(context->ctx);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyType_Slot context_slots[] = {
    {Py_tp_doc, "TlsContext(server, certificate, key, authority, verify, suites)\n--\n\n"
                "What many handshakes share; see kvtransport/_pure_tls.py for the contract."},
    {Py_tp_new, (void *)context_new},
    {Py_tp_dealloc, (void *)context_dealloc},
    {0, NULL},
};
static PyType_Spec context_spec = {"kvtransport._native.TlsContext", sizeof(context_object), 0, Py_TPFLAGS_DEFAULT,
                                   context_slots};

/* ---- Tls ---- */

typedef struct {
    PyObject_HEAD
    PyObject *context; /* until the handshake is over */
    void *ssl;         /* the same */
    int fd;
    bool server, done, reading, writing;
    secrets secrets;
    kv_tls_records records;
    PyObject *peer, *binding, *cipher; /* after it */
} tls_object;

static int aim(const kv_openssl *o, tls_object *tls, const char *name, bool address) {
    if (!name) return 0;
    if (address) return o->X509_VERIFY_PARAM_set1_ip_asc(o->SSL_get0_param(tls->ssl), name) == 1 ? 0 : -1;
    if (o->SSL_ctrl(tls->ssl, KV_SSL_CTRL_SET_TLSEXT_HOSTNAME, 0, (void *)(uintptr_t)name) != 1) return -1;
    return o->SSL_set1_host(tls->ssl, name) == 1 ? 0 : -1;
}

static PyObject *tls_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"context", "fd", "name", "address", NULL};
    PyObject *context, *fd_object;
    const char *name = NULL;
    int address = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!O|zp:Tls", names, (PyTypeObject *)context_type, &context,
                                     &fd_object, &name, &address))
        return NULL;
    int fd = PyObject_AsFileDescriptor(fd_object);
    if (fd < 0) return NULL;
    PyObject *self = ((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!self) return NULL;
    tls_object *tls = (tls_object *)self;
    const kv_openssl *o = &openssl.table;
    o->ERR_clear_error();
    tls->context = Py_NewRef(context);
    tls->server = ((context_object *)context)->server;
    tls->fd = fd;
    tls->ssl = o->SSL_new(((context_object *)context)->ctx);
    if (!tls->ssl || o->SSL_set_fd(tls->ssl, fd) != 1 || aim(o, tls, name, address) < 0) {
        protocol_error(o, "TLS connection", name);
        Py_DECREF(self);
        return NULL;
    }
    if (tls->server) o->SSL_set_accept_state(tls->ssl);
    else o->SSL_set_connect_state(tls->ssl);
    return self;
}

static void end_handshake(tls_object *tls) {
    if (tls->ssl) openssl.table.SSL_free(tls->ssl);
    tls->ssl = NULL;
    openssl.table.OPENSSL_cleanse(&tls->secrets, sizeof tls->secrets);
    Py_CLEAR(tls->context);
}

static void tls_dealloc(PyObject *self) {
    tls_object *tls = (tls_object *)self;
    PyTypeObject *type = Py_TYPE(self);
    end_handshake(tls);
    kv_tls_records_free(&tls->records);
    Py_XDECREF(tls->peer);
    Py_XDECREF(tls->binding);
    Py_XDECREF(tls->cipher);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyObject *peer_certificate(const kv_openssl *o, const void *ssl) {
    void *certificate = o->SSL_get1_peer_certificate(ssl);
    if (!certificate) return Py_NewRef(Py_None);
    int nbytes = o->i2d_X509(certificate, NULL);
    PyObject *der = nbytes > 0 ? PyBytes_FromStringAndSize(NULL, nbytes) : Py_NewRef(Py_None);
    if (der && der != Py_None) {
        unsigned char *out = (unsigned char *)PyBytes_AsString(der);
        o->i2d_X509(certificate, &out);
    }
    o->X509_free(certificate);
    return der;
}

/* The handshake is over: what is wanted of it, then records. */
static int settle(const kv_openssl *o, tls_object *tls) {
    static const char label[] = "EXPORTER-Channel-Binding"; /* RFC 9266 */
    unsigned char binding[32];
    const void *cipher = o->SSL_get_current_cipher(tls->ssl);
    const char *name = cipher ? o->SSL_CIPHER_get_name(cipher) : "";
    unsigned number = !strcmp(name, "TLS_AES_128_GCM_SHA256")         ? 0x1301
                      : !strcmp(name, "TLS_AES_256_GCM_SHA384")       ? 0x1302
                      : !strcmp(name, "TLS_CHACHA20_POLY1305_SHA256") ? 0x1303
                                                                      : 0;
    const struct kv_tls_suite *suite = kv_tls_suite_of(number);
    secrets *s = &tls->secrets;
    if (!suite || s->client_bytes != kv_tls_suite_hash_bytes(suite) || s->server_bytes != s->client_bytes ||
        o->SSL_export_keying_material(tls->ssl, binding, sizeof binding, label, sizeof label - 1, NULL, 0, 0) != 1)
        return protocol_error(o, "TLS secrets", name), -1;
    tls->peer = peer_certificate(o, tls->ssl);
    tls->binding = PyBytes_FromStringAndSize((char *)binding, sizeof binding);
    tls->cipher = PyUnicode_FromString(name);
    if (!tls->peer || !tls->binding || !tls->cipher) return -1;
    const unsigned char *rx = tls->server ? s->client : s->server, *tx = tls->server ? s->server : s->client;
    if (kv_tls_records_init(&tls->records, o, tls->fd, suite, rx, tx) < 0) {
        kv_tls_records_free(&tls->records);
        return PyErr_NoMemory(), -1;
    }
    kv_tls_try_kernel(&tls->records);
    end_handshake(tls);
    tls->done = true;
    return 0;
}

static PyObject *tls_handshake(PyObject *self, PyObject *unused) {
    (void)unused;
    tls_object *tls = (tls_object *)self;
    const kv_openssl *o = &openssl.table;
    if (tls->done) return PyLong_FromLong(0);
    if (!tls->ssl || tls->reading) {
        PyErr_SetString(PyExc_ValueError, tls->ssl ? "the handshake is running on another thread" : "the handshake has failed");
        return NULL;
    }
    tls->reading = true;
    int result, error, saved;
    Py_BEGIN_ALLOW_THREADS
    o->ERR_clear_error();
    errno = 0;
    shaking = &tls->secrets;
    result = o->SSL_do_handshake(tls->ssl);
    saved = errno;
    shaking = NULL;
    error = o->SSL_get_error(tls->ssl, result);
    Py_END_ALLOW_THREADS
    tls->reading = false;
    if (result == 1) return settle(o, tls) < 0 ? NULL : PyLong_FromLong(0);
    if (error == KV_SSL_ERROR_WANT_READ) return PyLong_FromLong(1);
    if (error == KV_SSL_ERROR_WANT_WRITE) return PyLong_FromLong(2);
    if (error == KV_SSL_ERROR_SYSCALL && saved) {
        end_handshake(tls);
        errno = saved;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    if (error == KV_SSL_ERROR_SYSCALL || error == KV_SSL_ERROR_ZERO_RETURN) {
        PyErr_SetString(PyExc_EOFError, "the peer ended the stream during the handshake");
    } else {
        long verdict = o->SSL_get_verify_result(tls->ssl);
        protocol_error(o, "TLS handshake", verdict ? o->X509_verify_cert_error_string(verdict) : NULL);
    }
    end_handshake(tls);
    return NULL;
}

static int begin_io(tls_object *tls, bool *flag) {
    if (tls->done && !*flag) {
        *flag = true;
        return 0;
    }
    PyErr_SetString(PyExc_ValueError, tls->done ? "another thread uses this direction" : "the handshake is not over");
    return -1;
}

static PyObject *moved_or_error(const kv_tls_records *r, ssize_t moved) {
    if (moved >= 0) return PyLong_FromSsize_t(moved);
    if (moved == -EAGAIN) return PyLong_FromLong(0);
    if ((moved == -EPROTO || moved == -EBADMSG || moved == -ECONNRESET) && r->why) {
        PyObject *arguments = Py_BuildValue("(is)", (int)-moved, r->why);
        if (arguments) PyErr_SetObject(PyExc_OSError, arguments);
        Py_XDECREF(arguments);
        return NULL;
    }
    errno = (int)-moved;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *tls_send_pages(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"head", "base", "pieces", "start", "budget", NULL};
    tls_object *tls = (tls_object *)self;
    PyObject *base, *pieces;
    Py_buffer head = {0};
    kv_pages pages;
    size_t start, budget = KV_DEFAULT_BUDGET;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "y*OOO&|O&:send_pages", names, &head, &base, &pieces,
                                     kv_size_converter, &start, kv_size_converter, &budget))
        return NULL;
    ssize_t moved = 0;
    bool ok = false;
    if (kv_take_budget(budget) == 0 && kv_pages_get(&pages, base, pieces, false) == 0) {
        kv_iovs iovs;
        kv_iovs_init(&iovs);
        ok = kv_gather_message(&iovs, &head, &pages, start, budget) == 0 && begin_io(tls, &tls->writing) == 0;
        if (ok && iovs.nbytes) {
            Py_BEGIN_ALLOW_THREADS
            moved = kv_tls_writev(&tls->records, iovs.items, iovs.count);
            Py_END_ALLOW_THREADS
        }
        if (ok) tls->writing = false;
        kv_iovs_free(&iovs);
        kv_pages_release(&pages);
    }
    PyBuffer_Release(&head);
    return ok ? moved_or_error(&tls->records, moved) : NULL;
}

static PyObject *tls_recv_pages(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"base", "pieces", "start", "tail", "tail_start", "budget", NULL};
    tls_object *tls = (tls_object *)self;
    PyObject *base, *pieces, *tail_object = Py_None;
    kv_pages pages;
    size_t start, tail_start = 0, budget = KV_DEFAULT_BUDGET;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO&|OO&O&:recv_pages", names, &base, &pieces, kv_size_converter,
                                     &start, &tail_object, kv_size_converter, &tail_start, kv_size_converter, &budget) ||
        kv_take_budget(budget) < 0)
        return NULL;
    Py_buffer tail = {0};
    if (tail_object != Py_None && PyObject_GetBuffer(tail_object, &tail, PyBUF_WRITABLE) < 0) return NULL;
    ssize_t moved = 0;
    bool ok = false, wanted = false;
    if (kv_pages_get(&pages, base, pieces, true) == 0) {
        kv_iovs iovs;
        kv_iovs_init(&iovs);
        ok = kv_gather_room(&iovs, &pages, start, &tail, tail_start, budget) == 0 && begin_io(tls, &tls->reading) == 0;
        wanted = ok && iovs.nbytes;
        if (wanted) {
            Py_BEGIN_ALLOW_THREADS
            moved = kv_tls_readv(&tls->records, iovs.items, iovs.count);
            Py_END_ALLOW_THREADS
        }
        if (ok) tls->reading = false;
        kv_iovs_free(&iovs);
        kv_pages_release(&pages);
    }
    PyBuffer_Release(&tail);
    if (!ok) return NULL;
    if (wanted && moved == 0) {
        PyErr_SetString(PyExc_EOFError, "the peer has ended the stream");
        return NULL;
    }
    return moved_or_error(&tls->records, moved);
}

static PyObject *tls_flush(PyObject *self, PyObject *unused) {
    (void)unused;
    tls_object *tls = (tls_object *)self;
    if (begin_io(tls, &tls->writing) < 0) return NULL;
    int result;
    Py_BEGIN_ALLOW_THREADS
    result = kv_tls_flush(&tls->records);
    Py_END_ALLOW_THREADS
    tls->writing = false;
    if (result < 0 && result != -EAGAIN) return moved_or_error(&tls->records, result);
    return PyLong_FromSize_t(kv_tls_kept(&tls->records));
}

static PyObject *tls_shutdown(PyObject *self, PyObject *unused) {
    (void)unused;
    tls_object *tls = (tls_object *)self;
    if (begin_io(tls, &tls->writing) < 0) return NULL;
    kv_tls_shutdown(&tls->records);
    tls->writing = false;
    return PyLong_FromSize_t(kv_tls_kept(&tls->records));
}

struct kv_tls_records *kv_tls_hand_over(PyObject *object, int fd) {
    if (!PyObject_TypeCheck(object, (PyTypeObject *)tls_type)) {
        PyErr_Format(PyExc_TypeError, "expected a Tls object, got %R", object);
        return NULL;
    }
    tls_object *tls = (tls_object *)object;
    if (tls->done && tls->fd != fd) {
        PyErr_Format(PyExc_ValueError, "this Tls object is on descriptor %d, not %d", tls->fd, fd);
        return NULL;
    }
    if (begin_io(tls, &tls->writing) < 0) return NULL;
    if (begin_io(tls, &tls->reading) < 0) {
        tls->writing = false;
        return NULL;
    }
    return &tls->records;
}

static PyObject *get_kept(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromSize_t(kv_tls_kept(&((tls_object *)self)->records));
}
static PyObject *get_pending(PyObject *self, void *unused) {
    (void)unused;
    tls_object *tls = (tls_object *)self;
    return PyBool_FromLong(tls->done && kv_tls_pending(&tls->records));
}
static PyObject *get_alert(PyObject *self, void *unused) {
    (void)unused;
    tls_object *tls = (tls_object *)self;
    if (!tls->done || tls->records.alert < 0) return Py_NewRef(Py_None);
    return PyLong_FromLong(tls->records.alert);
}
static PyObject *get_kernel(PyObject *self, void *unused) {
    (void)unused;
    return PyBool_FromLong(((tls_object *)self)->records.kernel);
}
static PyObject *get_object(PyObject *self, void *offset) {
    PyObject *object = *(PyObject **)((char *)self + (size_t)(uintptr_t)offset);
    return Py_NewRef(object ? object : Py_None);
}
static PyObject *get_limit(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLongLong(((tls_object *)self)->records.update_records);
}
static int set_limit(PyObject *self, PyObject *value, void *unused) {
    (void)unused;
    uint64_t records;
    if (!value) return PyErr_SetString(PyExc_AttributeError, "update_records cannot be deleted"), -1;
    if (!kv_u64_converter(value, &records)) return -1;
    if (records == 0) return PyErr_SetString(PyExc_ValueError, "update_records must be at least 1"), -1;
    ((tls_object *)self)->records.update_records = records;
    return 0;
}

static PyMethodDef tls_methods[] = {
    {"handshake", tls_handshake, METH_NOARGS, NULL},
    {"send_pages", KV_METHOD(tls_send_pages), METH_VARARGS | METH_KEYWORDS, NULL},
    {"recv_pages", KV_METHOD(tls_recv_pages), METH_VARARGS | METH_KEYWORDS, NULL},
    {"flush", tls_flush, METH_NOARGS, NULL},
    {"shutdown", tls_shutdown, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};
#define OFFSET(member) ((void *)(uintptr_t)offsetof(tls_object, member))
static PyGetSetDef tls_members[] = {
    {"kept", get_kept, NULL, NULL, NULL},
    {"pending", get_pending, NULL, NULL, NULL},
    {"alert", get_alert, NULL, NULL, NULL},
    {"kernel", get_kernel, NULL, NULL, NULL},
    {"peer_certificate", get_object, NULL, NULL, OFFSET(peer)},
    {"channel_binding", get_object, NULL, NULL, OFFSET(binding)},
    {"cipher", get_object, NULL, NULL, OFFSET(cipher)},
    {"update_records", get_limit, set_limit, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot tls_slots[] = {
    {Py_tp_doc, "Tls(context, fd, name=None, address=False)\n--\n\n"
                "TLS 1.3 on a connected, non-blocking socket; see kvtransport/_pure_tls.py for the contract."},
    {Py_tp_new, (void *)tls_new},
    {Py_tp_dealloc, (void *)tls_dealloc},
    {Py_tp_methods, tls_methods},
    {Py_tp_getset, tls_members},
    {0, NULL},
};
static PyType_Spec tls_spec = {"kvtransport._native.Tls", sizeof(tls_object), 0, Py_TPFLAGS_DEFAULT, tls_slots};

int kv_add_tls_types(PyObject *module) {
    context_type = PyType_FromSpec(&context_spec);
    tls_type = PyType_FromSpec(&tls_spec);
    if (!context_type || !tls_type) return -1;
    if (PyModule_AddObjectRef(module, "TlsContext", context_type) < 0) return -1;
    return PyModule_AddObjectRef(module, "Tls", tls_type);
}
