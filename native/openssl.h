/*
 * OpenSSL 3, found at run time as CUDA is: the extension builds without its headers and runs without it.
 * Prototypes after OpenSSL's manual pages (SSL_CTX_new(3), EVP_EncryptInit(3), ...); the ABI of libssl.so.3 is stable.
 */
#ifndef KV_OPENSSL_H
#define KV_OPENSSL_H

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>


#define KV_SSL_FUNCTIONS(F)                                                                                            \
    F(const void *, TLS_server_method, (void))                                                                         \
    F(const void *, TLS_client_method, (void))                                                                         \
    F(void *, SSL_CTX_new, (const void *method))                                                                       \
    F(void, SSL_CTX_free, (void *ctx))                                                                                 \
    F(long, SSL_CTX_ctrl, (void *ctx, int command, long number, void *pointer))                                        \
    F(uint64_t, SSL_CTX_set_options, (void *ctx, uint64_t options))                                                    \
    F(int, SSL_CTX_set_ciphersuites, (void *ctx, const char *names))                                                   \
    F(int, SSL_CTX_set_num_tickets, (void *ctx, size_t count))                                                         \
    F(int, SSL_CTX_use_certificate, (void *ctx, void *certificate))                                                    \
    F(int, SSL_CTX_use_PrivateKey, (void *ctx, void *key))                                                             \
    F(int, SSL_CTX_use_certificate_file, (void *ctx, const char *path, int type))                                      \
    F(int, SSL_CTX_use_PrivateKey_file, (void *ctx, const char *path, int type))                                       \
    F(int, SSL_CTX_check_private_key, (const void *ctx))                                                               \
    F(void *, SSL_CTX_get_cert_store, (const void *ctx))                                                               \
    F(int, SSL_CTX_add_client_CA, (void *ctx, void *certificate))                                                      \
    F(void, SSL_CTX_set_verify, (void *ctx, int mode, void *callback))                                                 \
    F(void, SSL_CTX_set_keylog_callback, (void *ctx, void (*callback)(const void *ssl, const char *line)))             \
    F(void *, SSL_new, (void *ctx))                                                                                    \
    F(void, SSL_free, (void *ssl))                                                                                     \
    F(int, SSL_set_fd, (void *ssl, int fd))                                                                            \
    F(void, SSL_set_accept_state, (void *ssl))                                                                         \
    F(void, SSL_set_connect_state, (void *ssl))                                                                        \
    F(long, SSL_ctrl, (void *ssl, int command, long number, void *pointer))                                            \
    F(int, SSL_set1_host, (void *ssl, const char *name))                                                               \
    F(void *, SSL_get0_param, (void *ssl))                                                                             \
    F(int, SSL_do_handshake, (void *ssl))                                                                              \
    F(int, SSL_get_error, (const void *ssl, int result))                                                               \
    F(long, SSL_get_verify_result, (const void *ssl))                                                                  \
    F(const void *, SSL_get_current_cipher, (const void *ssl))                                                         \
    F(const char *, SSL_CIPHER_get_name, (const void *cipher))                                                         \
    F(void *, SSL_get1_peer_certificate, (const void *ssl))                                                            \
    F(int, SSL_export_keying_material,                                                                                 \
      (void *ssl, unsigned char *out, size_t nbytes, const char *label, size_t label_bytes,                            \
       const unsigned char *context, size_t context_bytes, int use_context))                                           \
    F(int, SSL_write_ex, (void *ssl, const void *data, size_t nbytes, size_t *done))                                   \
    F(int, SSL_read_ex, (void *ssl, void *data, size_t nbytes, size_t *done))

