/* What plain C reaches on a path: send() and recv() in a loop, one thread per connection, nothing else.
 *
 *   baseline receive HOST CONNECTIONS BYTES COPIES CONGESTION
 *   baseline send HOST PORT CONNECTIONS BYTES COPIES CONGESTION      CONGESTION "-": the system's default
 *
 * Each end keeps COPIES buffers of BYTES and takes the next one each round, so that no round runs from a cache that
 * is smaller than all of them. Commands come as lines on standard input and are answered by lines:
 *
 *   move CALL HASH    send or receive BYTES, split evenly over the connections, CALL bytes per system call at most.
 *                     HASH 1: xxh3_64 of every MiB, by the sender before it is sent, by the receiver while it is hot.
 *                     A connection is done when its receiver has answered one byte, as a sealed transfer is.
 *   ping SIZE COUNT   COUNT round trips of SIZE bytes each way on the first connection.
 *
 * Every answer is one JSON object. The process ends with its input, and with the process that started it.
 */
#define _GNU_SOURCE
#define XXH_INLINE_ALL
#include "xxhash.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_CONNECTIONS 64
#define MAX_PINGS 100000
#define HUGE ((size_t)2 << 20)
#define HASH_UNIT ((size_t)1 << 20)

typedef struct {
    int fd;
    unsigned char *data; /* this connection's part of the copy in use */
    size_t nbytes, call;
    bool hash;
    pthread_t thread;
} connection;

static connection connections[MAX_CONNECTIONS];
static int count;
static size_t nbytes;
static int copies;
static unsigned char *memory;
static volatile uint64_t sink; /* so that no hash is optimised away */

static void die(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static double cpu(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) * 1e-6;
}

static void allocate(bool random) {
    size_t total = (nbytes * (size_t)copies + HUGE - 1) / HUGE * HUGE;
    unsigned char *p = mmap(NULL, total + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) die("mmap");
    memory = (unsigned char *)(((uintptr_t)p + HUGE - 1) & ~(uintptr_t)(HUGE - 1));
    madvise(memory, total, MADV_HUGEPAGE); /* where it is refused, small pages serve */
    uint64_t state = 0x9E3779B97F4A7C15ull;
    for (size_t i = 0; i < total / 8; i++) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        ((uint64_t *)memory)[i] = random ? state : 0;
    }
}

static void tune(int fd, const char *congestion) {
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (strcmp(congestion, "-") && setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, congestion, (socklen_t)strlen(congestion)))
        die("this congestion control may not be chosen here");
}

#ifdef KV_TLS_BASELINE
#include "openssl.h"

static kv_openssl o;
static void *ssl_of[MAX_CONNECTIONS + 64]; /* by descriptor */

static void secure(int fd, bool sender) {
    static void *ctx;
    char why[128];
    if (fd >= MAX_CONNECTIONS + 64) exit(2);
    if (!ctx) {
        if (kv_openssl_load(&o, why, sizeof why)) fprintf(stderr, "%s\n", why), exit(1);
        ctx = o.SSL_CTX_new(sender ? o.TLS_client_method() : o.TLS_server_method());
        o.SSL_CTX_ctrl(ctx, KV_SSL_CTRL_SET_MIN_PROTO, KV_TLS1_3, NULL);
        o.SSL_CTX_set_ciphersuites(ctx, "TLS_AES_128_GCM_SHA256");
        o.SSL_CTX_set_num_tickets(ctx, 0);
        if (!sender && (o.SSL_CTX_use_certificate_file(ctx, getenv("KV_TLS_PEM"), 1) != 1 ||
                        o.SSL_CTX_use_PrivateKey_file(ctx, getenv("KV_TLS_KEY"), 1) != 1))
            fputs("the certificate cannot be used\n", stderr), exit(1);
    }
    void *ssl = ssl_of[fd] = o.SSL_new(ctx);
    o.SSL_set_fd(ssl, fd);
    if (sender) o.SSL_set_connect_state(ssl);
    else o.SSL_set_accept_state(ssl);
    if (o.SSL_do_handshake(ssl) != 1) fputs("no handshake\n", stderr), exit(1);
}

static ssize_t put(int fd, const void *data, size_t length) {
    size_t n = 0;
    return o.SSL_write_ex(ssl_of[fd], data, length, &n) == 1 ? (ssize_t)n : -1;
}

static ssize_t get(int fd, void *data, size_t length) {
    size_t n = 0;
    return o.SSL_read_ex(ssl_of[fd], data, length, &n) == 1 ? (ssize_t)n : -1;
}
#else
static void secure(int fd, bool sender) { (void)fd, (void)sender; }
static ssize_t put(int fd, const void *data, size_t length) { return send(fd, data, length, MSG_NOSIGNAL); }
static ssize_t get(int fd, void *data, size_t length) { return recv(fd, data, length, 0); }
#endif

static void send_all(int fd, const unsigned char *data, size_t length, size_t call) {
    while (length) {
        ssize_t n = put(fd, data, length < call ? length : call);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) die("send");
        data += n, length -= (size_t)n;
    }
}

static void recv_all(int fd, unsigned char *data, size_t length, size_t call, XXH3_state_t *state) {
    while (length) {
        ssize_t n = get(fd, data, length < call ? length : call);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) die("recv");
        if (state) XXH3_64bits_update(state, data, (size_t)n);
        data += n, length -= (size_t)n;
    }
}

static void *sending(void *argument) {
    connection *c = argument;
    unsigned char answer;
    if (!c->hash) send_all(c->fd, c->data, c->nbytes, c->call);
    for (size_t at = 0; c->hash && at < c->nbytes; at += HASH_UNIT) {
        size_t n = c->nbytes - at < HASH_UNIT ? c->nbytes - at : HASH_UNIT;
        sink ^= XXH3_64bits(c->data + at, n);
        send_all(c->fd, c->data + at, n, c->call);
    }
    recv_all(c->fd, &answer, 1, 1, NULL);
    return NULL;
}

