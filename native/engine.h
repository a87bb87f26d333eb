/*
 * The I/O engine: threads that frame, hash, send, receive and place, without Python. Linux (epoll, eventfd).
 *
 * LOCKING. One mutex per engine guards everything that two threads may see. It is never held during a system call that
 * moves bytes, while bytes are hashed, or while Python objects are touched (a buffer's release may run Python code, which
 * may come back here). I/O threads never need the GIL; a Python thread may wait for the mutex while it holds the GIL.
 *
 * - An operation (one receive, or one send, with its hashing) notes under the mutex what memory it will touch, sets
 *   `receiving` or `sending`, and clears it under the mutex afterwards. Whoever takes memory back (voids a claim, drops or
 *   moves a span, closes) first redirects, so that no later operation touches it, then waits for the operations that had
 *   begun before (kv_settle). Nobody waits while an operation of its own is in progress: no cycle.
 * - What is read (head, body, hash, position) belongs to the connection's thread. What is written (out, position) belongs
 *   to whoever set `writing`: its thread, or a Python thread that found it idle and sends a few bytes at once.
 * - Who clears `writing` has, under the same hold of the mutex, seen that there is nothing to send, or that something will
 *   bring it back (`blocked` until the descriptor is writable, or a kick). Work that is added later kicks.
 * - Objects (connection, group, outgoing, incoming) are freed by Python threads only, after they were unlinked under
 *   the mutex and nothing is in progress on them. I/O threads find connections by slot and serial, never by pointer.
 * - A wait lets go of the mutex: what was found before it is looked up again after it.
 */
#ifndef KV_ENGINE_H
#define KV_ENGINE_H

#include "kvnative.h"

#ifdef __linux__
#define KV_ENGINE 1

#include <pthread.h>
#include <stdint.h>
#include <sys/types.h>
#include <unistd.h>

#include "xxh3.h"

#define KV_HEADER_BYTES 64
#define KV_TYPES 14 /* frame types are 1..13 */
#define KV_MAX_THREADS 16
#define KV_STEP_BYTES ((size_t)1 << 20)      /* a send; and what a thread reads or writes before it looks at others */
#define KV_RECV_BYTES ((size_t)256 << 10)    /* a receive: measured 18% faster than 1 MiB, the copy stays in the cache */
#define KV_MAX_UP_BYTES ((size_t)8 << 20)    /* frames Python has not taken yet: more pauses reading */
#define KV_MAX_PENDING ((size_t)1 << 16)     /* applied ranges Python has not taken yet: more pauses reading */
#define KV_TELL_NS 2000000u                  /* what can wait is told after so long, or when its thread has nothing to do */
#define KV_MAX_RANGES ((size_t)4096)         /* separate ranges per extent, as in wire/ranges.py */
#define KV_NEAR_US 2000u                     /* round trips below this: a local path, which a few MiB fill */
#define KV_QUEUE_BYTES ((uint64_t)4 << 20)   /* not acknowledged on all connections of a link over a local path */
#define KV_SAMPLE_NS 5000000u                /* over so long a connection's rate is taken */
#define KV_SOON_S 0.01                       /* a chunk that is through by then need not be left to another connection */
#define KV_AGAIN_MS 20                       /* a connection that left a chunk to another looks again */
#define KV_RTT_EVERY 64                      /* chunks after which the kernel is asked for the round trip again */
#define KV_MIN_CHUNK ((size_t)512 << 10)     /* flow/chunking.py */
#define KV_MAX_CODED ((size_t)16 << 20)     /* bytes of a coded chunk: a DATA payload */
#define KV_MAX_OFFSET (((uint64_t)1 << 63) - 1)

enum { KV_HELLO = 1, KV_OPEN, KV_ACCEPT, KV_DATA, KV_ACK, KV_CREDIT, KV_SEAL, KV_CANCEL, KV_RESUME, KV_ERROR, KV_PING,
       KV_CALL, KV_REPLY };
