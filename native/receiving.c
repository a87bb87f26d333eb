/* Reading frames: DATA to its claimed place, the rest to Python. See engine.h on locking. */
#include "engine.h"

#ifdef KV_ENGINE
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define READ_STEPS 4 /* receives before the thread looks at its other connections */
#define IOVS 256

/* ---- who may write where ---- */

kv_incoming *kv_incoming_find(const kv_group *group, const unsigned char *transfer) {
    kv_incoming *in = group->incoming[kv_bucket(transfer)];
    while (in && memcmp(in->transfer, transfer, 16) != 0) in = in->next;
    return in;
}

kv_in_slot *kv_in_slot_find(const kv_incoming *in, unsigned layer, unsigned tensor) {
    size_t low = 0, high = in->slot_count;
    unsigned key = layer << 16 | tensor;
    while (low < high) {
        size_t middle = (low + high) / 2;
        unsigned here = (unsigned)in->slots[middle].layer << 16 | in->slots[middle].tensor;
        if (here == key) return &in->slots[middle];
        if (here < key) low = middle + 1;
        else high = middle;
    }
    return NULL;
}

static void void_claim(kv_conn *conn) {
    conn->claim = NULL;
    conn->claim_slot = NULL;
    conn->void_in = true;
}

/*
 * Whether a new copy of [start, stop) may have its destination; voids the claims of earlier attempts. 1: yes, 0: no,
 * -1: waited, so that everything must be looked at again.
 */
static int win(kv_incoming *in, kv_in_slot *slot, uint64_t start, uint64_t stop, uint64_t attempt) {
    if (in->placing == slot && in->placing_start < stop && start < in->placing_stop) return 0; /* as good as there */
    kv_conn *rivals = NULL; /* a list through `rival` */
    for (kv_conn *other = in->group->conns; other; other = other->next_of_group) {
        uint64_t low = other->header.offset, high = low + other->header.length;
        if (other->claim != in || other->claim_slot != slot || low >= stop || start >= high) continue;
        if (other->header.sequence >= attempt) return 0;
        other->rival = rivals;
        rivals = other;
    }
    for (kv_conn *other = rivals; other; other = other->rival) void_claim(other);
    return rivals && kv_settle(in->group, true) ? -1 : 1;
}

/* Bytes that connections are receiving into their places. Claims are disjoint, and so are they and what is applied. */
static uint64_t claimed_bytes(const kv_incoming *in) {
    uint64_t bytes = 0;
    for (const kv_conn *conn = in->group->conns; conn; conn = conn->next_of_group)
        if (conn->claim == in) bytes += conn->header.length;
    return bytes;
}

void kv_incoming_close(kv_incoming *in) {
    if (in->closed) return;
    in->closed = true;
    kv_engine *engine = in->group->engine;
    kv_incoming **at = &in->group->incoming[kv_bucket(in->transfer)];
    while (*at != in) at = &(*at)->next;
    *at = in->next; /* no new claims */
    bool claimed = false;
    for (kv_conn *conn = in->group->conns; conn; conn = conn->next_of_group) {
        if (conn->claim != in) continue;
        void_claim(conn);
        claimed = true;
    }
    if (claimed) kv_settle(in->group, true);
    if (in->ready) {
        kv_incoming **ready = &engine->ready_in;
        while (*ready != in) ready = &(*ready)->next_ready;
        *ready = in->next_ready;
        in->ready = false;
    }
}

/* ---- telling ---- */

static void say(kv_conn *conn, int kind, int detail, int64_t tag) {
    kv_event *event = kv_event_new(kind, conn, conn->frame_head, 0);
    if (!event) {
        kv_conn_lost(conn, KV_LOST_MEMORY, 0);
        return;
    }
    event->detail = detail;
    event->tag = tag;
    kv_push_event(conn->engine, event);
}

static void queue_frame(kv_conn *conn, unsigned char *frame, size_t nbytes) {
    kv_bytes *bytes = frame ? malloc(sizeof *bytes + nbytes) : NULL;
    if (!bytes) {
        free(frame);
        kv_conn_lost(conn, KV_LOST_MEMORY, 0);
        return;
    }
    bytes->next = NULL;
    bytes->nbytes = nbytes;
    memcpy(bytes->data, frame, nbytes);
    free(frame);
    kv_queue_control(conn, bytes);
}

