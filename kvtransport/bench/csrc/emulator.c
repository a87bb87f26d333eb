/* A link between two network namespaces, emulated in user space: delay, rate, drop-tail queue, loss.
 *
 *   emulator link DELAY_MS RATE_MBIT LOSS_PERCENT QUEUE_MS SEED
 *   emulator enter PID SIDE COMMAND...    run COMMAND inside namespace SIDE (0, 1) of the emulator with this PID
 *
 * Each namespace has one TUN device (10.78.0.1 and 10.78.0.2); what one sends is read here, delayed and written to
 * the other. Packets pass as the kernel's super-packets of up to 64 KiB (virtio headers), which is what makes
 * several Gbit/s possible, but loss, the queue and the rate work on the segments they would be on a wire: a segment
 * that is lost is cut out of its super-packet. Both directions are alike. Rate 0 is no limit and no queue.
 *
 * Neither namespace has a name: they live as long as this process or something inside them does, so nothing is left
 * behind however it ends. Commands come as lines on standard input: `set DELAY_MS RATE_MBIT LOSS_PERCENT QUEUE_MS`
 * changes the link while it carries packets (their order is kept), `stats` answers what passed so far. Every answer
 * is one JSON object. The process ends with its input, and with the process that started it.
 */
#define _GNU_SOURCE
#include "namespaces.h"

#include <math.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>

#define WIRE_OVERHEAD 38 /* Ethernet header, check sequence, preamble and gap of every segment */
#define BATCH 64         /* packets of one direction before the other has its turn */
#define MAX_HELD ((size_t)1 << 30)

typedef struct packet {
    struct packet *next;
    double due; /* when its last bit arrives */
    size_t length;
    unsigned char data[];
} packet;

typedef struct {
    int from, to; /* TUN devices */
    packet *head, *tail;
    double free_at;    /* when the wire has sent all that was queued */
    long until_loss;   /* segments until the next one is lost */
    size_t held_bytes; /* in queue and on the way */
    uint64_t packets, segments, lost, dropped, wire_bytes;
    double longest_queue_s;
} direction;

static struct {
    double delay_s, bits_per_s, loss, queue_s;
} link_now;
static uint64_t random_state;
static direction directions[2];

/* -- loss ------------------------------------------------------------------------------------------------- */

static double uniform(void) { /* (0, 1] */
    random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
    return ((double)(random_state >> 11) + 1.0) / 9007199254740992.0;
}

/* How many segments pass before one is lost: geometric, so that no random number is drawn per segment. */
static long draw_gap(void) {
    if (link_now.loss <= 0) return INT64_MAX / 2;
    if (link_now.loss >= 1) return 0;
    return (long)(log(uniform()) / log1p(-link_now.loss));
}

/* -- queue ------------------------------------------------------------------------------------------------ */

/* One more segment of `bytes` on the wire: when it has been sent, or a negative number when the queue is full. */
static double enqueue(direction *d, size_t bytes, double at) {
    if (link_now.bits_per_s <= 0) return at;
    double start = d->free_at > at ? d->free_at : at;
    double waits = start - at;
    if (waits > link_now.queue_s) return -1.0;
    if (waits > d->longest_queue_s) d->longest_queue_s = waits;
    return d->free_at = start + (double)bytes * 8.0 / link_now.bits_per_s;
}

static void hold(direction *d, packet *p, double sent_at) {
    p->due = sent_at + link_now.delay_s;
    if (d->tail && d->tail->due > p->due) p->due = d->tail->due; /* a shorter delay reorders nothing */
    p->next = NULL;
    if (d->tail) d->tail->next = p;
    else d->head = p;
    d->tail = p;
    d->held_bytes += p->length;
}

static packet *allocate(size_t length) {
    packet *p = malloc(sizeof *p + length);
    if (!p) die("memory");
    p->length = length;
    return p;
}

/* The fate of one segment: true when it is queued, with the time its last bit leaves in *sent_at. */
static bool pass(direction *d, size_t wire_bytes, double at, double *sent_at) {
    d->segments++;
    if (d->until_loss-- <= 0) {
        d->until_loss = draw_gap();
        d->lost++;
        return false;
    }
    double done = d->held_bytes > MAX_HELD ? -1.0 : enqueue(d, wire_bytes, at);
    if (done < 0) {
        d->dropped++;
        return false;
    }
    d->wire_bytes += wire_bytes;
    *sent_at = done;
    return true;
}

