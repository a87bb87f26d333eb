"""The native I/O engine over TLS records: the same bytes, the same ends, and damage that ends a connection."""

from __future__ import annotations

import errno
import gc
import random
import select
import socket
import threading
import time

import pytest

from kvtransport import _native
from kvtransport.buffers import PageList
from kvtransport.wire import bodies
from kvtransport.wire.frames import DEFAULT_LIMITS, FrameType, encode_control
from tests.tlskit import contexts, shake

LIMITS = DEFAULT_LIMITS.by_type
CONTROL, LOST, BAD, STRAY, ODD, CORRUPT, APPLIED, ACKED = range(8)
T = bytes(range(16))

pytestmark = pytest.mark.skipif(not hasattr(_native, "Engine"), reason="the engine is built on Linux only")


class Relay(threading.Thread):
    """Passes bytes between two sockets; ``damage`` flips one byte of what comes from the left after so many."""

    def __init__(self, left, right) -> None:
        super().__init__(daemon=True)
        self.left, self.right = left, right
        self.damage: int | None = None

    def run(self) -> None:
        passed = 0
        while True:
            ready, _, _ = select.select([self.left, self.right], [], [], 5)
            for sock in ready:
                data = bytearray(sock.recv(1 << 16))
                if not data:
                    self.left.close()
                    self.right.close()
                    return
                if sock is self.left:
                    passed += len(data)
                    if self.damage is not None and passed > self.damage:
                        data[len(data) // 2] ^= 1
                        self.damage = None
                try:
                    (self.right if sock is self.left else self.left).sendall(data)
                except OSError:
                    return


class Ends:
    def __init__(self, pki, *, relay: bool = False) -> None:
        self.engines = [_native.Engine(2), _native.Engine(1)]
        self.groups = [engine.group() for engine in self.engines]
        left, right = socket.socketpair()
        self.relay = None
        if relay:
            left.close()
            right.close()
            (left, a), (b, right) = socket.socketpair(), socket.socketpair()
            self.relay = Relay(a, b)
            self.relay.start()
        client, server = contexts(pki)
        self.tls = []
        for sock in (left, right):
            sock.setblocking(False)
        self.tls = [_native.Tls(client, left.fileno(), "localhost"), _native.Tls(server, right.fileno())]
        if relay:
            deadline = time.monotonic() + 5
            while sum(end.handshake() for end in self.tls):
                assert time.monotonic() < deadline
                time.sleep(0.001)
        else:
            shake(*self.tls)
        self.conns = [
            engine.adopt(sock.detach(), LIMITS, 1, tls)
            for engine, sock, tls in zip(self.engines, (left, right), self.tls, strict=True)
        ]
        for conn, group in zip(self.conns, self.groups, strict=True):
            conn.join(group)
        self.seen: tuple[list, list] = ([], [])

    def until(self, done, timeout=10.0) -> None:
        deadline = time.monotonic() + timeout
        while not done(*self.seen):
            select.select([e.fileno() for e in self.engines], [], [], 0.05)
            for engine, seen in zip(self.engines, self.seen, strict=True):
                seen += engine.drain()
            assert time.monotonic() < deadline, f"nothing more happened; so far: {self.seen}"

    def close(self) -> None:
        for conn in self.conns:
            conn.close(True)
        for engine in self.engines:
            engine.stop()


@pytest.fixture
def ends(pki):
    made = Ends(pki)
    yield made
    made.close()


def scattered(nbytes: int, page: int, seed: int, *, blank: bool) -> PageList:
    rng = random.Random(seed)
    count = -(-nbytes // page)
    base = bytearray(2 * count * page) if blank else bytearray(rng.randbytes(2 * count * page))
    return PageList.pages(base, [i * page for i in rng.sample(range(2 * count), count)], page, nbytes)


def start(ends, nbytes: int, page: int):
    source, target = scattered(nbytes, page, 1, blank=False), scattered(nbytes, page, 2, blank=True)
    into = ends.groups[1].incoming(
        T, [(0, 0, nbytes, target.base, target.pieces)], 7, nbytes, 64 << 20, min(nbytes, 64 << 20), False, True
    )
    out = ends.groups[0].outgoing(T, [(0, 0)], 8, 0, True)
    out.accept(1 << 20, 1 << 40)
    return source, target, into, out


@pytest.mark.parametrize("page", [1000, 18_432])
def test_a_transfer_over_tls(ends, page):
    nbytes = 9_000_001
    source, target, into, out = start(ends, nbytes, page)
    out.add(0, 0, 0, source.base, source.pieces)
    ends.until(lambda left, right: any(e[0] == ACKED for e in left) and target.tobytes() == source.tobytes())
    out.close()
    into.close()


def test_frames_both_ways_and_a_polite_end(ends):
    cancel = encode_control(FrameType.CANCEL, bodies.Cancel(reason="x" * 1000), transfer=T)
    for conn in ends.conns:
        for _ in range(300):
            conn.send(cancel)
    ends.until(lambda left, right: all(sum(e[0] == CONTROL for e in side) == 300 for side in (left, right)))
    ends.conns[0].finish()
    ends.until(lambda left, right: any(e[0] == LOST for e in right))
    lost = next(e for e in ends.seen[1] if e[0] == LOST)
    assert lost[2] >> 16 == 0  # the end between two frames


@pytest.mark.parametrize("after", [100, 3_000_000])
def test_a_flipped_byte_ends_the_connection_and_is_never_applied(pki, after):
    ends = Ends(pki, relay=True)
    ends.relay.damage = after
    nbytes = 8 << 20
    source, target, into, out = start(ends, nbytes, 4096)
    out.add(0, 0, 0, source.base, source.pieces)
    ends.until(lambda left, right: any(e[0] == LOST for e in right))
    lost = next(e for e in ends.seen[1] if e[0] == LOST)
    assert lost[2] & 0xFFFF == errno.EBADMSG
    assert target.tobytes() != source.tobytes()
    out.close()
    into.close()
    ends.close()


def test_what_cannot_be_adopted(pki):
    client, server = contexts(pki)
    engine = _native.Engine(1)
    left, right = socket.socketpair()
    for sock in (left, right):
        sock.setblocking(False)
    a, b = _native.Tls(client, left.fileno(), "localhost"), _native.Tls(server, right.fileno())
    with pytest.raises(ValueError, match="handshake is not over"):
        engine.adopt(left.fileno(), LIMITS, 1, a)
    with pytest.raises(TypeError, match="expected a Tls object"):
        engine.adopt(left.fileno(), LIMITS, 1, object())
    shake(a, b)
    with pytest.raises(ValueError, match="is on descriptor"):
        engine.adopt(right.fileno(), LIMITS, 1, a)
    conn = engine.adopt(left.detach(), LIMITS, 1, a)
    with pytest.raises(ValueError, match="another thread"):
        a.send_pages(b"x", None, None, 0)
    with pytest.raises(ValueError, match="another thread"):
        a.recv_pages(bytearray(1), None, 0)
    del a
    gc.collect()  # the records live as long as the connection
    conn.send(encode_control(FrameType.PING, offset=1))
    got = bytearray(64)
    deadline = time.monotonic() + 5
    while not b.recv_pages(got, None, 0):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    conn.close(True)
    engine.stop()
    right.close()
