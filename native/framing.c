/* Headers, and the two control frames the engine writes itself. wire/frames.py is the reference; tests hold this to it. */
#include "engine.h"

#ifdef KV_ENGINE
#include <stdlib.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the wire is little-endian, and so is every machine this was written for"
#endif

#define COVERED 48 /* bytes of the header that its check covers */
#define VERSION 1

static const unsigned char MAGIC[4] = {'K', 'V', 'T', '1'};

static void put(unsigned char *at, const void *value, size_t nbytes) { memcpy(at, value, nbytes); }

void kv_header_pack(unsigned char *out, kv_header *header) {
    memcpy(out, MAGIC, 4);
    out[4] = VERSION;
    out[5] = header->type;
    put(out + 6, &header->flags, 2);
    put(out + 8, header->transfer, 16);
    put(out + 24, &header->layer, 2);
    put(out + 26, &header->tensor, 2);
    put(out + 28, &header->length, 4);
    put(out + 32, &header->offset, 8);
    put(out + 40, &header->sequence, 8);
    put(out + 48, &header->checksum, 8);
    header->check = kv_engine_xxh3->one_shot(out, COVERED, 0);
    put(out + 56, &header->check, 8);
}

void kv_header_seal(unsigned char *packed, uint64_t checksum) { put(packed + COVERED, &checksum, 8); }

static bool all_zeros(const unsigned char *transfer) {
    static const unsigned char zeros[16];
    return memcmp(transfer, zeros, 16) == 0;
}

bool kv_header_unpack(const unsigned char *packed, kv_header *header, const uint32_t *limits) {
    if (memcmp(packed, MAGIC, 4) != 0) return false;
    memcpy(&header->check, packed + 56, 8);
    if (kv_engine_xxh3->one_shot(packed, COVERED, 0) != header->check) return false;
    header->type = packed[5];
    if (packed[4] != VERSION || header->type < KV_HELLO || header->type > KV_REPLY) return false;
    memcpy(&header->flags, packed + 6, 2);
    memcpy(header->transfer, packed + 8, 16);
    memcpy(&header->layer, packed + 24, 2);
    memcpy(&header->tensor, packed + 26, 2);
    memcpy(&header->length, packed + 28, 4);
    memcpy(&header->offset, packed + 32, 8);
    memcpy(&header->sequence, packed + 40, 8);
    memcpy(&header->checksum, packed + 48, 8);

    unsigned allowed = KV_URGENT;
    if (header->type == KV_DATA) allowed |= KV_NO_CHECKSUM | KV_RESEND | KV_CODED;
    if (header->type == KV_ACK) allowed |= KV_FINAL;
    if (header->type == KV_PING) allowed |= KV_REPLY_FLAG;
    if (header->flags & ~allowed) return false;
    if ((header->flags & KV_NO_CHECKSUM) && (header->checksum || header->flags & KV_CODED)) return false;

    bool none = all_zeros(header->transfer);
    bool must_be_none = header->type == KV_HELLO || header->type == KV_PING;
    bool either = header->type == KV_ERROR || header->type == KV_CALL || header->type == KV_REPLY;
    if (!either && none != must_be_none) return false;
    if (header->length > limits[header->type]) return false;
    if (header->type == KV_DATA)
        return header->length && header->offset <= KV_MAX_OFFSET && header->length <= KV_MAX_OFFSET - header->offset;
    return header->type != KV_CREDIT || header->offset <= KV_MAX_OFFSET;
}

/* ---- the bodies it writes: msgpack, the shortest form of every integer, as msgspec writes them ---- */

static size_t put_number(unsigned char *at, uint64_t value) {
    if (value < 128) return *at = (unsigned char)value, 1;
    int width = value <= 0xff ? 1 : value <= 0xffff ? 2 : value <= 0xffffffff ? 4 : 8;
    *at = width == 1 ? 0xcc : width == 2 ? 0xcd : width == 4 ? 0xce : 0xcf;
    for (int i = 0; i < width; i++) at[1 + i] = (unsigned char)(value >> (8 * (width - 1 - i)));
    return 1 + (size_t)width;
}

unsigned char *kv_ack_frame(const unsigned char *transfer, const uint64_t (*ranges)[4], size_t count, size_t *nbytes) {
    /* map of 1, "ranges", array of count arrays of 4 numbers of at most 9 bytes */
    unsigned char *frame = malloc(KV_HEADER_BYTES + 16 + count * 37);
    if (!frame) return NULL;
    unsigned char *at = frame + KV_HEADER_BYTES;
    memcpy(at, "\x81\xa6ranges", 8);
    at += 8;
    if (count < 16) {
        *at++ = (unsigned char)(0x90 | count);
    } else {
        *at++ = 0xdc;
        *at++ = (unsigned char)(count >> 8);
        *at++ = (unsigned char)count;
    }
    for (size_t i = 0; i < count; i++) {
        *at++ = 0x94;
        for (int k = 0; k < 4; k++) at += put_number(at, ranges[i][k]);
    }
    size_t body = (size_t)(at - frame) - KV_HEADER_BYTES;
    kv_header header = {.type = KV_ACK, .length = (uint32_t)body};
    memcpy(header.transfer, transfer, 16);
    kv_header_pack(frame, &header);
    kv_header_seal(frame, kv_engine_xxh3->one_shot(frame + KV_HEADER_BYTES, body, header.check));
    *nbytes = KV_HEADER_BYTES + body;
    return frame;
}

unsigned char *kv_credit_frame(const unsigned char *transfer, uint64_t limit, size_t *nbytes) {
    unsigned char *frame = malloc(KV_HEADER_BYTES);
    if (!frame) return NULL;
    kv_header header = {.type = KV_CREDIT, .offset = limit};
    memcpy(header.transfer, transfer, 16);
    kv_header_pack(frame, &header);
    kv_header_seal(frame, kv_engine_xxh3->one_shot(frame, 0, header.check));
    *nbytes = KV_HEADER_BYTES;
    return frame;
}
#else
typedef int kv_no_framing;
#endif