#define KV_CRYPTO_FUNCTIONS(F)                                                                                         \
    F(const char *, OpenSSL_version, (int what))                                                                       \
    F(void *, BIO_new_mem_buf, (const void *data, int nbytes))                                                         \
    F(int, BIO_free, (void *bio))                                                                                      \
    F(void *, PEM_read_bio_X509, (void *bio, void **out, void *callback, void *argument))                              \
    F(void *, PEM_read_bio_PrivateKey, (void *bio, void **out, void *callback, void *argument))                        \
    F(void, X509_free, (void *certificate))                                                                            \
    F(void, EVP_PKEY_free, (void *key))                                                                                \
    F(int, X509_STORE_add_cert, (void *store, void *certificate))                                                      \
    F(int, X509_VERIFY_PARAM_set1_ip_asc, (void *param, const char *address))                                          \
    F(const char *, X509_verify_cert_error_string, (long code))                                                        \
    F(int, i2d_X509, (const void *certificate, unsigned char **out))                                                   \
    F(unsigned long, ERR_get_error, (void))                                                                            \
    F(unsigned long, ERR_peek_last_error, (void))                                                                      \
    F(void, ERR_clear_error, (void))                                                                                   \
    F(const char *, ERR_reason_error_string, (unsigned long code))                                                     \
    F(const void *, EVP_aes_128_gcm, (void))                                                                           \
    F(const void *, EVP_aes_256_gcm, (void))                                                                           \
    F(const void *, EVP_chacha20_poly1305, (void))                                                                     \
    F(const void *, EVP_sha256, (void))                                                                                \
    F(const void *, EVP_sha384, (void))                                                                                \
    F(void *, EVP_CIPHER_CTX_new, (void))                                                                              \
    F(void, EVP_CIPHER_CTX_free, (void *ctx))                                                                          \
    F(int, EVP_CIPHER_CTX_ctrl, (void *ctx, int command, int number, void *pointer))                                   \
    F(int, EVP_CipherInit_ex,                                                                                          \
      (void *ctx, const void *cipher, void *engine, const unsigned char *key, const unsigned char *iv, int encrypt))   \
    F(int, EVP_CipherUpdate,                                                                                           \
      (void *ctx, unsigned char *out, int *out_bytes, const unsigned char *in, int in_bytes))                          \
    F(int, EVP_CipherFinal_ex, (void *ctx, unsigned char *out, int *out_bytes))                                        \
    F(unsigned char *, HMAC,                                                                                           \
      (const void *digest, const void *key, int key_bytes, const unsigned char *data, size_t nbytes,                   \
       unsigned char *out, unsigned *out_bytes))                                                                       \
    F(void, OPENSSL_cleanse, (void *data, size_t nbytes))

typedef struct {
#define KV_MEMBER(result, name, arguments) result(*name) arguments;
    KV_SSL_FUNCTIONS(KV_MEMBER)
    KV_CRYPTO_FUNCTIONS(KV_MEMBER)
#undef KV_MEMBER
} kv_openssl;

/* From openssl/ssl.h, tls1.h and evp.h: numbers that the manual gives names to. */
enum {
    KV_SSL_VERIFY_PEER = 1,
    KV_SSL_VERIFY_FAIL_IF_NO_PEER_CERT = 2,
    KV_SSL_CTRL_SET_MIN_PROTO = 123,
    KV_SSL_CTRL_EXTRA_CHAIN_CERT = 14,
    KV_SSL_CTRL_SESS_CACHE_MODE = 44,
    KV_SSL_CTRL_SET_TLSEXT_HOSTNAME = 55,
    KV_TLS1_3 = 0x0304,
    KV_SSL_ERROR_SSL = 1,
    KV_SSL_ERROR_WANT_READ = 2,
    KV_SSL_ERROR_WANT_WRITE = 3,
    KV_SSL_ERROR_SYSCALL = 5,
    KV_SSL_ERROR_ZERO_RETURN = 6,
    KV_EVP_AEAD_GET_TAG = 0x10,
    KV_EVP_AEAD_SET_TAG = 0x11,
};
#define KV_SSL_OP_NO_TICKET ((uint64_t)1 << 14)
#define KV_SSL_OP_NO_RENEGOTIATION ((uint64_t)1 << 30)

/* Fills the table; returns NULL, or what is missing (in `why`). Not thread-safe: call once. */
static inline const char *kv_openssl_load(kv_openssl *table, char *why, size_t why_size) {
#ifdef __APPLE__
    const char *names[] = {"libssl.3.dylib", "libcrypto.3.dylib"};
#else
    const char *names[] = {"libssl.so.3", "libcrypto.so.3"};
#endif
    void *ssl = dlopen(names[0], RTLD_NOW | RTLD_LOCAL), *crypto = dlopen(names[1], RTLD_NOW | RTLD_LOCAL);
    if (!ssl || !crypto) {
        snprintf(why, why_size, "%s cannot be loaded", names[ssl ? 1 : 0]);
        return why;
    }
#define KV_FIND(library, name)                                                                                         \
    if (!(*(void **)&table->name = dlsym(library, #name))) {                                                           \
        snprintf(why, why_size, "%s lacks %s", names[library == crypto], #name);                                       \
        return why;                                                                                                    \
    }
#define KV_FIND_SSL(result, name, arguments) KV_FIND(ssl, name)
#define KV_FIND_CRYPTO(result, name, arguments) KV_FIND(crypto, name)
    KV_SSL_FUNCTIONS(KV_FIND_SSL)
    KV_CRYPTO_FUNCTIONS(KV_FIND_CRYPTO)
#undef KV_FIND_SSL
#undef KV_FIND_CRYPTO
#undef KV_FIND
    return NULL;
}

#endif
