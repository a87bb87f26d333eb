"""The native I/O engine against the reference of ``wire/``, over socket pairs and without asyncio."""

from __future__ import annotations

import gc
import os
import random
import select
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from kvtransport import _native
from kvtransport.buffers import PageList
from kvtransport.errors import KVError
from kvtransport.wire import bodies
from kvtransport.wire.frames import (
    DEFAULT_LIMITS,
    HEADER_BYTES,
    Flag,
    FrameType,
    data_seed,
    encode_control,
    encode_data,
    pack_header,
    seal_header,
    unpack_header,
)
from kvtransport.wire.reader import FrameReader

ROOT = Path(__file__).resolve().parents[2]
LIMITS = DEFAULT_LIMITS.by_type
CONTROL, LOST, BAD, STRAY, ODD, CORRUPT, APPLIED, ACKED = range(8)
SLOT, BOUNDS, UNCHECKED, OVERLAP, RANGES, CREDIT = range(6)
T = bytes(range(16))
MIB = 1 << 20

pytestmark = pytest.mark.skipif(not hasattr(_native, "Engine"), reason="the engine is built on Linux only")


class End:
    """One connection of an engine, and the other end of it as a plain socket with the reference parser."""

    def __init__(self, engine, group, tag=1):
        mine, self.sock = socket.socketpair()
        mine.setblocking(False)
        self.conn = engine.adopt(mine.detach(), LIMITS, tag)
        if group is not None:
            self.conn.join(group)
        self.reader = FrameReader()

    def say(self, data):
        self.sock.sendall(data)

    def frames(self, count, timeout=5.0):
        got = []
        self.sock.settimeout(timeout)
        while len(got) < count:
            data = self.sock.recv(1 << 20)
            assert data, "the engine ended the stream"
            got += self.reader.feed(data)
        return got

    def silent(self, for_s=0.05):
        self.sock.settimeout(for_s)
        with pytest.raises(TimeoutError):
            self.sock.recv(1)


