"""An in-memory network: the same protocol, link, sender and receiver code without a socket.

Streams are bounded byte queues; readiness callbacks come from the loop (``call_soon``), so that a loop
with a virtual clock runs everything deterministically. A :class:`Tap` may look at, change, delay or cut what
crosses: that is how tests provoke faults.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from ..buffers import PageList, copy_pages
from ..errors import ConfigError, ConnectError
from .base import TlsSession

CAPACITY = 256 * 1024
"""Bytes a direction holds before the sender would block."""

Tap = Callable[[bytearray], bytearray | None]
"""Called with every piece that enters a direction; returns what goes on, or None to swallow it."""


class _Pipe:
    """One direction: a bounded queue of byte pieces."""

    def __init__(self) -> None:
        self.pieces: deque[memoryview] = deque()
        self.size = 0
        self.ended = False
        self.broken = False
        self.tap: Tap | None = None
        self.held = False


class MemoryStream:
    """One end; see :class:`kvtransport.io.base.ByteStream`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, out: _Pipe, into: _Pipe, local: str, peer: str) -> None:
        self._loop = loop
        self._out = out
        self._in = into
        self.local = local
        self.peer = peer
        self.session: TlsSession | None = None
        self.other: MemoryStream | None = None
        self._readable: Callable[[], None] | None = None
        self._writable: Callable[[], None] | None = None
        self._armed = False
        self._closed = False

    # -- the byte stream -----------------------------------------------------------------------

    def send(self, head: bytes, pages: PageList | None, start: int) -> int:
        self._check()
        room = CAPACITY - self._out.size
        total = len(head) + (0 if pages is None else pages.nbytes)
        take = min(room, total - start)
        if take <= 0:
            return 0
        data = bytearray(take)
        from_head = max(0, min(len(head) - start, take))
        data[:from_head] = head[start : start + from_head]
        if take > from_head and pages is not None:
            at = max(0, start - len(head))
            part = pages.slice(at, at + take - from_head)
            target = PageList.of(memoryview(data)[from_head:])
            copy_pages(target.base, target.pieces, part.base, part.pieces)
        self._push(data)
        return take

    def recv(self, pages: PageList | None, start: int, tail: bytearray, tail_start: int) -> int:
        if self._closed:
            raise OSError("stream is closed")
        body = (0 if pages is None else pages.nbytes) - start
        wanted = body + len(tail) - tail_start
        got = 0
        while got < wanted and self._in.pieces and not self._in.held:
            piece = self._in.pieces.popleft()
            n = min(len(piece), body - got) if got < body else min(len(piece), wanted - got)
            if got < body and pages is not None:
                part = pages.slice(start + got, start + got + n)
                source = PageList.of(piece[:n])
                copy_pages(part.base, part.pieces, source.base, source.pieces)
            else:
                at = tail_start + got - body
                tail[at : at + n] = piece[:n]
            if n < len(piece):
                self._in.pieces.appendleft(piece[n:])
            got += n
            self._in.size -= n
        if got:
            if self.other is not None:
                self.other._arm()
            return got
        if self._in.broken:
            raise ConnectionResetError("connection reset")
        if self._in.ended and wanted and not self._in.pieces:
            raise EOFError("end of stream")
        return 0

    def on_readable(self, callback: Callable[[], None] | None) -> None:
        self._readable = callback
        self._arm()

    def on_writable(self, callback: Callable[[], None] | None) -> None:
        self._writable = callback
        self._arm()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._readable = self._writable = None
        self._out.ended = True
        self._in.broken = True
        if self.other is not None:
            self.other._arm()

    def finish(self) -> asyncio.Future[None]:
        gone: asyncio.Future[None] = self._loop.create_future()
        gone.set_result(None)
        if self._closed:
            return gone
        self._in.tap = lambda data: None
        self._in.pieces.clear()
        self._in.size = 0
        self._closed = True
        self._readable = self._writable = None
        self._out.ended = True
        if self.other is not None:
            self.other._arm()
        return gone

    def abort(self) -> None:
        if not self._closed:
            self._out.broken = True
            self._out.pieces.clear()
            self._out.size = 0
            self.close()

    def info(self) -> None:
        return None

    def unsent_bytes(self) -> int:
        return self._out.size

    # -- test hooks ----------------------------------------------------------------------------

    def tap(self, tap: Tap | None) -> None:
        """Let ``tap`` see everything this end sends from now on."""
        self._out.tap = tap

    def hold(self, held: bool) -> None:
        """Freeze (True) or thaw what this end has sent: delivered later, nothing lost."""
        self._out.held = held
        if self.other is not None:
            self.other._arm()

    # -- inside --------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._closed:
            raise OSError("stream is closed")
        if self._out.broken:
            raise BrokenPipeError("connection reset")

    def _push(self, data: bytearray) -> None:
        seen: bytearray | None = data
        if self._out.tap is not None:
            seen = self._out.tap(data)
        if seen:
            self._out.pieces.append(memoryview(seen))
            self._out.size += len(seen)
        if self.other is not None:
            self.other._arm()

    def _arm(self) -> None:
        if not self._armed and not self._closed and (self._readable or self._writable):
            self._armed = True
            self._loop.call_soon(self._fire)

    def _fire(self) -> None:
        self._armed = False
        again = False
        if self._readable and not self._in.held and (self._in.pieces or self._in.ended or self._in.broken):
            self._readable()
            again = bool(self._in.pieces or self._in.ended or self._in.broken)
        if self._writable and (self._out.size < CAPACITY or self._out.broken):
            self._writable()
            again = True
        if again:
            self._arm()


def stream_pair(
    loop: asyncio.AbstractEventLoop, left: str = "left", right: str = "right"
) -> tuple[MemoryStream, MemoryStream]:
    """Two connected ends."""
    one, two = _Pipe(), _Pipe()
    a, b = MemoryStream(loop, one, two, left, right), MemoryStream(loop, two, one, right, left)
    a.other, b.other = b, a
    return a, b


class _MemoryListener:
    def __init__(self, network: MemoryNetwork, host: str, port: int) -> None:
        self._network = network
        self.host = host
        self.port = port

    def close(self) -> None:
        self._network.listeners.pop((self.host, self.port), None)


class MemoryNetwork:
    """A :class:`kvtransport.io.base.Network` of its own; ``streams`` lists the dialling ends for tests to break."""

    def __init__(self) -> None:
        self.listeners: dict[tuple[str, int], Callable[[MemoryStream], None]] = {}
        self.streams: list[tuple[MemoryStream, MemoryStream]] = []
        self._next_port = 40_000

    async def connect(self, host: str, port: int, *, local: str | None = None) -> MemoryStream:
        accept = self.listeners.get((host, port))
        if accept is None:
            raise ConnectError(
                f"cannot connect to {host}:{port}: nobody listens in this memory network"
            ) from ConnectionRefusedError()
        self._next_port += 1
        mine, theirs = stream_pair(asyncio.get_running_loop(), f"{host}:{self._next_port}", f"{host}:{port}")
        self.streams.append((mine, theirs))
        accept(theirs)
        return mine

    async def listen(self, host: str, port: int, accept: Callable[[MemoryStream], None]) -> _MemoryListener:
        if port == 0:
            self._next_port += 1
            port = self._next_port
        if (host, port) in self.listeners:
            raise ConfigError(f"cannot listen on {host}:{port}: the port is taken")
        self.listeners[host, port] = accept
        return _MemoryListener(self, host, port)
