"""The native engine as a link sees it: events from its threads in, decisions of the event loop out.

One per endpoint. Its threads are in ``native/engine.c``; here their events are drained, whenever its eventfd says that there
are some, and given to whoever they are for.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import socket
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

from ..buffers import NativeEngine, PageList
from ..connection import MAX_CONTROL_BYTES, AnyConnection, Owner
from ..errors import Fault, KVError, LimitError, PeerLostError, ProtocolError
from ..flow.telemetry import PathInfo
from ..io import tcp_info
from ..io.base import LAST_WORD_S
from ..io.tcp import SO_MAX_PACING_RATE, TCP_INFO, TcpStream, pacing_option, set_congestion, unsent_option
from ..io.tls import TlsStream, alert_error, native_records
from ..wire import bodies
from ..wire.frames import HEADER_BYTES, MAGIC, FrameType, Header, Limits, encode_control, unpack_header
from .base import NOBODY, IncomingOwner, IncomingStats, Odd, OutgoingOwner, OutgoingStats, Placed, Slot

if TYPE_CHECKING:
    from .. import _native

CONTROL, LOST, BAD, STRAY, ODD, CORRUPT, APPLIED, ACKED = range(8)
LOST_END, LOST_INSIDE, LOST_ERRNO, LOST_VOID, LOST_MEMORY = range(5)
MAX_THREADS = 8

_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _stop() -> None:
    # The threads touch no Python object, but memory of Python objects, which may be unmapped from here on.
    for engine in list(_engines):
        engine.stop()


def default_threads() -> int:
    """I/O threads of an endpoint that does not say how many: half the cores."""
    return min(MAX_THREADS, max(1, (os.cpu_count() or 1) // 2))


class _Listener(Protocol):
    def told(self, event: tuple[Any, ...]) -> None:
        """An event of the native engine: (kind, tag, ...)."""


class Engine:
    """The I/O threads of one endpoint. Belongs to one event loop."""

    def __init__(self, native: _native.Engine, threads: int) -> None:
        self._native = native
        self.threads = threads
        self._loop = asyncio.get_running_loop()
        self._listeners: dict[int, _Listener] = {}
        self._next_tag = 0
        self._loop.add_reader(native.fileno(), self.drain)
        _engines.add(self)

    @classmethod
    def make(cls, threads: int | None) -> Engine | None:
        """With ``threads`` (None: half the cores); None where there is no native engine or ``threads`` is 0.

        Half: the other half of a machine has work of its own, and where both ends share two cores one thread each
        measured best (docs/performance.md).
        """
        if NativeEngine is None or threads == 0:
            return None
        count = threads or default_threads()
        return cls(NativeEngine(count), count)

    def connection(self, stream: TcpStream | TlsStream, owner: Owner, *, limits: Limits) -> EngineConnection:
        return EngineConnection(self, stream, owner, limits)

    def lanes(self) -> NativeLanes:
        return NativeLanes(self)

    @staticmethod
    def carries(stream: object) -> TypeGuard[TcpStream | TlsStream]:
        """Whether it can move the bytes of ``stream``: not of the memory network's, nor of TLS over Python's ssl."""
        return isinstance(stream, TcpStream) or (isinstance(stream, TlsStream) and native_records())

    def adopt(self, fd: int, limits: Limits, listener: _Listener, tls: Any) -> tuple[_native.Conn, int]:
        self._next_tag += 1
        conn = self._native.adopt(fd, limits.by_type, self._next_tag, tls)  # told in a later turn of the loop
        self._listeners[self._next_tag] = listener
        return conn, self._next_tag

    def group(self) -> _native.Group:
        return self._native.group()

    def listen(self, listener: _Listener) -> int:
        self._next_tag += 1
        self._listeners[self._next_tag] = listener
        return self._next_tag

    def forget(self, tag: int) -> None:
        self._listeners.pop(tag, None)

    def drain(self) -> None:
        """Give what has happened to whom it concerns."""
        for event in self._native.drain():
            listener = self._listeners.get(event[1])
            if listener is None:
                continue  # it has ended meanwhile
            try:
                listener.told(event)
            except Exception as error:  # noqa: BLE001  the others' events must not be lost
                self._loop.call_exception_handler({"message": "an event of the I/O engine failed", "exception": error})

    def close(self) -> None:
        """Close what is left and end the threads. Idempotent."""
        if not self._loop.is_closed():
            self._loop.remove_reader(self._native.fileno())
        for listener in list(self._listeners.values()):
            if isinstance(listener, EngineConnection):
                listener.shut()
        self._listeners.clear()
        self.stop()

    def stop(self) -> None:
        _engines.discard(self)
        self._native.stop()


class EngineStream:
    """The socket under an :class:`EngineConnection`, as far as others may see it (:class:`..io.base.ByteStream`)."""

    def __init__(self, connection: EngineConnection, stream: TcpStream | TlsStream) -> None:
        self._connection = connection
        self.peer = stream.peer
        self.local = stream.local
        self.session = stream.session

    def info(self) -> PathInfo | None:
        return tcp_info.parse(self._connection.getsockopt(socket.IPPROTO_TCP, TCP_INFO, tcp_info.BYTES))

    def congestion(self) -> str:
        name = self._connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
        return name.rstrip(b"\0").decode() or "unknown"

    def set_congestion(self, names: Sequence[str]) -> str | None:
        return set_congestion(self._connection.setsockopt, names)

    def pace(self, bytes_per_s: float | None) -> None:
        self._connection.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, pacing_option(bytes_per_s))

    def keep_unsent(self, nbytes: int | None) -> None:
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, unsent_option(nbytes))

    def unsent_bytes(self) -> int:
        return self._connection.unsent()

    def close(self) -> None:
        self._connection.shut()

    def finish(self) -> asyncio.Future[None]:
        return self._connection.finish()

    def abort(self) -> None:
        self._connection.shut(abort=True)

    # Its bytes are the engine's.

    def send(self, head: bytes, pages: PageList | None, start: int) -> int:
        raise OSError("the I/O engine sends on this socket")

    def recv(self, pages: PageList | None, start: int, tail: bytearray, tail_start: int) -> int:
        raise OSError("the I/O engine receives on this socket")

    def on_readable(self, callback: object) -> None:
        raise OSError("the I/O engine watches this socket")

    on_writable = on_readable


class _Nobody:
    """The owner of a connection that is gone."""

    def control(self, connection: AnyConnection, header: Header, payload: bytes) -> None:
        pass

    def stray(self, connection: AnyConnection, header: Header) -> None:
        pass

    def lost(self, connection: AnyConnection, error: KVError) -> None:
        pass


_GONE = _Nobody()


class EngineConnection:
    """See :class:`kvtransport.connection.AnyConnection`."""

    def __init__(self, engine: Engine, stream: TcpStream | TlsStream, owner: Owner, limits: Limits) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._limits = limits
        self.owner: Owner = owner
        self.index = 0
        self.closed = False
        self.established = False
        self.last_heard = self.last_ping = self._loop.time()
        self.stream = EngineStream(self, stream)
        self._heard = False
        self._parked = False
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self._last_word: asyncio.TimerHandle | None = None
        self._tls: Any = None
        if isinstance(stream, TlsStream):
            fd, self._tls = stream.detach()
        else:
            fd = stream.detach()
        self.native, self._tag = engine.adopt(fd, limits, self, self._tls)

    # -- AnyConnection -------------------------------------------------------------------------

    def limit(self, limits: Limits) -> None:
        self._limits = limits
        self.native.limit(limits.by_type)

    def start(self) -> None:
        """It receives since it was made; what came is told by the next turn of the loop."""

    @property
    def sent_bytes(self) -> int:
        return self._stats()[0]

    @property
    def received_bytes(self) -> int:
        return self._stats()[1]

    @property
    def load(self) -> int:
        return 2 if self.closed else self._stats()[4]

    def heard(self, now: float) -> None:
        self._stats()
        if self._heard:
            self._heard = False
            self.last_heard = now

    def send_control(self, frame: bytes) -> None:
        if not self.closed:
            waiting = self.native.send(frame)
            if waiting > MAX_CONTROL_BYTES:
                self.fail(LimitError(f"{self.stream.peer} does not read: {waiting} bytes of control frames wait"))

    @property
    def parked(self) -> bool:
        return self._parked

    def park(self, parked: bool) -> None:
        if parked != self._parked and not self.closed:
            self._parked = parked
            self.native.park(parked)

    def flush(self) -> None:
        """Sending has begun when send_control returned."""

    def refuse(self, error: KVError) -> None:
        if not self.closed:
            self.send_control(encode_control(FrameType.ERROR, bodies.Error.of(error)))
            if not self.closed:
                self.finish()
                self._report(error)

    def leave(self, last: bytes, error: KVError) -> asyncio.Future[None] | None:
        self.send_control(last)
        if self.closed:
            return None
        gone = self.finish()
        self._report(error)
        return gone

    def fail(self, error: KVError, *, abort: bool = False) -> None:
        if not self.closed:
            self.shut(abort=abort)
            self._report(error)

    def _report(self, error: KVError) -> None:
        self.closed = True
        owner, self.owner = self.owner, _GONE
        owner.lost(self, error)

    # -- the socket ----------------------------------------------------------------------------

    def finish(self) -> asyncio.Future[None]:
        """Send what is queued, then no more; done when the peer has closed too, or a second later."""
        if self._last_word is None and not self._gone.done():
            self.native.finish()
            self._last_word = self._loop.call_later(LAST_WORD_S, self.shut)
        return self._gone

    def shut(self, *, abort: bool = False) -> None:
        """Close the socket; when this returns its threads have let go of it. Idempotent."""
        self._engine.forget(self._tag)
        self._stats()
        self.native.close(abort)
        if self._last_word is not None:
            self._last_word.cancel()
        if not self._gone.done() and not self._loop.is_closed():
            self._gone.set_result(None)

    def getsockopt(self, level: int, option: int, nbytes: int) -> bytes:
        return self.native.getsockopt(level, option, nbytes)

    def setsockopt(self, level: int, option: int, value: bytes) -> None:
        self.native.setsockopt(level, option, value)

    def unsent(self) -> int:
        return self.native.unsent()

    def _stats(self) -> tuple[int, int, int, bool, int]:
        stats = self.native.stats()
        self._heard |= stats[3]
        return stats

    # -- events --------------------------------------------------------------------------------

    def told(self, event: tuple[Any, ...]) -> None:
        kind, _, detail, head, data = event
        if self.closed:
            if kind == LOST:
                self.shut()
            return
        try:
            if kind == CONTROL:
                self.owner.control(self, unpack_header(head, self._limits), data)
            elif kind == STRAY:
                self.owner.stray(self, unpack_header(head, self._limits))
            elif kind == BAD:
                raise self._what_is_bad(detail, data)
            elif kind == LOST:
                how = detail >> 16
                self.fail(self._why_lost(how, detail & 0xFFFF), abort=how == LOST_VOID)
        except KVError as error:
            self.refuse(error)

    def _what_is_bad(self, detail: int, head: bytes) -> KVError:
        if detail:
            name = FrameType(head[5]).name
            return ProtocolError(
                f"{name} body from {self.stream.peer} failed its checksum; resetting the connection",
                fault=Fault.NETWORK,
            )
        try:
            unpack_header(head.ljust(HEADER_BYTES, b"\0"), self._limits)
        except KVError as error:
            if self.established and not head.startswith(MAGIC):
                error.fault = Fault.NETWORK  # it does speak this protocol: this was damaged on its way
            return error
        return ProtocolError(f"{self.stream.peer} sent a header that the I/O engine does not understand")

    def _why_lost(self, how: int, number: int) -> KVError:
        peer = self.stream.peer
        if self._tls is not None and self._tls.alert is not None:
            return alert_error(peer, self._tls.alert)
        if how == LOST_ERRNO:
            return PeerLostError(f"connection to {peer} broke: {os.strerror(number)}")
        if how == LOST_VOID:
            return PeerLostError("reset by this side: a cancelled transfer had an unchecked frame half sent")
        if how == LOST_MEMORY:
            return PeerLostError(f"connection to {peer} given up: out of memory", fault=Fault.LOCAL)
        return PeerLostError(f"{peer} closed the connection{' in the middle of a frame' if how == LOST_INSIDE else ''}")


class NativeLanes:
    """See :class:`.base.Lanes`: the group of a link's connections in the engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._group = engine.group()

    def join(self, connection: AnyConnection) -> None:
        assert isinstance(connection, EngineConnection)
        connection.native.join(self._group)

    def leave(self, connection: AnyConnection) -> None:
        """It left when it was closed."""

    def schedule(self) -> None:
        """The threads know."""

    def outgoing(
        self, owner: OutgoingOwner, transfer: bytes, slots: Sequence[Slot], *, priority: int, checksum: bool
    ) -> NativeOutgoing:
        return NativeOutgoing(self._engine, self._group, owner, transfer, slots, priority, checksum)

    def incoming(
        self,
        owner: IncomingOwner,
        transfer: bytes,
        granted: Mapping[Slot, tuple[PageList, int]],
        *,
        window: int,
        unchecked: bool,
        eager: bool,
    ) -> NativeIncoming:
        return NativeIncoming(self._engine, self._group, owner, transfer, granted, window, unchecked, eager)