static void *receiving(void *argument) {
    connection *c = argument;
    XXH3_state_t *state = c->hash ? XXH3_createState() : NULL;
    if (!c->hash) recv_all(c->fd, c->data, c->nbytes, c->call, NULL);
    for (size_t at = 0; c->hash && at < c->nbytes; at += HASH_UNIT) {
        size_t n = c->nbytes - at < HASH_UNIT ? c->nbytes - at : HASH_UNIT;
        XXH3_64bits_reset(state);
        recv_all(c->fd, c->data + at, n, c->call, state);
        sink ^= XXH3_64bits_digest(state);
    }
    XXH3_freeState(state);
    send_all(c->fd, (const unsigned char *)"k", 1, 1);
    return NULL;
}

static void move(bool sender, size_t call, bool hash, int round) {
    unsigned char *copy = memory + nbytes * (size_t)(round % copies);
    size_t part = nbytes / (size_t)count;
    if (!sender) memset(copy, 0, nbytes);
    if (!sender) puts("{\"event\": \"expecting\"}"), fflush(stdout);
    double cpu_then = cpu(), then = now();
    for (int i = 0; i < count; i++) {
        connection *c = &connections[i];
        c->data = copy + part * (size_t)i;
        c->nbytes = i == count - 1 ? nbytes - part * (size_t)i : part;
        c->call = call, c->hash = hash;
        if (pthread_create(&c->thread, NULL, sender ? sending : receiving, c)) die("thread");
    }
    for (int i = 0; i < count; i++) pthread_join(connections[i].thread, NULL);
    double seconds = now() - then, cpu_s = cpu() - cpu_then;
    unsigned long long digest = XXH3_64bits(copy, nbytes);
    printf("{\"event\": \"done\", \"seconds\": %.9f, \"cpu_s\": %.6f, \"digest\": \"%016llx\"}\n", seconds, cpu_s, digest);
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void ping(bool sender, size_t size, int rounds) {
    static double seconds[MAX_PINGS];
    int fd = connections[0].fd;
    if (rounds < 1 || rounds > MAX_PINGS || size > nbytes) exit(2);
    if (!sender) puts("{\"event\": \"expecting\"}"), fflush(stdout);
    for (int i = 0; i < rounds; i++) {
        double then = now();
        if (sender) send_all(fd, memory, size, size);
        recv_all(fd, memory, size, size, NULL);
        if (!sender) send_all(fd, memory, size, size);
        seconds[i] = now() - then;
    }
    qsort(seconds, (size_t)rounds, sizeof *seconds, ascending);
    double p50 = seconds[rounds / 2], p99 = seconds[(int)((long)rounds * 99 / 100)];
    printf("{\"event\": \"done\", \"p50_s\": %.9f, \"p99_s\": %.9f}\n", p50, p99);
}

static void serve(bool sender) {
    char line[128];
    size_t call;
    int number, round = 0;
    while (fgets(line, sizeof line, stdin)) {
        if (sscanf(line, "move %zu %d", &call, &number) == 2 && call)
            move(sender, call, number == 1, round++);
        else if (sscanf(line, "ping %zu %d", &call, &number) == 2)
            ping(sender, call, number);
        else
            exit(2);
        fflush(stdout);
    }
}

static struct sockaddr_in address(const char *host, int port) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    if (inet_pton(AF_INET, host, &a.sin_addr) != 1) errno = EINVAL, die("the host must be an IPv4 address");
    return a;
}

int main(int argc, char **argv) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    signal(SIGINT, SIG_IGN); /* Ctrl-C reaches the whole group; whoever started us decides */
    bool sender = argc == 8 && !strcmp(argv[1], "send");
    if (!sender && (argc != 7 || strcmp(argv[1], "receive"))) {
        fputs("see the head of baseline.c\n", stderr);
        return 2;
    }
    char **rest = argv + (sender ? 4 : 3);
    count = atoi(rest[0]), nbytes = strtoull(rest[1], NULL, 10), copies = atoi(rest[2]);
    const char *congestion = rest[3];
    if (count < 1 || count > MAX_CONNECTIONS || nbytes < (size_t)count || copies < 1) return 2;
    allocate(sender);
    if (sender) {
        struct sockaddr_in to = address(argv[2], atoi(argv[3]));
        for (int i = 0; i < count; i++) {
            int fd = connections[i].fd = socket(AF_INET, SOCK_STREAM, 0);
            tune(fd, congestion);
            if (connect(fd, (struct sockaddr *)&to, sizeof to)) die("connect");
            secure(fd, true);
        }
    } else {
        struct sockaddr_in at = address(argv[2], 0);
        socklen_t length = sizeof at;
        int listener = socket(AF_INET, SOCK_STREAM, 0);
        tune(listener, congestion);
        if (bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, MAX_CONNECTIONS)) die("listen");
        getsockname(listener, (struct sockaddr *)&at, &length);
        printf("{\"event\": \"listening\", \"port\": %d}\n", ntohs(at.sin_port)), fflush(stdout);
        for (int i = 0; i < count; i++) {
            if ((connections[i].fd = accept(listener, NULL, NULL)) < 0) die("accept");
            tune(connections[i].fd, congestion);
            secure(connections[i].fd, false);
        }
        close(listener);
    }
    char running[16] = {0};
    socklen_t length = sizeof running - 1;
    getsockopt(connections[0].fd, IPPROTO_TCP, TCP_CONGESTION, running, &length);
    printf("{\"event\": \"ready\", \"congestion\": \"%s\"}\n", running), fflush(stdout);
    serve(sender);
    return 0;
}
