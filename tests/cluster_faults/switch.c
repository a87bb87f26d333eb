/* A switch between network namespaces: whatever one sends to another is delayed, slowed or lost as the pair's link says.
 *
 *   switch run HOSTS                      HOSTS namespaces, with addresses 10.78.0.1 on; links begin without delay or limit
 *   switch enter PID HOST COMMAND...      run COMMAND inside namespace HOST (0, 1, ...) of the switch with this PID
 *
 * Each ordered pair of hosts is a link of its own, so that one direction alone can be cut. Packets pass as the kernel's super-packets (virtio
 * headers), whole or not at all. Commands come as lines on standard input: `set FROM TO DELAY_MS RATE_MBIT CUT` changes a link (rate 0: no
 * limit; CUT 1: nothing passes, and nobody is told); what is on its way arrives as it would have, on a link that is cut it is lost. Each is
 * answered by one JSON object. `stats` answers what each host sent. The process ends with its input, and with whoever started it.
 */
#include "namespaces.h"

#include <netinet/ip.h>
#include <poll.h>
#include <stdint.h>

#define MAX_HOSTS 16
#define BATCH 64
#define QUEUE_S 0.2 /* drop-tail before a rate limit */
#define MAX_HELD ((size_t)256 << 20)

typedef struct packet {
    struct packet *next;
    double due;
    size_t length;
    unsigned char data[];
} packet;

typedef struct {
    double delay_s, bits_per_s, free_at;
    bool cut;
    packet *head, *tail;
} line;

static int hosts;
static int device[MAX_HOSTS];
static line lines[MAX_HOSTS][MAX_HOSTS];
static uint64_t packets[MAX_HOSTS], wire_bytes[MAX_HOSTS], dropped[MAX_HOSTS];
static size_t held_bytes;

static void take(int from, const unsigned char *data, size_t length, double at) {
    const struct iphdr *ip = (const void *)(data + sizeof(struct virtio_net_hdr));
    if (length < sizeof(struct virtio_net_hdr) + sizeof *ip || ip->version != 4) return;
    int to = (int)(ntohl(ip->daddr) & 255) - 1;
    if (to < 0 || to >= hosts || to == from) return;
    line *l = &lines[from][to];
    packets[from]++;
    double start = l->free_at > at ? l->free_at : at;
    if (l->cut || held_bytes > MAX_HELD || (l->bits_per_s > 0 && start - at > QUEUE_S)) {
        dropped[from]++;
        return;
    }
    packet *p = malloc(sizeof *p + length);
    if (!p) die("memory");
    memcpy(p->data, data, length);
    p->length = length, p->next = NULL;
    if (l->bits_per_s > 0) start = l->free_at = start + (double)length * 8.0 / l->bits_per_s;
    else start = at;
    p->due = start + l->delay_s;
    if (l->tail && l->tail->due > p->due) p->due = l->tail->due; /* a shorter delay reorders nothing */
    if (l->tail) l->tail->next = p;
    else l->head = p;
    l->tail = p;
    held_bytes += length, wire_bytes[from] += length;
}

static void pop(line *l) {
    packet *p = l->head;
    l->head = p->next;
    if (!l->head) l->tail = NULL;
    held_bytes -= p->length;
    free(p);
}

/* Deliver what is due on one link; returns whether there was anything. */
static bool deliver(int from, int to, double at) {
    line *l = &lines[from][to];
    bool any = false;
    while (l->head && (l->cut || l->head->due <= at)) {
        if (l->cut) dropped[from]++;
        else if (write(device[to], l->head->data, l->head->length) < 0) {
            if (errno == EAGAIN) break;
            dropped[from]++;
        }
        pop(l);
        any = true;
    }
    return any;
}

static void print_stats(void) {
    printf("{\"event\": \"stats\", \"hosts\": [");
    for (int i = 0; i < hosts; i++)
        printf("%s{\"packets\": %lu, \"wire_bytes\": %lu, \"dropped\": %lu}", i ? ", " : "", packets[i], wire_bytes[i], dropped[i]);
    puts("]}"), fflush(stdout);
}

static bool set_line(const char *text) {
    int from, to, cut;
    double delay_ms, mbit;
    if (sscanf(text, "%d %d %lf %lf %d", &from, &to, &delay_ms, &mbit, &cut) != 5) return false;
    if (from < 0 || to < 0 || from >= hosts || to >= hosts || from == to || delay_ms < 0 || mbit < 0) return false;
    line *l = &lines[from][to];
    l->delay_s = delay_ms / 1e3, l->bits_per_s = mbit * 1e6, l->cut = cut != 0;
    double at = now();
    if (l->free_at > at + QUEUE_S) l->free_at = at; /* what a slow link had queued does not hold up a fast one */
    return true;
}

static bool command(const char *text) {
    if (!strncmp(text, "set ", 4) && set_line(text + 4)) {
        puts("{\"event\": \"changed\"}"), fflush(stdout);
        return true;
    }
    if (strcmp(text, "stats")) return false;
    print_stats();
    return true;
}

static void carry(void) {
    static unsigned char data[sizeof(struct virtio_net_hdr) + 65536 + 64];
    struct pollfd p[MAX_HOSTS + 1];
    for (int i = 0; i < hosts; i++) p[i] = (struct pollfd){device[i], POLLIN, 0};
    p[hosts] = (struct pollfd){0, POLLIN, 0};
    for (;;) {
        double at = now(), next = at + 0.05;
        bool worked = false;
        for (int from = 0; from < hosts; from++) {
            for (int k = 0; k < BATCH; k++) {
                ssize_t n = read(device[from], data, sizeof data);
                if (n <= 0) break;
                take(from, data, (size_t)n, at);
                worked = true;
            }
            for (int to = 0; to < hosts; to++) {
                worked |= deliver(from, to, at);
                packet *head = lines[from][to].head;
                if (head && head->due < next) next = head->due > at ? head->due : at + 1e-4; /* due, but the device is full */
            }
        }
        double wait = worked ? 0 : next - at;
        struct timespec t = {0, (long)(wait * 1e9)};
        ppoll(p, (nfds_t)hosts + 1, &t, NULL);
        if (p[hosts].revents && !obey(command)) return;
    }
}

static int run(const char *count) {
    hosts = atoi(count);
    if (hosts < 2 || hosts > MAX_HOSTS) {
        fprintf(stderr, "2 to %d hosts, got %s\n", MAX_HOSTS, count);
        return 2;
    }
    prctl(PR_SET_TIMERSLACK, 1ul);
    make_sides(hosts, device);
    puts("{\"event\": \"ready\"}"), fflush(stdout);
    carry();
    return 0;
}

int main(int argc, char **argv) {
    if (argc >= 5 && !strcmp(argv[1], "enter")) return enter(argv + 2);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    signal(SIGINT, SIG_IGN); /* Ctrl-C reaches the whole group; whoever started us decides */
    if (argc == 3 && !strcmp(argv[1], "run")) return run(argv[2]);
    fputs("see the head of switch.c\n", stderr);
    return 2;
}