enum { KV_NO_CHECKSUM = 1, KV_FINAL = 2, KV_RESEND = 4, KV_URGENT = 8, KV_REPLY_FLAG = 16, KV_CODED = 32 };

/* ---- stream.c: the bytes below the frames ---- */

/*
 * A connected, non-blocking byte stream on a descriptor. The engine calls it from one thread at a time per direction, or
 * altogether where `exclusive` is set (TLS: one state for both directions), and is told of readiness by the descriptor
 * (edge-triggered). A stream that still shakes hands answers -EAGAIN and goes on with it at each call.
 */
typedef struct kv_stream kv_stream;
typedef struct {
    /* Bytes moved; 0 at the end of the stream (readv only); -errno, -EAGAIN when it would block. Without `pending`, fewer
     * bytes than were asked for mean that there are no more now. */
    ssize_t (*readv)(kv_stream *stream, struct iovec *items, size_t count);
    ssize_t (*writev)(kv_stream *stream, struct iovec *items, size_t count);
    /* Send on what writev took and kept (records): 0 when nothing is kept, else -errno. NULL: never keeps anything. */
    int (*flush)(kv_stream *stream);
    /* Whether readv has bytes without the descriptor being readable. NULL: never. */
    bool (*pending)(kv_stream *stream);
    void (*shutdown)(kv_stream *stream); /* nothing more will be written; flush is called until nothing is kept */
    void (*destroy)(kv_stream *stream);  /* frees the stream; the descriptor is the engine's to close */
    bool exclusive;
} kv_stream_ops;
struct kv_stream {
    const kv_stream_ops *ops;
    int fd;
};
kv_stream *kv_plain_stream(int fd); /* NULL: no memory */
unsigned kv_round_trip_us(int fd);  /* the kernel's least of the last minutes; UINT_MAX where it has none */

/* ---- framing.c: the header, as docs/wire-format.md has it ---- */

typedef struct {
    uint8_t type;
    uint16_t flags, layer, tensor;
    uint32_t length;
    uint64_t offset, sequence, checksum, check;
    unsigned char transfer[16];
} kv_header;

/* Fills 64 bytes, check included, and sets header->check. */
void kv_header_pack(unsigned char *out, kv_header *header);
void kv_header_seal(unsigned char *packed, uint64_t checksum);
/* False where unpack_header of wire/frames.py raises; `limits` has the largest payload by type. */
bool kv_header_unpack(const unsigned char *packed, kv_header *header, const uint32_t *limits);
/* An ACK frame of `count` ranges {layer, tensor, start, stop} (64-bit each); malloc'ed. NULL: no memory. */
unsigned char *kv_ack_frame(const unsigned char *transfer, const uint64_t (*ranges)[4], size_t count, size_t *nbytes);
unsigned char *kv_credit_frame(const unsigned char *transfer, uint64_t limit, size_t *nbytes);

/* ---- maps.c: page lists as the threads use them; sets of ranges ---- */

typedef struct kv_map {
    Py_buffer base;            /* held for the life of the map */
    size_t count, nbytes;
    size_t *offsets, *ends;    /* of each piece: where in the base, and the bytes up to its end */
    struct kv_map *next;       /* in a list of maps to free */
} kv_map;

/* `pieces`: as kv_pages_get has it, or one as a tuple (offset, length). NULL with an exception. */
kv_map *kv_map_get(PyObject *base, PyObject *pieces, bool writable);
void kv_map_free(kv_map *map);                                       /* with the GIL, without the mutex; also lists */
/* iovecs of bytes [start, stop) of the map: at most `room` of them, and the bytes they hold. */
size_t kv_map_iovs(const kv_map *map, size_t start, size_t stop, struct iovec *items, size_t room, size_t *nbytes);

typedef struct {
    uint64_t (*items)[2]; /* sorted, disjoint, never touching: [start, stop) */
    size_t count, capacity;
} kv_ranges;
/* Bytes of [start, stop) that are in the set. */
uint64_t kv_ranges_covered(const kv_ranges *set, uint64_t start, uint64_t stop);
int kv_ranges_add(kv_ranges *set, uint64_t start, uint64_t stop); /* -1: more than KV_MAX_RANGES, or no memory */
void kv_ranges_free(kv_ranges *set);

