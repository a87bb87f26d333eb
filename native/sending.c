/* Outgoing transfers: ready units in, chunks out, turns between transfers, acknowledgements. See engine.h on locking. */
#include "engine.h"

#ifdef KV_ENGINE
#include <stdlib.h>
#include <string.h>

#include <errno.h>

/* ---- what there is to send ---- */

static uint64_t next_cut(const kv_outgoing *out, const kv_span *span) {
    uint64_t left = span->stop - span->cut; /* flow/chunking.py: no runts */
    if (span->coded || left <= out->chunk_bytes) return left;
    return left < out->chunk_bytes + out->chunk_bytes / 2 ? (left + 1) / 2 : out->chunk_bytes;
}

/* Bytes the next cut may have: all, part of at least KV_MIN_CHUNK, or 0. With nothing on its way any part will do. */
static uint64_t credit_for(const kv_outgoing *out, const kv_span *span) {
    uint64_t wanted = next_cut(out, span);
    uint64_t limit = out->credit < out->allowed ? out->credit : out->allowed;
    uint64_t left = limit > out->used ? limit - out->used : 0;
    uint64_t n = wanted < left ? wanted : left, least = out->inflight ? KV_MIN_CHUNK : 1;
    if (span->coded) least = wanted; /* all or nothing */
    return n < (wanted < least ? wanted : least) ? 0 : n;
}

static bool drop_stale_retries(kv_outgoing *out) {
    while (out->retry_count) {
        kv_retry *retry = &out->retries[out->retry_at];
        if (retry->span && retry->span->chunks[retry->chunk].state == KV_CHUNK_QUEUED) return true;
        out->retry_at++;
        out->retry_count--;
    }
    out->retry_at = 0;
    return false;
}

static void enter_level(kv_outgoing *out) {
    kv_level **at = &out->group->levels;
    while (*at && (*at)->priority > out->priority) at = &(*at)->next;
    kv_level *level = *at;
    if (!level || level->priority != out->priority) {
        level = calloc(1, sizeof *level);
        if (!level) return; /* tried again at the next change */
        level->priority = out->priority;
        level->next = *at;
        *at = level;
    }
    out->level = level;
    if (!level->first) {
        level->first = out->ahead = out->behind = out;
    } else { /* the last of the circle */
        out->behind = level->first;
        out->ahead = level->first->ahead;
        out->ahead->behind = out->behind->ahead = out;
    }
}

static void leave_level(kv_outgoing *out) {
    kv_level *level = out->level;
    if (!level) return;
    out->level = NULL;
    if (out->behind != out) {
        if (level->first == out) level->first = out->behind;
        out->ahead->behind = out->behind;
        out->behind->ahead = out->ahead;
        return;
    }
    kv_level **at = &out->group->levels;
    while (*at != level) at = &(*at)->next;
    *at = level->next;
    free(level);
}

void kv_update_turn(kv_outgoing *out) {
    bool cuttable = out->accepted && out->head, has_credit = false;
    if (cuttable) has_credit = credit_for(out, out->head) > 0;
    if (cuttable && !has_credit && out->allowed >= out->credit) { /* who waits for its allowance does not stall */
        if (!out->stalled_since) out->stalled_since = kv_now_ns();
    } else if (out->stalled_since) {
        out->stalled_ns += kv_now_ns() - out->stalled_since;
        out->stalled_since = 0;
    }
    bool runnable = !out->closed && out->accepted && (drop_stale_retries(out) || has_credit);
    if (!runnable) leave_level(out);
    else if (!out->level) enter_level(out);
}

/* ---- what waits on a connection ---- */

/*
 * Whether the connection has enough. What lies in sockets, ours and the peer's, an urgent transfer has to wait for, and it has
 * left the caches when its turn comes; on a local path a few MiB keep everything busy. A longer path takes what the kernel's
 * window says. What has a higher priority than others that wait is not held back.
 */
static bool enough(kv_conn *conn) {
    if (conn->taken % KV_RTT_EVERY == 0) conn->near = kv_round_trip_us(conn->stream->fd) < KV_NEAR_US;
    conn->full = false;
    if (!conn->near || conn->group->levels->next) return false;
    uint64_t live = 0;
    for (const kv_conn *each = conn->group->conns; each; each = each->next_of_group) live += !each->lost && !each->closed && !each->parked;
    conn->full = conn->unacked && conn->unacked * live >= KV_QUEUE_BYTES;
    return conn->full;
}

