/* Which connection a chunk is through on first: what each delivers, and what it has queued. See engine.h on locking. */
#include "engine.h"

#ifdef KV_ENGINE
#define WEIGHT 0.3 /* of a new sample in a connection's rate */
#define LATER 1.5  /* so many times as late as the others, and a chunk is theirs: rates are not known to a tenth */

void kv_took(kv_conn *conn, uint64_t nbytes) {
    if (!conn->unacked) {
        conn->mark_ns = conn->progress_ns = kv_now_ns();
        conn->mark_bytes = 0;
    }
    conn->unacked += nbytes;
    conn->taken++;
}

void kv_acked(kv_conn *conn, uint64_t nbytes) {
    uint64_t now = kv_now_ns(), passed = now - conn->mark_ns;
    conn->progress_ns = now;
    conn->mark_bytes += nbytes;
    if (passed < KV_SAMPLE_NS) return;
    double sample = (double)conn->mark_bytes * 1e9 / (double)passed;
    conn->rate = conn->rate > 0 ? conn->rate + WEIGHT * (sample - conn->rate) : sample;
    conn->mark_ns = now;
    conn->mark_bytes = 0;
}

/*
 * As long as there is enough for all, each takes what it can send: rates add up. Towards the end a chunk on a slow connection is
 * what everybody waits for. It is left to others when they will have sent everything, this chunk with it, well before, and one
 * of them alone is through with it well before: the one that is first never leaves it, so somebody takes it. A connection that stands
 * still does not count, and soon not as being first either.
 */
bool kv_leave_to_others(kv_conn *conn, uint64_t nbytes) {
    conn->declined = false;
    if (conn->rate <= 0) return false;
    double mine = (double)(conn->unacked + nbytes) / conn->rate;
    if (mine < KV_SOON_S) return false;
    uint64_t now = kv_now_ns(), left = conn->group->uncut;
    double rates = 0, earliest = mine;
    kv_conn *first = NULL;
    for (kv_conn *other = conn->group->conns; other; other = other->next_of_group) {
        if (other == conn || other->lost || other->closed || other->parked || other->finishing || other->rate <= 0) continue;
        double through = (double)(other->unacked + nbytes) / other->rate;
        bool waits = other->unacked || other->blocked;
        if (waits && (double)(now - other->progress_ns) / 1e9 > through) continue;
        rates += other->rate;
        left += other->unacked;
        if (through < earliest) earliest = through, first = other;
    }
    if (!first || LATER * earliest >= mine || LATER * (double)left / rates >= mine) return false;
    conn->declined = true;
    if (!conn->thread->declined_ns) {
        conn->thread->declined_ns = now;
        kv_wake(conn->thread); /* it has to be on its feet in time; this may be a thread of Python */
    }
    if (!first->writing && !first->blocked) kv_kick(first);
    return true;
}

void kv_look_again(kv_thread *thread) {
    kv_engine *engine = thread->engine;
    if (kv_now_ns() - thread->declined_ns < KV_AGAIN_MS * 1000000u) return;
    thread->declined_ns = 0;
    for (size_t i = 0; i < engine->conn_capacity; i++) {
        kv_conn *conn = engine->conns[i];
        if (conn && conn->thread == thread && conn->declined) kv_kick(conn);
    }
}
#else
typedef int kv_no_prediction;
#endif
