/* Threads, connections and their life, events for Python, and the write step. See engine.h on locking. */
#include "engine.h"

#ifdef KV_ENGINE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define EVENTS 64
#define IOVS 1024 /* IOV_MAX */
#define WAKE UINT64_MAX

const kv_xxh3 *kv_engine_xxh3;
unsigned char kv_zeros[KV_RECV_BYTES];

uint64_t kv_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void kv_wait(kv_engine *engine) {
    engine->waiters++;
    pthread_cond_wait(&engine->let_go, &engine->lock);
    engine->waiters--;
}

bool kv_settle(kv_group *group, bool receives) {
    kv_engine *engine = group->engine;
    uint64_t mark = engine->operations;
    bool waited = false;
again:
    for (kv_conn *conn = group->conns; conn; conn = conn->next_of_group) {
        bool busy = receives ? conn->receiving && conn->in_op <= mark : conn->sending && conn->out_op <= mark;
        if (!busy) continue;
        kv_wait(engine);
        waited = true;
        goto again; /* the list may have changed */
    }
    return waited;
}

static void poke(int fd) {
    uint64_t one = 1;
    ssize_t n;
    do n = write(fd, &one, sizeof one);
    while (n < 0 && errno == EINTR); /* EAGAIN: it is poked already */
}

/* ---- events ---- */

void kv_signal(kv_engine *engine) {
    engine->untold_ns = 0;
    if (engine->signalled) return;
    engine->signalled = true;
    poke(engine->event_fd);
}

void kv_signal_soon(kv_engine *engine) {
    if (!engine->signalled && !engine->untold_ns) engine->untold_ns = kv_now_ns();
}

/* A thread that goes to sleep has nothing better to do than to wake Python; one that stays busy does so before long. */
static void tell_in_time(kv_thread *thread) {
    kv_engine *engine = thread->engine;
    if (engine->untold_ns && (!thread->kicked || kv_now_ns() - engine->untold_ns >= KV_TELL_NS)) kv_signal(engine);
}

kv_event *kv_event_new(int kind, const kv_conn *conn, const unsigned char *head, size_t nbytes) {
    kv_event *event = malloc(sizeof *event + nbytes);
    if (!event) return NULL;
    memset(event, 0, sizeof *event);
    event->kind = kind;
    event->tag = conn->tag;
    event->serial = conn->serial;
    event->slot = conn->slot;
    event->nbytes = nbytes;
    if (kind != KV_EV_BAD) memcpy(event->head, head, KV_HEADER_BYTES);
    return event;
}

void kv_push_event(kv_engine *engine, kv_event *event) {
    event->next = NULL;
    *engine->last_event = event;
    engine->last_event = &event->next;
    kv_conn *conn = engine->conns[event->slot];
    if (conn && conn->serial == event->serial) {
        conn->up_bytes += sizeof *event + event->nbytes;
        if (conn->up_bytes > KV_MAX_UP_BYTES) conn->paused = true;
    }
    kv_signal(engine);
}

/* ---- kicks ---- */

void kv_wake(kv_thread *thread) {
    if (!thread->asleep) return;
    thread->asleep = false;
    poke(thread->wake);
}

void kv_kick(kv_conn *conn) {
    if (conn->kicked || conn->closed || conn->lost) return;
    kv_thread *thread = conn->thread;
    conn->kicked = true;
    conn->next_kicked = NULL;
    if (thread->last_kicked) thread->last_kicked->next_kicked = conn;
    else thread->kicked = conn;
    thread->last_kicked = conn;
    kv_wake(thread);
}

static kv_conn *next_kicked(kv_thread *thread) {
    kv_conn *conn = thread->kicked;
    if (!conn) return NULL;
    thread->kicked = conn->next_kicked;
    if (!thread->kicked) thread->last_kicked = NULL;
    conn->kicked = false;
    return conn;
}

