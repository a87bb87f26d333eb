"""The C extension and its pure-Python twin, but for the arenas: one suite over both."""

from __future__ import annotations

import array
import gc
import itertools
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransport import _native, _pure

ROOT = Path(__file__).resolve().parents[2]
BOTH = pytest.mark.parametrize("impl", [_native, _pure], ids=["native", "pure"])


@pytest.fixture(params=[_native, _pure], ids=["native", "pure"])
def impl(request):
    return request.param


@pytest.fixture
def pair():
    left, right = socket.socketpair()
    left.setblocking(False)
    right.setblocking(False)
    with left, right:
        yield left, right


def pairs(*pieces):
    return np.array(pieces, np.int64).reshape(-1, 2)


def concat(base, pieces):
    return b"".join(bytes(memoryview(base)[o : o + n]) for o, n in np.asarray(pieces).tolist())


def child(code, *args, **options):
    """Run ``code`` in a fresh interpreter; its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        cwd=ROOT, capture_output=True, text=True, timeout=60, **options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- page lists: what is refused ----

BAD_PIECES = {
    "negative offset": ((0, 4), (-1, 4)),
    "negative length": ((0, 4), (4, -1)),
    "past the end": ((0, 4), (13, 4)),
    "offset past the end": ((0, 4), (17, 0)),
    "overflowing sum": ((0, 4), (2**63 - 1, 2**63 - 1)),
    "smallest numbers": ((0, 4), (-(2**63), -(2**63))),
}


def every_call(impl, base, pieces):
    good = bytearray(8)
    hasher = impl.Hasher()
    return [
        lambda: impl.hash_pages(base, pieces),
        lambda: hasher.update_pages(base, pieces, 0, 0),
        lambda: impl.copy_pages(base, pieces, good, None),
        lambda: impl.copy_pages(good, None, base, pieces),
        lambda: impl.send_pages(0, b"", base, pieces, 0),
        lambda: impl.recv_pages(0, base, pieces, 0),
    ]


@pytest.mark.parametrize("pieces", BAD_PIECES.values(), ids=BAD_PIECES)
def test_every_piece_is_checked_and_named(impl, pieces):
    base = bytearray(16)
    for call in every_call(impl, base, pairs(*pieces)):
        with pytest.raises(ValueError, match=r"piece 1: .* does not fit a base of 16 bytes"):
            call()
    assert base == bytes(16)


@pytest.mark.parametrize(
    "pieces",
    [
        np.zeros((2, 2), np.int32),
        np.zeros((2, 2), np.uint64),
        np.zeros((2, 2), np.float64),
        np.zeros((2, 3), np.int64),
        np.zeros(3, np.int64),
        b"0123456789abcdef",
        [(0, 1)],
        7,
    ],
    ids=lambda pieces: f"{type(pieces).__name__} {getattr(pieces, 'dtype', '')} {getattr(pieces, 'shape', '')}",
)
def test_pieces_of_another_form_are_refused(impl, pieces):
    for call in every_call(impl, bytearray(16), pieces):
        with pytest.raises(TypeError):
            call()


def test_scattered_memory_is_refused(impl):
    with pytest.raises((TypeError, BufferError, ValueError)):
        impl.hash_pages(bytearray(16), np.zeros((4, 4), np.int64)[:, ::2])
    with pytest.raises((BufferError, ValueError)):
        impl.hash_pages(np.zeros(16, np.uint8)[::2], None)


def test_pieces_need_a_base_and_writing_needs_writable_memory(impl, pair):
    for call in every_call(impl, None, pairs((0, 0)))[:2]:
        with pytest.raises(TypeError, match="pieces were given without a base"):
            call()
    with pytest.raises((BufferError, TypeError)):
        impl.copy_pages(bytes(4), None, bytes(4), None)
    with pytest.raises((BufferError, TypeError)):
        impl.recv_pages(pair[0], bytes(4), None, 0)
    with pytest.raises((BufferError, TypeError)):
        impl.recv_pages(pair[0], None, None, 0, bytes(4))


def test_pieces_may_come_from_any_int64_buffer(impl):
    base = b"0123456789"
    flat = array.array("q", [2, 3, 0, 1])
    assert impl.hash_pages(base, flat) == xxhash.xxh3_64_intdigest(b"2340")
    assert impl.hash_pages(base, memoryview(flat)) == xxhash.xxh3_64_intdigest(b"2340")
    assert impl.hash_pages(base, np.empty((0, 2), np.int64)) == xxhash.xxh3_64_intdigest(b"")
    assert impl.hash_pages(None, None) == xxhash.xxh3_64_intdigest(b"")


def test_positions_are_checked(impl, pair):
    fd = pair[0]
    hasher = impl.Hasher()
    calls = [
        lambda: impl.send_pages(fd, b"head", bytes(4), None, 9),
        lambda: impl.recv_pages(fd, bytearray(4), None, 5),
        lambda: impl.recv_pages(fd, None, None, 0, bytearray(4), 5),
        lambda: hasher.update_pages(bytes(4), None, 0, 5),
        lambda: hasher.update_pages(bytes(4), None, 3, 2),
        lambda: impl.send_pages(fd, b"head", None, None, -1),
        lambda: impl.send_pages(fd, b"head", None, None, 0, 0),
        lambda: impl.recv_pages(fd, None, None, 0, bytearray(4), 0, 0),
    ]
    for call in calls:
        with pytest.raises(ValueError):
            call()


# ---- sockets ----

SCATTERED = ((5, 3), (0, 5), (60, 4), (8, 0), (20, 1), (21, 9), (5, 3))


def test_send_from_every_start(impl, pair):
    left, right = pair
    base = os.urandom(64)
    message = b"header--" + concat(base, SCATTERED)
    for start in range(len(message) + 1):
        assert impl.send_pages(left.fileno(), b"header--", base, pairs(*SCATTERED), start) == len(message) - start
        assert (right.recv(1000) if start < len(message) else b"") == message[start:]


def test_receive_from_every_start(impl, pair):
    left, right = pair
    disjoint = pairs((5, 3), (60, 4), (20, 1), (0, 5), (8, 0), (21, 9))
    data = os.urandom(22 + 7)
    for start in range(23):
        for tail_start in range(8) if start in {0, 11, 22} else [0]:
            base, tail = bytearray(64), bytearray(7)
            wanted = 22 - start + 7 - tail_start
            left.send(data[:wanted] + b"next frame")
            assert impl.recv_pages(right.fileno(), base, disjoint, start, tail, tail_start) == wanted
            assert concat(base, disjoint) == bytes(start) + data[: 22 - start]
            assert tail == bytes(tail_start) + data[22 - start : wanted]
            assert right.recv(100) == b"next frame"


@pytest.mark.parametrize("budget", [1, 2, 7, 8, 9, 30, 1000])
def test_budget_bounds_each_call(impl, pair, budget):
    left, right = pair
    base = os.urandom(64)
    message = b"header--" + concat(base, SCATTERED)
    sent, seen = 0, b""
    while sent < len(message):
        n = impl.send_pages(left.fileno(), b"header--", base, pairs(*SCATTERED), sent, budget)
        assert n == min(budget, len(message) - sent)
        seen += right.recv(1000)
        sent += n
    assert seen == message
    left.send(message)
    target, tail, got = bytearray(64), bytearray(20), 0
    pages = pairs((10, 5), (0, 8))
    while got < 33:
        n = impl.recv_pages(right, target, pages, min(got, 13), tail, max(got - 13, 0), budget)
        assert n == min(budget, 33 - got)
        got += n
    assert concat(target, pages) + tail == message[:33]


def test_nothing_left_moves_nothing(impl, pair):
    left, right = pair
    assert impl.send_pages(left, b"", None, None, 0) == 0
    assert impl.send_pages(left, b"ab", b"cd", None, 4) == 0
    right.close()  # not even an end of stream is looked for
    assert impl.recv_pages(left, None, None, 0) == 0
    assert impl.recv_pages(left, bytearray(4), None, 4, bytearray(2), 2) == 0


def test_head_or_tail_alone(impl, pair):
    left, right = pair
    tail = bytearray(4)
    assert impl.send_pages(left, memoryview(b"head"), None, None, 1) == 3
    assert impl.recv_pages(right, None, None, 0, tail, 0) == 3
    assert tail == b"ead\0"


def test_would_block_is_zero(impl, pair):
    left, right = pair
    big = bytes(1 << 20)
    assert impl.recv_pages(right, bytearray(4), None, 0) == 0
    sent = 0
    while n := impl.send_pages(left, b"", big, None, 0):
        sent += n
    assert sent > 0
    assert impl.send_pages(left, b"more", None, None, 0) == 0
    received = 0
    into = bytearray(1 << 20)
    while n := impl.recv_pages(right, into, None, 0):
        received += n
    assert received == sent


def test_blocking_sockets_do_not_block(impl, pair):
    left, right = pair
    left.setblocking(True)
    right.setblocking(True)
    assert impl.recv_pages(right, bytearray(4), None, 0) == 0
    while impl.send_pages(left, b"", bytes(1 << 20), None, 0):
        pass
    assert left.getblocking()


def test_default_timeout_does_not_make_it_wait(impl, pair):
    socket.setdefaulttimeout(30)
    try:
        assert impl.recv_pages(pair[0], bytearray(4), None, 0) == 0
    finally:
        socket.setdefaulttimeout(None)


def test_more_pieces_than_one_call_takes(impl, pair):
    left, right = pair
    base = os.urandom(3000 * 24)
    rng = np.random.default_rng(1)
    pieces = np.stack((rng.permutation(3000) * 24, rng.integers(0, 24, 3000)), axis=1).astype(np.int64)
    message = b"h" * 64 + concat(base, pieces)
    target, tail = bytearray(len(base)), bytearray(64)
    sent = got = 0
    body = len(message) - 64
    left.send(b"")
    while got < len(message):
        sent += impl.send_pages(left, b"h" * 64, base, pieces, sent)
        if got < 64:
            got += impl.recv_pages(right, None, None, 0, tail, got)
        else:
            got += impl.recv_pages(right, target, pieces, got - 64)
    assert sent == len(message)
    assert tail == message[:64]
    assert concat(target, pieces) == message[64:]
    assert body == int(pieces[:, 1].sum())


@pytest.mark.parametrize("seed", range(6))
def test_random_page_lists_arrive(impl, pair, seed):
    left, right = pair
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 200))
    lengths = rng.integers(0, 40_000, n)
    offsets = np.cumsum(lengths + rng.integers(0, 100, n)) - lengths
    order = rng.permutation(n)
    pieces = np.stack((offsets, lengths), axis=1)[order].astype(np.int64)
    source = rng.bytes(int(offsets[-1] + lengths[-1]) + 10)
    target = bytearray(len(source))
    total = int(lengths.sum())
    sent = got = 0
    while got < total:
        sent += impl.send_pages(left, b"", source, pieces, sent, int(rng.integers(1, 1 << 20)))
        got += impl.recv_pages(right, target, pieces, got, budget=int(rng.integers(1, 1 << 20)))
    assert concat(target, pieces) == concat(source, pieces)


def test_end_of_stream(impl, pair):
    left, right = pair
    left.send(b"abc")
    left.shutdown(socket.SHUT_WR)
    base = bytearray(8)
    assert impl.recv_pages(right, base, None, 0) == 3  # what came is told before the end is
    assert base[:3] == b"abc"
    with pytest.raises(EOFError, match="ended the stream"):
        impl.recv_pages(right, base, None, 3)


def test_broken_connection_is_an_error_and_no_signal(impl):
    out = child(
        f"""
        import signal, socket
        from kvtransport import {impl.__name__.split(".")[1]} as impl
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        left, right = socket.socketpair()
        right.close()
        for pieces in None, [0, 1, 2, 1]:
            import array
            try:
                impl.send_pages(left, b"head", b"body", pieces and array.array("q", pieces), 0)
            except OSError as error:
                print(type(error).__name__)
        """
    )
    assert out.split() == ["BrokenPipeError"] * 2
    assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN


def test_reset_is_an_error(impl):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        accepted.close()

        def receive_until_broken():
            while impl.recv_pages(client, bytearray(4), None, 0) == 0:
                pass

        with pytest.raises(ConnectionResetError):
            receive_until_broken()


def test_bad_descriptors(impl, pair):
    fd = os.dup(pair[0].fileno())
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        impl.send_pages(fd, b"x", None, None, 0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        impl.recv_pages(fd, None, None, 0, bytearray(1))
    for call in (lambda: impl.send_pages(-1, b"x", None, None, 0), lambda: impl.recv_pages(-1, bytearray(1), None, 0)):
        with pytest.raises(ValueError, match="negative"):
            call()


def test_the_descriptor_stays_open(impl, pair):
    for _ in range(3):
        impl.send_pages(pair[0].fileno(), b"x", None, None, 0)
    gc.collect()
    assert pair[1].recv(10) == b"xxx"


# ---- checksums ----


@st.composite
def page_lists(draw, max_base=300):
    base = draw(st.binary(max_size=max_base))
    starts = st.integers(0, len(base))
    edges = draw(st.lists(st.tuples(starts, starts), max_size=20))
    return base, pairs(*[(min(a, b), abs(a - b)) for a, b in edges])


@BOTH
@given(page_lists(), st.integers(0, 2**64 - 1), st.data())
@settings(max_examples=60, deadline=None)
def test_hashes_equal_xxhash(impl, pages, seed, data):
    base, pieces = pages
    whole = concat(base, pieces)
    assert impl.hash_pages(base, pieces, seed) == xxhash.xxh3_64_intdigest(whole, seed)
    hasher = impl.Hasher(seed)
    cuts = sorted({0, len(whole), *data.draw(st.lists(st.integers(0, len(whole)), max_size=5))})
    for start, stop in itertools.pairwise(cuts):
        hasher.update_pages(base, pieces, start, stop)
        assert hasher.intdigest() == xxhash.xxh3_64_intdigest(whole[:stop], seed)
    hasher.update(base)
    assert hasher.intdigest() == xxhash.xxh3_64_intdigest(whole + base, seed)


@BOTH
@given(page_lists(), st.integers(0, 2**64 - 1), st.data())
@settings(max_examples=60, deadline=None)
def test_hashes_of_the_parts_of_a_page_list(impl, pages, seed, data):
    base, pieces = pages
    whole = concat(base, pieces)
    cuts = sorted([0, len(whole), *data.draw(st.lists(st.integers(0, len(whole)), max_size=6))])
    sizes = np.diff(np.array(cuts, np.int64))
    sums = np.zeros(len(sizes), np.uint64)
    impl.hash_each(base, pieces, sizes, sums, seed)
    assert sums.tolist() == [xxhash.xxh3_64_intdigest(whole[a:b], seed) for a, b in itertools.pairwise(cuts)]
    for wrong in (np.append(sizes, 1), np.append(sizes, -1), sizes + 1):
        with pytest.raises(ValueError):
            impl.hash_each(base, pieces, wrong, np.zeros(len(wrong), np.uint64), seed)
    with pytest.raises(ValueError):
        impl.hash_each(base, pieces, sizes, np.zeros(len(sizes) + 1, np.uint64), seed)
    if len(sizes) > 1:
        with pytest.raises(ValueError):
            impl.hash_each(base, pieces, np.array([2**62, 2**62, 2**62, 2**62], np.int64), np.zeros(4, np.uint64), seed)


@pytest.mark.parametrize("size", [0, 1, 3, 8, 16, 17, 128, 129, 240, 241, 1024, 65535, 65536, 65537, 1 << 20])
def test_hashes_of_every_kind_of_length(impl, size):
    data = np.random.default_rng(size).bytes(size)
    for seed in (0, 1, 2**64 - 1):
        assert impl.hash_pages(data, None, seed) == xxhash.xxh3_64_intdigest(data, seed)
        hasher = impl.Hasher(seed=seed)
        hasher.update(memoryview(data))
        assert hasher.intdigest() == xxhash.xxh3_64_intdigest(data, seed)


def test_reset_starts_again(impl):
    hasher = impl.Hasher(3)
    hasher.update(b"abc")
    hasher.reset()
    assert hasher.intdigest() == xxhash.xxh3_64_intdigest(b"")
    hasher.reset(9)
    hasher.update(np.arange(4, dtype=np.int32))
    assert hasher.intdigest() == xxhash.xxh3_64_intdigest(np.arange(4, dtype=np.int32).tobytes(), 9)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_are_64_bits(impl, seed):
    for call in (
        lambda: impl.Hasher(seed),
        lambda: impl.hash_pages(b"", None, seed),
        lambda: impl.Hasher().reset(seed),
    ):
        with pytest.raises(OverflowError):
            call()


def test_hasher_takes_bytes_only(impl):
    for wrong in (None, "text", 5):
        with pytest.raises(TypeError):
            impl.Hasher().update(wrong)


def test_a_hasher_belongs_to_one_thread_at_a_time():
    """And while one thread hashes, others run: the GIL is released."""
    hasher = _native.Hasher()
    data, stop = bytes(32 << 20), threading.Event()

    def hash_on():
        while not stop.is_set():
            hasher.update(data)

    def digest_until_refused():
        while True:
            hasher.intdigest()

    thread = threading.Thread(target=hash_on)
    thread.start()
    try:
        with pytest.raises(RuntimeError, match="in use by another thread"):
            digest_until_refused()
    finally:
        stop.set()
        thread.join()


# ---- copies ----


@BOTH
@given(page_lists(), st.data())
@settings(max_examples=60, deadline=None)
def test_copies_equal_the_model(impl, pages, data):
    source, pieces = pages
    whole = concat(source, pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    lengths = [b - a for a, b in itertools.pairwise([0, *cuts, len(whole)])]
    size = len(whole) + 50
    places = pairs(*[(data.draw(st.integers(0, size - n)), n) for n in lengths])
    target, model, at = bytearray(size), bytearray(size), 0
    for offset, length in places.tolist():
        model[offset : offset + length] = whole[at : at + length]
        at += length
    assert impl.copy_pages(target, places, source, pieces) == len(whole)
    assert target == model


def test_copy_inside_one_buffer(impl):
    base = bytearray(range(100))
    assert impl.copy_pages(base, pairs((50, 10), (70, 10)), base, pairs((0, 20))) == 20
    assert base[50:60] + base[70:80] == bytes(range(20))


def test_large_copies(impl):
    rng = np.random.default_rng(0)
    source, target = rng.bytes(300 * 4096), bytearray(300 * 4096)
    pieces = np.stack((rng.permutation(300) * 4096, np.full(300, 4096)), axis=1).astype(np.int64)
    assert impl.copy_pages(target, None, source, pieces) == len(source)
    assert target == concat(source, pieces)
    back = bytearray(len(source))
    impl.copy_pages(back, pieces, target, None)
    assert back == source


def test_copies_of_different_lengths_are_refused(impl):
    target = bytearray(5)
    with pytest.raises(ValueError, match="cannot copy 4 bytes into pages of 5 bytes"):
        impl.copy_pages(target, None, b"abcd", None)
    assert target == bytes(5)


def test_failed_calls_release_their_buffers(impl, pair):
    base, tail, pieces = bytearray(16), bytearray(4), array.array("q", [0, 17])
    for call in every_call(impl, base, pieces):
        with pytest.raises(ValueError):
            call()
    with pytest.raises(ValueError):
        impl.recv_pages(pair[0], base, pieces, 0, tail)
    base.append(1)  # a bytearray that is still exported cannot grow
    tail.append(1)
    pieces.append(1)
