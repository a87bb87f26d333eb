"""The pure-Python twin of ``kvtransport._native``: same names, same results, slower.

What it lacks: loops without the GIL, and in :mod:`kvtransport._pure_arena` huge pages, locking and CUDA registration.

A *page list* is a ``base`` (any C-contiguous buffer) and ``pieces`` (C-contiguous int64 pairs (offset, length) of
shape (n, 2), in bytes of the base; None for all of it). Every piece is checked against its base before a byte
is touched: ValueError names the piece that does not fit.
"""

from __future__ import annotations

import operator
import socket
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import xxhash

from ._pure_arena import Arena, View, _descriptor, _size

if TYPE_CHECKING:
    from ._native import Memory, Pieces

__all__ = [
    "Arena",
    "Hasher",
    "View",
    "copy_pages",
    "hash_each",
    "hash_pages",
    "hash_vectors",
    "join_planes",
    "recv_pages",
    "send_pages",
    "split_planes",
]

_IOV_LIMIT = 1024
_RECV_BYTES = 256 << 10
_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)

hash_vectors = "xxhash"


# ---- page lists ----


def _flat(buffer: Memory, *, writable: bool = False) -> memoryview:
    view = memoryview(buffer)  # type: ignore[arg-type]
    if writable and view.readonly:
        raise BufferError("the buffer is read-only")
    if not view.c_contiguous:
        raise BufferError("the buffer is not C-contiguous")
    if view.nbytes == 0:
        return memoryview(bytearray())
    return view if view.format == "B" and view.ndim == 1 else memoryview(np.frombuffer(view, np.uint8).data)


class _Pages:
    """A checked page list: ``base`` flat, ``pieces`` an int64 array (n, 2)."""

    def __init__(self, base: Memory | None, pieces: Pieces | None, *, writable: bool = False) -> None:
        if base is None and pieces is not None:
            raise TypeError("pieces were given without a base")
        self.base = memoryview(bytearray()) if base is None else _flat(base, writable=writable)
        if pieces is None:
            self.pieces: npt.NDArray[np.int64] = np.array([[0, len(self.base)]], np.int64)
        else:
            self.pieces = self._checked(memoryview(pieces))  # type: ignore[arg-type]
        self.nbytes = int(self.pieces[:, 1].sum())

    def _checked(self, view: memoryview) -> npt.NDArray[np.int64]:
        shape = (view.ndim == 2 and (view.shape or ())[1:] == (2,)) or (view.ndim == 1 and len(view) % 2 == 0)
        known = view.format.lstrip("@=<") in {"q", "l", "n"} and view.itemsize == 8
        if not (shape and known and view.c_contiguous):
            raise TypeError(
                "pieces must be C-contiguous int64 pairs (offset, length) of shape (n, 2), got "
                f'{view.ndim} dimension(s) of format "{view.format}"'
            )
        pieces = np.asarray(view, np.int64).reshape(-1, 2)
        offsets, lengths, size = pieces[:, 0], pieces[:, 1], len(self.base)
        bad = np.flatnonzero((offsets < 0) | (lengths < 0) | (offsets > size) | (lengths > size - offsets))
        if len(bad):
            i = int(bad[0])
            raise ValueError(f"piece {i}: offset {offsets[i]}, length {lengths[i]} does not fit a base of {size} bytes")
        return pieces

    def runs(self, start: int, stop: int) -> Iterator[memoryview]:
        """Memory of bytes [start, stop) in order, neighbours joined."""
        stop = min(stop, self.nbytes)
        ends = np.cumsum(self.pieces[:, 1])
        first = int(np.searchsorted(ends, start, "right"))
        last = int(np.searchsorted(ends, stop, "left"))
        begin = end = -1
        at = int(ends[first - 1]) if first else 0
        for offset, length in self.pieces[first : last + 1].tolist():
            low, high = offset + max(start - at, 0), offset + min(length, stop - at)
            at += length
            if high <= low:
                continue
            if low != end:
                if end > begin:
                    yield self.base[begin:end]
                begin = low
            end = high
        if end > begin:
            yield self.base[begin:end]


def _head_runs(head: memoryview, pages: _Pages, start: int, budget: int) -> list[memoryview]:
    stop = min(start + budget, len(head) + pages.nbytes)
    runs = [head[start:stop]] if start < min(len(head), stop) else []
    if stop > len(head):
        runs += pages.runs(max(start - len(head), 0), stop - len(head))
    return runs


def _check_position(what: str, position: int, nbytes: int) -> int:
    if _size(position) > nbytes:
        raise ValueError(f"{what} is {position}, but there are only {nbytes} bytes")
    return position