static void unkick(kv_conn *conn) {
    if (!conn->kicked) return;
    kv_conn *before = NULL, *at = conn->thread->kicked;
    while (at != conn) before = at, at = at->next_kicked;
    if (before) before->next_kicked = conn->next_kicked;
    else conn->thread->kicked = conn->next_kicked;
    if (conn->thread->last_kicked == conn) conn->thread->last_kicked = before;
    conn->kicked = false;
}

void kv_kick_group(kv_group *group, size_t chunks) {
    kv_conn *first = group->turn ? group->turn : group->conns, *conn = first;
    if (!conn) return;
    do {
        kv_conn *next = conn->next_of_group ? conn->next_of_group : group->conns;
        bool dead = conn->closed || conn->lost || conn->finishing || conn->parked;
        bool enough = conn->full && group->levels && !group->levels->next;
        if (!dead && !enough && !conn->writing && !conn->blocked && !conn->kicked && conn->out == KV_OUT_NONE) {
            kv_kick(conn);
            chunks--;
        }
        conn = next;
    } while (chunks && conn != first);
    group->turn = conn; /* the next one's turn: small transfers are striped too */
}

/* ---- threads ---- */

static kv_conn *find(kv_engine *engine, uint64_t name) {
    kv_conn *conn = engine->conns[name & 0xffff];
    return conn && conn->serial == name >> 16 ? conn : NULL;
}

static void service(kv_thread *thread, kv_conn *conn) {
    kv_engine *engine = thread->engine;
    conn->users++;
    bool readable = conn->readable;
    kv_unlock(engine);
    if (readable) kv_read_some(conn, thread->scratch);
    kv_write_some(conn, KV_STEP_BYTES);
    kv_lock(engine);
    conn->users--;
    kv_let_go(engine);
}

static void *run(void *argument) {
    kv_thread *thread = argument;
    kv_engine *engine = thread->engine;
    struct epoll_event events[EVENTS];
    kv_lock(engine);
    while (!engine->stopping) {
        tell_in_time(thread);
        int patience = thread->kicked ? 0 : thread->declined_ns ? KV_AGAIN_MS : -1;
        thread->asleep = !thread->kicked;
        kv_unlock(engine);
        int n = epoll_wait(thread->epoll, events, EVENTS, patience);
        kv_lock(engine);
        thread->asleep = false;
        if (thread->declined_ns) kv_look_again(thread);
        for (int i = 0; i < n; i++) {
            if (events[i].data.u64 == WAKE) {
                uint64_t count;
                (void)!read(thread->wake, &count, sizeof count);
                continue;
            }
            kv_conn *conn = find(engine, events[i].data.u64);
            if (!conn) continue;
            if (events[i].events & ~(uint32_t)EPOLLOUT) conn->readable = true;
            /* The end is told once, perhaps together with the last bytes: read on until it comes. */
            if (events[i].events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) conn->ending = true;
            if (events[i].events & EPOLLOUT) {
                conn->writable = true;
                conn->blocked = false;
            }
            kv_kick(conn);
        }
        /* Those that are kicked now, each once; what they kick has its turn after the next look at the descriptors. */
        size_t due = 0;
        for (kv_conn *conn = thread->kicked; conn; conn = conn->next_kicked) due++;
        for (kv_conn *conn; due-- && (conn = next_kicked(thread));) service(thread, conn);
    }
    kv_unlock(engine);
    return NULL;
}

static int start_thread(kv_engine *engine, kv_thread *thread) {
    thread->engine = engine;
    thread->epoll = epoll_create1(EPOLL_CLOEXEC);
    thread->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    thread->scratch = malloc(KV_RECV_BYTES);
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = WAKE};
    int error = thread->scratch ? 0 : ENOMEM;
    if (!error && (thread->epoll < 0 || thread->wake < 0)) error = errno;
    if (!error && epoll_ctl(thread->epoll, EPOLL_CTL_ADD, thread->wake, &event) < 0) error = errno;
    if (!error) error = pthread_create(&thread->id, NULL, run, thread);
    if (!error) {
        pthread_setname_np(thread->id, "kv-io"); /* told apart from the event loop by top and perf */
        thread->running = true;
        return 0;
    }
    if (thread->epoll >= 0) close(thread->epoll);
    if (thread->wake >= 0) close(thread->wake);
    free(thread->scratch);
    memset(thread, 0, sizeof *thread);
    errno = error;
    return -1;
}

