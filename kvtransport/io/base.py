"""What the rest of the package needs of a network: a few methods, implemented over TCP and over memory.

Only modules of this package touch sockets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeGuard, runtime_checkable

from ..buffers import PageList
from ..errors import KVError
from ..flow.telemetry import PathInfo

LAST_WORD_S = 1.0
"""How long a connection that is closed on purpose is kept so that the reason arrives."""


class BrokenStreamError(OSError):
    """A stream that is broken for a reason of its own; ``cause`` says it as the package's users see it."""

    def __init__(self, cause: KVError) -> None:
        super().__init__(cause.message)
        self.cause = cause


@dataclass(frozen=True, slots=True)
class TlsSession:
    """What a TLS handshake agreed on."""

    peer_certificate: bytes | None
    """The peer's verified certificate, DER; None: it showed none."""
    channel_binding: bytes | None
    """32 bytes that only the two ends know (RFC 9266); None where the implementation has no exporter."""
    cipher: str
    kernel: bool
    """Whether the kernel seals what is sent (kTLS)."""


class ByteStream(Protocol):
    """One connected, non-blocking, reliable byte stream. Belongs to one event loop."""

    peer: str
    local: str
    session: TlsSession | None
    """None: what passes can be read on its way."""

    def send(self, head: bytes, pages: PageList | None, start: int) -> int:
        """Send on from byte ``start`` of ``head ++ pages``.

        Returns the bytes taken, 0 when the stream would block. Raises OSError when the stream is broken.
        """

    def recv(self, pages: PageList | None, start: int, tail: bytearray, tail_start: int) -> int:
        """Receive into ``pages`` from ``start`` on, then into ``tail`` from ``tail_start`` on.

        Returns the bytes received, 0 when nothing is there. Raises EOFError at the end of the stream,
        OSError when it is broken.
        """

    def on_readable(self, callback: Callable[[], None] | None) -> None:
        """Call back whenever bytes are there (level-triggered); None stops."""

    def on_writable(self, callback: Callable[[], None] | None) -> None:
        """Call back whenever bytes can be taken (level-triggered); None stops."""

    def close(self) -> None:
        """Close; bytes already taken are still delivered. No callback follows. Idempotent."""

    def finish(self) -> asyncio.Future[None]:
        """Close after telling why: what was taken is delivered even if the peer keeps sending, whose bytes are thrown
        away for at most a second. (Closing with unread bytes resets a TCP connection and loses the last word.)
        Done, as the future says, when the peer has closed too or that second is over.
        """

    def abort(self) -> None:
        """Close at once with a reset where there is one. Idempotent."""

    def info(self) -> PathInfo | None:
        """What the system knows of the path; None where it says nothing."""

    def unsent_bytes(self) -> int:
        """Bytes taken that the peer has not acknowledged, as far as is known."""


@runtime_checkable
class TunableStream(Protocol):
    """A stream over a socket of which the system lets more be chosen."""

    def congestion(self) -> str:
        """The congestion control it runs."""

    def set_congestion(self, names: Sequence[str]) -> str | None:
        """Run the first of ``names`` that the system allows; returns it, None when it allows none."""

    def pace(self, bytes_per_s: float | None) -> None:
        """Send at most so fast (None: no limit)."""

    def keep_unsent(self, nbytes: int | None) -> None:
        """Take no more when so many bytes were not sent for the first time yet (None: as the system has it)."""


@lru_cache(maxsize=64)
def _tunable(kind: type) -> bool:
    return issubclass(kind, TunableStream)


def is_tunable(stream: ByteStream) -> TypeGuard[TunableStream]:
    """Whether it is a :class:`TunableStream`. ``isinstance`` with a protocol takes tens of microseconds where the answer is no."""
    return _tunable(type(stream))


class Listener(Protocol):
    """A bound port."""

    host: str
    port: int

    def close(self) -> None:
        """Stop accepting and free the port. Idempotent."""


class Network(Protocol):
    """Makes streams. ``options`` of a stream (buffers, congestion control) belong to the implementation."""

    def connect(self, host: str, port: int, *, local: str | None = None) -> Awaitable[ByteStream]:
        """Connect, from the address ``local``; raises ConnectError naming address and reason. Cancelling leaves no socket behind.

        The error's cause is a ConnectionRefusedError when the host answers that nobody listens there.
        """

    def listen(self, host: str, port: int, accept: Callable[[ByteStream], None]) -> Awaitable[Listener]:
        """Bind and call ``accept`` per incoming stream; raises ConfigError when the port is taken."""