/* ---- sending.c ---- */

struct kv_engine;
struct kv_conn;
struct kv_group;

enum { KV_CHUNK_QUEUED = 1, KV_CHUNK_SENT, KV_CHUNK_ACKED };

typedef struct {
    uint64_t start, stop;
    uint64_t attempt;
    uint64_t serial; /* of the connection that has it */
    int state;
} kv_chunk;

/* A ready unit: bytes [start, stop) of one extent, and where they lie. */
typedef struct kv_span {
    struct kv_span *next; /* among those that are not cut to the end */
    struct kv_outgoing *out;
    struct kv_out_slot *slot;
    kv_map *map;
    bool coded; /* the map holds the payload that these bytes became: one chunk, never cut */
    uint64_t key, start, stop, cut, acked; /* cut, acked: sent up to here at least once; bytes acknowledged */
    kv_chunk *chunks, first;
    size_t count, capacity;
} kv_span;

typedef struct kv_out_slot {
    uint16_t layer, tensor;
    kv_span **spans; /* [begin, begin + count) by start */
    size_t begin, count, capacity;
    uint64_t acked_new; /* acknowledged and not told Python */
} kv_out_slot;

typedef struct {
    kv_span *span;
    size_t chunk;
} kv_retry;

/* One transfer on its way out. */
typedef struct kv_outgoing {
    struct kv_group *group;
    struct kv_outgoing *next;              /* in the group */
    struct kv_outgoing *ahead, *behind;    /* among those that have a chunk to send, in their level */
    struct kv_level *level;                /* NULL: has nothing to send */
    unsigned char transfer[16];
    int priority;
    bool checksum, accepted, closed;
    uint64_t chunk_bytes, credit, used, inflight, next_key;
    uint64_t allowed; /* as credit, but this side's own limit: a capped tenant's */
    kv_out_slot *slots;
    size_t slot_count;
    int64_t tag;
    kv_span *head, *tail;
    kv_retry *retries; /* [retry_at, retry_at + retry_count) */
    size_t retry_at, retry_count, retry_capacity;
    uint64_t stalled_since, stalled_ns, chunks, cut_bytes, resent_bytes;
    /* for Python: keys of spans that are acknowledged, and their memory, which only it may release */
    struct kv_outgoing *next_ready;
    bool ready;
    uint64_t *done;
    size_t done_count, done_capacity;
    kv_map *garbage;
    int droppers; /* threads in the middle of dropping a span */
} kv_outgoing;

typedef struct kv_level {
    struct kv_level *next; /* lower priority */
    int priority;
    kv_outgoing *first; /* circular */
} kv_level;

/* ---- receiving.c ---- */

typedef struct kv_in_slot {
    uint16_t layer, tensor;
    uint64_t nbytes;
    uint64_t first_ns; /* when the first header came; 0 once told */
    kv_map *map;
    kv_ranges applied;
} kv_in_slot;

typedef struct {
    kv_in_slot *slot;
    uint64_t start, stop;
} kv_applied;

/* One transfer on its way in: what is granted and not applied may be written. */
typedef struct kv_incoming {
    struct kv_group *group;
    struct kv_incoming *next;
    struct kv_incoming *next_ready; /* has `pending` for Python */
    bool ready, closed, allow_unchecked, eager; /* eager: Python wants to hear of every range at once */
    kv_in_slot *placing;            /* Python writes bytes of it that it has decoded and verified: */
    uint64_t placing_start, placing_stop;
    unsigned char transfer[16];
    int64_t tag;
    kv_in_slot *slots;
    size_t slot_count;
    kv_applied *pending;
    size_t pending_count, pending_capacity;
    uint64_t total, window, granted, applied_bytes;
    uint64_t chunks, verified, duplicate_bytes;
} kv_incoming;

/* ---- engine.c ---- */