/* The thread with the fewest connections; a new one as long as there may be more. Under the mutex. */
static kv_thread *thread_for(kv_engine *engine) {
    kv_thread *best = NULL;
    for (int i = 0; i < engine->thread_count; i++)
        if (!best || engine->threads[i].load < best->load) best = &engine->threads[i];
    if (best && (best->load == 0 || engine->thread_count == engine->thread_limit)) return best;
    kv_thread *fresh = &engine->threads[engine->thread_count];
    if (start_thread(engine, fresh) < 0) return best;
    engine->thread_count++;
    return fresh;
}

kv_engine *kv_engine_new(int threads) {
    kv_engine *engine = calloc(1, sizeof *engine);
    if (!engine) return NULL;
    engine->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (engine->event_fd < 0) {
        free(engine);
        return NULL;
    }
    pthread_mutex_init(&engine->lock, NULL);
    pthread_cond_init(&engine->let_go, NULL);
    engine->last_event = &engine->first_event;
    engine->thread_limit = threads < 1 ? 1 : threads > KV_MAX_THREADS ? KV_MAX_THREADS : threads;
    engine->pid = getpid();
    return engine;
}

void kv_engine_stop(kv_engine *engine) {
    if (engine->pid != getpid()) return; /* after a fork: the threads are the parent's, and so may be the mutex */
    kv_lock(engine);
    engine->stopping = true;
    int count = engine->thread_count;
    for (int i = 0; i < count; i++) poke(engine->threads[i].wake);
    kv_unlock(engine);
    for (int i = 0; i < count; i++) {
        kv_thread *thread = &engine->threads[i];
        if (!thread->running) continue;
        pthread_join(thread->id, NULL);
        thread->running = false;
    }
}

void kv_engine_free(kv_engine *engine) {
    kv_engine_stop(engine);
    for (int i = 0; i < engine->thread_count; i++) {
        close(engine->threads[i].epoll);
        close(engine->threads[i].wake);
        free(engine->threads[i].scratch);
    }
    while (engine->first_event) {
        kv_event *event = engine->first_event;
        engine->first_event = event->next;
        free(event);
    }
    close(engine->event_fd);
    if (engine->pid == getpid()) {
        pthread_cond_destroy(&engine->let_go);
        pthread_mutex_destroy(&engine->lock);
    }
    free(engine->conns);
    free(engine);
}

/* ---- connections ---- */

static int free_slot(kv_engine *engine, uint32_t *slot) {
    for (size_t i = 0; i < engine->conn_capacity; i++)
        if (!engine->conns[i]) return *slot = (uint32_t)i, 0;
    size_t capacity = engine->conn_capacity ? engine->conn_capacity * 2 : 16;
    if (capacity > 0x10000) return errno = EMFILE, -1;
    kv_conn **conns = realloc(engine->conns, capacity * sizeof *conns);
    if (!conns) return errno = ENOMEM, -1;
    memset(conns + engine->conn_capacity, 0, (capacity - engine->conn_capacity) * sizeof *conns);
    *slot = (uint32_t)engine->conn_capacity;
    engine->conns = conns;
    engine->conn_capacity = capacity;
    return 0;
}

static void free_hashes(kv_conn *conn) {
    if (conn->hash) kv_engine_xxh3->destroy(conn->hash);
    if (conn->out_hash) kv_engine_xxh3->destroy(conn->out_hash);
}

static void dispose(kv_conn *conn) {
    int fd = conn->stream->fd;
    conn->stream->ops->destroy(conn->stream);
    close(fd);
    free_hashes(conn);
    free(conn);
}