/* The chunk is not on its connection any more. */
static void off_connection(const kv_outgoing *out, const kv_chunk *chunk, bool acked) {
    if (chunk->state != KV_CHUNK_SENT) return;
    for (kv_conn *conn = out->group->conns; conn; conn = conn->next_of_group) {
        if (conn->serial != chunk->serial) continue;
        conn->unacked -= chunk->stop - chunk->start;
        if (acked) kv_acked(conn, chunk->stop - chunk->start);
        if (conn->full) {
            conn->full = false;
            if (out->group->levels) kv_kick(conn);
        }
        return;
    }
}

/* ---- spans ---- */

kv_out_slot *kv_out_slot_find(const kv_outgoing *out, unsigned layer, unsigned tensor) {
    size_t low = 0, high = out->slot_count;
    unsigned key = layer << 16 | tensor;
    while (low < high) {
        size_t middle = (low + high) / 2;
        unsigned here = (unsigned)out->slots[middle].layer << 16 | out->slots[middle].tensor;
        if (here == key) return &out->slots[middle];
        if (here < key) low = middle + 1;
        else high = middle;
    }
    return NULL;
}

/* Index of the first span of the slot that ends behind `at`. */
static size_t span_at(const kv_out_slot *slot, uint64_t at) {
    size_t low = slot->begin, high = slot->begin + slot->count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (slot->spans[middle]->stop > at) high = middle;
        else low = middle + 1;
    }
    return low;
}

static int slot_insert(kv_out_slot *slot, kv_span *span) {
    if (slot->begin + slot->count == slot->capacity) {
        if (slot->begin > slot->count) {
            memmove(slot->spans, slot->spans + slot->begin, slot->count * sizeof *slot->spans);
            slot->begin = 0;
        } else {
            size_t capacity = slot->capacity ? slot->capacity * 2 : 4;
            void *spans = realloc(slot->spans, capacity * sizeof *slot->spans);
            if (!spans) return -1;
            slot->spans = spans;
            slot->capacity = capacity;
        }
    }
    size_t at = span_at(slot, span->start), end = slot->begin + slot->count;
    memmove(slot->spans + at + 1, slot->spans + at, (end - at) * sizeof *slot->spans);
    slot->spans[at] = span;
    slot->count++;
    return 0;
}

static void slot_remove(kv_out_slot *slot, kv_span *span) {
    size_t at = span_at(slot, span->start), end = slot->begin + slot->count;
    if (at == slot->begin) slot->begin++;
    else memmove(slot->spans + at, slot->spans + at + 1, (end - at - 1) * sizeof *slot->spans);
    if (--slot->count == 0) slot->begin = 0;
}

kv_span *kv_outgoing_add(kv_outgoing *out, kv_out_slot *slot, uint64_t start, uint64_t stop, kv_map *map, bool coded) {
    kv_span *span = calloc(1, sizeof *span);
    if (!span) return NULL;
    span->out = out;
    span->slot = slot;
    span->map = map;
    span->start = span->cut = start;
    span->stop = stop;
    span->coded = coded;
    span->chunks = &span->first;
    span->capacity = 1;
    if (slot_insert(slot, span) < 0) {
        free(span);
        return NULL;
    }
    span->key = out->next_key++;
    if (out->tail) out->tail->next = span;
    else out->head = span;
    out->tail = span;
    out->group->uncut += stop - start;
    kv_update_turn(out);
    if (out->level) kv_kick_group(out->group, (size_t)(map->nbytes / out->chunk_bytes) + 1);
    return span;
}

kv_span *kv_span_find(const kv_out_slot *slot, uint64_t start) {
    size_t at = span_at(slot, start);
    if (at == slot->begin + slot->count || slot->spans[at]->start != start) return NULL;
    return slot->spans[at];
}

static bool sends_from(const kv_conn *conn, const kv_span *span) { return conn->out == KV_OUT_DATA && conn->span == span; }

/* Half-sent frames of the span go on as zeros, which their checksum voids; without one the connection is reset. */
static void void_frames(const kv_span *span) {
    kv_group *group = span->out->group;
    bool reading = false;
    for (kv_conn *conn = group->conns; conn; conn = conn->next_of_group) {
        if (!sends_from(conn, span)) continue;
        conn->span = NULL;
        conn->voided = true;
        reading |= conn->sending;
        if (conn->sending) continue; /* what is to become of it is decided when its operation ends */
        kv_frame_voided(conn);
    }
    if (reading) kv_settle(group, false);
}