class NativeOutgoing:
    """See :class:`.base.Outgoing`."""

    def __init__(
        self,
        engine: Engine,
        group: _native.Group,
        owner: OutgoingOwner,
        transfer: bytes,
        slots: Sequence[Slot],
        priority: int,
        checksum: bool,
    ) -> None:
        self._engine = engine
        self._owner: OutgoingOwner = owner
        self._tag = engine.listen(self)
        self._native = group.outgoing(transfer, list(slots), self._tag, priority, checksum)
        self.accept = self._native.accept
        self.allow = self._native.allow
        self.hold = self._native.hold
        self.stalled = self._native.stalled
        self.uncut = self._native.uncut
        self.ack = self._native.ack
        self.resend = self._native.resend

    def grant(self, credit: int) -> None:
        """The engine takes CREDIT frames by itself; one that was taken before the transfer is known is taken again."""

    def add(self, layer: int, tensor: int, start: int, pages: PageList) -> int:
        return self._native.add(layer, tensor, start, pages.base, pages.where)

    def add_coded(self, layer: int, tensor: int, start: int, nbytes: int, payload: bytes) -> int:
        return self._native.add_coded(layer, tensor, start, nbytes, payload)

    def swap(self, layer: int, tensor: int, start: int, pages: PageList) -> bool:
        return self._native.swap(layer, tensor, start, pages.base, pages.where)

    def requeue(self, connection: AnyConnection) -> int:
        assert isinstance(connection, EngineConnection)
        return self._native.requeue(connection.native.serial)

    def stats(self) -> OutgoingStats:
        return OutgoingStats(*self._native.stats())

    def close(self) -> None:
        self._engine.forget(self._tag)
        self._native.close()
        self._owner = NOBODY

    def told(self, event: tuple[Any, ...]) -> None:
        self._owner.on_acked(event[2], event[3])


