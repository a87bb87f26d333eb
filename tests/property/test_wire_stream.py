"""A stream means the same however it is cut, and whatever is written is read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransport.errors import IntegrityError, KVError, LimitError
from kvtransport.wire.bodies import (
    MAX_OFFSET,
    Accept,
    Ack,
    ByteRange,
    Call,
    Cancel,
    Error,
    Hello,
    Open,
    Reply,
    Resume,
    Seal,
)
from kvtransport.wire.frames import (
    DEFAULT_LIMITS,
    NO_TRANSFER,
    Flag,
    Frame,
    FrameType,
    decode_control,
    encode_control,
    encode_data,
    pack_header,
    unpack_header,
)
from kvtransport.wire.reader import FrameReader

GOLDEN = {
    name: bytes.fromhex(vector["hex"])
    for name, vector in json.loads(
        (Path(__file__).parents[1] / "wire" / "golden.json").read_text(encoding="utf-8")
    ).items()
}
STREAM = b"".join(GOLDEN.values())

u16 = st.integers(0, 2**16 - 1)
offsets = st.integers(0, MAX_OFFSET)
ids = st.binary(min_size=16, max_size=16).filter(lambda b: b != NO_TRANSFER)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=64)
words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=64)
positive = st.floats(min_value=1e-6, max_value=1e9)
scalars = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | texts | st.binary()
)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(texts, v, max_size=4), max_leaves=20)
trees = st.dictionaries(texts, values, max_size=4)


@st.composite
def byte_range(draw):
    start = draw(st.integers(0, MAX_OFFSET - 1))
    return ByteRange(draw(u16), draw(u16), start, draw(st.integers(start + 1, MAX_OFFSET)))


ranges = st.lists(byte_range(), max_size=20).map(tuple)
errors = st.builds(
    Error, code=words, message=texts, fault=st.sampled_from(["local", "remote", "network"]), retryable=st.booleans()
)
hellos = st.builds(
    lambda count, index, **k: Hello(count=count, index=index % count, **k),
    count=st.integers(1, 1024),
    index=u16,
    versions=st.lists(st.integers(1, 255), min_size=1, max_size=16).map(tuple),
    incarnation=st.binary(min_size=16, max_size=16),
    link=st.binary(min_size=16, max_size=16),
    role=st.sampled_from(["dial", "accept"]),
    name=texts,
    features=st.lists(words, max_size=8).map(tuple),
    token=st.none() | st.binary(min_size=1, max_size=1024),
    peer_incarnation=st.none() | st.binary(min_size=16, max_size=16),
    window_bytes=offsets,
    keepalive_s=positive,
)
opens = st.builds(
    Open.of,
    st.binary(min_size=1, max_size=300),
    deadline_s=positive,
    chunk_bytes=st.integers(1, 2**32 - 1),
    priority=st.integers(-(2**31), 2**31 - 1),
    checksum=st.sampled_from(["xxh3", "none"]),
)
controls = st.one_of(
    st.tuples(st.just(FrameType.HELLO), hellos, st.just(NO_TRANSFER)),
    st.tuples(st.just(FrameType.OPEN), opens, ids),
    st.tuples(st.just(FrameType.ACCEPT), st.builds(Accept, credit=offsets, chunk_bytes=st.integers(1, 2**32 - 1)), ids),
    st.tuples(st.just(FrameType.ACK), st.builds(Ack, ranges=ranges), ids),
    st.tuples(st.just(FrameType.CREDIT), st.none(), ids),
    st.tuples(
        st.just(FrameType.SEAL),
        st.builds(Seal, total_bytes=offsets, digest=st.binary(min_size=32, max_size=32), chunks=offsets),
        ids,
    ),
    st.tuples(st.just(FrameType.CANCEL), st.builds(Cancel, reason=texts), ids),
    st.tuples(st.just(FrameType.RESUME), st.builds(Resume, ranges=ranges), ids),
    st.tuples(st.just(FrameType.ERROR), errors, ids | st.just(NO_TRANSFER)),
    st.tuples(st.just(FrameType.PING), st.none(), st.just(NO_TRANSFER)),
    st.tuples(st.just(FrameType.CALL), st.builds(Call, verb=words, args=trees), st.just(NO_TRANSFER)),
    st.tuples(
        st.just(FrameType.REPLY),
        st.builds(lambda r: Reply(ok=True, result=r), trees) | st.builds(lambda e: Reply(ok=False, error=e), errors),
        st.just(NO_TRANSFER),
    ),
)


def parse(pieces: list[bytes]) -> tuple[list[Frame], type[KVError] | None]:
    """All frames of a stream that comes in these pieces, and the error that ends it."""
    reader = FrameReader()
    frames: list[Frame] = []
    try:
        for piece in pieces:
            frames += reader.feed(piece)
        reader.close()
    except KVError as exc:
        return frames, type(exc)
    return frames, None


def comparable(frames: list[Frame]) -> list[tuple[object, ...]]:
    return [(f.header, f.payload, f.error is None) for f in frames]


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_every_split_point_of_every_vector(name):
    raw = GOLDEN[name] + GOLDEN["ping"]
    whole = parse([raw])
    assert whole[1] is None
    for cut in range(len(raw) + 1):
        assert parse([raw[:cut], raw[cut:]]) == whole


def test_byte_by_byte():
    assert parse([bytes([b]) for b in STREAM]) == parse([STREAM])


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_cut_of_a_damaged_stream_gives_the_same_frames_and_the_same_error(data):
    raw = bytearray(b"".join(data.draw(st.lists(st.sampled_from(sorted(GOLDEN.values())), min_size=1, max_size=5))))
    for _ in range(data.draw(st.integers(0, 2))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    pieces = [bytes(raw[a:b]) for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    frames, error = parse([bytes(raw)])
    cut_frames, cut_error = parse(pieces)
    assert comparable(cut_frames) == comparable(frames)
    assert cut_error is error


@given(controls, st.integers(0, MAX_OFFSET))
@settings(max_examples=300, deadline=None)
def test_every_body_round_trips(control, offset):
    type, body, transfer = control
    raw = encode_control(type, body, transfer=transfer, offset=offset)
    (frame,) = FrameReader().feed(raw)
    assert (frame.header.type, frame.header.transfer, frame.header.offset) == (type, transfer, offset)
    assert decode_control(frame.header, frame.payload) == body


@given(
    payload=st.binary(min_size=1, max_size=500),
    transfer=ids,
    layer=u16,
    tensor=u16,
    offset=st.integers(0, MAX_OFFSET - 500),
    sequence=st.integers(0, 2**64 - 1),
    flags=st.sampled_from([0, Flag.RESEND, Flag.NO_CHECKSUM, Flag.RESEND | Flag.NO_CHECKSUM, Flag.URGENT]),
)
@settings(deadline=None)
def test_data_round_trips(payload, **fields):
    (frame,) = FrameReader().feed(encode_data(payload, **fields) + payload)
    assert frame.payload == payload
    assert frame.error is None
    assert {k: getattr(frame.header, k) for k in fields} == fields


@given(st.binary(max_size=400))
@settings(deadline=None)
def test_noise_is_an_error_and_nothing_else(noise):
    frames, error = parse([b"KVT1" + noise])
    assert frames == []
    assert error is not None


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_flip_anywhere_never_passes_for_the_frame_that_was_sent(data):
    raw = bytearray(data.draw(st.sampled_from([v for n, v in sorted(GOLDEN.items()) if n != "data_no_checksum"])))
    at = data.draw(st.integers(0, len(raw) * 8 - 1))
    raw[at // 8] ^= 1 << (at % 8)
    frames, error = parse([bytes(raw)])
    assert error is not None or [type(f.error) for f in frames] == [IntegrityError]


@given(st.sampled_from(list(FrameType)), st.integers(0, 5000) | st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_headers_round_trip_up_to_the_limit_and_are_refused_by_name_above(kind, length):
    scope = NO_TRANSFER if kind in (FrameType.HELLO, FrameType.PING) else b"t" * 16
    raw = pack_header(kind, transfer=scope, length=length, layer=1, tensor=2, sequence=3)
    if length > DEFAULT_LIMITS.by_type[kind] or (kind is FrameType.DATA and length == 0):
        with pytest.raises(LimitError, match=kind.name):
            unpack_header(raw)
        return
    header = unpack_header(raw)
    assert (header.type, header.length, header.layer, header.tensor, header.sequence) == (kind, length, 1, 2, 3)