/* -- packets ---------------------------------------------------------------------------------------------- */

static uint32_t sum_words(const void *data, size_t length, uint32_t sum) {
    const uint16_t *words = data;
    for (; length > 1; length -= 2) sum += *words++;
    return sum;
}

static uint16_t fold(uint32_t sum) {
    while (sum >> 16) sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)sum;
}

/* Payload [from, from + length) of a TCP super-packet as a packet of its own. `first`: number of its first segment. */
static packet *slice(const unsigned char *whole, size_t headers, size_t from, size_t length, unsigned first, bool last) {
    packet *p = allocate(headers + length);
    memcpy(p->data, whole, headers);
    memcpy(p->data + headers, whole + headers + from, length);
    struct virtio_net_hdr *virtio = (void *)p->data;
    struct iphdr *ip = (void *)(p->data + sizeof *virtio);
    struct tcphdr *tcp = (void *)((unsigned char *)ip + ip->ihl * 4);
    ip->tot_len = htons((uint16_t)(headers - sizeof *virtio + length));
    ip->id = htons((uint16_t)(ntohs(ip->id) + first));
    ip->check = 0;
    ip->check = (uint16_t)~fold(sum_words(ip, ip->ihl * 4u, 0));
    tcp->seq = htonl(ntohl(tcp->seq) + (uint32_t)from);
    if (!last) tcp->fin = 0, tcp->psh = 0;
    /* The sum of the pseudo header; the receiving kernel takes it as a checksum still to be completed. */
    uint32_t sum = sum_words(&ip->saddr, 8, htons(IPPROTO_TCP) + htons((uint16_t)(tcp->doff * 4u + length)));
    tcp->check = fold(sum);
    if (length <= virtio->gso_size) virtio->gso_type = VIRTIO_NET_HDR_GSO_NONE, virtio->gso_size = 0;
    return p;
}

static void take_super_packet(direction *d, const unsigned char *data, size_t length, double at) {
    const struct virtio_net_hdr *virtio = (const void *)data;
    const struct iphdr *ip = (const void *)(data + sizeof *virtio);
    const struct tcphdr *tcp = (const void *)((const unsigned char *)ip + ip->ihl * 4);
    size_t headers = sizeof *virtio + ip->ihl * 4u + tcp->doff * 4u, payload = length - headers;
    size_t mss = virtio->gso_size, each = headers - sizeof *virtio + WIRE_OVERHEAD;
    size_t run = 0; /* payload of the segments before this one that passed and wait to be joined */
    double sent_at = at;
    unsigned number = 0;
    for (size_t from = 0; from < payload; from += mss, number++) {
        size_t part = payload - from < mss ? payload - from : mss;
        bool passed = pass(d, part + each, at, &sent_at), end = from + part == payload;
        if (passed) run += part;
        if (run && (!passed || end)) {
            size_t stop = passed ? from + part : from, start = stop - run;
            hold(d, slice(data, headers, start, run, (unsigned)(start / mss), stop == payload), sent_at);
            run = 0;
        }
    }
}

static void take(direction *d, const unsigned char *data, size_t length, double at) {
    const struct virtio_net_hdr *virtio = (const void *)data;
    const struct iphdr *ip = (const void *)(data + sizeof *virtio);
    /* The link is IPv4's. What else a kernel says by itself on a new device (IPv6 looking for routers) is nobody's traffic. */
    if (length < sizeof *virtio + sizeof *ip || ip->version != 4) return;
    d->packets++;
    if (virtio->gso_type != VIRTIO_NET_HDR_GSO_NONE && virtio->gso_size && ip->protocol == IPPROTO_TCP) {
        take_super_packet(d, data, length, at);
        return;
    }
    double sent_at = at;
    if (!pass(d, length - sizeof *virtio + WIRE_OVERHEAD, at, &sent_at)) return;
    packet *p = allocate(length);
    memcpy(p->data, data, length);
    hold(d, p, sent_at);
}

/* Deliver what is due. Returns whether there was anything. */
static bool deliver(direction *d, double at) {
    bool any = false;
    while (d->head && d->head->due <= at) {
        packet *p = d->head;
        if (write(d->to, p->data, p->length) < 0) {
            if (errno == EAGAIN) break;
            d->dropped++;
        }
        d->head = p->next;
        if (!d->head) d->tail = NULL;
        d->held_bytes -= p->length;
        free(p);
        any = true;
    }
    return any;
}