kv_conn *kv_conn_new(kv_engine *engine, kv_stream *stream, int64_t tag, const uint32_t *limits) {
    kv_conn *conn = calloc(1, sizeof *conn);
    if (!conn) {
        close(stream->fd);
        stream->ops->destroy(stream);
        errno = ENOMEM;
        return NULL;
    }
    conn->engine = engine;
    conn->stream = stream;
    conn->tag = tag;
    memcpy(conn->limits, limits, sizeof conn->limits);
    conn->last_control = &conn->first_control;
    conn->readable = true; /* bytes may be there already */
    conn->hash = kv_engine_xxh3->create();
    conn->out_hash = kv_engine_xxh3->create();
    if (!conn->hash || !conn->out_hash) {
        dispose(conn);
        errno = ENOMEM;
        return NULL;
    }
    kv_lock(engine);
    conn->thread = engine->stopping ? NULL : thread_for(engine);
    if (!conn->thread || free_slot(engine, &conn->slot) < 0) {
        int error = engine->stopping ? ESHUTDOWN : errno;
        kv_unlock(engine);
        dispose(conn);
        errno = error;
        return NULL;
    }
    conn->serial = ++engine->next_serial;
    engine->conns[conn->slot] = conn;
    conn->thread->load++;
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET,
                                .data.u64 = conn->serial << 16 | conn->slot};
    if (epoll_ctl(conn->thread->epoll, EPOLL_CTL_ADD, stream->fd, &event) < 0) {
        int error = errno;
        engine->conns[conn->slot] = NULL;
        conn->thread->load--;
        kv_unlock(engine);
        dispose(conn);
        errno = error;
        return NULL;
    }
    kv_unlock(engine);
    return conn;
}

void kv_conn_join(kv_conn *conn, kv_group *group) {
    if (conn->group || conn->closed) return;
    conn->group = group;
    conn->next_of_group = group->conns;
    group->conns = conn;
    kv_kick(conn);
}

static void drop_control(kv_conn *conn) {
    if (conn->control) {
        conn->control->next = conn->first_control;
        conn->first_control = conn->control;
        conn->control = NULL;
    }
    while (conn->first_control) {
        kv_bytes *frame = conn->first_control;
        conn->first_control = frame->next;
        free(frame);
    }
    conn->last_control = &conn->first_control;
    conn->control_bytes = 0;
}

void kv_conn_lost(kv_conn *conn, int how, int error) {
    if (conn->lost || conn->closed) return;
    conn->lost = true;
    conn->claim = NULL;
    conn->claim_slot = NULL;
    kv_event *event = kv_event_new(KV_EV_LOST, conn, conn->frame_head, 0);
    if (!event) return; /* silence is noticed too */
    event->detail = how << 16 | (error & 0xffff);
    kv_push_event(conn->engine, event);
}

void kv_queue_control(kv_conn *conn, kv_bytes *frame) {
    *conn->last_control = frame;
    conn->last_control = &frame->next;
    conn->control_bytes += frame->nbytes;
}

size_t kv_conn_send(kv_conn *conn, kv_bytes *frame) {
    kv_lock(conn->engine);
    if (conn->closed || conn->lost || conn->finishing) {
        kv_unlock(conn->engine);
        free(frame);
        return 0;
    }
    kv_queue_control(conn, frame);
    size_t waiting = conn->control_bytes;
    bool idle = !conn->writing && !conn->blocked && conn->out == KV_OUT_NONE && !conn->stream->ops->exclusive;
    if (!idle && !conn->writing && !conn->blocked) kv_kick(conn);
    kv_unlock(conn->engine);
    if (idle) kv_write_some(conn, 1);
    return waiting;
}

void kv_conn_finish(kv_conn *conn) {
    kv_lock(conn->engine);
    conn->finishing = true;
    conn->claim = NULL;
    conn->claim_slot = NULL;
    conn->void_in = true;
    conn->paused = false;
    conn->readable = true;
    kv_kick(conn);
    kv_unlock(conn->engine);
}

