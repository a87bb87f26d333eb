"""Pages of 18 KiB (16 tokens of one MLA layer) through the extension, its twin, and a call per page from Python.

``pytest benchmarks/test_native.py --benchmark-group-by=group --benchmark-columns=median,iqr``; each moves 32 MiB.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading

import numpy as np
import pytest
import xxhash

from kvtransport import _native, _pure

PAGE = 18 * 1024
COUNT = (32 << 20) // PAGE
TOTAL = PAGE * COUNT
POOL = 4 * COUNT  # pages of the pool: 128 MiB, larger than the caches


@pytest.fixture(scope="module")
def memory():
    """A pool of pages, a target like it, and where the pages lie."""
    rng = np.random.default_rng(1)
    with _native.Arena(POOL * PAGE, memfd=False) as source, _native.Arena(POOL * PAGE, memfd=False) as target:
        memoryview(source)[:] = (os.urandom(1 << 20) * (POOL * PAGE // (1 << 20) + 1))[: POOL * PAGE]
        offsets = rng.permutation(POOL)[:COUNT].astype(np.int64) * PAGE
        pages = np.stack((offsets, np.full(COUNT, PAGE)), axis=1)
        with memoryview(source) as source_view, memoryview(target) as target_view:
            yield source_view, target_view, pages


def layout(kind, pages):
    return np.array([[0, TOTAL]], np.int64) if kind == "contiguous" else pages


def connected():
    """Both ends of a TCP connection over loopback, in blocking mode."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        left = socket.create_connection(server.getsockname())
        right, _ = server.accept()
    for sock in (left, right):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The system's default may be one that halves loopback; where cubic may not be chosen, it stays.
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
    return left, right


def wait(sock, event):
    poll = select.poll()
    poll.register(sock, event)
    poll.poll(10_000)


def send_through(impl, sock, base, pieces):
    sent = 0
    while sent < TOTAL:
        n = impl.send_pages(sock, b"", base, pieces, sent)
        sent += n
        if not n:
            wait(sock, select.POLLOUT)


def receive_through(impl, sock, base, pieces):
    got = 0
    while got < TOTAL:
        n = impl.recv_pages(sock, base, pieces, got)
        got += n
        if not n:
            wait(sock, select.POLLIN)


def send_each(sock, base, pieces):
    for offset, length in pieces.tolist():
        sock.sendall(base[offset : offset + length])


def receive_each(sock, base, pieces):
    for offset, length in pieces.tolist():
        view = base[offset : offset + length]
        while view:
            view = view[sock.recv_into(view) :]


MOVERS = {
    "native": (
        lambda *args: send_through(_native, *args),
        lambda *args: receive_through(_native, *args),
    ),
    "twin": (
        lambda *args: send_through(_pure, *args),
        lambda *args: receive_through(_pure, *args),
    ),
    "a call per page": (send_each, receive_each),
}


@pytest.mark.parametrize("kind", ["contiguous", "pages"])
@pytest.mark.parametrize("way", MOVERS)
@pytest.mark.benchmark(group="32 MiB over loopback, one thread each way", min_rounds=15, warmup=True)
def test_send_and_receive(benchmark, memory, way, kind):
    source, target, pages = memory
    pieces = layout(kind, pages)
    send, receive = MOVERS[way]
    left, right = connected()
    with left, right:

        def move():
            thread = threading.Thread(target=send, args=(left, source, pieces))
            thread.start()
            receive(right, target, pieces)
            thread.join()

        benchmark(move)
    assert _native.hash_pages(source, pieces) == _native.hash_pages(target, pieces)


def hash_each(base, pieces):
    state = xxhash.xxh3_64()
    for offset, length in pieces.tolist():
        state.update(base[offset : offset + length])
    return state.intdigest()


HASHERS = {"native": _native.hash_pages, "twin": _pure.hash_pages, "a call per page": hash_each}


@pytest.mark.parametrize("kind", ["contiguous", "pages"])
@pytest.mark.parametrize("way", HASHERS)
@pytest.mark.benchmark(group="xxh3 of 32 MiB", min_rounds=15, warmup=True)
def test_hash(benchmark, memory, way, kind):
    source, _, pages = memory
    pieces = layout(kind, pages)
    assert benchmark(HASHERS[way], source, pieces) == _native.hash_pages(source, pieces)


def copy_each(to, to_pieces, base, pieces):
    for (put, length), (offset, _) in zip(to_pieces.tolist(), pieces.tolist(), strict=True):
        to[put : put + length] = base[offset : offset + length]


COPIERS = {"native": _native.copy_pages, "twin": _pure.copy_pages, "a call per page": copy_each}


@pytest.mark.parametrize("kind", ["contiguous", "pages"])
@pytest.mark.parametrize("way", COPIERS)
@pytest.mark.benchmark(group="copy of 32 MiB", min_rounds=15, warmup=True)
def test_copy(benchmark, memory, way, kind):
    source, target, pages = memory
    pieces = layout(kind, pages)
    benchmark(COPIERS[way], target, pieces, source, pieces)
    assert _native.hash_pages(source, pieces) == _native.hash_pages(target, pieces)