# ---- sockets ----


def _move(
    fd: int, runs: list[memoryview], per_call: int, call: Callable[[socket.socket, list[memoryview]], int]
) -> tuple[int, bool]:
    """Move until all is moved, the socket would block or the stream has ended: (bytes, ended)."""
    # Borrowed, not owned: family and kind are given so that nothing is asked of the descriptor, and it is detached.
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=fd)
    moved = 0
    try:
        if sock.gettimeout() is not None:  # a default timeout would make the calls wait
            sock.setblocking(False)
        runs = runs[::-1]  # the next run is the last: taking it off is cheap
        while runs:
            now: list[memoryview] = []
            room = per_call
            while runs and room and len(now) < _IOV_LIMIT:
                run = runs.pop()
                if len(run) > room:
                    runs.append(run[room:])
                    run = run[:room]
                now.append(run)
                room -= len(run)
            try:
                n = call(sock, now)
            except (BlockingIOError, InterruptedError):
                return moved, False
            if n == 0:
                return moved, True
            moved += n
            for run in reversed(now[_whole_runs(now, n) :]):
                runs.append(run)
    finally:
        sock.detach()
    return moved, False


def _whole_runs(runs: list[memoryview], nbytes: int) -> int:
    """How many runs ``nbytes`` finish; the run they end in is cut in place."""
    for i, run in enumerate(runs):
        if nbytes < len(run):
            runs[i] = run[nbytes:]
            return i
        nbytes -= len(run)
    return len(runs)


def send_pages(
    fd: int, head: Memory, base: Memory | None, pieces: Pieces | None, start: int, budget: int = 1 << 20
) -> int:
    """Send bytes of the message head ++ pages from position ``start`` on, without blocking.

    Stops when all is sent, the socket would block or ``budget`` bytes are sent; returns the bytes this call
    sent (0: it would block, or nothing was left). Raises OSError as the socket does.
    """
    fd = _descriptor(fd)
    if _size(budget) == 0:
        raise ValueError("budget must be at least 1 byte")
    flat, pages = _flat(head), _Pages(base, pieces)
    runs = _head_runs(flat, pages, _check_position("start", start, len(flat) + pages.nbytes), budget)
    flags = socket.MSG_DONTWAIT | _NO_SIGNAL
    return _move(fd, runs, sys.maxsize, lambda sock, now: sock.sendmsg(now, [], flags))[0]


def recv_pages(
    fd: int,
    base: Memory | None,
    pieces: Pieces | None,
    start: int,
    tail: Memory | None = None,
    tail_start: int = 0,
    budget: int = 1 << 20,
) -> int:
    """Receive into pages from position ``start`` on, then into ``tail`` from ``tail_start`` on, without blocking.

    Stops when all is there, the socket would block or ``budget`` bytes came; returns the bytes this call received
    (0: it would block, or nothing was wanted). Raises EOFError when the peer has ended the stream and this
    call received nothing, OSError as the socket does, BufferError for memory that is read-only.
    """
    fd = _descriptor(fd)
    if _size(budget) == 0:
        raise ValueError("budget must be at least 1 byte")
    rest = memoryview(bytearray()) if tail is None else _flat(tail, writable=True)
    pages = _Pages(base, pieces, writable=base is not None)
    _check_position("start", start, pages.nbytes)
    _check_position("tail_start", tail_start, len(rest))
    stop = min(start + budget, pages.nbytes)
    runs = list(pages.runs(start, stop))
    room = min(budget - (stop - start), len(rest) - tail_start)
    if room:
        runs.append(rest[tail_start : tail_start + room])
    moved, ended = _move(fd, runs, _RECV_BYTES, lambda sock, now: sock.recvmsg_into(now, 0, socket.MSG_DONTWAIT)[0])
    if ended and not moved:
        raise EOFError("the peer has ended the stream")
    return moved


# ---- checksums and copies ----


def _seed(seed: int) -> int:
    seed = operator.index(seed)
    if not 0 <= seed < 1 << 64:
        raise OverflowError(f"a seed is an integer from 0 to 2^64-1, got {seed}")
    return seed


