/* baseline.c over TLS 1.3: SSL_write_ex and SSL_read_ex in the same loops, AES-128-GCM, by the same OpenSSL as ours.
 *
 * KV_TLS_PEM names a file with the receiver's certificate, KV_TLS_KEY one with its key; the sender verifies nothing,
 * and handshakes are not timed.
 */
#define KV_TLS_BASELINE 1
#include "baseline.c"