typedef struct kv_bytes {
    struct kv_bytes *next;
    size_t nbytes;
    unsigned char data[];
} kv_bytes;

enum { KV_EV_CONTROL, KV_EV_LOST, KV_EV_BAD, KV_EV_STRAY, KV_EV_ODD, KV_EV_CORRUPT, KV_EV_APPLIED, KV_EV_ACKED };
/* Why a frame is odd (KV_EV_ODD). */
enum { KV_ODD_SLOT, KV_ODD_BOUNDS, KV_ODD_UNCHECKED, KV_ODD_OVERLAP, KV_ODD_RANGES, KV_ODD_CREDIT };
/* How a connection ended (KV_EV_LOST), beside an errno. */
enum { KV_LOST_END, KV_LOST_INSIDE, KV_LOST_ERRNO, KV_LOST_VOID, KV_LOST_MEMORY };

typedef struct kv_event {
    struct kv_event *next;
    int kind, detail;
    int64_t tag;
    uint64_t serial; /* of the connection whose backlog it counts in, */
    uint32_t slot;   /* and where it stands */
    size_t nbytes;   /* of data */
    unsigned char head[KV_HEADER_BYTES];
    unsigned char data[];
} kv_event;

typedef struct kv_thread {
    struct kv_engine *engine;
    pthread_t id;
    int epoll, wake, load;
    bool running, asleep;
    uint64_t declined_ns; /* since when a connection of its that left a chunk to another has to look again; 0: none has */
    struct kv_conn *kicked, *last_kicked;
    unsigned char *scratch; /* KV_RECV_BYTES nobody reads */
} kv_thread;

typedef struct kv_engine {
    pthread_mutex_t lock;
    pthread_cond_t let_go;
    int waiters;
    uint64_t operations;
    int event_fd;
    bool signalled, stopping;
    uint64_t untold_ns; /* since when there is something that Python need not hear of at once; 0: there is nothing */
    pid_t pid;
    kv_event *first_event, **last_event;
    kv_incoming *ready_in;
    kv_outgoing *ready_out;
    kv_thread threads[KV_MAX_THREADS];
    int thread_limit, thread_count;
    struct kv_conn **conns;
    size_t conn_capacity;
    uint64_t next_serial;
} kv_engine;

enum { KV_OUT_NONE, KV_OUT_CONTROL, KV_OUT_DATA };
enum { KV_IN_HEAD, KV_IN_BODY, KV_IN_PLACE, KV_IN_DRAIN, KV_IN_STOPPED };

typedef struct {
    uint64_t transfer[2];
    uint64_t range[4];
} kv_ack;
#define KV_ACKS 64

typedef struct kv_conn {
    kv_engine *engine;
    kv_thread *thread;
    struct kv_group *group;
    struct kv_conn *next_kicked;
    struct kv_conn *next_of_group;
    struct kv_conn *rival; /* while one connection takes a chunk over from others */
    kv_stream *stream;
    uint32_t slot;
    uint64_t serial;
    int64_t tag;
    uint32_t limits[KV_TYPES];
    bool closed, finishing, shut, lost;
    bool parked; /* takes no chunk: control frames only */
    bool kicked, writing, sending, receiving, paused;
    bool readable, ending, blocked, writable; /* blocked: until the descriptor says writable, which it may do while we ask */
    uint64_t in_op, out_op;           /* numbers of the operations in progress */
    int users; /* its thread works on it */
    size_t up_bytes;
    /* to send */
    kv_bytes *first_control, **last_control;
    size_t control_bytes;
    int out;
    kv_bytes *control;       /* being sent */
    unsigned char head[KV_HEADER_BYTES];
    bool sealed, checksummed, voided;
    uint64_t out_check; /* of head: the seed of its checksum */
    void *out_hash;
    kv_span *span;           /* NULL when voided: the rest is zeros */
    size_t span_chunk;
    uint64_t out_start, out_bytes, out_at; /* of the span; payload bytes; bytes of head ++ payload sent */
    uint64_t unacked, taken; /* bytes of chunks that it took and that are not acknowledged; chunks it took */
    double rate;             /* bytes per second that were acknowledged while it had something to wait for; 0: not known */
    uint64_t mark_ns, mark_bytes, progress_ns; /* of the sample being taken; when something of it was acknowledged */
    bool declined;           /* left a chunk to another connection */
    bool near, full;         /* its path is local; it has as much as it may have, and waits for acknowledgements */
    /* receiving */
    int in;
    unsigned char in_head[KV_HEADER_BYTES];    /* being received */
    unsigned char frame_head[KV_HEADER_BYTES]; /* of the payload being received */
    size_t in_head_at;
    kv_header header;
    kv_event *body;
    kv_incoming *claim;
    kv_in_slot *claim_slot;
    bool hashing, void_in;
    void *hash;
    uint64_t in_at;
    bool duplicate;
    kv_ack acks[KV_ACKS];
    size_t ack_count;
    /* telling */
    uint64_t sent_bytes, received_bytes;
    bool heard; /* since Python last asked */
} kv_conn;

