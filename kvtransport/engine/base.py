"""What a link asks of whatever moves its chunks.

Two implementations: :mod:`.native` (threads in C over TCP sockets) and :mod:`.python` (the event loop, over any
:class:`~kvtransport.io.base.ByteStream`: the in-memory network of tests, and systems without the extension). Senders and
receivers keep the decisions; what is here follows rules that need none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Protocol

from ..buffers import PageList
from ..wire.frames import Header

if TYPE_CHECKING:
    from ..connection import AnyConnection

Slot = tuple[int, int]
"""(layer, tensor)"""
Applied = tuple[int, int, int, int, float]
"""(layer, tensor, start, stop, when the first header of the extent came)"""


@dataclass(frozen=True, slots=True)
class OutgoingStats:
    """Sizes in bytes, times in seconds. ``stalled_now_s``: for how long there has been work and no credit."""

    chunks: int = 0
    moved_bytes: int = 0
    resent_bytes: int = 0
    inflight_bytes: int = 0
    credit_left: int = 0
    stalled_now_s: float = 0.0
    stalled_s: float = 0.0


@dataclass(frozen=True, slots=True)
class IncomingStats:
    """Sizes in bytes."""

    chunks: int = 0
    verified: int = 0
    duplicate_bytes: int = 0
    applied_bytes: int = 0
    granted: int = 0
    """Credit, absolute."""


class Odd(IntEnum):
    """What is wrong with a DATA frame that was drained."""

    SLOT = 0
    BOUNDS = 1
    UNCHECKED = 2
    OVERLAP = 3
    RANGES = 4
    CREDIT = 5


class Placed(IntEnum):
    """What became of decoded bytes."""

    LOST = 0
    """Another copy of them is on its way into place, or the transfer has ended."""
    DONE = 1
    THERE = 2
    """They had been applied before."""


class OutgoingOwner(Protocol):
    def on_acked(self, acked: Sequence[tuple[int, int, int]], keys: Sequence[int]) -> None:
        """Newly acknowledged bytes per (layer, tensor), and the spans of which all is acknowledged: they are dropped."""


class IncomingOwner(Protocol):
    def on_applied(self, ranges: Sequence[Applied]) -> None:
        """Verified and in their places, told once each; neighbours may be joined."""

    def on_corrupt(self, header: Header) -> None:
        """A payload did not verify; its claim is void."""

    def on_odd(self, why: Odd, header: Header) -> None:
        """A frame that breaks a rule; it was drained."""

    def acknowledge(self, ranges: Sequence[tuple[int, int, int, int]]) -> None:
        """Say that these are applied (coded chunks, and the twin's: the native engine says so of others itself)."""

    def give_credit(self, limit: int) -> None:
        """Say that credit has moved (as above)."""


class Nobody:
    """The owner of what is closed: it hears of nothing. In the place of a transfer, which would otherwise keep itself alive until a
    garbage collector comes by."""

    def on_acked(self, acked: Sequence[tuple[int, int, int]], keys: Sequence[int]) -> None:
        pass

    def on_applied(self, ranges: Sequence[Applied]) -> None:
        pass

    def on_corrupt(self, header: Header) -> None:
        pass

    def on_odd(self, why: Odd, header: Header) -> None:
        pass

    def acknowledge(self, ranges: Sequence[tuple[int, int, int, int]]) -> None:
        pass

    def give_credit(self, limit: int) -> None:
        pass


NOBODY = Nobody()


class Outgoing(Protocol):
    """One transfer's chunks on their way out. Nothing leaves before :meth:`accept`."""

    def accept(self, chunk_bytes: int, credit: int) -> None:
        """Chunks of at most ``chunk_bytes`` may be cut, up to ``credit`` bytes since the start. Also ends :meth:`hold`."""

    def hold(self) -> None:
        """Send nothing until :meth:`accept` is called again."""

    def allow(self, limit: int) -> None:
        """This side's own limit, absolute as credit is; at first there is none. Bytes sent again do not count."""

    def grant(self, credit: int) -> None:
        """Absolute credit; a lower one is an old one."""

    def add(self, layer: int, tensor: int, start: int, pages: PageList) -> int:
        """Bytes that are ready; returns the key of the span."""

    def add_coded(self, layer: int, tensor: int, start: int, nbytes: int, payload: bytes) -> int:
        """As :meth:`add`, of ``nbytes`` that became ``payload``: one chunk, at most of the size that was accepted."""

    def uncut(self, layer: int, tensor: int, start: int) -> int:
        """Bytes never sent of the span that starts there; 0 when there is none."""

    def swap(self, layer: int, tensor: int, start: int, pages: PageList) -> bool:
        """The span's bytes lie in ``pages`` now; afterwards the old place is not read any more. False: there is none."""

    def ack(self, layer: int, tensor: int, start: int, stop: int) -> None:
        """These bytes were acknowledged. Raises KeyError for a slot that the transfer does not have."""

    def resend(self, layer: int, tensor: int, start: int, stop: int) -> int:
        """Send what is on its way in this range again; returns the bytes. Raises KeyError as :meth:`ack`."""

    def requeue(self, connection: AnyConnection) -> int:
        """Send again what ``connection``, which is gone, had; returns the bytes."""

    def stalled(self) -> float:
        """For how long there has been work and no credit, seconds."""

    def stats(self) -> OutgoingStats: ...

    def close(self) -> None:
        """End. When this returns, nothing reads a source any more; half-sent frames go on as zeros. Idempotent."""


class Incoming(Protocol):
    """One transfer's granted memory, its claims, and what is applied."""

    def applied(self) -> list[tuple[int, int, int, int]]: ...

    def contains(self, layer: int, tensor: int, start: int, stop: int) -> bool: ...

    def place(self, header: Header, raw: bytearray) -> Placed | Odd:
        """Decoded and verified bytes, which came under ``header``, into their place, if they still may. Applied, they
        are told as all are; acknowledging them and credit are done by this, over the owner."""

    def connection_lost(self, connection: AnyConnection) -> None:
        """Its claim is void."""

    def stats(self) -> IncomingStats: ...

    def close(self) -> None:
        """End. When this returns, nothing writes to the granted memory any more. Idempotent."""


class Lanes(Protocol):
    """The connections of one link as the transfers see them: whichever has room takes the next chunk."""

    def join(self, connection: AnyConnection) -> None:
        """The handshake of ``connection`` is over."""

    def leave(self, connection: AnyConnection) -> None:
        """``connection`` is closed."""

    def schedule(self) -> None:
        """Something may be sent."""

    def outgoing(
        self, owner: OutgoingOwner, transfer: bytes, slots: Sequence[Slot], *, priority: int, checksum: bool
    ) -> Outgoing: ...

    def incoming(
        self,
        owner: IncomingOwner,
        transfer: bytes,
        granted: Mapping[Slot, tuple[PageList, int]],
        *,
        window: int,
        unchecked: bool,
        eager: bool,
    ) -> Incoming:
        """``granted``: memory and bytes by (layer, tensor). ``eager``: the owner wants to hear of every range at once."""
