"""What a reader refuses, and how it says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import xxhash

from kvtransport.errors import (
    Fault,
    HeaderError,
    IntegrityError,
    KVError,
    LimitError,
    ProtocolError,
    VersionError,
)
from kvtransport.wire.bodies import Accept, Ack, Call, byte_ranges
from kvtransport.wire.frames import (
    DEFAULT_LIMITS,
    HEADER_BYTES,
    NO_TRANSFER,
    Flag,
    FrameType,
    Limits,
    check_payload,
    decode_control,
    encode_control,
    encode_data,
    pack_header,
    seal_header,
    unpack_header,
)
from kvtransport.wire.reader import FrameReader

T = bytes(range(16))
GOLDEN = {
    name: bytes.fromhex(vector["hex"])
    for name, vector in json.loads(Path(__file__).with_name("golden.json").read_text()).items()
}
STREAM = b"".join(GOLDEN.values())
PING = GOLDEN["ping"]


def reheader(raw: bytes, **changes: int | bytes) -> bytes:
    """The header with bytes replaced at offsets and its check made good: a peer that lies, no flipped bit."""
    head = bytearray(raw[:48])
    for where, value in changes.items():
        at = int(where.removeprefix("at"))
        value = bytes([value]) if isinstance(value, int) else value
        head[at : at + len(value)] = value
    return bytes(head) + raw[48:56] + xxhash.xxh3_64_intdigest(bytes(head)).to_bytes(8, "little")


# ------------------------------------------------------------------------------------------ flipped bits


@pytest.mark.parametrize("name", ["data", "ack", "ping", "data_no_checksum"])
@pytest.mark.parametrize("byte", range(HEADER_BYTES))
def test_every_flipped_header_bit_is_found(name, byte):
    for bit in range(8):
        raw = bytearray(GOLDEN[name])
        raw[byte] ^= 1 << bit
        reader = FrameReader()
        if 48 <= byte < 56 and name == "data":
            void, after = reader.feed(bytes(raw) + PING)
            assert void.payload == b""
            assert isinstance(void.error, IntegrityError)
            assert after.header.type is FrameType.PING
            continue
        if byte < 4:
            expected, text = ProtocolError, "expected magic KVT1"
        elif not 48 <= byte < 56:
            expected, text = HeaderError, "damaged"
        elif name == "data_no_checksum":
            expected, text = ProtocolError, "NO_CHECKSUM"
        else:
            expected, text = IntegrityError, "checksum"
        with pytest.raises(expected, match=text) as caught:
            reader.feed(bytes(raw) + PING)
        assert type(caught.value) is expected
        assert reader.buffered == 0


def test_every_flipped_payload_bit_is_found():
    for name in ("data", "seal"):
        size = len(GOLDEN[name])
        for at in range(HEADER_BYTES * 8, size * 8):
            raw = bytearray(GOLDEN[name])
            raw[at // 8] ^= 1 << (at % 8)
            with pytest.raises(IntegrityError):
                check_payload(unpack_header(bytes(raw[:64])), bytes(raw[64:]))


def test_right_bytes_in_the_wrong_place_do_not_verify():
    payload = b"the same bytes" * 8
    here = encode_data(payload, transfer=T, layer=1, tensor=0, offset=0)
    for place in ({"layer": 2}, {"tensor": 1}, {"offset": 112}, {"transfer": b"x" * 16}, {"sequence": 1}):
        there = encode_data(payload, **{"transfer": T, "layer": 1, "tensor": 0, "offset": 0} | place)
        forged = seal_header(there, int.from_bytes(here[48:56], "little"))
        (frame,) = FrameReader().feed(forged + payload)
        assert isinstance(frame.error, IntegrityError), place
        assert frame.payload == b""


def test_void_data_leaves_the_stream_in_step_but_a_damaged_control_frame_ends_it():
    data = bytearray(GOLDEN["data"])
    data[-1] ^= 1
    reader = FrameReader()
    frames = reader.feed(bytes(data) + GOLDEN["data"] + PING)
    assert [f.error is None for f in frames] == [False, True, True]
    accept = bytearray(GOLDEN["accept"])
    accept[-1] ^= 1
    with pytest.raises(IntegrityError, match="ACCEPT"):
        reader.feed(bytes(accept))
    with pytest.raises(IntegrityError, match="ACCEPT"):
        reader.feed(PING)
    assert isinstance(reader.error, IntegrityError)


# ------------------------------------------------------------------------------------------ lying headers


@pytest.mark.parametrize("version", [0, 2, 255])
def test_wrong_version(version):
    with pytest.raises(VersionError, match=f"expected protocol version 1, got {version}"):
        unpack_header(reheader(PING, at4=version))


@pytest.mark.parametrize("number", [0, 14, 255])
def test_unknown_type(number):
    with pytest.raises(VersionError, match=rf"expected a frame type of 1\.\.13 .*, got {number}"):
        unpack_header(reheader(PING, at5=number))


@pytest.mark.parametrize(
    ("head", "hint"),
    [
        (b"GET / HTTP/1.1\r\n", "HTTP"),
        (b"\x16\x03\x01\x02\x00", "TLS"),
        (b"SSH-2.0-OpenSSH", "is this a kvtransport port"),
        (b"KVT2", "is this a kvtransport port"),
        (bytes(64), "is this a kvtransport port"),
    ],
)
def test_wrong_magic_says_what_it_may_be(head, hint):
    with pytest.raises(ProtocolError, match="expected magic KVT1, got") as caught:
        unpack_header(head.ljust(64, b"\0"))
    assert hint in caught.value.message
    assert caught.value.fault is Fault.REMOTE


def test_checks_come_in_the_documented_order():
    """Each damage hides all later ones: the first thing wrong is what the error names."""
    layers = [
        ({"at0": b"XXXX"}, ProtocolError, "magic"),
        (None, HeaderError, "damaged"),
        ({"at4": 9}, VersionError, "version 1, got 9"),
        ({"at5": 99}, VersionError, "frame type"),
        ({"at6": b"\x00\x80"}, ProtocolError, "flags"),
        ({"at28": b"\xff\xff\xff\xff"}, LimitError, "at most"),
    ]
    for first in range(len(layers)):
        raw = GOLDEN["data"]
        changes: dict[str, int | bytes] = {}
        for change, _, _ in layers[first:]:
            changes |= change or {}
        raw = reheader(raw, **changes)
        if first <= 1:
            raw = raw[:63] + bytes([raw[63] ^ 1])
        with pytest.raises(ProtocolError, match=layers[first][2]) as caught:
            unpack_header(raw)
        assert type(caught.value) is layers[first][1]


@pytest.mark.parametrize("kind", list(FrameType))
def test_flags_that_a_type_does_not_have_are_refused(kind):
    allowed = {
        FrameType.DATA: Flag.NO_CHECKSUM | Flag.RESEND | Flag.CODED,
        FrameType.ACK: Flag.FINAL,
        FrameType.PING: Flag.REPLY,
    }.get(kind, 0) | Flag.URGENT
    scope = NO_TRANSFER if kind in (FrameType.HELLO, FrameType.PING) else T
    length = 1 if kind is FrameType.DATA else 0
    for bit in range(16):
        raw = pack_header(kind, transfer=scope, flags=1 << bit, length=length)
        if allowed & 1 << bit:
            assert unpack_header(raw).flags == 1 << bit
        else:
            with pytest.raises(ProtocolError, match=f"{kind.name} allows flags"):
                unpack_header(raw)


@pytest.mark.parametrize("kind", list(FrameType))
def test_transfer_ids_are_there_when_and_only_when_they_belong(kind):
    length = 1 if kind is FrameType.DATA else 0
    without, with_id = pack_header(kind, length=length), pack_header(kind, transfer=T, length=length)
    if kind in (FrameType.HELLO, FrameType.PING):
        assert unpack_header(without).transfer == NO_TRANSFER
        with pytest.raises(ProtocolError, match="belongs to no transfer"):
            unpack_header(with_id)
    elif kind in (FrameType.ERROR, FrameType.CALL, FrameType.REPLY):
        assert unpack_header(without).transfer == NO_TRANSFER
        assert unpack_header(with_id).transfer == T
    else:
        assert unpack_header(with_id).transfer == T
        with pytest.raises(ProtocolError, match="needs a transfer id"):
            unpack_header(without)


@pytest.mark.parametrize("kind", list(FrameType))
def test_a_length_over_the_limit_is_refused_at_the_header(kind):
    limit = DEFAULT_LIMITS.by_type[kind]
    scope = NO_TRANSFER if kind in (FrameType.HELLO, FrameType.PING) else T
    assert unpack_header(pack_header(kind, transfer=scope, length=limit)).length == limit
    reader = FrameReader()
    with pytest.raises(LimitError, match=f"{kind.name} payload is at most {limit} bytes, got {limit + 1}"):
        reader.feed(pack_header(kind, transfer=scope, length=limit + 1))
    assert reader.buffered == 0


def test_limits_are_injected_and_themselves_checked():
    small = Limits(data=100)
    assert unpack_header(pack_header(FrameType.DATA, transfer=T, length=100), small).length == 100
    with pytest.raises(LimitError, match="at most 100 bytes, got 101"):
        unpack_header(pack_header(FrameType.DATA, transfer=T, length=101), small)
    with pytest.raises(LimitError, match="limit of ACK"):
        Limits(ack=2**32)
    with pytest.raises(LimitError, match="ACCEPT payload is at most 3 bytes"):
        encode_control(FrameType.ACCEPT, Accept(credit=1, chunk_bytes=1), transfer=T, limits=Limits(accept=3))
    assert Limits().largest() == 16 << 20
    assert Limits() == DEFAULT_LIMITS


@pytest.mark.parametrize(("length", "offset"), [(0, 0), (1, 2**63 - 1), (16 << 20, 2**63 - (16 << 20)), (1, 2**64 - 1)])
def test_data_must_have_bytes_and_end_in_range(length, offset):
    with pytest.raises(LimitError, match=r"at least 1 byte and end by 2\^63-1"):
        unpack_header(pack_header(FrameType.DATA, transfer=T, length=length, offset=offset))
    assert unpack_header(pack_header(FrameType.DATA, transfer=T, length=1, offset=2**63 - 2)).offset == 2**63 - 2


def test_credit_is_bounded_but_tokens_use_all_64_bits():
    with pytest.raises(LimitError, match="CREDIT"):
        unpack_header(pack_header(FrameType.CREDIT, transfer=T, offset=2**63))
    assert unpack_header(pack_header(FrameType.PING, offset=2**64 - 1)).offset == 2**64 - 1
    assert unpack_header(pack_header(FrameType.CALL, offset=2**64 - 1)).offset == 2**64 - 1


def test_fields_that_a_type_does_not_use_are_ignored():
    raw = pack_header(FrameType.PING, layer=3, tensor=4, sequence=5, offset=6)
    header = unpack_header(raw)
    assert (header.layer, header.tensor, header.sequence) == (3, 4, 5)


@pytest.mark.parametrize("size", [0, 1, 63, 65, 128])
def test_a_header_is_64_bytes(size):
    with pytest.raises(HeaderError, match=f"64 bytes, got {size}") as caught:
        unpack_header(bytes(size))
    assert caught.value.fault is Fault.LOCAL


# ------------------------------------------------------------------------------------------ this side's mistakes


@pytest.mark.parametrize(
    "fields",
    [
        {"layer": 2**16},
        {"tensor": -1},
        {"length": 2**32},
        {"offset": 2**64},
        {"sequence": -1},
        {"flags": 2**16},
        {"checksum": 2**64},
        {"transfer": b"short"},
    ],
)
def test_packing_what_does_not_fit_is_a_local_error(fields):
    with pytest.raises(ProtocolError, match=r"out of range|16 bytes") as caught:
        pack_header(FrameType.DATA, **{"transfer": T} | fields)
    assert caught.value.fault is Fault.LOCAL


@pytest.mark.parametrize(
    ("type", "body", "kwargs", "text"),
    [
        (FrameType.DATA, None, {}, "no control frame"),
        (FrameType.CREDIT, {"x": 1}, {"transfer": T}, "has no body"),
        (FrameType.ACCEPT, None, {"transfer": T}, "needs a Accept or a mapping, got nothing"),
        (FrameType.ACCEPT, Ack(ranges=()), {"transfer": T}, "needs a Accept or a mapping, got a Ack"),
        (FrameType.ACCEPT, {"credit": 1}, {"transfer": T}, "chunk_bytes"),
        (FrameType.ACCEPT, {"credit": -1, "chunk_bytes": 1}, {"transfer": T}, "credit"),
        (FrameType.ACCEPT, {"credit": 1, "chunk_bytes": 1}, {}, "needs a transfer id"),
        (FrameType.ACCEPT, {"credit": 1, "chunk_bytes": 1}, {"transfer": T, "flags": Flag.FINAL}, "allows flags"),
        (FrameType.ACK, Ack(ranges=byte_ranges([(0, 0, 0, 1)])), {"transfer": T, "flags": Flag.FINAL}, "FINAL"),
        (FrameType.CALL, {"verb": "x", "args": {"a": object()}}, {}, "cannot be encoded"),
        (FrameType.CALL, Call(verb="x" * 65, args={}), {}, "verb"),
        (FrameType.CALL, Call(verb="x", args={"a": bytes(4 << 20)}), {}, "at most 4194304 bytes"),
    ],
)
def test_encoding_what_a_peer_would_refuse_is_a_local_error(type, body, kwargs, text):
    with pytest.raises(ProtocolError, match=text) as caught:
        encode_control(type, body, **kwargs)
    assert caught.value.fault is Fault.LOCAL


def test_a_mapping_with_an_unknown_key_travels():
    """A newer peer's extra key is no error to us, nor is ours to it."""
    raw = encode_control(FrameType.ACCEPT, {"credit": 5, "chunk_bytes": 6, "later": [1, {"x": 2}]}, transfer=T)
    assert decode_control(unpack_header(raw[:64]), raw[64:]) == Accept(credit=5, chunk_bytes=6)