#define KV_BUCKETS 256

/* The connections of one link, and its transfers. */
typedef struct kv_group {
    kv_engine *engine;
    kv_conn *conns;
    kv_conn *turn; /* who is kicked first when there is work */
    kv_outgoing *outgoing[KV_BUCKETS];
    kv_incoming *incoming[KV_BUCKETS];
    kv_level *levels; /* highest first */
    uint64_t uncut; /* bytes of all transfers that were never sent */
} kv_group;

extern const kv_xxh3 *kv_engine_xxh3;
extern unsigned char kv_zeros[KV_RECV_BYTES];

uint64_t kv_now_ns(void);
static inline void kv_lock(kv_engine *engine) { pthread_mutex_lock(&engine->lock); }
static inline void kv_unlock(kv_engine *engine) { pthread_mutex_unlock(&engine->lock); }
/* Under the mutex: somebody who waits for sending, receiving or users may look again. */
static inline void kv_let_go(kv_engine *engine) {
    if (engine->waiters) pthread_cond_broadcast(&engine->let_go);
}
void kv_wait(kv_engine *engine); /* under the mutex: until somebody lets go of something */
/* Under the mutex: waits for the receives (or sends) in progress now on the group's connections. True if it waited. */
bool kv_settle(struct kv_group *group, bool receives);

kv_engine *kv_engine_new(int threads); /* NULL with errno */
void kv_engine_stop(kv_engine *engine);
void kv_engine_free(kv_engine *engine);
/* Under the mutex. */
void kv_push_event(kv_engine *engine, kv_event *event);
kv_event *kv_event_new(int kind, const kv_conn *conn, const unsigned char *head, size_t nbytes); /* NULL: no memory */
void kv_signal(kv_engine *engine);      /* Python is to look now, */
void kv_signal_soon(kv_engine *engine); /* or before long: called by I/O threads, each wake-up costs them their processor */
void kv_wake(kv_thread *thread);                                /* from its sleep, to look at what is due */
void kv_kick(kv_conn *conn);                                    /* its thread looks at it soon */
void kv_kick_group(kv_group *group, size_t chunks);             /* so many connections may have something to send */
void kv_conn_lost(kv_conn *conn, int how, int error);           /* says so once; its I/O has ended */

/* A connection over `stream`, which it takes over, error or not. NULL with errno. */
kv_conn *kv_conn_new(kv_engine *engine, kv_stream *stream, int64_t tag, const uint32_t *limits);
void kv_conn_join(kv_conn *conn, kv_group *group);
/* Queues a frame (malloc'ed, taken over) and sends it now if nothing else is being sent; bytes that wait. */
size_t kv_conn_send(kv_conn *conn, kv_bytes *frame);
void kv_queue_control(kv_conn *conn, kv_bytes *frame); /* under the mutex */
void kv_conn_finish(kv_conn *conn);           /* send what is queued, then no more; throw away what comes */
void kv_conn_close(kv_conn *conn, bool abort); /* waits for what is in progress; nothing moves afterwards */
void kv_conn_free(kv_conn *conn);