void kv_flush_acks(kv_conn *conn) {
    size_t done = 0;
    while (done < conn->ack_count && !conn->lost && !conn->closed) {
        const kv_ack *first = &conn->acks[done];
        uint64_t ranges[KV_ACKS][4];
        size_t n = 0;
        while (done + n < conn->ack_count && memcmp(first->transfer, conn->acks[done + n].transfer, 16) == 0) {
            memcpy(ranges[n], conn->acks[done + n].range, sizeof ranges[n]);
            n++;
        }
        size_t nbytes = 0;
        unsigned char *frame =
            kv_ack_frame((const unsigned char *)first->transfer, (const uint64_t(*)[4])ranges, n, &nbytes);
        queue_frame(conn, frame, nbytes);
        done += n;
    }
    conn->ack_count = 0;
}

static void ack(kv_conn *conn, const kv_header *header) {
    uint64_t range[4] = {header->layer, header->tensor, header->offset, header->offset + header->length};
    if (conn->ack_count) {
        kv_ack *last = &conn->acks[conn->ack_count - 1];
        if (memcmp(last->transfer, header->transfer, 16) == 0 && last->range[0] == range[0] &&
            last->range[1] == range[1] && last->range[3] == range[2]) {
            last->range[3] = range[3];
            return;
        }
    }
    if (conn->ack_count == KV_ACKS) kv_flush_acks(conn);
    kv_ack *entry = &conn->acks[conn->ack_count++];
    memcpy(entry->transfer, header->transfer, 16);
    memcpy(entry->range, range, sizeof range);
}

/* As flow/credit.py: worth a frame when it moved by a quarter of the window, or to its end. */
static uint64_t credit_after(kv_incoming *in, uint64_t nbytes) {
    in->applied_bytes += nbytes;
    uint64_t limit = in->applied_bytes + in->window;
    if (limit > in->total) limit = in->total;
    if (limit <= in->granted) return 0;
    uint64_t step = in->window / 4 ? in->window / 4 : 1;
    if (limit - in->granted < step && limit != in->total) return 0;
    return in->granted = limit;
}

static void give_credit(kv_conn *conn, kv_incoming *in, uint64_t nbytes) {
    uint64_t limit = credit_after(in, nbytes);
    if (!limit) return;
    size_t frame_bytes = 0;
    unsigned char *frame = kv_credit_frame(in->transfer, limit, &frame_bytes);
    queue_frame(conn, frame, frame_bytes);
}

/* For Python: this range is applied. Neighbours are joined, so that it hears of few. */
static bool note_applied(kv_incoming *in, kv_in_slot *slot, uint64_t start, uint64_t stop) {
    size_t look = in->pending_count < 8 ? in->pending_count : 8;
    for (size_t i = in->pending_count - look; i < in->pending_count; i++) {
        kv_applied *entry = &in->pending[i];
        if (entry->slot != slot || (entry->stop != start && entry->start != stop)) continue;
        if (entry->stop == start) entry->stop = stop;
        else entry->start = start;
        return true;
    }
    if (in->pending_count == in->pending_capacity) {
        size_t capacity = in->pending_capacity ? in->pending_capacity * 2 : 16;
        void *pending = realloc(in->pending, capacity * sizeof *in->pending);
        if (!pending) return false;
        in->pending = pending;
        in->pending_capacity = capacity;
    }
    in->pending[in->pending_count++] = (kv_applied){slot, start, stop};
    return true;
}

static void have_pending(kv_incoming *in) {
    if (in->ready) return;
    in->ready = true;
    in->next_ready = in->group->engine->ready_in;
    in->group->engine->ready_in = in;
}

/* ---- frames ---- */

static void bad(kv_conn *conn, int detail, const unsigned char *head, size_t nbytes) {
    kv_event *event = kv_event_new(KV_EV_BAD, conn, head, nbytes);
    conn->in = KV_IN_STOPPED;
    if (!event) {
        kv_conn_lost(conn, KV_LOST_MEMORY, 0);
        return;
    }
    event->detail = detail;
    if (nbytes) memcpy(event->data, head, nbytes);
    kv_push_event(conn->engine, event);
}