void kv_conn_close(kv_conn *conn, bool abort) {
    kv_engine *engine = conn->engine;
    if (engine->pid != getpid()) return;
    kv_lock(engine);
    if (conn->closed) {
        kv_unlock(engine);
        return;
    }
    conn->closed = true;
    while (conn->users || conn->writing || conn->receiving || conn->sending) kv_wait(engine);
    unkick(conn);
    if (conn->group) {
        kv_conn **at = &conn->group->conns;
        while (*at != conn) at = &(*at)->next_of_group;
        *at = conn->next_of_group;
        if (conn->group->turn == conn) conn->group->turn = NULL;
    }
    engine->conns[conn->slot] = NULL;
    conn->thread->load--;
    conn->claim = NULL;
    conn->span = NULL;
    conn->out = KV_OUT_NONE;
    epoll_ctl(conn->thread->epoll, EPOLL_CTL_DEL, conn->stream->fd, NULL);
    kv_unlock(engine);

    drop_control(conn);
    free(conn->body);
    conn->body = NULL;
    if (abort) { /* a reset instead of a lingering FIN: half a frame cannot pass for a clean end */
        struct linger linger = {1, 0};
        setsockopt(conn->stream->fd, SOL_SOCKET, SO_LINGER, &linger, sizeof linger);
    }
    kv_stream *stream = conn->stream;
    int fd = stream->fd;
    if (!abort && !conn->shut) stream->ops->shutdown(stream);
    kv_lock(engine);
    conn->stream = NULL; /* options of its socket may be asked for by another Python thread */
    kv_unlock(engine);
    stream->ops->destroy(stream);
    close(fd);
}

void kv_conn_free(kv_conn *conn) {
    if (conn->engine->pid != getpid()) {
        /* A copy in a forked process: the threads are the parent's, and the mutex may be held for ever. */
        if (conn->stream) close(conn->stream->fd);
        return;
    }
    kv_conn_close(conn, false);
    free_hashes(conn);
    free(conn);
}

/* ---- writing ---- */

/* Something to send into `out`. Under the mutex. */
static bool next_out(kv_conn *conn) {
    if (conn->first_control) {
        conn->control = conn->first_control;
        conn->first_control = conn->control->next;
        if (!conn->first_control) conn->last_control = &conn->first_control;
        conn->control->next = NULL;
        conn->out = KV_OUT_CONTROL;
        conn->out_at = 0;
        return true;
    }
    return !conn->finishing && !conn->parked && kv_take_chunk(conn);
}

/* The iovecs of what is left of the frame: head, then bytes of the map, or zeros. */
static size_t gather(const kv_conn *conn, const kv_map *map, struct iovec *items) {
    size_t n = 0, at = conn->out_at, nbytes = 0;
    if (conn->out == KV_OUT_CONTROL) {
        items[n++] = (struct iovec){conn->control->data + at, conn->control->nbytes - at};
        return n;
    }
    if (at < KV_HEADER_BYTES) {
        items[n++] = (struct iovec){(void *)(conn->head + at), KV_HEADER_BYTES - at};
        at = KV_HEADER_BYTES;
    }
    at -= KV_HEADER_BYTES;
    size_t left = conn->out_bytes - at;
    if (map) {
        size_t start = conn->out_start + at, take = left < KV_STEP_BYTES ? left : KV_STEP_BYTES;
        return n + kv_map_iovs(map, start, start + take, items + n, IOVS - n, &nbytes);
    }
    items[n++] = (struct iovec){kv_zeros, left < sizeof kv_zeros ? left : sizeof kv_zeros};
    return n;
}

