"""One connection: frames in, frames out, over any :class:`~kvtransport.io.base.ByteStream`.

Reading: the header first, then the payload straight into the place its owner names, hashed while it is hot;
the next header comes with the same system call as the end of a payload. Writing: control frames before data, one data
frame at a time, taken from the owner when there is room, so that a chunk goes to the connection that can send it now.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from .buffers import Hasher, PageList
from .errors import Fault, KVError, LimitError, PeerLostError, ProtocolError
from .io.base import BrokenStreamError, ByteStream
from .last_words import LastWords, Piece
from .wire import bodies
from .wire.frames import (
    DEFAULT_LIMITS,
    HEADER_BYTES,
    MAGIC,
    Flag,
    FrameType,
    Header,
    Limits,
    data_seed,
    encode_control,
    pack_header,
    seal_header,
    unpack_header,
)

READ_BUDGET = 4 << 20
"""Bytes read per readiness callback before other connections get their turn."""

MAX_CONTROL_BYTES = 32 << 20
"""Control frames queued for a peer that does not read them; more closes the connection."""


@dataclass(slots=True)
class OutFrame:
    """A data frame on its way: ``key`` is the sender's, ``pages`` may be swapped for the same bytes elsewhere."""

    head: bytes
    pages: PageList
    key: object
    checksummed: bool


class Owner(Protocol):
    """Who a connection reports to: a handshake first, then a link."""

    def control(self, connection: AnyConnection, header: Header, payload: bytes) -> None:
        """A verified control frame."""

    def stray(self, connection: AnyConnection, header: Header) -> None:
        """A DATA frame that no transfer claims; its payload is thrown away. Raises KVError to refuse the connection."""

    def lost(self, connection: AnyConnection, error: KVError) -> None:
        """The connection is gone; called once."""


class Chunks(Protocol):
    """Where DATA comes from and goes to, once the handshake is over."""

    def place_data(self, connection: Connection, header: Header) -> PageList:
        """Where the payload of a DATA frame goes (scratch for what nobody wants)."""

    def data_done(self, connection: Connection, header: Header, verified: bool) -> None:
        """The payload is in its place; not called for a voided claim. A coded one that verified goes to the owner instead."""

    def next_data(self, connection: Connection) -> OutFrame | None:
        """The next chunk for this connection, None when there is nothing to send."""


class AnyConnection(Protocol):
    """What links and handshakes use of a connection, whoever moves its bytes."""

    owner: Owner
    index: int
    closed: bool
    established: bool
    """Its handshake is over: whoever is at the other end speaks this protocol."""
    last_heard: float
    last_ping: float

    @property
    def stream(self) -> ByteStream: ...

    @property
    def sent_bytes(self) -> int: ...

    @property
    def received_bytes(self) -> int: ...

    @property
    def load(self) -> int:
        """0 idle, 1 sending, 2 its peer takes nothing now."""

    def start(self) -> None:
        """Begin to receive."""

    def limit(self, limits: Limits) -> None:
        """Largest payloads of frames from now on."""

    def heard(self, now: float) -> None:
        """Called by the owner's clock: notes whether anything arrived since the last call."""

    def send_control(self, frame: bytes) -> None:
        """Queue a whole control frame; it goes out before the next data frame."""

    @property
    def parked(self) -> bool:
        """It takes no chunk; control frames only."""

    def park(self, parked: bool) -> None:
        """Take no chunk from now on (the one being sent goes on), or take them again."""

    def flush(self) -> None:
        """Get queued control frames out as far as the stream takes them now."""

    def refuse(self, error: KVError) -> None:
        """Tell the peer what is wrong with what it sent, then close."""

    def leave(self, last: bytes, error: KVError) -> asyncio.Future[None] | None:
        """Close with the control frame ``last`` as the last word. A data frame that is half sent goes on before it, as zeros, for at
        most a second; where it has no checksum that would void it, the stream ends there.

        Returns what is done when nothing of the connection is left; None when it is closed already.
        """

    def fail(self, error: KVError, *, abort: bool = False) -> None:
        """Close and report ``error`` to the owner. Idempotent."""