def test_decode_control_verifies_and_refuses_data():
    raw = GOLDEN["accept"]
    header = unpack_header(raw[:64])
    with pytest.raises(IntegrityError):
        decode_control(header, raw[64:-1] + b"\x01")
    with pytest.raises(ProtocolError, match=r"announced \d+ payload bytes, got"):
        decode_control(header, raw[64:-1])
    with pytest.raises(ProtocolError, match="DATA has no body"):
        decode_control(unpack_header(GOLDEN["data"][:64]), GOLDEN["data"][64:])
    assert decode_control(unpack_header(GOLDEN["credit"]), b"") is None
    assert decode_control(unpack_header(PING), b"") is None


def test_no_checksum_data_is_passed_on_unverified_but_counted():
    raw = bytearray(GOLDEN["data_no_checksum"])
    raw[-1] ^= 0xFF
    (frame,) = FrameReader().feed(bytes(raw))
    assert frame.error is None
    assert frame.payload == bytes(raw[64:])
    with pytest.raises(ProtocolError, match="announced 512"):
        check_payload(frame.header, b"short")


# ------------------------------------------------------------------------------------------ truncation


def test_every_truncation_is_seen_at_the_end_and_not_before():
    raw = GOLDEN["ping"] + GOLDEN["data"] + GOLDEN["seal"]
    ends = {0, 64, 64 + len(GOLDEN["data"]), len(raw)}
    for cut in range(len(raw) + 1):
        reader = FrameReader()
        frames = reader.feed(raw[:cut])
        assert len(frames) == sum(end <= cut for end in ends if end)
        if cut in ends:
            reader.close()
            continue
        with pytest.raises(ProtocolError, match="the stream ended inside") as caught:
            reader.close()
        assert caught.value.fault is Fault.NETWORK