static void begin_data(kv_conn *conn) {
    const kv_header *header = &conn->header;
    conn->in = KV_IN_DRAIN;
    conn->in_at = 0;
    conn->duplicate = conn->hashing = conn->void_in = false;
    for (;;) {
        kv_incoming *in = conn->group ? kv_incoming_find(conn->group, header->transfer) : NULL;
        if (!in) {
            say(conn, KV_EV_STRAY, 0, conn->tag);
            return;
        }
        kv_in_slot *slot = kv_in_slot_find(in, header->layer, header->tensor);
        int odd = -1;
        uint64_t covered = 0, stop = header->offset + header->length;
        if (!slot) odd = KV_ODD_SLOT;
        else if (stop > slot->nbytes) odd = KV_ODD_BOUNDS;
        else if (header->flags & KV_NO_CHECKSUM && !in->allow_unchecked) odd = KV_ODD_UNCHECKED;
        else covered = kv_ranges_covered(&slot->applied, header->offset, stop);
        /* Writing a part would put unverified bytes over verified ones. */
        if (odd < 0 && covered && covered < header->length) odd = KV_ODD_OVERLAP;
        if (odd >= 0) {
            say(conn, KV_EV_ODD, odd, in->tag);
            return;
        }
        if (!slot->first_ns) slot->first_ns = kv_now_ns();
        int won = covered ? 0 : win(in, slot, header->offset, stop, header->sequence);
        if (won < 0) {
            if (conn->closed || conn->lost) return;
            continue;
        }
        if (!won) {
            in->duplicate_bytes += header->length;
            conn->duplicate = true;
            return;
        }
        if (in->applied_bytes + claimed_bytes(in) + header->length > in->granted) {
            say(conn, KV_EV_ODD, KV_ODD_CREDIT, in->tag);
            return;
        }
        conn->claim = in;
        conn->claim_slot = slot;
        conn->in = KV_IN_PLACE;
        conn->hashing = !(header->flags & KV_NO_CHECKSUM);
        if (conn->hashing) kv_engine_xxh3->reset(conn->hash, header->check);
        return;
    }
}

static void control_done(kv_conn *conn) {
    kv_event *event = conn->body;
    conn->body = NULL;
    conn->in = KV_IN_HEAD;
    const kv_header *header = &conn->header;
    if (kv_engine_xxh3->one_shot(event->data, event->nbytes, header->check) != header->checksum) {
        free(event);
        if (header->type != KV_DATA) {
            bad(conn, 1, conn->frame_head, KV_HEADER_BYTES);
            return;
        }
        kv_incoming *in = conn->group ? kv_incoming_find(conn->group, header->transfer) : NULL;
        if (in) say(conn, KV_EV_CORRUPT, 0, in->tag);
        return;
    }
    bool flow = header->type == KV_ACK || header->type == KV_CREDIT;
    if (flow && conn->group && kv_outgoing_take(conn->group, header, event->data)) {
        free(event);
        return;
    }
    kv_push_event(conn->engine, event);
}

/* A whole header is there. */
static void begin(kv_conn *conn) {
    conn->in_head_at = 0;
    memcpy(conn->frame_head, conn->in_head, KV_HEADER_BYTES);
    if (!kv_header_unpack(conn->in_head, &conn->header, conn->limits)) {
        bad(conn, 0, conn->in_head, KV_HEADER_BYTES);
        return;
    }
    if (conn->header.type == KV_DATA && !(conn->header.flags & KV_CODED)) {
        begin_data(conn);
        return;
    }
    /* Its length was checked against the limit of its type. */
    conn->body = kv_event_new(KV_EV_CONTROL, conn, conn->in_head, conn->header.length);
    if (!conn->body) {
        kv_conn_lost(conn, KV_LOST_MEMORY, 0);
        return;
    }
    conn->in = KV_IN_BODY;
    conn->in_at = 0;
    if (conn->header.length == 0) control_done(conn);
}