class Connection:
    """See the module. Belongs to one event loop; every method returns at once."""

    def __init__(self, stream: ByteStream, owner: Owner, *, limits: Limits = DEFAULT_LIMITS, now: float = 0.0) -> None:
        self.stream = stream
        self.owner = owner
        self.chunks: Chunks | None = None
        self.index = 0
        self.closed = False
        self.established = False
        """Its handshake is over: whoever is at the other end speaks this protocol."""
        self.parked = False
        self.last_heard = now
        self.last_ping = now
        self.received_bytes = 0
        self.sent_bytes = 0
        self._limits = limits
        # reading
        self._head = bytearray(HEADER_BYTES)
        self._head_at = 0
        self._header: Header | None = None
        self._pages: PageList | None = None
        self._at = 0
        self._hasher = Hasher()
        self._hashing = False
        self._void = False
        self._heard = False
        # writing
        self._control: deque[bytes] = deque()
        self._control_bytes = 0
        self._frame: OutFrame | None = None
        self._out: bytes = b""
        self._out_at = 0
        self._blocked = False

    def start(self) -> None:
        self.stream.on_readable(self._readable)

    def limit(self, limits: Limits) -> None:
        self._limits = limits

    # -- reading -------------------------------------------------------------------------------

    def heard(self, now: float) -> None:
        """Called by the owner's clock: notes whether anything arrived since the last call."""
        if self._heard:
            self._heard = False
            self.last_heard = now

    def void_incoming(self) -> None:
        """Let the rest of the payload being received drain into scratch; its place is not written again."""
        if self._pages is not None and self._header is not None and self._header.type is FrameType.DATA:
            self._pages = PageList.scratch(self._pages.nbytes)
            self._hashing = False
            self._void = True

    def _readable(self) -> None:
        budget = READ_BUDGET
        try:
            while budget > 0 and not self.closed:
                pages = self._pages
                n = self.stream.recv(pages, self._at, self._head, self._head_at)
                if n == 0:
                    return
                self._heard = True
                self.received_bytes += n
                budget -= n
                if pages is not None:
                    n = self._took(pages, n)
                self._head_at += n
                if self._pages is None:
                    if self._head_at == HEADER_BYTES:
                        self._begin()
                    elif self._head_at >= len(MAGIC) and not self._head.startswith(MAGIC):
                        # A stranger may never send 64 bytes: the four it sent say enough.
                        self._unpack()
        except KVError as error:
            self.refuse(error)
        except EOFError:
            where = "" if self._head_at == 0 and self._pages is None else " in the middle of a frame"
            self.fail(PeerLostError(f"{self.stream.peer} closed the connection{where}"))
        except OSError as error:
            self.fail(self._broken(error))

    def _took(self, pages: PageList, n: int) -> int:
        """Account for ``n`` bytes of payload and next header; returns those that belong to the header."""
        stop = min(pages.nbytes, self._at + n)
        rest = n - (stop - self._at)
        if self._hashing:
            self._hasher.update_pages(pages.base, pages.pieces, self._at, stop)
        self._at = stop
        if stop == pages.nbytes:
            self._finish(pages)
        return rest

    def _unpack(self) -> Header:
        try:
            return unpack_header(self._head, self._limits)
        except ProtocolError as error:
            if self.established and not self._head.startswith(MAGIC):
                error.fault = Fault.NETWORK  # it does speak this protocol: this was damaged on its way
            raise

    def _begin(self) -> None:
        header = self._unpack()
        self._head_at = 0
        self._header = header
        self._void = False
        if header.type is FrameType.DATA and not header.flags & Flag.CODED:
            if self.chunks is None:
                self.owner.stray(self, header)
                self._pages = PageList.scratch(header.length)
            else:
                self._pages = self.chunks.place_data(self, header)
        else:
            self._pages = PageList.of(bytearray(header.length)) if header.length else None
        self._at = 0
        self._hashing = not header.flags & Flag.NO_CHECKSUM and self._pages is not None
        if self._hashing:
            self._hasher.reset(header.check)
        if self._pages is None:
            self.owner.control(self, header, b"")

    def _finish(self, pages: PageList) -> None:
        header, self._header, self._pages, self._at = self._header, None, None, 0
        assert header is not None
        if header.type is FrameType.DATA and not header.flags & Flag.CODED:
            if not self._void:
                verified = not self._hashing or self._hasher.intdigest() == header.checksum
                if self.chunks is not None:
                    self.chunks.data_done(self, header, verified)
            return
        if self._hasher.intdigest() != header.checksum:
            if header.type is FrameType.DATA:
                if self.chunks is not None:
                    self.chunks.data_done(self, header, False)
                return
            raise ProtocolError(
                f"{header.type.name} body from {self.stream.peer} failed its checksum; resetting the connection",
                fault=Fault.NETWORK,
            )
        self.owner.control(self, header, pages.tobytes())

    # -- writing -------------------------------------------------------------------------------

    @property
    def blocked(self) -> bool:
        return self._blocked or self.closed

    @property
    def load(self) -> int:
        return 2 if self.blocked else int(self.sending is not None)

    @property
    def sending(self) -> OutFrame | None:
        """The data frame that is partly sent."""
        return self._frame

    def send_control(self, frame: bytes) -> None:
        """Queue a whole control frame; it goes out before the next data frame."""
        if self.closed:
            return
        self._control.append(frame)
        self._control_bytes += len(frame)
        if self._control_bytes > MAX_CONTROL_BYTES:
            self.fail(
                LimitError(f"{self.stream.peer} does not read: {self._control_bytes} bytes of control frames wait")
            )

    def park(self, parked: bool) -> None:
        self.parked = parked  # whoever unparks it schedules the lanes

    def swap_source(self, pages: PageList) -> None:
        """Send the rest of the current data frame from ``pages`` (the same bytes, elsewhere)."""
        if self._frame is not None:
            self._frame.pages = pages

    def void_outgoing(self) -> None:
        """Finish the current data frame from zeros; its checksum then voids it.

        Without a checksum nothing would void it: the connection is reset instead.
        """
        if self._frame is None:
            return
        if self._frame.checksummed:
            self._frame.pages = PageList.zeros(self._frame.pages.nbytes)
        else:
            self.fail(
                PeerLostError("reset by this side: a cancelled transfer had an unchecked frame half sent"), abort=True
            )

    def pump(self, frames: int) -> bool:
        """Send up to ``frames`` frames; True when it stopped because of the number, not for lack of room or work."""
        try:
            while frames > 0 and not self.closed:
                if not self._out and not self._next():
                    self._watch(False)
                    return False
                pages = None if self._frame is None else self._frame.pages
                total = len(self._out) + (0 if pages is None else pages.nbytes)
                n = self.stream.send(self._out, pages, self._out_at)
                if n == 0:
                    self._watch(True)
                    return False
                self._out_at += n
                self.sent_bytes += n
                if self._out_at == total:
                    frames -= 1
                    self._frame, self._out, self._out_at = None, b"", 0
        except KVError as error:
            self.fail(error)
        except OSError as error:
            self.fail(self._broken(error))
        return not self.closed

    def _next(self) -> bool:
        if self._control:
            if len(self._control) == 1:
                self._out = self._control.popleft()
            else:
                self._out = b"".join(self._control)
                self._control.clear()
            self._control_bytes = 0
        else:
            self._frame = None if self.chunks is None else self.chunks.next_data(self)
            if self._frame is None:
                return False
            self._out = self._frame.head
        self._out_at = 0
        return True

    def _watch(self, blocked: bool) -> None:
        if blocked != self._blocked:
            self._blocked = blocked
            self.stream.on_writable(self._writable if blocked else None)

    def _writable(self) -> None:
        self._watch(False)
        if self.pump(4):
            # More to send: come back through the loop, so that reading gets its turn.
            self._watch(True)

    # -- ending --------------------------------------------------------------------------------

    def _broken(self, error: OSError) -> KVError:
        if isinstance(error, BrokenStreamError):
            return error.cause
        return PeerLostError(f"connection to {self.stream.peer} broke: {error.strerror or error}")

    def flush(self) -> None:
        """Get queued control frames out as far as the stream takes them now."""
        while not self.closed and (self._control or (self._out and self._frame is None)):
            if not self.pump(1):
                return

    def refuse(self, error: KVError) -> None:
        """Tell the peer what is wrong with what it sent, then close."""
        if not self.closed:
            self.send_control(encode_control(FrameType.ERROR, bodies.Error.of(error)))
            self.flush()
            self._close(error, self.stream.finish)

    def leave(self, last: bytes, error: KVError) -> asyncio.Future[None] | None:
        self.send_control(last)
        self.flush()
        if self.closed:
            return None
        left: list[asyncio.Future[None]] = []
        pieces: list[Piece] = []
        if self._out and (self._frame is None or self._frame.checksummed):
            # Half sent: it goes on as zeros, since its source is given back now.
            pieces.append((self._out, None if self._frame is None else PageList.zeros(self._frame.pages.nbytes)))
            pieces += [(frame, None) for frame in self._control]

        def close() -> None:
            left.append(LastWords(self.stream, pieces, self._out_at).gone if pieces else self.stream.finish())

        self._close(error, close)
        return left[0]

    def fail(self, error: KVError, *, abort: bool = False) -> None:
        """Close and report ``error`` to the owner. Idempotent."""
        self._close(error, self.stream.abort if abort else self.stream.close)

    def _close(self, error: KVError, close: Callable[[], object]) -> None:
        if self.closed:
            return
        self.closed = True
        self._pages = None
        self._control.clear()
        close()
        self.owner.lost(self, error)
        self._frame = None


def data_head(
    transfer: bytes,
    layer: int,
    tensor: int,
    offset: int,
    attempt: int,
    pages: PageList,
    *,
    checksum: bool,
    coded: bool = False,
) -> bytes:
    """The sealed header of a DATA frame; with ``checksum`` this reads every byte of ``pages``."""
    flags = (Flag.RESEND if attempt else 0) | (0 if checksum else Flag.NO_CHECKSUM) | (Flag.CODED if coded else 0)
    head = pack_header(
        FrameType.DATA,
        transfer=transfer,
        flags=flags,
        layer=layer,
        tensor=tensor,
        length=pages.nbytes,
        offset=offset,
        sequence=attempt,
    )
    return seal_header(head, pages.hash(data_seed(head))) if checksum else head
