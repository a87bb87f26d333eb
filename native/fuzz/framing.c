/* libFuzzer: the engine's headers and ACK frames against the reference, kvtransport.wire.frames, in the same process. What
 * the reference raises at is false here, what it reads is read the same, and what is written is what it would write. */
#include "../engine.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

PyMODINIT_FUNC PyInit__native(void);
static PyObject *unpack, *control, *ack, *ranges_of, *type_ack;
static uint32_t limits[32];

static PyObject *get(const char *module_name, const char *name) {
    PyObject *m = PyImport_ImportModule(module_name), *found = m ? PyObject_GetAttrString(m, name) : NULL;
    if (!found) PyErr_Print(), abort();
    return found;
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    Py_Initialize();
    if (!PyInit__native()) PyErr_Print(), abort();
    unpack = get("kvtransport.wire.frames", "unpack_header");
    control = get("kvtransport.wire.frames", "encode_control");
    ack = get("kvtransport.wire.bodies", "Ack");
    ranges_of = get("kvtransport.wire.bodies", "byte_ranges");
    type_ack = PyObject_GetAttrString(get("kvtransport.wire.frames", "FrameType"), "ACK");
    PyObject *by_type = PyObject_GetAttrString(get("kvtransport.wire.frames", "DEFAULT_LIMITS"), "by_type");
    for (Py_ssize_t i = 0; i < PySequence_Size(by_type) && i < 32; i++) {
        PyObject *limit = PySequence_GetItem(by_type, i);
        limits[i] = (uint32_t)PyLong_AsUnsignedLong(limit);
        Py_DECREF(limit);
    }
    return 0;
}

static uint64_t field(PyObject *header, const char *name) {
    PyObject *value = PyObject_GetAttrString(header, name);
    uint64_t number = value ? PyLong_AsUnsignedLongLong(value) : 0;
    if (PyErr_Occurred()) PyErr_Print(), abort();
    Py_DECREF(value);
    return number;
}

static void read_one(const uint8_t *data, bool repair) {
    unsigned char packed[KV_HEADER_BYTES];
    memcpy(packed, data, sizeof packed);
    if (repair) {
        memcpy(packed, "KVT1\1", 5);
        uint64_t check = kv_engine_xxh3->one_shot(packed, 48, 0);
        memcpy(packed + 56, &check, 8);
    }
    kv_header header = {0};
    bool taken = kv_header_unpack(packed, &header, limits);
    PyObject *said = PyObject_CallFunction(unpack, "y#", (const char *)packed, (Py_ssize_t)sizeof packed);
    if (!said) PyErr_Clear();
    if (taken != (said != NULL)) abort();
    if (!taken) return;
    if (field(said, "type") != header.type || field(said, "flags") != header.flags || field(said, "layer") != header.layer ||
        field(said, "tensor") != header.tensor || field(said, "length") != header.length ||
        field(said, "offset") != header.offset || field(said, "sequence") != header.sequence ||
        field(said, "checksum") != header.checksum || field(said, "check") != header.check)
        abort();
    Py_DECREF(said);
    unsigned char again[KV_HEADER_BYTES];
    kv_header_pack(again, &header);
    if (memcmp(again, packed, sizeof again)) abort();
}

static void write_one(const uint8_t *data, size_t size) {
    uint64_t ranges[40][4];
    unsigned char transfer[16];
    memcpy(transfer, data, 16);
    transfer[0] |= 1; /* not all zeros */
    data += 16, size -= 16;
    size_t count = 0;
    PyObject *list = PyList_New(0);
    while (count < 40 && size >= 6) {
        uint64_t start = 0, more = 0;
        size_t wide = data[0] % 8; /* numbers of every width */
        ranges[count][0] = data[1] * 257u, ranges[count][1] = data[2];
        data += 3, size -= 3;
        for (size_t i = 0; i < wide && size > 1; i++, data++, size--) start = start << 8 | *data;
        if (size) more = *data++, size--;
        ranges[count][2] = start, ranges[count][3] = start + 1 + more * more * more;
        PyObject *row = Py_BuildValue("(KKKK)", ranges[count][0], ranges[count][1], ranges[count][2], ranges[count][3]);
        PyList_Append(list, row);
        Py_DECREF(row);
        count++;
    }
    size_t nbytes;
    unsigned char *frame = kv_ack_frame(transfer, (const uint64_t(*)[4])ranges, count, &nbytes);
    PyObject *args = PyTuple_New(0), *rows = PyObject_CallFunctionObjArgs(ranges_of, list, NULL);
    PyObject *named = Py_BuildValue("{sO}", "ranges", rows), *body = PyObject_Call(ack, args, named);
    PyObject *pair = Py_BuildValue("(OO)", type_ack, body), *scope = Py_BuildValue("{sy#}", "transfer", transfer, (Py_ssize_t)16);
    PyObject *said = pair && scope ? PyObject_Call(control, pair, scope) : NULL;
    char *text;
    Py_ssize_t length;
    if (!said || PyBytes_AsStringAndSize(said, &text, &length) < 0) PyErr_Print(), abort();
    if ((size_t)length != nbytes || memcmp(text, frame, nbytes)) abort();
    free(frame);
    Py_DECREF(said), Py_DECREF(scope), Py_DECREF(pair), Py_DECREF(body), Py_DECREF(named), Py_DECREF(rows), Py_DECREF(args);
    Py_DECREF(list);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 2) return 0;
    bool write = *data & 1, repair = *data & 6;
    data++, size--;
    if (write && size >= 16) write_one(data, size);
    if (!write && size >= KV_HEADER_BYTES) read_one(data, repair);
    return 0;
}