static void data_done(kv_conn *conn, uint64_t digest) {
    const kv_header *header = &conn->header;
    kv_incoming *in = conn->claim;
    kv_in_slot *slot = conn->claim_slot;
    int mode = conn->in;
    conn->claim = NULL;
    conn->claim_slot = NULL;
    conn->in = KV_IN_HEAD;
    uint64_t start = header->offset, stop = start + header->length;
    if (mode == KV_IN_PLACE && in) {
        if (conn->hashing && digest != header->checksum) {
            say(conn, KV_EV_CORRUPT, 0, in->tag);
            return;
        }
        if (kv_ranges_add(&slot->applied, start, stop) < 0 || !note_applied(in, slot, start, stop)) {
            say(conn, KV_EV_ODD, KV_ODD_RANGES, in->tag);
            return;
        }
        in->chunks++;
        if (conn->hashing) in->verified++;
        ack(conn, header);
        give_credit(conn, in, header->length);
        have_pending(in);
        bool whole = slot->applied.count == 1 && slot->applied.items[0][0] == 0 && slot->applied.items[0][1] == slot->nbytes;
        if (in->eager || in->applied_bytes == in->total) kv_signal(conn->engine);
        else if (whole) kv_signal_soon(conn->engine);
        if (in->pending_count > KV_MAX_PENDING) {
            conn->paused = true;
            kv_signal(conn->engine);
        }
    } else if (conn->duplicate && conn->group) {
        /* A copy of what is there already: say again that it is. */
        in = kv_incoming_find(conn->group, header->transfer);
        slot = in ? kv_in_slot_find(in, header->layer, header->tensor) : NULL;
        if (slot && kv_ranges_covered(&slot->applied, start, stop) == stop - start) ack(conn, header);
    }
}

int kv_incoming_place(kv_incoming *in, kv_in_slot *slot, uint64_t start, const unsigned char *bytes, size_t nbytes,
                      uint64_t attempt, uint64_t *credit) {
    kv_engine *engine = in->group->engine;
    uint64_t stop = start + nbytes;
    int won = -1;
    while (won < 0) { /* again after every wait */
        if (in->closed) return KV_PLACE_LOST;
        uint64_t covered = kv_ranges_covered(&slot->applied, start, stop);
        if (covered && covered < nbytes) return KV_PLACE_ODD + KV_ODD_OVERLAP;
        if (covered) {
            in->duplicate_bytes += nbytes;
            return KV_PLACE_THERE;
        }
        won = win(in, slot, start, stop, attempt);
    }
    if (!won) {
        in->duplicate_bytes += nbytes;
        return KV_PLACE_LOST;
    }
    if (!slot->first_ns) slot->first_ns = kv_now_ns();
    in->placing = slot;
    in->placing_start = start, in->placing_stop = stop;
    kv_unlock(engine);
    for (uint64_t at = start; at < stop;) {
        struct iovec items[IOVS];
        size_t taken = 0, n = kv_map_iovs(slot->map, at, stop, items, IOVS, &taken);
        for (size_t i = 0; i < n; i++) {
            memcpy(items[i].iov_base, bytes, items[i].iov_len);
            bytes += items[i].iov_len;
        }
        at += taken;
    }
    kv_lock(engine);
    in->placing = NULL;
    if (kv_ranges_add(&slot->applied, start, stop) < 0 || !note_applied(in, slot, start, stop))
        return KV_PLACE_ODD + KV_ODD_RANGES;
    in->chunks++, in->verified++;
    *credit = credit_after(in, nbytes);
    have_pending(in);
    kv_signal(engine);
    return KV_PLACE_DONE;
}

/* ---- bytes ---- */

/* Where the next bytes go: what is left of the payload, then the next header. Returns how many are for the payload. */
static size_t gather(kv_conn *conn, unsigned char *scratch, kv_map *map, struct iovec *items, size_t *count) {
    size_t left = 0, want = 0, n = 0;
    if (conn->in != KV_IN_HEAD) {
        left = conn->header.length - conn->in_at;
        want = left < KV_RECV_BYTES ? left : KV_RECV_BYTES;
        if (conn->in == KV_IN_BODY) {
            items[n++] = (struct iovec){conn->body->data + conn->in_at, want};
        } else if (map) {
            size_t at = conn->header.offset + conn->in_at;
            n = kv_map_iovs(map, at, at + want, items, IOVS - 1, &want);
        } else {
            items[n++] = (struct iovec){scratch, want};
        }
    }
    if (left == want && conn->in_head_at < KV_HEADER_BYTES)
        items[n++] = (struct iovec){conn->in_head + conn->in_head_at, KV_HEADER_BYTES - conn->in_head_at};
    *count = n;
    return want;
}