class Hasher:
    """Streaming xxh3_64. For one thread at a time."""

    __slots__ = ("_state",)

    def __init__(self, seed: int = 0) -> None:
        self._state = xxhash.xxh3_64(seed=_seed(seed))

    def update(self, buffer: Memory, /) -> None:
        """Add the bytes of a C-contiguous buffer."""
        self._state.update(_flat(buffer))

    def update_pages(self, base: Memory | None, pieces: Pieces | None, start: int, stop: int) -> None:
        """Add bytes [start, stop) of a page list."""
        pages = _Pages(base, pieces)
        if not _size(start) <= _size(stop) <= pages.nbytes:
            raise ValueError(f"bytes {start} to {stop} of pages that hold {pages.nbytes}")
        for run in pages.runs(start, stop):
            self._state.update(run)

    def intdigest(self) -> int:
        """xxh3_64 of what was added so far."""
        return int(self._state.intdigest())

    def reset(self, seed: int = 0) -> None:
        """Start again, with this seed."""
        self._state = xxhash.xxh3_64(seed=_seed(seed))


def hash_pages(base: Memory | None, pieces: Pieces | None, seed: int = 0) -> int:
    """xxh3_64 of the bytes of a page list."""
    hasher = Hasher(seed)
    for run in _Pages(base, pieces).runs(0, sys.maxsize):
        hasher._state.update(run)
    return hasher.intdigest()


def hash_each(base: Memory | None, pieces: Pieces | None, sizes: Memory, out: Memory, seed: int = 0) -> None:
    """xxh3_64 of each of the parts of ``sizes`` bytes (int64) that a page list is cut into, into ``out`` (uint64)."""
    pages = _Pages(base, pieces)
    each = np.frombuffer(_flat(sizes), np.int64).tolist()
    sums = np.frombuffer(_flat(out, writable=True), np.uint64)
    if len(sums) != len(each) or any(n < 0 for n in each) or sum(each) != pages.nbytes:
        raise ValueError(
            f"{len(each)} parts of {sum(each)} bytes and {sums.nbytes} bytes for their sums do not go with a page list of "
            f"{pages.nbytes}"
        )
    at = 0
    for i, size in enumerate(each):
        hasher = Hasher(seed)
        for run in pages.runs(at, at + size):
            hasher._state.update(run)
        sums[i] = hasher.intdigest()
        at += size


def copy_pages(
    dst_base: Memory | None, dst_pieces: Pieces | None, src_base: Memory | None, src_pieces: Pieces | None
) -> int:
    """Copy the bytes of one page list into another of the same length; returns the bytes copied.

    Where the two share memory at different positions, the bytes left there are unspecified.
    """
    to, source = _Pages(dst_base, dst_pieces, writable=dst_base is not None), _Pages(src_base, src_pieces)
    if to.nbytes != source.nbytes:
        raise ValueError(f"cannot copy {source.nbytes} bytes into pages of {to.nbytes} bytes")
    left = memoryview(b"")
    sources = source.runs(0, source.nbytes)
    for run in to.runs(0, to.nbytes):
        at = 0
        while at < len(run):
            left = left or next(sources)
            take = min(len(left), len(run) - at)
            run[at : at + take] = left[:take]
            left = left[take:]
            at += take
    return to.nbytes


def _planes(pages: _Pages, exponents: Memory, rest: Memory, *, writable: bool) -> tuple[_Plane, _Plane]:
    planes = [np.frombuffer(_flat(plane, writable=writable), np.uint8) for plane in (exponents, rest)]
    if pages.nbytes % 2 or any(len(plane) != pages.nbytes // 2 for plane in planes):
        raise ValueError(
            f"{pages.nbytes} bytes of 16-bit elements have two planes of {pages.nbytes // 2} bytes, "
            f"got {len(planes[0])} and {len(planes[1])}"
        )
    return planes[0], planes[1]


_Plane = npt.NDArray[np.uint8]


def split_planes(base: Memory, pieces: Pieces | None, exponents: Memory, rest: Memory) -> int:
    """Take the bfloat16 elements of a page list apart: exponents, and sign with mantissa. Returns the bytes read.

    Turned left by one bit the exponent is the upper byte; each plane has half the bytes of the pages.
    """
    pages = _Pages(base, pieces)
    upper, lower = _planes(pages, exponents, rest, writable=True)
    data = np.frombuffer(b"".join(pages.runs(0, pages.nbytes)), "<u2")
    turned = (data << 1) | (data >> 15)
    upper[:] = turned >> 8
    lower[:] = turned & 0xFF
    return pages.nbytes


def join_planes(base: Memory, pieces: Pieces | None, exponents: Memory, rest: Memory) -> int:
    """Put them together again, into a page list. Returns the bytes written."""
    pages = _Pages(base, pieces, writable=True)
    upper, lower = _planes(pages, exponents, rest, writable=False)
    turned = upper.astype("<u2") << 8 | lower
    copy_pages(base, pieces, ((turned >> 1) | (turned << 15)).astype("<u2").view(np.uint8), None)
    return pages.nbytes