def test_a_frame_cut_short_takes_the_next_header_for_payload_and_is_void():
    """Nothing realigns a stream by luck: the frame after the cut is lost with it."""
    data = GOLDEN["data"]
    reader = FrameReader()
    frames = reader.feed(data[:-10] + PING + PING)
    assert [f.error is None for f in frames] == [False]
    with pytest.raises(KVError):
        reader.feed(b"")
    with pytest.raises(ProtocolError):
        reader.close()


def test_whole_golden_stream_in_order():
    reader = FrameReader()
    frames = reader.feed(STREAM)
    assert len(frames) == len(GOLDEN)
    assert all(f.error is None for f in frames)
    reader.close()


def test_the_reader_never_holds_more_than_one_frame():
    reader = FrameReader()
    raw = GOLDEN["data"]
    for _ in range(50):
        for at in range(0, len(raw), 37):
            reader.feed(raw[at : at + 37])
            assert reader.buffered < len(raw)
    assert reader.buffered == 0


def test_a_coded_payload_always_has_a_checksum():
    raw = pack_header(FrameType.DATA, transfer=T, flags=Flag.CODED | Flag.NO_CHECKSUM, length=1)
    with pytest.raises(ProtocolError, match="both NO_CHECKSUM and CODED"):
        unpack_header(raw)
