"""An in-memory network with latency, bandwidth and faults, on whatever clock the loop has.

Streams behave as TCP does: bytes arrive in order, once, or the stream breaks; each side learns of a break in its own
time, or never. What is taken by :meth:`SimStream.send` occupies the pipe until the other side has read it.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from kvtransport.buffers import PageList, copy_pages
from kvtransport.errors import ConfigError, ConnectError


@dataclass(slots=True)
class Path:
    """What connections of this network are like."""

    latency_s: float = 0.002
    jitter_s: float = 0.0
    bytes_per_s: float = 2e6
    capacity: int = 16 << 10
    packet: int = 4 << 10
    connect_fails_s: float = 2.0
    """How long dialling into a black hole takes to fail."""


@dataclass(slots=True, eq=False)
class Half:
    """One direction of a stream."""

    arrived: deque[memoryview] = field(default_factory=deque)
    held: int = 0
    """Bytes taken and not read by the other side."""
    clear_at: float = 0.0
    """When the last byte taken will have arrived."""
    gone: bool = False
    """Nothing arrives any more."""
    ended: bool = False
    reset: bool = False
    """For the reader: the next read raises."""
    broken: bool = False
    """For the writer: the next write raises."""
    flips: deque[int] = field(default_factory=deque)
    """Bits to flip: each is the distance in bytes (times 8, plus the bit) from the bytes sent next."""


Watch = Callable[["SimStream", PageList, int, int], None]


class SimStream:
    """See :class:`kvtransport.io.base.ByteStream`."""

    def __init__(self, network: SimNetwork, name: str, process: object, out: Half, into: Half) -> None:
        self.network = network
        self.path = network.path
        """What the bytes it sends meet; a test may give a stream a path of its own."""
        self.local = self.name = name
        self.peer = ""
        self.session = None
        self.process = process
        self.out = out
        self.into = into
        self.other: SimStream | None = None
        self.closed = False
        self.paused = False
        self._readable: Callable[[], None] | None = None
        self._writable: Callable[[], None] | None = None
        self._armed = False

    # -- the byte stream -----------------------------------------------------------------------

    def send(self, head: bytes, pages: PageList | None, start: int) -> int:
        if self.closed:
            raise OSError("stream is closed")
        if self.out.broken:
            raise BrokenPipeError("connection reset")
        path = self.path
        total = len(head) + (0 if pages is None else pages.nbytes)
        take = min(path.capacity - self.out.held, total - start)
        if take <= 0:
            return 0
        data = bytearray(take)
        from_head = max(0, min(len(head) - start, take))
        data[:from_head] = head[start : start + from_head]
        if take > from_head and pages is not None:
            at = max(0, start - len(head))
            part = pages.slice(at, at + take - from_head)
            self.network.on_source_read(self, part)
            target = PageList.of(memoryview(data)[from_head:])
            copy_pages(target.base, target.pieces, part.base, part.pieces)
        self.network.on_send(self, head, start, take)
        self._put(data)
        return take

    def recv(self, pages: PageList | None, start: int, tail: bytearray, tail_start: int) -> int:
        if self.closed:
            raise OSError("stream is closed")
        body = (0 if pages is None else pages.nbytes) - start
        wanted = body + len(tail) - tail_start
        got = 0
        arrived = self.into.arrived
        while got < wanted and arrived:
            piece = arrived.popleft()
            if got < body:
                assert pages is not None
                n = min(len(piece), body - got)
                part = pages.slice(start + got, start + got + n)
                self.network.on_target_write(self, part)
                source = PageList.of(piece[:n])
                copy_pages(part.base, part.pieces, source.base, source.pieces)
            else:
                n = min(len(piece), wanted - got)
                at = tail_start + got - body
                tail[at : at + n] = piece[:n]
            if n < len(piece):
                arrived.appendleft(piece[n:])
            got += n
        if got:
            self.into.held -= got
            if self.other is not None:
                self.other.arm()
            return got
        if self.into.reset:
            raise ConnectionResetError("connection reset")
        if self.into.ended and wanted:
            raise EOFError("end of stream")
        return 0

    def on_readable(self, callback: Callable[[], None] | None) -> None:
        self._readable = callback
        self.arm()

    def on_writable(self, callback: Callable[[], None] | None) -> None:
        self._writable = callback
        self.arm()

    def close(self) -> None:
        self._close(reset=False)

    def finish(self) -> asyncio.Future[None]:
        self._close(reset=False)
        gone: asyncio.Future[None] = self.network.loop.create_future()
        gone.set_result(None)
        return gone

    def abort(self) -> None:
        self._close(reset=True)

    def info(self) -> None:
        return None

    def unsent_bytes(self) -> int:
        return self.out.held

    # -- faults --------------------------------------------------------------------------------

    def stall(self, seconds: float) -> None:
        """What this end sends from now on is under way for so much longer."""
        self.out.clear_at = max(self.out.clear_at, self.network.loop.time()) + seconds

    def pause(self, seconds: float) -> None:
        """This end's process does not read for a while (a slow reader)."""
        self.paused = True

        def resume() -> None:
            self.paused = False
            self.arm()

        self.network.later(seconds, resume)

    def flip(self, byte: int, bit: int) -> None:
        """Flip a bit of what this end sends, ``byte`` bytes from here."""
        self.out.flips.append(byte * 8 + bit)

    def broke(self, after_s: float, *, drop: bool = True) -> None:
        """This end learns after ``after_s`` that the stream is broken; ``drop``: what is on its way to it is lost."""
        if drop:
            self.into.gone = True

        def strike() -> None:
            self.into.reset = True
            self.into.gone = True
            self.out.broken = True
            self.out.gone = True
            self.arm()

        self.network.later(after_s, strike)

    def black_hole(self) -> None:
        """Nothing arrives any more in either direction, and nobody is told."""
        self.out.gone = self.into.gone = True

    # -- inside --------------------------------------------------------------------------------

    def _put(self, data: bytearray) -> None:
        out, path, now = self.out, self.path, self.network.loop.time()
        if out.flips:
            later: list[int] = []
            for at in out.flips:
                if at < len(data) * 8:
                    data[at // 8] ^= 1 << at % 8
                    self.network.log(f"{self.name}: flipped bit {at % 8} of byte {at // 8} of {len(data)}")
                else:
                    later.append(at - len(data) * 8)
            out.flips = deque(later)
        out.held += len(data)
        view = memoryview(data)
        at = max(now + path.latency_s + self.network.rng.random() * path.jitter_s, out.clear_at)
        for i in range(0, len(data), path.packet):
            piece = view[i : i + path.packet]
            at += len(piece) / path.bytes_per_s
            self.network.later(at - now, lambda piece=piece: self._arrive(piece))
        out.clear_at = at

    def _arrive(self, piece: memoryview) -> None:
        if self.out.gone or self.other is None:
            return
        if self.other.closed:
            # Nobody reads there any more: the answer is a reset.
            self.out.broken = True
            self.arm()
            return
        self.out.arrived.append(piece)
        self.other.arm()

    def _close(self, *, reset: bool) -> None:
        if self.closed:
            return
        self.closed = True
        self._readable = self._writable = None
        self.into.arrived.clear()
        out, other, loop = self.out, self.other, self.network.loop
        assert other is not None

        def tell() -> None:
            if out.gone and not reset:
                return
            if reset:
                out.reset = True
                out.arrived.clear()
                other.out.broken = True
            else:
                out.ended = True
            other.arm()

        if reset and out.gone:
            return  # a reset is lost in a black hole, too
        out.gone = out.gone or reset
        at = loop.time() + self.path.latency_s
        self.network.later((at if reset else max(at, out.clear_at)) - loop.time(), tell)

    def arm(self) -> None:
        if not self._armed and not self.closed and (self._readable or self._writable):
            self._armed = True
            self.network.soon(self._fire)

    def _fire(self) -> None:
        self._armed = False
        again = False
        if self._readable and not self.paused and self._ready():
            self._readable()
            again = self._ready() and not self.paused
        if self._writable and (self.out.held < self.path.capacity or self.out.broken):
            self._writable()
            again = True
        if again:
            self.arm()

    def _ready(self) -> bool:
        return bool(self.into.arrived or self.into.ended or self.into.reset)


class SimListener:
    def __init__(self, network: SimNetwork, host: str, port: int) -> None:
        self._network = network
        self.host = host
        self.port = port

    def close(self) -> None:
        self._network.listeners.pop((self.host, self.port), None)


class SimNetwork:
    """The wires; :meth:`of` gives each process its own view, a :class:`kvtransport.io.base.Network`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, rng: random.Random, path: Path) -> None:
        self.loop = loop
        self.rng = rng
        self.path = path
        self.listeners: dict[tuple[str, int], tuple[object, Callable[[SimStream], None]]] = {}
        self.streams: list[tuple[SimStream, SimStream]] = []
        self.unreachable = False
        """Dialling ends in a black hole."""
        self.holes: set[tuple[str, int]] = set()
        """Addresses where it always does."""
        self.timers: set[asyncio.TimerHandle] = set()
        self.log: Callable[[str], None] = lambda text: None
        self.on_source_read: Callable[[SimStream, PageList], None] = lambda stream, pages: None
        self.on_target_write: Callable[[SimStream, PageList], None] = lambda stream, pages: None
        self.on_send: Callable[[SimStream, bytes, int, int], None] = lambda stream, head, start, n: None

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        def run() -> None:
            self.timers.discard(handle)
            action()

        handle = self.loop.call_later(max(0.0, seconds), run)
        self.timers.add(handle)

    def soon(self, action: Callable[[], None]) -> None:
        self.loop.call_soon(action)

    def of(self, process: object) -> View:
        return View(self, process)

    def live(self) -> list[tuple[SimStream, SimStream]]:
        """Pairs whose dialling end is still open and unharmed."""
        self.streams = [p for p in self.streams if not (p[0].closed and p[1].closed)]
        return [p for p in self.streams if not (p[0].closed or p[1].closed or p[0].out.gone or p[0].into.gone)]

    def silence(self) -> None:
        """Drop everything that is on its way: the end of a run."""
        for handle in self.timers:
            handle.cancel()
        self.timers.clear()


class View:
    def __init__(self, network: SimNetwork, process: object) -> None:
        self._network = network
        self._process = process
        self._count = 0

    async def connect(self, host: str, port: int) -> SimStream:
        network = self._network
        await asyncio.sleep(network.path.latency_s * 2)
        found = network.listeners.get((host, port))
        if network.unreachable or (host, port) in network.holes:
            await asyncio.sleep(network.path.connect_fails_s)
            raise ConnectError(f"no answer from {host}:{port}")
        if found is None:
            raise ConnectError(f"cannot connect to {host}:{port}: nobody listens") from ConnectionRefusedError()
        process, accept = found
        self._count += 1
        one, two = Half(), Half()
        mine = SimStream(network, f"{self._process}>{process}#{self._count}", self._process, one, two)
        theirs = SimStream(network, f"{process}<{self._process}#{self._count}", process, two, one)
        mine.other, theirs.other = theirs, mine
        mine.peer, theirs.peer = f"{host}:{port}", getattr(self._process, "address", f"{self._process}")
        network.streams.append((mine, theirs))
        accept(theirs)
        return mine

    async def listen(self, host: str, port: int, accept: Callable[[SimStream], None]) -> SimListener:
        network = self._network
        port = port or 7000
        if (host, port) in network.listeners:
            raise ConfigError(f"cannot listen on {host}:{port}: the port is taken")
        network.listeners[host, port] = (self._process, accept)
        return SimListener(network, host, port)