def local_end(engine, group):
    """An :class:`End` over TCP on loopback: a path whose round trip the kernel knows."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        mine, _ = server.accept()
    mine.setblocking(False)
    end = End.__new__(End)
    end.sock, end.reader = theirs, FrameReader()
    end.conn = engine.adopt(mine.detach(), LIMITS, 1)
    end.conn.join(group)
    return end


@pytest.fixture
def engine():
    engine = _native.Engine(2)
    yield engine
    engine.stop()


@pytest.fixture
def group(engine):
    return engine.group()


def events(engine, until, timeout=5.0):
    """Drain until ``until(all so far)``."""
    got = []
    deadline = time.monotonic() + timeout
    while not until(got):
        ready, _, _ = select.select([engine.fileno()], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"nothing more happened; so far: {got}"
        got += engine.drain()
    return got


def one_event(engine):
    [event] = events(engine, bool)
    return event


def data(payload, offset=0, layer=0, tensor=0, **rest):
    return encode_data(payload, transfer=T, layer=layer, tensor=tensor, offset=offset, **rest) + payload


def incoming(group, memory, *, tag=7, window=64 * MIB, unchecked=False, eager=True, nbytes=None, pieces=None):
    total = len(memory) if nbytes is None else nbytes
    slots = [(0, 0, total, memory, pieces)]
    return group.incoming(T, slots, tag, total, window, min(total, window), unchecked, eager)


def outgoing(group, *, tag=8, slots=((0, 0),), checksum=True, priority=0, transfer=T, chunk=MIB, credit=1 << 40):
    out = group.outgoing(transfer, list(slots), tag, priority, checksum)
    if chunk:
        out.accept(chunk, credit)
    return out


def ack(*ranges, transfer=T):
    return encode_control(FrameType.ACK, bodies.Ack(ranges=bodies.byte_ranges(list(ranges))), transfer=transfer)


# ---- what a page list may be, and when Python hears ----------------------------------------------------


@pytest.mark.parametrize("piece", [(-1, 4), (0, 17), (16, 1), (17, 0), (1 << 62, 1 << 62), (0, -1)])
def test_one_piece_has_to_fit_its_base(group, piece):
    out = outgoing(group)
    with pytest.raises(ValueError, match=r"does not fit a base of 16 bytes"):
        out.add(0, 0, 0, bytes(16), piece)
    with pytest.raises(ValueError, match=r"does not fit a base of 16 bytes"):
        incoming(group, bytearray(16), pieces=piece)
    with pytest.raises((TypeError, OverflowError)):
        out.add(0, 0, 0, bytes(16), (0, 1, 2))
    with pytest.raises((TypeError, OverflowError)):
        out.add(0, 0, 0, bytes(16), (0, 1 << 64))
    with pytest.raises(BufferError):
        incoming(group, bytes(16), pieces=(0, 16))


def test_one_piece_is_where_it_says(engine, group):
    """Sent from the middle of a buffer, received into the middle of another, nothing beside it touched."""
    source, place = random.Random(2).randbytes(300), bytearray(300)
    end = End(engine, group)
    out = outgoing(group)
    out.add(0, 0, 0, source, (100, 70))
    [frame] = end.frames(1)
    assert frame.payload == source[100:170]
    into = incoming(group, place, nbytes=70, pieces=(30, 70))
    end.say(data(frame.payload))
    events(engine, lambda e: APPLIED in [x[0] for x in e])
    assert place == bytes(30) + source[100:170] + bytes(200)
    into.close()
    out.close()


@pytest.mark.parametrize("sent", [1, 37, 399, 400])
def test_whole_extents_are_told_though_nothing_follows(engine, group, sent):
    """Python is not woken for each of a burst; the last of it is told when there is nothing more to do, all over or not."""
    count = 400
    memory = bytearray(count * 64)
    slots = [(i // 64, i % 64, 64, memory, (64 * i, 64)) for i in range(count)]
    into = group.incoming(T, slots, 7, len(memory), 64 * MIB, len(memory), False, False)
    payload = bytes(range(64))
    end = End(engine, group)
    end.say(b"".join(data(payload, layer=i // 64, tensor=i % 64) for i in range(sent)))
    told = events(engine, lambda got: sum(len(event[2]) for event in got) == sent)
    assert {event[0] for event in told} == {APPLIED}
    assert {(a, b) for event in told for a, b, *_ in event[2]} == {(i // 64, i % 64) for i in range(sent)}
    assert memory == payload * sent + bytes(64 * (count - sent))
    into.close()


# ---- framing, against the reference -------------------------------------------------------------------


def samples():
    text = "x" * 40
    return [
        encode_control(FrameType.PING, offset=77),
        encode_control(FrameType.CREDIT, transfer=T, offset=1 << 40),
        encode_control(FrameType.CANCEL, bodies.Cancel(reason=text), transfer=T),
        encode_control(FrameType.CALL, bodies.Call(verb="v", args={"a": text}), offset=3),
        encode_control(FrameType.ACCEPT, bodies.Accept(credit=5, chunk_bytes=6), transfer=T),
        ack((0, 0, 0, 300), (1, 2, 70_000, 1 << 33)),
    ]


@pytest.mark.parametrize("frame", samples(), ids=lambda f: FrameType(f[5]).name)
def test_control_frames_go_up_whole(engine, frame):
    end = End(engine, None)
    for i in range(0, len(frame), 7):  # however they are cut
        end.say(frame[i : i + 7])
    kind, tag, _, head, payload = one_event(engine)
    assert (kind, tag, head + payload) == (CONTROL, 1, frame)


def test_header_checks_are_the_references(engine):
    """Random damage, with the header check made right again in most cases: accepted by both or by none."""
    rng = random.Random(1)
    heads = [f[:HEADER_BYTES] for f in [*samples(), data(b"z" * 100), data(b"z", flags=Flag.NO_CHECKSUM)]]
    accepted = 0
    for _ in range(1500):
        head = bytearray(rng.choice(heads))
        for _ in range(rng.randint(0, 2)):
            at = rng.choice([4, 5, 6, 7, *range(8, 24), 28, 29, 30, 31, 32, 39, 40, 50, 60])
            head[at] = rng.choice([0, 1, 2, 4, 8, 16, 255, rng.randrange(256)])
        if rng.random() < 0.2:
            head[8:24] = bytes(16)
        if rng.random() < 0.9:
            head[56:] = pack_header_check(bytes(head))
        try:
            expected = unpack_header(bytes(head))
        except KVError:
            expected = None
        end = End(engine, None)
        end.say(bytes(head) if expected is None else bytes(head) + bytes(min(expected.length, 64)))
        if expected is not None and expected.type is not FrameType.DATA and expected.length > 64:
            end.sock.close()  # waits for a body: the end inside it is what is told
        kind, _, _, told_head, told = one_event(engine)
        if expected is None:
            assert (kind, told) == (BAD, bytes(head))
        else:
            accepted += 1
            assert kind in (CONTROL, STRAY, LOST) or (kind == BAD and told == bytes(head))
            assert kind != STRAY or (expected.type is FrameType.DATA and told_head == bytes(head))
        end.conn.close()
    assert 100 < accepted < 1400


def pack_header_check(head):
    import xxhash

    return xxhash.xxh3_64_intdigest(head[:48]).to_bytes(8, "little")


def test_a_stranger_is_known_by_four_bytes(engine):
    end = End(engine, None)
    end.say(b"GET / HT")
    kind, _, _, _, told = one_event(engine)
    assert (kind, told[:4]) == (BAD, b"GET ")


def test_damaged_control_body_is_told(engine):
    frame = bytearray(encode_control(FrameType.CANCEL, bodies.Cancel(reason="why"), transfer=T))
    frame[-1] ^= 1
    end = End(engine, None)
    end.say(frame)
    kind, _, detail, _, told = one_event(engine)
    assert (kind, detail, told) == (BAD, 1, bytes(frame[:HEADER_BYTES]))


def test_ends_of_a_stream(engine):
    clean, inside = End(engine, None, 1), End(engine, None, 2)
    clean.sock.close()
    inside.say(b"KVT1")
    inside.sock.close()
    got = {e[1]: e[2] >> 16 for e in events(engine, lambda e: len(e) == 2)}
    assert got == {1: 0, 2: 1}


def test_frames_python_does_not_take_pause_the_connection(engine):
    end = End(engine, None)
    frame = encode_control(FrameType.CALL, bodies.Call(verb="v", args={"a": b"x" * (1 << 20)}), offset=3)
    end.sock.setblocking(False)
    sent, deadline = 0, time.monotonic() + 1.0
    while time.monotonic() < deadline and sent < 40 * len(frame):
        try:
            sent += end.sock.send(frame[sent % len(frame) :])
        except BlockingIOError:
            time.sleep(0.01)
    assert sent < 20 * len(frame)
    whole = events(engine, lambda e: len(e) >= sent // len(frame))
    assert all(e[0] == CONTROL for e in whole)


# ---- sending --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checksum", [True, False], ids=["xxh3", "unchecked"])
def test_chunks_are_frames_of_the_reference(engine, group, checksum):
    end = End(engine, group)
    source = random.Random(2).randbytes(300_000)
    pages = PageList(source, [(200_000, 70_001), (0, 130_000), (270_001, 29_999)])
    out = outgoing(group, checksum=checksum, chunk=100_000)
    key = out.add(0, 0, 5_000, pages.base, pages.pieces)
    frames = end.frames(2)  # 230,000 bytes: one chunk, then what is left
    frames += end.frames(1) if sum(f.header.length for f in frames) < 230_000 else []
    assert [f.error for f in frames] == [None] * len(frames)
    assert b"".join(f.payload for f in frames) == pages.tobytes()
    assert [f.header.offset for f in frames] == [5_000, 105_000, 170_000][: len(frames)]
    assert all(bool(f.header.flags & Flag.NO_CHECKSUM) != checksum for f in frames)
    end.say(ack((0, 0, 5_000, 150_000)))  # covers the first chunk only
    end.say(ack((0, 0, 105_000, 235_000)))
    told = events(engine, bool)
    assert [e[0] for e in told] == [ACKED]
    assert told[0][3] == [key]
    assert sum(n for e in told for _, _, n in e[2]) == 230_000
    assert out.stats()[:3] == (len(frames), 230_000, 0)


def test_nothing_is_sent_before_accept_or_beyond_credit(engine, group):
    end = End(engine, group)
    out = outgoing(group, chunk=0)
    source = bytes(MIB)
    out.add(0, 0, 0, source, None)
    end.silent()
    out.accept(4096, 4096)
    assert end.frames(1)[0].header.length == 4096
    end.silent()
    assert out.stats()[5] > 0  # seconds without credit
    end.say(encode_control(FrameType.CREDIT, transfer=T, offset=8192))
    assert end.frames(1)[0].header.offset == 4096
    end.say(encode_control(FrameType.CREDIT, transfer=T, offset=4096))  # an old one
    end.silent()


def test_priorities_and_turns(engine, group):
    names = [bytes([i]) * 16 for i in range(1, 4)]
    outs = [outgoing(group, transfer=n, priority=p, chunk=1000) for n, p in zip(names, (0, 0, 5), strict=True)]
    for out in outs:
        out.add(0, 0, 0, bytes(3000), None)
    end = End(engine, group)
    order = [names.index(f.header.transfer) for f in end.frames(9)]
    assert order[:3] == [2, 2, 2]
    assert sorted(order[3:5]) == sorted(order[5:7]) == [0, 1]


def test_ack_and_credit_that_are_odd_go_up(engine, group):
    end = End(engine, group)
    out = outgoing(group)
    out.add(0, 0, 0, bytes(1000), None)
    end.frames(1)
    odd = [
        ack((9, 9, 0, 1)),  # not in the manifest
        ack((0, 0, 0, 1000), transfer=b"?" * 16),
        encode_control(FrameType.ACK, bodies.Ack(ranges=()), transfer=T, flags=Flag.FINAL),
    ]
    body = b"\x81\xa6ranges\x91\x94\x00\x00\x05"  # cut short
    head = pack_header(FrameType.ACK, transfer=T, length=len(body))
    import xxhash

    odd.append(seal_header(head, xxhash.xxh3_64_intdigest(body, data_seed(head))) + body)
    for frame in odd:
        end.say(frame)
    told = events(engine, lambda e: len(e) == len(odd))
    assert [e[3] + e[4] for e in told] == odd
    assert out.stats()[3] == 1000


def test_resend_and_requeue_count_attempts(engine, group):
    end = End(engine, group)
    out = outgoing(group, chunk=1000)
    out.add(0, 0, 0, bytes(2000), None)
    end.frames(2)
    assert out.resend(0, 0, 1500, 1600) == 1000
    [frame] = end.frames(1)
    assert (frame.header.offset, frame.header.sequence) == (1000, 1)
    assert frame.header.flags & Flag.RESEND
    assert out.requeue(end.conn.serial) == 2000
    assert sorted((f.header.offset, f.header.sequence) for f in end.frames(2)) == [(0, 1), (1000, 2)]
    assert out.requeue(12345) == 0
    out.ack(0, 0, 0, 2000)
    assert out.stats()[3] == 0
    assert out.requeue(end.conn.serial) == 0


def half_sent(engine, group, checksum=True):
    """A transfer with a frame that the peer does not take to its end."""
    end = End(engine, group)
    source = bytearray(b"\x5a" * (8 * MIB))
    out = outgoing(group, checksum=checksum, chunk=8 * MIB)
    key = out.add(0, 0, 0, source, None)
    deadline = time.monotonic() + 5
    while not (end.conn.stats()[4] and end.conn.stats()[0] > HEADER_BYTES):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(0.02)
    return end, source, out, key


def test_closing_voids_a_half_sent_frame(engine, group):
    end, source, out, _ = half_sent(engine, group)
    out.close()
    source[:] = bytes(len(source))  # the caller's again
    del source[:]  # and not exported any more
    [frame] = end.frames(1)
    assert frame.error is not None
    end.conn.send(encode_control(FrameType.PING, offset=1))
    assert end.frames(1)[0].header.type is FrameType.PING  # the stream is in step


def test_closing_resets_where_nothing_would_void(engine, group):
    end, source, out, _ = half_sent(engine, group, checksum=False)
    out.close()
    del source[:]
    kind, _, detail, *_ = one_event(engine)
    assert (kind, detail >> 16) == (LOST, 3)
    end.conn.close(True)


def test_swapped_source_goes_on_elsewhere(engine, group):
    end, source, out, _ = half_sent(engine, group)
    assert out.swap(0, 0, 0, bytes(source), None)
    engine.drain()
    source[:] = bytes(len(source))
    [frame] = end.frames(1)
    assert frame.error is None
    assert frame.payload == b"\x5a" * (8 * MIB)
    with pytest.raises(ValueError):
        out.swap(0, 0, 0, b"short", None)
    assert out.swap(0, 0, 1, b"x", None) is False


def test_work_goes_to_whoever_can_send(engine, group):
    stuck, open_ = End(engine, group, 1), End(engine, group, 2)
    out = outgoing(group, chunk=MIB)
    out.add(0, 0, 0, bytes(64 * MIB), None)
    got = open_.frames(60)  # all but what the stuck one has in its buffers
    assert len({f.header.offset for f in got}) == 60
    assert stuck.conn.stats()[0] < 3 * MIB


# ---- receiving ------------------------------------------------------------------------------------------


def test_data_goes_to_its_place_and_is_acknowledged(engine, group):
    end = End(engine, group)
    memory = bytearray(400)
    pages = PageList(memory, [(300, 100), (0, 200)])
    into = incoming(group, memory, nbytes=300, pieces=pages.pieces)
    payload = random.Random(3).randbytes(300)
    end.say(data(payload[:120]) + data(payload[120:], offset=120))
    told = events(engine, lambda e: sum(r[3] - r[2] for x in e for r in x[2]) == 300)
    assert {e[0] for e in told} == {APPLIED}
    assert pages.tobytes() == payload
    acks = end.frames(1)
    assert acks[0].header.type is FrameType.ACK
    assert into.applied() == [(0, 0, 0, 300)]
    assert into.stats() == (2, 2, 0, 300, 300)


def test_acks_and_credit_are_the_references(engine, group):
    end = End(engine, group)
    into = incoming(group, bytearray(1 << 20), window=64 << 10)  # noqa: F841  lives as long as it is expected
    for i in range(0, 16 << 12, 8 << 12):  # every other page
        end.say(data(bytes(4096), offset=i))
    deadline = time.monotonic() + 5
    raw = b""
    end.sock.settimeout(0.2)
    while time.monotonic() < deadline:
        try:
            raw += end.sock.recv(1 << 16)
        except TimeoutError:
            break
    frames = FrameReader().feed(raw)
    ranges = []
    for frame in frames:
        body = None
        if frame.header.type is FrameType.ACK:
            body = bodies.decode_body(bodies.Ack, frame.payload)
            ranges += [tuple(r) for r in body.ranges]
        again = encode_control(frame.header.type, body, transfer=T, offset=frame.header.offset)
        assert again in raw
    assert ranges == [(0, 0, 0, 4096), (0, 0, 32768, 36864)]


def test_credit_moves_with_what_is_applied(engine, group):
    end = End(engine, group)
    into = incoming(group, bytearray(1 << 20), window=1 << 16)  # noqa: F841  lives as long as it is expected
    end.say(data(bytes(1 << 14)) + data(bytes(1 << 14), offset=1 << 14))
    credits = [f.header.offset for f in end.frames(3) if f.header.type is FrameType.CREDIT]
    assert credits[-1] in ((1 << 16) + (1 << 14), (1 << 16) + (1 << 15))


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (data(b"x", layer=3), SLOT),
        (data(b"x" * 10, offset=995), BOUNDS),
        (data(b"x", flags=Flag.NO_CHECKSUM), UNCHECKED),
        (data(b"x" * 100, offset=50), OVERLAP),
    ],
    ids=["slot", "bounds", "unchecked", "overlap"],
)
def test_odd_data_is_drained_and_told(engine, group, frame, reason):
    end = End(engine, group)
    memory = bytearray(1000)
    into = incoming(group, memory)  # noqa: F841  lives as long as it is expected
    end.say(data(b"y" * 100))
    events(engine, lambda e: any(x[0] == APPLIED for x in e))
    end.say(frame)
    kind, tag, detail, head, _ = one_event(engine)
    assert (kind, tag, detail, head) == (ODD, 7, reason, frame[:HEADER_BYTES])
    assert memory == b"y" * 100 + bytes(900)
    end.say(data(b"z" * 100, offset=100))  # the stream is in step
    events(engine, lambda e: any(x[0] == APPLIED for x in e))


def test_data_beyond_the_credit_is_drained_and_told(engine, group):
    first, second = End(engine, group, 1), End(engine, group, 2)
    memory = bytearray(1000)
    into = incoming(group, memory, window=300)
    half = data(b"a" * 200)
    first.say(half[:100])  # claimed, and not applied
    deadline = time.monotonic() + 5
    while first.conn.stats()[1] < 100:
        assert time.monotonic() < deadline
    beyond = data(b"b" * 101, offset=200)
    second.say(beyond)
    kind, tag, detail, head, _ = one_event(engine)
    assert (kind, tag, detail, head) == (ODD, 7, CREDIT, beyond[:HEADER_BYTES])
    second.say(data(b"c" * 100, offset=200))  # exactly what is left
    events(engine, lambda e: any(x[0] == APPLIED for x in e))
    first.say(half[100:])
    events(engine, lambda e: any(x[0] == APPLIED for x in e))
    assert memory == b"a" * 200 + b"c" * 100 + bytes(700)
    assert into.stats()[4] == 600  # credit has moved: what was refused may come now
    second.say(data(b"d" * 300, offset=300, sequence=1))
    assert one_event(engine)[0] == APPLIED
    into.close()


def test_a_local_path_holds_a_few_mib_that_are_not_acknowledged(engine, group):
    end = local_end(engine, group)
    bulk = outgoing(group)
    bulk.add(0, 0, 0, bytes(8 * MIB), None)
    assert [f.header.offset for f in end.frames(4)] == [0, MIB, 2 * MIB, 3 * MIB]
    end.silent()
    urgent = outgoing(group, transfer=bytes(range(1, 17)), tag=9, priority=1)
    urgent.add(0, 0, 0, bytes(2 * MIB), None)
    assert [f.header.transfer[0] for f in end.frames(2)] == [1, 1]  # does not wait for the bulk's acknowledgements
    end.silent()
    end.say(ack((0, 0, 0, MIB)))
    end.silent()  # six were on their way
    end.say(ack((0, 0, MIB, 3 * MIB)))
    assert [f.header.offset for f in end.frames(1)] == [4 * MIB]
    urgent.close()  # nothing will acknowledge it any more
    assert [f.header.offset for f in end.frames(2)] == [5 * MIB, 6 * MIB]
    bulk.close()


def test_corrupt_and_stray_data(engine, group):
    end = End(engine, group)
    memory = bytearray(1000)
    into = incoming(group, memory)
    bad = bytearray(data(b"y" * 1000))
    bad[-1] ^= 1
    end.say(bad)
    assert one_event(engine)[:2] == (CORRUPT, 7)
    end.say(data(b"z" * 1000, sequence=1))
    assert one_event(engine)[0] == APPLIED
    assert memory == b"z" * 1000
    into.close()
    end.say(data(b"w" * 1000))
    kind, tag, _, head, _ = one_event(engine)
    assert (kind, tag, unpack_header(head).transfer) == (STRAY, 1, T)
    assert memory == b"z" * 1000


def test_a_duplicate_is_acknowledged_again_and_not_written(engine, group):
    end = End(engine, group)
    memory = bytearray(1000)
    into = incoming(group, memory)
    end.say(data(b"y" * 1000))
    end.frames(1)
    memory[:] = b"m" * 1000
    end.say(data(b"y" * 1000, sequence=1))
    [again] = end.frames(1)
    assert [tuple(r) for r in bodies.decode_body(bodies.Ack, again.payload).ranges] == [(0, 0, 0, 1000)]
    assert memory == b"m" * 1000
    assert into.stats()[2] == 1000


def test_claims_first_header_wins_until_a_later_attempt(engine, group):
    first, same, later = (End(engine, group, i) for i in (1, 2, 3))
    memory = bytearray(1000)
    into = incoming(group, memory)
    frame = data(b"a" * 1000)
    first.say(frame[: HEADER_BYTES + 500])
    wait_for(lambda: memory[499] == ord("a"))
    same.say(data(b"b" * 1000))
    wait_for(lambda: into.stats()[2] == 1000)
    assert memory[:500] == b"a" * 500
    taken = data(b"c" * 1000, sequence=1)
    later.say(taken[: HEADER_BYTES + 100])
    wait_for(lambda: memory[99] == ord("c"))
    first.say(frame[HEADER_BYTES + 500 :])  # voided: it drains, and says nothing
    time.sleep(0.02)
    assert memory[500:] == bytes(500)
    later.say(taken[HEADER_BYTES + 100 :])
    told = events(engine, lambda e: any(x[0] == APPLIED for x in e))
    assert {e[0] for e in told} == {APPLIED}
    assert memory == b"c" * 1000


def test_no_byte_after_close(engine, group):
    end = End(engine, group)
    memory = bytearray(1000)
    into = incoming(group, memory)
    frame = data(b"a" * 1000)
    end.say(frame[: HEADER_BYTES + 500])
    wait_for(lambda: memory[499] == ord("a"))
    into.close()
    memory[:] = bytes(1000)
    end.say(frame[HEADER_BYTES + 500 :])
    end.say(encode_control(FrameType.PING))
    assert one_event(engine)[0] == CONTROL
    assert memory == bytes(1000)
    del into
    del memory[:]  # not exported any more


def test_a_lost_connection_lets_go_of_its_claim(engine, group):
    gone, other = End(engine, group, 1), End(engine, group, 2)
    memory = bytearray(1000)
    into = incoming(group, memory)  # noqa: F841  lives as long as it is expected
    gone.say(data(b"a" * 1000)[:500])
    wait_for(lambda: memory[400] == ord("a"))
    gone.sock.close()
    assert one_event(engine)[:2] == (LOST, 1)
    other.say(data(b"b" * 1000))
    assert one_event(engine)[0] == APPLIED
    assert memory == b"b" * 1000


def test_too_many_separate_ranges_are_told(engine, group):
    end = End(engine, group)
    into = incoming(group, bytearray(20_000))  # noqa: F841  lives as long as it is expected
    threading.Thread(target=lambda: [end.say(data(b"x", offset=2 * i)) for i in range(4200)], daemon=True).start()
    told = events(engine, lambda e: any(x[0] == ODD for x in e), 20)
    assert next(e[2] for e in told if e[0] == ODD) == RANGES


def wait_for(condition, timeout=5.0):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.001)


# ---- life and death -------------------------------------------------------------------------------------


def test_finish_says_the_last_word_and_ends(engine):
    end = End(engine, None)
    end.conn.send(encode_control(FrameType.PING))
    end.conn.finish()
    assert end.frames(1)[0].header.type is FrameType.PING
    end.say(b"\0" * 100_000)  # thrown away
    assert end.sock.recv(1) == b""


def test_nothing_is_left_open(engine):
    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    before = None
    for _ in range(20):
        group = engine.group()
        ends = [End(engine, group) for _ in range(4)]
        out = outgoing(group)
        out.add(0, 0, 0, bytes(1 << 20), None)
        into = incoming(group, bytearray(1000))
        for end in ends:
            end.sock.close()
        del end, ends, out, into, group
        gc.collect()
        engine.drain()
        before = before or descriptors()
    assert descriptors() <= before


def test_buffers_are_released_with_their_transfer(engine, group):
    source, target = bytearray(1000), bytearray(1000)
    out = group.outgoing(T, [(0, 0)], 1, 0, True)
    out.add(0, 0, 0, source, None)
    into = group.incoming(T, [(0, 0, 1000, target, None)], 2, 1000, 1000, 1000, False, True)
    for buffer in (source, target):
        with pytest.raises(BufferError):
            del buffer[:]
    out.close()
    del source[:]
    del into
    del target[:]


def test_wrong_arguments(engine, group):
    with pytest.raises(ValueError, match="16 bytes"):
        group.outgoing(b"short", [(0, 0)], 1, 0, True)
    with pytest.raises(TypeError):
        group.outgoing(T, [0], 1, 0, True)
    with pytest.raises(ValueError, match="its pages hold"):
        group.incoming(T, [(0, 0, 11, bytearray(10), None)], 1, 10, 10, 10, False, False)
    with pytest.raises(BufferError):
        group.incoming(T, [(0, 0, 10, bytes(10), None)], 1, 10, 10, 10, False, False)
    out = outgoing(group)
    with pytest.raises(ValueError, match="already"):
        outgoing(group)
    with pytest.raises(KeyError):
        out.add(1, 0, 0, b"x", None)
    with pytest.raises(TypeError):
        engine.adopt(0, (1, 2), 1)
    other = _native.Engine(1)
    end = End(engine, None)
    with pytest.raises(TypeError, match="its own engine"):
        end.conn.join(other.group())


def test_a_forked_child_leaves_the_engine_alone():
    code = """
        import os, socket, gc, sys
        from kvtransport import _native
        from kvtransport.wire.frames import DEFAULT_LIMITS
        engine = _native.Engine(2)
        a, b = socket.socketpair(); a.setblocking(False)
        group = engine.group(); conn = engine.adopt(a.detach(), DEFAULT_LIMITS.by_type, 1); conn.join(group)
        out = group.outgoing(bytes(range(16)), [(0, 0)], 1, 0, True); out.accept(1 << 20, 1 << 30)
        out.add(0, 0, 0, bytes(1000), None)
        into = group.incoming(bytes(range(16)), [(0, 0, 10, bytearray(10), None)], 2, 10, 10, 10, False, True)
        pid = os.fork()
        if pid == 0:
            del out, into, conn, group, engine
            gc.collect()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert len(b.recv(2000)) == 1064
        print("fine")  # and exits with its threads running
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr


def test_everything_at_once():
    """Two engines, four connections: transfers that finish, are cancelled on either side, moved, and lose connections."""
    rng = random.Random(5)
    left, right = _native.Engine(2), _native.Engine(2)
    one, two = left.group(), right.group()
    senders = {}

    def say_again(out, into):
        """As links do: the frame that granted the rest may have been on the connection that was lost."""
        out.accept(chunk_bytes, into.stats()[4])

    def connect(tag):
        a, b = socket.socketpair()
        a.setblocking(False)
        b.setblocking(False)
        ends = left.adopt(a.detach(), LIMITS, tag), right.adopt(b.detach(), LIMITS, tag)
        ends[1].join(two)  # first: what reaches an end without a group is not the engine's to place
        ends[0].join(one)
        senders[tag] = ends

    for tag in range(4):
        connect(tag)
    done = 0
    for number in range(60):
        name = rng.randbytes(16)
        size = rng.choice([1000, 300_000, 6 * MIB])
        source = rng.randbytes(size)
        target = bytearray(size)
        into = two.incoming(name, [(0, 0, size, target, None)], 7, size, 2 * MIB, min(size, 2 * MIB), False, True)
        out = one.outgoing(name, [(0, 0)], 8, rng.choice([0, 0, 1]), True)
        chunk_bytes = rng.choice([64 << 10, 512 << 10, MIB])
        out.accept(chunk_bytes, min(size, 2 * MIB))
        half = size // 2
        keys = {out.add(0, 0, 0, source[:half], None), out.add(0, 0, half, source[half:], None)}
        fate = rng.choice(["finish", "finish", "cancel out", "cancel in", "swap", "lose"])
        applied, deadline = 0, time.monotonic() + 20
        if fate == "swap":
            for key in keys:
                first = key == min(keys)
                out.swap(0, 0, 0 if first else half, bytes(source[:half] if first else source[half:]), None)
        while keys and time.monotonic() < deadline:
            select.select([left.fileno(), right.fileno()], [], [], 0.01)
            for event in left.drain():
                if event[0] == ACKED and event[1] == 8:
                    keys.difference_update(event[3])
                elif event[0] == LOST:
                    lost = senders.pop(event[1], None)
                    if lost:
                        out.requeue(lost[0].serial)
                        say_again(out, into)
            for event in right.drain():
                if event[0] == APPLIED:
                    applied += sum(r[3] - r[2] for r in event[2])
                elif event[0] == CORRUPT:
                    header = unpack_header(event[3])
                    if header.transfer == name:
                        out.resend(0, 0, header.offset, header.offset + header.length)
            if fate == "lose" and applied > size // 4 and len(senders) > 1:
                tag = next(iter(senders))
                senders[tag][1].close(True)
                senders[tag][0].close(True)
                out.requeue(senders[tag][0].serial)  # it takes nothing any more
                say_again(out, into)
                del senders[tag]
                connect(100 + number)
                fate = "finish"
            if fate == "cancel out" and applied > size // 4:
                out.close()
                break
            if fate == "cancel in" and applied > size // 4:
                into.close()
                target[:] = bytes(size)
                break
        else:
            assert not keys, f"transfer {number} ({fate}, {size} bytes) stands still at {applied}: {out.stats()}"
            assert target == source
            done += 1
        if fate == "cancel in":
            assert target == bytes(size)
        out.close()
        into.close()
    assert done > 25
    left.stop()
    right.stop()