class NativeIncoming:
    """See :class:`.base.Incoming`."""

    def __init__(
        self,
        engine: Engine,
        group: _native.Group,
        owner: IncomingOwner,
        transfer: bytes,
        granted: Mapping[Slot, tuple[PageList, int]],
        window: int,
        unchecked: bool,
        eager: bool,
    ) -> None:
        self._engine = engine
        self._owner: IncomingOwner = owner
        self._tag = engine.listen(self)
        slots = [(layer, tensor, n, p.base, p.where) for (layer, tensor), (p, n) in granted.items()]
        total = sum(nbytes for _, nbytes in granted.values())
        self._native = group.incoming(transfer, slots, self._tag, total, window, min(total, window), unchecked, eager)
        self.applied = self._native.applied

    def contains(self, layer: int, tensor: int, start: int, stop: int) -> bool:
        return any(
            (layer, tensor) == (at, of) and low <= start and stop <= high for at, of, low, high in self.applied()
        )

    def place(self, header: Header, raw: bytearray) -> Placed | Odd:
        code, credit = self._native.place(header.layer, header.tensor, header.offset, raw, header.sequence)
        if code > Placed.THERE:
            return Odd(code - Placed.THERE - 1)
        if code != Placed.LOST:
            self._owner.acknowledge([(header.layer, header.tensor, header.offset, header.offset + len(raw))])
        if credit:
            self._owner.give_credit(credit)
        return Placed(code)

    def connection_lost(self, connection: AnyConnection) -> None:
        """Its claim went with it."""

    def stats(self) -> IncomingStats:
        return IncomingStats(*self._native.stats())

    def close(self) -> None:
        self._engine.forget(self._tag)
        self._native.close()
        self._owner = NOBODY

    def told(self, event: tuple[Any, ...]) -> None:
        kind = event[0]
        if kind == APPLIED:
            self._owner.on_applied(event[2])
        elif kind == CORRUPT:
            self._owner.on_corrupt(unpack_header(event[3]))
        elif kind == ODD:
            self._owner.on_odd(Odd(event[2]), unpack_header(event[3]))