void kv_frame_voided(kv_conn *conn) {
    if (conn->out_at == 0) {
        conn->out = KV_OUT_NONE; /* nothing of it is on the wire */
        conn->voided = false;
        kv_kick(conn);
    } else if (!conn->checksummed) {
        conn->out = KV_OUT_NONE;
        kv_conn_lost(conn, KV_LOST_VOID, 0);
    }
}

static void trash(kv_outgoing *out, kv_map *map) {
    map->next = out->garbage;
    out->garbage = map;
}

void kv_span_swap(kv_span *span, kv_map *map) {
    kv_map *old = span->map;
    kv_outgoing *out = span->out;
    span->map = map;
    out->droppers++;
    kv_settle(out->group, false);
    out->droppers--;
    kv_let_go(out->group->engine);
    trash(out, old);
}

static void span_drop(kv_span *span) {
    kv_outgoing *out = span->out;
    slot_remove(span->slot, span); /* first: nobody else may find it while this waits */
    for (size_t i = 0; i < out->retry_count; i++) {
        kv_retry *retry = &out->retries[out->retry_at + i];
        if (retry->span == span) retry->span = NULL;
    }
    for (size_t i = 0; i < span->count; i++) off_connection(out, &span->chunks[i], false);
    out->droppers++;
    void_frames(span);
    out->droppers--;
    kv_let_go(out->group->engine);
    trash(out, span->map);
    if (span->chunks != &span->first) free(span->chunks);
    free(span);
}

/* ---- chunks ---- */

static kv_chunk *span_new_chunk(kv_span *span) {
    if (span->count == span->capacity) {
        size_t capacity = span->capacity * 4;
        kv_chunk *chunks = span->chunks == &span->first ? NULL : span->chunks;
        chunks = realloc(chunks, capacity * sizeof *chunks);
        if (!chunks) return NULL;
        if (span->chunks == &span->first) chunks[0] = span->first;
        span->chunks = chunks;
        span->capacity = capacity;
    }
    return &span->chunks[span->count++];
}

static bool cut(kv_outgoing *out, kv_span **span_out, size_t *index) {
    kv_span *span = out->head;
    if (!out->accepted || !span) return false;
    uint64_t n = credit_for(out, span);
    if (!n) return false;
    kv_chunk *chunk = span_new_chunk(span);
    if (!chunk) return false;
    *chunk = (kv_chunk){.start = span->cut, .stop = span->cut + n};
    span->cut += n;
    out->group->uncut -= n;
    out->used += n;
    out->inflight += n;
    out->cut_bytes += n;
    out->chunks++;
    if (span->cut == span->stop) {
        out->head = span->next;
        if (!out->head) out->tail = NULL;
        span->next = NULL;
    }
    *span_out = span;
    *index = span->count - 1;
    return true;
}

static bool take_retry(kv_outgoing *out, kv_span **span, size_t *index) {
    if (!out->accepted || !drop_stale_retries(out)) return false;
    kv_retry *retry = &out->retries[out->retry_at];
    out->retry_at++;
    out->retry_count--;
    *span = retry->span;
    *index = retry->chunk;
    return true;
}

bool kv_take_chunk(kv_conn *conn) {
    kv_group *group = conn->group;
    while (group && group->levels) {
        if (enough(conn)) return false;
        kv_outgoing *out = group->levels->first;
        kv_span *span;
        size_t index;
        if (out->head && !out->retry_count && kv_leave_to_others(conn, credit_for(out, out->head))) return false;
        if (!take_retry(out, &span, &index) && !cut(out, &span, &index)) {
            leave_level(out);
            continue;
        }
        group->levels->first = out->behind; /* the others of its level come first now */
        kv_chunk *chunk = &span->chunks[index];
        chunk->state = KV_CHUNK_SENT;
        chunk->serial = conn->serial;
        kv_took(conn, chunk->stop - chunk->start);
        if (chunk->attempt) out->resent_bytes += chunk->stop - chunk->start;
        uint64_t nbytes = span->coded ? span->map->nbytes : chunk->stop - chunk->start;
        kv_header header = {.type = KV_DATA, .layer = span->slot->layer, .tensor = span->slot->tensor,
                            .length = (uint32_t)nbytes, .offset = chunk->start, .sequence = chunk->attempt};
        header.flags = (uint16_t)((chunk->attempt ? KV_RESEND : 0) | (out->checksum ? 0 : KV_NO_CHECKSUM) |
                                  (span->coded ? KV_CODED : 0));
        memcpy(header.transfer, out->transfer, 16);
        kv_header_pack(conn->head, &header);
        conn->out = KV_OUT_DATA;
        conn->out_check = header.check;
        conn->sealed = !out->checksum;
        conn->checksummed = out->checksum;
        conn->voided = false;
        conn->span = span;
        conn->out_start = chunk->start - span->start;
        conn->out_bytes = nbytes;
        conn->out_at = 0;
        kv_update_turn(out);
        return true;
    }
    return false;
}