# ---- which connection a chunk is through on first ------------------------------------------------------


class Unequal:
    """Two connections of which the engine has learned that one is many times slower."""

    CHUNK = bytes(64 << 10)

    def __init__(self, engine):
        self.engine, self.count = engine, 0
        while not self._learned():
            pass  # the machine stood still: what was fast may have looked slow

    def _learned(self) -> bool:
        self.group = self.engine.group()
        self.ends = self.fast, self.slow = End(self.engine, self.group), End(self.engine, self.group)
        self.out = outgoing(self.group, chunk=len(self.CHUNK))
        self.count = 0
        self.slow.conn.park(True)
        begun = time.monotonic()
        end, answer = self.arrives()
        assert end is self.fast
        self.acknowledged(end, answer, 0.006)
        self.took_s = time.monotonic() - begun
        if self.took_s > 0.5:
            self.close()
            return False
        self.fast.conn.park(True)
        self.slow.conn.park(False)
        end, answer = self.arrives()
        assert end is self.slow
        self.acknowledged(end, answer, max(0.3, 20 * self.took_s))
        self.fast.conn.park(False)
        return True

    def add(self):
        self.out.add(0, 0, self.count * len(self.CHUNK), self.CHUNK, None)
        self.count += 1

    def arrives(self):
        """Where the next chunk has come, and its acknowledgement."""
        self.add()
        ready, _, _ = select.select([end.sock for end in self.ends], [], [], 30)
        assert len(ready) == 1
        end = next(end for end in self.ends if end.sock is ready[0])
        [frame] = end.frames(1, 30)
        assert frame.header.offset == (self.count - 1) * len(self.CHUNK)
        return end, ack((0, 0, frame.header.offset, frame.header.offset + len(self.CHUNK)))

    def acknowledged(self, end, answer, after_s):
        time.sleep(after_s)
        end.say(answer)
        events(self.engine, lambda got: any(event[0] == ACKED for event in got), 30)

    def close(self):
        self.out.close()
        for end in self.ends:
            end.conn.close(True)