/* -- the loop --------------------------------------------------------------------------------------------- */

static bool set_link(const char *text) {
    double delay_ms, mbit, percent, queue_ms;
    if (sscanf(text, "%lf %lf %lf %lf", &delay_ms, &mbit, &percent, &queue_ms) != 4) return false;
    if (delay_ms < 0 || mbit < 0 || percent < 0 || percent > 100 || queue_ms < 0) return false;
    link_now.delay_s = delay_ms / 1e3, link_now.bits_per_s = mbit * 1e6;
    link_now.loss = percent / 100, link_now.queue_s = queue_ms / 1e3;
    return true;
}

static void print_stats(void) {
    printf("{\"event\": \"stats\", \"directions\": [");
    for (int i = 0; i < 2; i++) {
        const direction *d = &directions[i];
        printf("%s{\"packets\": %lu, \"segments\": %lu, \"lost\": %lu, \"dropped\": %lu, \"wire_bytes\": %lu, "
               "\"longest_queue_s\": %.6f, \"held_bytes\": %zu}",
               i ? ", " : "", d->packets, d->segments, d->lost, d->dropped, d->wire_bytes, d->longest_queue_s, d->held_bytes);
    }
    puts("]}");
    fflush(stdout);
}

static bool command(const char *text) {
    if (!strncmp(text, "set ", 4) && set_link(text + 4)) {
        for (int i = 0; i < 2; i++) directions[i].until_loss = draw_gap();
        puts("{\"event\": \"changed\"}"), fflush(stdout);
        return true;
    }
    if (strcmp(text, "stats")) return false;
    print_stats();
    return true;
}

static void relay(void) {
    static unsigned char data[sizeof(struct virtio_net_hdr) + 65536 + 64];
    double heard = 0;
    for (;;) {
        double at = now();
        bool worked = false;
        for (int i = 0; i < 2; i++) {
            direction *d = &directions[i];
            for (int k = 0; k < BATCH; k++) {
                ssize_t n = read(d->from, data, sizeof data);
                if (n <= 0) break;
                take(d, data, (size_t)n, at);
                worked = true;
            }
            worked |= deliver(d, at);
        }
        double wait = 0;
        if (!worked) {
            wait = 0.05;
            for (int i = 0; i < 2; i++)
                if (directions[i].head && directions[i].head->due - at < wait) wait = directions[i].head->due - at;
            if (wait < 0) wait = 1e-5; /* due, but the device is full */
        } else if (at - heard < 0.001) {
            continue; /* busy: look for commands a thousand times a second at most */
        }
        heard = at;
        struct timespec t = {0, (long)(wait * 1e9)};
        struct pollfd p[3] = {{directions[0].from, POLLIN, 0}, {directions[1].from, POLLIN, 0}, {0, POLLIN, 0}};
        ppoll(p, 3, &t, NULL);
        if (p[2].revents && !obey(command)) return;
    }
}

static int run_link(char **arguments) {
    char text[256];
    snprintf(text, sizeof text, "%s %s %s %s", arguments[0], arguments[1], arguments[2], arguments[3]);
    random_state = strtoull(arguments[4], NULL, 10) * 2654435761u + 88172645463325252ull;
    if (!set_link(text)) {
        fprintf(stderr, "not a link: %s\n", text);
        return 2;
    }
    prctl(PR_SET_TIMERSLACK, 1ul);
    int device[2];
    make_sides(2, device);
    for (int i = 0; i < 2; i++) {
        directions[i].from = device[i], directions[i].to = device[1 - i];
        directions[i].until_loss = draw_gap();
    }
    puts("{\"event\": \"ready\"}"), fflush(stdout);
    relay();
    return 0;
}

int main(int argc, char **argv) {
    if (argc >= 5 && !strcmp(argv[1], "enter")) return enter(argv + 2);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    signal(SIGINT, SIG_IGN); /* Ctrl-C reaches the whole group; whoever started us decides */
    if (argc == 7 && !strcmp(argv[1], "link")) return run_link(argv + 2);
    fputs("see the head of emulator.c\n", stderr);
    return 2;
}