/* ---- acknowledgements and losses ---- */

static void tell(kv_outgoing *out) {
    if (!out->ready) {
        out->ready = true;
        out->next_ready = out->group->engine->ready_out;
        out->group->engine->ready_out = out;
    }
    kv_signal_soon(out->group->engine);
}

static int note_done(kv_outgoing *out, uint64_t key) {
    if (out->done_count == out->done_capacity) {
        size_t capacity = out->done_capacity ? out->done_capacity * 2 : 16;
        void *done = realloc(out->done, capacity * sizeof *out->done);
        if (!done) return -1;
        out->done = done;
        out->done_capacity = capacity;
    }
    out->done[out->done_count++] = key;
    tell(out);
    return 0;
}

int kv_outgoing_ack(kv_outgoing *out, kv_out_slot *slot, uint64_t start, uint64_t stop) {
    size_t at = span_at(slot, start);
    while (at < slot->begin + slot->count && slot->spans[at]->start < stop) {
        kv_span *span = slot->spans[at];
        for (size_t i = 0; i < span->count; i++) {
            kv_chunk *chunk = &span->chunks[i];
            if (chunk->state == KV_CHUNK_ACKED || chunk->start < start || chunk->stop > stop) continue;
            off_connection(out, chunk, true);
            chunk->state = KV_CHUNK_ACKED;
            uint64_t n = chunk->stop - chunk->start;
            span->acked += n;
            out->inflight -= n;
            slot->acked_new += n;
        }
        if (span->acked < span->stop - span->start) {
            at++;
            continue;
        }
        if (note_done(out, span->key) < 0) return -1;
        span_drop(span);
        at = span_at(slot, start); /* dropping may have waited */
    }
    kv_update_turn(out);
    if (out->level) kv_kick_group(out->group, 1);
    return 0;
}

static uint64_t again(kv_outgoing *out, kv_span *span, size_t index) {
    kv_chunk *chunk = &span->chunks[index];
    if (out->retry_at + out->retry_count == out->retry_capacity) {
        if (out->retry_at > out->retry_capacity / 2) {
            memmove(out->retries, out->retries + out->retry_at, out->retry_count * sizeof *out->retries);
            out->retry_at = 0;
        } else {
            size_t capacity = out->retry_capacity ? out->retry_capacity * 2 : 16;
            void *retries = realloc(out->retries, capacity * sizeof *out->retries);
            if (!retries) return 0; /* the deadline will tell */
            out->retries = retries;
            out->retry_capacity = capacity;
        }
    }
    out->retries[out->retry_at + out->retry_count++] = (kv_retry){span, index};
    off_connection(out, chunk, false);
    chunk->state = KV_CHUNK_QUEUED;
    chunk->attempt++;
    chunk->serial = 0;
    return chunk->stop - chunk->start;
}

static void after_resend(kv_outgoing *out, size_t chunks) {
    if (!chunks) return;
    kv_update_turn(out);
    if (out->level) kv_kick_group(out->group, chunks);
}

uint64_t kv_outgoing_resend(kv_outgoing *out, kv_out_slot *slot, uint64_t start, uint64_t stop) {
    uint64_t bytes = 0;
    size_t chunks = 0;
    for (size_t at = span_at(slot, start); at < slot->begin + slot->count && slot->spans[at]->start < stop; at++) {
        kv_span *span = slot->spans[at];
        for (size_t i = 0; i < span->count; i++) {
            kv_chunk *chunk = &span->chunks[i];
            if (chunk->state != KV_CHUNK_SENT || chunk->start >= stop || chunk->stop <= start) continue;
            bytes += again(out, span, i);
            chunks++;
        }
    }
    after_resend(out, chunks);
    return bytes;
}

uint64_t kv_outgoing_requeue(kv_outgoing *out, uint64_t serial) {
    uint64_t bytes = 0;
    size_t chunks = 0;
    for (kv_conn *conn = out->group->conns; conn; conn = conn->next_of_group)
        if (conn->serial == serial) conn->rate = 0; /* it stands still: what it delivered says nothing any more */
    for (size_t i = 0; i < out->slot_count; i++) {
        kv_out_slot *slot = &out->slots[i];
        for (size_t k = slot->begin; k < slot->begin + slot->count; k++) {
            kv_span *span = slot->spans[k];
            for (size_t c = 0; c < span->count; c++) {
                if (span->chunks[c].state != KV_CHUNK_SENT || span->chunks[c].serial != serial) continue;
                bytes += again(out, span, c);
                chunks++;
            }
        }
    }
    after_resend(out, chunks);
    return bytes;
}