def test_a_chunk_is_left_to_the_connection_that_is_through_first(engine):
    """Each would take it by its turn; a slow one leaves it to a fast one, until that stands still."""
    two = Unequal(engine)
    for _ in range(8):
        end, answer = two.arrives()
        assert end is two.fast
        two.acknowledged(end, answer, 0.006)
    waiting = [two.arrives()]
    while waiting[-1][0] is two.fast:  # which stands still now
        assert len(waiting) < 100
        time.sleep(2 * two.took_s)
        waiting.append(two.arrives())
    for end, answer in waiting:
        two.acknowledged(end, answer, 0)
    assert two.out.stats()[3] == 0
    two.close()


def test_who_left_a_chunk_looks_again_though_its_thread_is_busy():
    """With what another link has: nothing else would tell that the fast connection stands still."""
    engine = _native.Engine(1)
    two, busy, over = Unequal(engine), End(engine, engine.group(), 2), threading.Event()

    def keep_busy():
        while not over.wait(0.001):
            busy.say(encode_control(FrameType.PING, offset=1))

    pings = threading.Thread(target=keep_busy)
    pings.start()
    try:
        for _ in range(20):  # more than the socket of the fast one takes, which nobody reads
            two.add()
        ready, _, _ = select.select([two.slow.sock], [], [], 30)
        assert ready
    finally:
        over.set()
        pings.join()
        two.close()
        engine.stop()
