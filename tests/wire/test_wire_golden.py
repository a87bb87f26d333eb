"""Golden byte vectors: golden.json is the truth; other implementations (native framing) are held to the same file.

``python tests/wire/test_wire_golden.py`` rewrites the file from :func:`vectors`; a change of it is a change of
the protocol and needs a new version.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import msgpack
import msgspec
import pytest
import xxhash

from kvtransport.compression import decode
from kvtransport.errors import RefusedError
from kvtransport.wire.bodies import (
    Accept,
    Ack,
    Call,
    Cancel,
    Error,
    Hello,
    Open,
    Reply,
    Resume,
    Seal,
    byte_ranges,
)
from kvtransport.wire.frames import (
    Flag,
    FrameType,
    data_seed,
    decode_control,
    encode_control,
    encode_data,
    pack_header,
    payload_checksum,
    seal_header,
    unpack_header,
)
from kvtransport.wire.reader import FrameReader

GOLDEN = Path(__file__).with_name("golden.json")
TRANSFER = bytes(range(16))
MANIFEST = b"a manifest, opaque to the wire"
DIALER, ACCEPTOR, LINK = b"D" * 16, b"A" * 16, b"L" * 16

RAW = bytes(range(0x30, 0x50))
ELEMENTS = [(x << 1 | x >> 15) & 0xFFFF for (x,) in struct.iter_unpack("<H", RAW)]
"""Turned left by one bit."""
CODED = struct.pack("<BBHIIQ", 1, 1, 0, len(RAW), 18, xxhash.xxh3_64_intdigest(RAW)) + (
    b"\xf0\x01" + bytes(e >> 8 for e in ELEMENTS) + bytes(e & 0xFF for e in ELEMENTS)
)
"""By hand: an lz4 block of 16 literals, then the lower bytes."""


def vectors() -> dict[str, bytes]:
    """One frame per name; every frame type, and every flag that changes meaning."""
    data = bytes(range(256)) * 2
    ranges = byte_ranges([(0, 0, 0, 524288), (61, 3, 2**40, 2**40 + 1)])

    def control(type: FrameType, body: object = None, **kwargs: object) -> bytes:
        return encode_control(type, body, transfer=TRANSFER, **kwargs)

    def chunk(payload: bytes, **kwargs: int) -> bytes:
        return encode_data(payload, transfer=TRANSFER, layer=7, tensor=2, offset=1048576, **kwargs) + payload

    return {
        "hello_dial": encode_control(
            FrameType.HELLO,
            Hello(
                versions=(1,),
                incarnation=DIALER,
                link=LINK,
                index=0,
                count=8,
                role="dial",
                name="prefill-0",
                features=("resume",),
                token=b"secret",
                window_bytes=67108864,
                keepalive_s=10.0,
            ),
        ),
        "hello_accept": encode_control(
            FrameType.HELLO,
            Hello(
                versions=(1,), incarnation=ACCEPTOR, link=LINK, index=0, count=8, role="accept", peer_incarnation=DIALER
            ),
        ),
        "hello_advertised": encode_control(
            FrameType.HELLO,
            Hello(
                versions=(1,),
                incarnation=DIALER,
                link=LINK,
                index=0,
                count=1,
                role="dial",
                address="[fd00::7]:7777",
                address_incarnation=b"N" * 16,
            ),
        ),
        "open": control(
            FrameType.OPEN, Open.of(MANIFEST, deadline_s=30.0, chunk_bytes=524288, priority=-1, checksum="xxh3")
        ),
        "open_whole": control(FrameType.OPEN, Open.of(MANIFEST, deadline_s=30.0, chunk_bytes=524288, whole=data)),
        "accept": control(FrameType.ACCEPT, Accept(credit=67108864, chunk_bytes=524288)),
        "data": chunk(data),
        "data_takeover": chunk(data, sequence=3, flags=Flag.RESEND),
        "data_no_checksum": chunk(data, flags=Flag.NO_CHECKSUM),
        "data_coded": chunk(CODED, flags=Flag.CODED),
        "ack": control(FrameType.ACK, Ack(ranges=ranges)),
        "ack_final": control(FrameType.ACK, Ack(ranges=()), flags=Flag.FINAL),
        "credit": control(FrameType.CREDIT, offset=2**33 + 5),
        "seal": control(FrameType.SEAL, Seal(total_bytes=512, digest=hashlib.sha256(MANIFEST).digest(), chunks=1)),
        "cancel": control(FrameType.CANCEL, Cancel(reason="request aborted by the client")),
        "resume": control(FrameType.RESUME, Resume(ranges=ranges)),
        "error_transfer": control(FrameType.ERROR, Error.of(RefusedError("no destination for this request"))),
        "error_connection": encode_control(FrameType.ERROR, Error.of(RefusedError("wrong token"))),
        "ping": encode_control(FrameType.PING, offset=0x1122334455667788),
        "pong": encode_control(FrameType.PING, offset=0x1122334455667788, flags=Flag.REPLY),
        "call": encode_control(FrameType.CALL, Call(verb="match", args={"keys": [b"\x01" * 32], "n": 1}), offset=9),
        "reply_ok": encode_control(FrameType.REPLY, Reply(ok=True, result={"length": 4096}), offset=9),
        "reply_error": encode_control(
            FrameType.REPLY, Reply(ok=False, error=Error.of(RefusedError("over quota"))), offset=9
        ),
    }


def describe(frame: bytes) -> dict[str, object]:
    header = unpack_header(frame[:64])
    fields = header._asdict() | {"type": header.type.name, "transfer": header.transfer.hex()}
    for wide in ("checksum", "check"):
        fields[wide] = f"{fields[wide]:016x}"
    return {"header": fields, "hex": frame.hex()}


def load() -> dict[str, dict[str, object]]:
    return json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("name", sorted(load()))
def test_this_version_still_writes_the_golden_bytes(name):
    assert vectors()[name].hex() == load()[name]["hex"]


def test_every_vector_is_in_the_file_and_every_type_has_one():
    assert set(vectors()) == set(load())
    assert {v["header"]["type"] for v in load().values()} == {t.name for t in FrameType}


@pytest.mark.parametrize("name", sorted(load()))
def test_reader_gives_the_described_header(name):
    vector = load()[name]
    raw = bytes.fromhex(vector["hex"])
    (frame,) = FrameReader().feed(raw)
    assert frame.error is None
    assert frame.payload == raw[64:]
    assert describe(raw)["header"] == vector["header"]


@pytest.mark.parametrize("name", sorted(load()))
def test_field_offsets_by_hand(name):
    """The layout of docs/wire-format.md spelled out with no code of the package."""
    vector = load()[name]
    raw = bytes.fromhex(vector["hex"])
    expected = vector["header"]

    def u(start: int, size: int) -> int:
        return int.from_bytes(raw[start : start + size], "little")

    assert raw[:4] == b"KVT1"
    assert raw[4] == 1
    assert raw[5] == FrameType[expected["type"]]
    assert u(6, 2) == expected["flags"]
    assert raw[8:24].hex() == expected["transfer"]
    assert (u(24, 2), u(26, 2), u(28, 4)) == (expected["layer"], expected["tensor"], expected["length"])
    assert (u(32, 8), u(40, 8)) == (expected["offset"], expected["sequence"])
    assert u(48, 8) == int(expected["checksum"], 16)
    assert u(56, 8) == int(expected["check"], 16) == xxhash.xxh3_64_intdigest(raw[:48], 0)
    if name == "data_no_checksum":
        assert u(48, 8) == 0
    else:
        assert u(48, 8) == xxhash.xxh3_64_intdigest(raw[64:], u(56, 8))


@pytest.mark.parametrize("name", [n for n, v in sorted(load().items()) if v["header"]["length"] and "data" not in n])
def test_control_bodies_are_msgpack_maps_with_string_keys(name):
    raw = bytes.fromhex(load()[name]["hex"])
    body = msgpack.unpackb(raw[64:], raw=False, strict_map_key=True)
    assert isinstance(body, dict)
    assert all(isinstance(key, str) for key in body)
    typed = decode_control(unpack_header(raw[:64]), raw[64:])
    # A key that came later is not written where it is not set: earlier frames keep their bytes.
    assert set(body) == {f for f in typed.__struct_fields__ if getattr(typed, f) is not msgspec.UNSET}


def test_sender_order_of_packing():
    """Pack, hash with the seed, seal: the way native senders do it gives the golden DATA frame."""
    raw = bytes.fromhex(load()["data"]["hex"])
    packed = pack_header(FrameType.DATA, transfer=TRANSFER, layer=7, tensor=2, length=len(raw) - 64, offset=1048576)
    sealed = seal_header(packed, payload_checksum(raw[64:], data_seed(packed)))
    assert sealed == raw[:64]
    assert data_seed(sealed) == data_seed(packed) == unpack_header(sealed).check


def test_the_coded_payload_is_what_the_package_decodes():
    raw = bytes.fromhex(load()["data_coded"]["hex"])
    assert decode(raw[64:]) == RAW


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({n: describe(f) for n, f in vectors().items()}, indent=1) + "\n")