kv_outgoing *kv_outgoing_find(const kv_group *group, const unsigned char *transfer) {
    kv_outgoing *out = group->outgoing[kv_bucket(transfer)];
    while (out && memcmp(out->transfer, transfer, 16) != 0) out = out->next;
    return out;
}

/* ---- ACK and CREDIT ---- */

/* A msgpack unsigned integer; false at the end or for anything else. */
static bool get_number(const unsigned char **at, const unsigned char *end, uint64_t *value) {
    if (*at == end) return false;
    unsigned char first = *(*at)++;
    if (first < 128) return *value = first, true;
    if (first < 0xcc || first > 0xcf) return false;
    size_t width = (size_t)1 << (first - 0xcc);
    if ((size_t)(end - *at) < width) return false;
    *value = 0;
    while (width--) *value = *value << 8 | *(*at)++;
    return true;
}

/* The ranges of an ACK body in the form kv_ack_frame and wire/bodies.py write; NULL for any other, which Python judges. */
static const unsigned char *ack_ranges(const unsigned char *body, size_t nbytes, size_t *count) {
    if (nbytes < 9 || memcmp(body, "\x81\xa6ranges", 8) != 0) return NULL;
    const unsigned char *at = body + 8;
    if ((*at & 0xf0) == 0x90) return *count = *at & 0x0f, at + 1;
    if (*at != 0xdc || nbytes < 11) return NULL;
    *count = (size_t)at[1] << 8 | at[2];
    return *count <= 8192 ? at + 3 : NULL;
}

bool kv_outgoing_take(kv_group *group, const kv_header *header, const unsigned char *body) {
    kv_outgoing *out = kv_outgoing_find(group, header->transfer);
    if (!out) return false;
    if (header->type == KV_CREDIT) {
        if (header->offset > out->credit) {
            out->credit = header->offset;
            kv_update_turn(out);
            if (out->level) kv_kick_group(group, SIZE_MAX);
        }
        return true;
    }
    if (header->type != KV_ACK || header->flags & KV_FINAL || !out->accepted) return false;
    const unsigned char *end = body + header->length;
    for (int pass = 0; pass < 2; pass++) { /* first look at all of it: an error must have no effect */
        size_t count = 0;
        const unsigned char *at = ack_ranges(body, header->length, &count);
        if (!at) return false;
        for (size_t i = 0; i < count; i++) {
            uint64_t range[4];
            if (at == end || *at++ != 0x94) return false;
            for (int k = 0; k < 4; k++)
                if (!get_number(&at, end, &range[k])) return false;
            if (range[0] > 0xffff || range[1] > 0xffff || range[2] >= range[3] || range[3] > KV_MAX_OFFSET) return false;
            kv_out_slot *slot = kv_out_slot_find(out, (unsigned)range[0], (unsigned)range[1]);
            if (!slot) return false;
            if (pass == 0) continue;
            if (kv_outgoing_ack(out, slot, range[2], range[3]) < 0) return false; /* repeating it is harmless */
            if (out->closed) return true; /* dropping waited, and Python closed it meanwhile */
        }
        if (at != end) return false;
    }
    return true;
}

/* ---- the end ---- */

void kv_outgoing_close(kv_outgoing *out) {
    if (out->closed) return;
    out->closed = true;
    leave_level(out);
    for (const kv_span *span = out->head; span; span = span->next) out->group->uncut -= span->stop - span->cut;
    out->head = out->tail = NULL;
    for (size_t i = 0; i < out->slot_count; i++)
        while (out->slots[i].count) span_drop(out->slots[i].spans[out->slots[i].begin]);
    while (out->droppers) kv_wait(out->group->engine);
    kv_outgoing **at = &out->group->outgoing[kv_bucket(out->transfer)];
    while (*at != out) at = &(*at)->next;
    *at = out->next;
    if (out->ready) {
        kv_outgoing **ready = &out->group->engine->ready_out;
        while (*ready != out) ready = &(*ready)->next_ready;
        *ready = out->next_ready;
        out->ready = false;
    }
}
#else
typedef int kv_no_sending;
#endif