/* The checksum has to be in the header, ahead of what it covers. */
static void seal(kv_conn *conn, const kv_map *map) {
    struct iovec items[IOVS];
    size_t start = conn->out_start, stop = start + conn->out_bytes;
    uint64_t digest = 0;
    void *state = conn->out_hash;
    bool first = true;
    while (start < stop) {
        size_t nbytes = 0, n = kv_map_iovs(map, start, stop, items, IOVS, &nbytes);
        start += nbytes;
        if (first && n == 1 && start == stop) {
            digest = kv_engine_xxh3->one_shot(items[0].iov_base, nbytes, conn->out_check);
            kv_header_seal(conn->head, digest);
            return;
        }
        if (first) kv_engine_xxh3->reset(state, conn->out_check);
        first = false;
        kv_engine_xxh3->update_each(state, items, n);
    }
    kv_header_seal(conn->head, kv_engine_xxh3->digest(state));
}

static ssize_t send_step(kv_conn *conn, const kv_map *map) {
    struct iovec items[IOVS];
    if (conn->out == KV_OUT_DATA && !conn->sealed) {
        seal(conn, map);
        conn->sealed = true;
    }
    const kv_stream_ops *ops = conn->stream->ops;
    size_t n = gather(conn, map, items);
    ssize_t sent;
    do sent = ops->writev(conn->stream, items, n);
    while (sent == -EINTR);
    return sent;
}

/* `sent` bytes of the frame are out. Under the mutex. */
static void advance(kv_conn *conn, size_t sent) {
    conn->sent_bytes += sent;
    conn->out_at += sent;
    if (conn->out == KV_OUT_CONTROL) {
        conn->control_bytes -= sent;
        if (conn->out_at == conn->control->nbytes) {
            free(conn->control);
            conn->control = NULL;
            conn->out = KV_OUT_NONE;
        }
    } else if (conn->out_at == KV_HEADER_BYTES + conn->out_bytes) {
        conn->out = KV_OUT_NONE;
        conn->span = NULL;
    }
}

void kv_write_some(kv_conn *conn, size_t budget) {
    kv_engine *engine = conn->engine;
    kv_lock(engine);
    if (conn->writing || conn->blocked) {
        kv_unlock(engine);
        return;
    }
    conn->writing = true;
    size_t moved = 0;
    while (!conn->closed && !conn->lost) {
        if (moved >= budget && (conn->out != KV_OUT_NONE || conn->first_control || (conn->group && conn->group->levels))) {
            kv_kick(conn);
            break;
        }
        bool flushing = false;
        if (conn->out == KV_OUT_NONE && !next_out(conn)) {
            if (!conn->stream->ops->flush) break;
            flushing = true;
        }
        const kv_map *map = conn->out == KV_OUT_DATA && conn->span ? conn->span->map : NULL;
        conn->writable = false;
        conn->sending = true;
        conn->out_op = ++engine->operations;
        kv_unlock(engine);
        ssize_t sent = flushing ? conn->stream->ops->flush(conn->stream) : send_step(conn, map);
        kv_lock(engine);
        conn->sending = false;
        kv_let_go(engine);
        if (sent == -EAGAIN) {
            if (!flushing && conn->voided && conn->out == KV_OUT_DATA) kv_frame_voided(conn);
            if (conn->writable) continue; /* it became so while we asked */
            conn->blocked = true;
            break;
        }
        if (sent < 0) {
            kv_conn_lost(conn, KV_LOST_ERRNO, (int)-sent);
            break;
        }
        if (flushing) break;
        advance(conn, (size_t)sent);
        moved += (size_t)sent;
        if (conn->voided && conn->out == KV_OUT_DATA) kv_frame_voided(conn);
    }
    if (conn->finishing && !conn->shut && !conn->blocked && conn->out == KV_OUT_NONE && !conn->first_control &&
        !conn->closed && !conn->lost) {
        conn->shut = true;
        conn->stream->ops->shutdown(conn->stream);
    }
    conn->writing = false;
    kv_let_go(engine);
    kv_unlock(engine);
}
#else
typedef int kv_no_engine;
#endif