/* The steps; called by a connection's thread (the second also by others), without the mutex. */
void kv_read_some(kv_conn *conn, unsigned char *scratch);
void kv_write_some(kv_conn *conn, size_t budget);

/* sending.c, under the mutex unless it is said otherwise */
kv_out_slot *kv_out_slot_find(const kv_outgoing *out, unsigned layer, unsigned tensor);
/* Bytes [start, stop) of the slot: the map's, or (`coded`) what the map decodes to. NULL: no memory. */
kv_span *kv_outgoing_add(kv_outgoing *out, kv_out_slot *slot, uint64_t start, uint64_t stop, kv_map *map, bool coded);
bool kv_take_chunk(kv_conn *conn);      /* puts the next chunk of the group into `out` */
void kv_update_turn(kv_outgoing *out);  /* something changed: has it a chunk to send? Kicks connections if so */
/* Bytes [start, stop) were acknowledged. What is whole is dropped; Python hears of it. -1: no memory. */
int kv_outgoing_ack(kv_outgoing *out, kv_out_slot *slot, uint64_t start, uint64_t stop);
uint64_t kv_outgoing_resend(kv_outgoing *out, kv_out_slot *slot, uint64_t start, uint64_t stop);
uint64_t kv_outgoing_requeue(kv_outgoing *out, uint64_t serial); /* what that connection had goes again */
kv_span *kv_span_find(const kv_out_slot *slot, uint64_t start); /* the one that starts there */
void kv_span_swap(kv_span *span, kv_map *map);  /* the old map is garbage when this returns */
void kv_outgoing_close(kv_outgoing *out);       /* drops everything; nothing is read any more; unlinks */
void kv_frame_voided(kv_conn *conn);      /* the memory of its half-sent frame is gone */
/* An ACK or CREDIT for a transfer of this group; false: Python has to look at it. */
bool kv_outgoing_take(kv_group *group, const kv_header *header, const unsigned char *body);
kv_outgoing *kv_outgoing_find(const kv_group *group, const unsigned char *transfer);

/* prediction.c, under the mutex */
void kv_took(kv_conn *conn, uint64_t nbytes);   /* a chunk is on it */
void kv_acked(kv_conn *conn, uint64_t nbytes);  /* a chunk that was on it is acknowledged */
/* Whether a chunk should rather wait for another connection, which is kicked: it will be through long before. */
bool kv_leave_to_others(kv_conn *conn, uint64_t nbytes);
void kv_look_again(kv_thread *thread);          /* when it is time: kicks its connections that left a chunk to others */

/* receiving.c, under the mutex */
kv_incoming *kv_incoming_find(const kv_group *group, const unsigned char *transfer);
kv_in_slot *kv_in_slot_find(const kv_incoming *in, unsigned layer, unsigned tensor);
void kv_incoming_close(kv_incoming *in); /* voids all claims; nothing is written any more; unlinks */
void kv_flush_acks(kv_conn *conn);
enum { KV_PLACE_LOST, KV_PLACE_DONE, KV_PLACE_THERE, KV_PLACE_ODD }; /* + KV_ODD_... */
/*
 * Decoded, verified bytes [start, start + nbytes) into their place, under the rules of claims; `credit` is what the sender may
 * be told now, 0: nothing new. Lets go of the mutex to copy: nobody may close `in` meanwhile.
 */
int kv_incoming_place(kv_incoming *in, kv_in_slot *slot, uint64_t start, const unsigned char *bytes, size_t nbytes,
                      uint64_t attempt, uint64_t *credit);

static inline size_t kv_bucket(const unsigned char *transfer) {
    return (transfer[0] ^ transfer[7] ^ transfer[15]) & (KV_BUCKETS - 1);
}

#endif /* __linux__ */

int kv_add_engine_types(PyObject *module); /* adds nothing where there is no engine */

#endif