static void hash_placed(kv_conn *conn, const struct iovec *items, size_t nbytes) {
    for (size_t i = 0; nbytes; i++) {
        size_t n = items[i].iov_len < nbytes ? items[i].iov_len : nbytes;
        kv_engine_xxh3->update(conn->hash, items[i].iov_base, n);
        nbytes -= n;
    }
}

/* One receive. False when there is nothing more now, or ever. Called and returns with the mutex held. */
static bool receive(kv_conn *conn, unsigned char *scratch) {
    kv_engine *engine = conn->engine;
    struct iovec items[IOVS];
    bool placing = conn->in == KV_IN_PLACE && !conn->void_in;
    kv_map *map = placing ? conn->claim_slot->map : NULL;
    bool finishing = conn->finishing; /* may be set meanwhile */
    conn->receiving = true;
    conn->in_op = ++engine->operations;
    kv_unlock(engine);

    size_t count = 0, payload = 0, asked = 0;
    if (finishing) {
        items[count++] = (struct iovec){scratch, KV_RECV_BYTES};
    } else {
        payload = gather(conn, scratch, map, items, &count);
    }
    for (size_t i = 0; i < count; i++) asked += items[i].iov_len;
    ssize_t got;
    do got = conn->stream->ops->readv(conn->stream, items, count);
    while (got == -EINTR);
    uint64_t digest = 0;
    size_t mine = got > 0 ? ((size_t)got < payload ? (size_t)got : payload) : 0;
    if (map && conn->hashing && mine) {
        hash_placed(conn, items, mine);
        if (conn->in_at + mine == conn->header.length) digest = kv_engine_xxh3->digest(conn->hash);
    }

    kv_lock(engine);
    conn->receiving = false;
    kv_let_go(engine);
    if (conn->closed || conn->lost) return false;
    if (got == -EAGAIN) return false;
    if (got <= 0) {
        bool inside = conn->in_head_at || conn->in != KV_IN_HEAD;
        kv_conn_lost(conn, got < 0 ? KV_LOST_ERRNO : inside ? KV_LOST_INSIDE : KV_LOST_END, got < 0 ? (int)-got : 0);
        return false;
    }
    conn->heard = true;
    conn->received_bytes += (uint64_t)got;
    if (conn->finishing) return (size_t)got == asked || conn->ending || conn->stream->ops->pending;
    conn->in_at += mine;
    conn->in_head_at += (size_t)got - mine;
    if (conn->in != KV_IN_HEAD && conn->in_at == conn->header.length) {
        if (conn->in == KV_IN_BODY) control_done(conn);
        else data_done(conn, digest);
    }
    if (conn->in == KV_IN_HEAD && !conn->lost) {
        if (conn->in_head_at == KV_HEADER_BYTES) begin(conn);
        /* A stranger may never send 64 bytes: the four it sent say enough. */
        else if (conn->in_head_at >= 4 && memcmp(conn->in_head, "KVT1", 4) != 0)
            bad(conn, 0, conn->in_head, conn->in_head_at);
    }
    return (size_t)got == asked || conn->ending || conn->stream->ops->pending;
}

void kv_read_some(kv_conn *conn, unsigned char *scratch) {
    kv_engine *engine = conn->engine;
    kv_lock(engine);
    for (int steps = READ_STEPS; conn->readable; steps--) {
        bool stopped = conn->in == KV_IN_STOPPED && !conn->finishing;
        if (conn->closed || conn->lost || conn->paused || stopped) break;
        if (steps == 0) {
            kv_kick(conn); /* still readable: after the others */
            break;
        }
        if (!receive(conn, scratch)) conn->readable = false;
    }
    if (conn->ack_count) kv_flush_acks(conn);
    kv_unlock(engine);
}
#else
typedef int kv_no_receiving;
#endif
