"""The two faces of a transfer, whoever carries it.

:class:`kvtransport.sender.Sender` and :class:`kvtransport.receiver.Receiver` implement them over a link,
the embedded pool implements them over memory: a prefill loop written against :class:`OutgoingTransfer` streams to
another process, to a pool daemon or into its own process with the same lines.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from .buffers import PageList
from .manifest import Manifest


@dataclass(slots=True)
class LayerTimes:
    """When a layer passed each station; seconds on the clock of the process that recorded them (loop time)."""

    ready_s: float | None = None
    """Producer: the layer's last range was handed over."""
    first_byte_s: float | None = None
    """Consumer: the first header of the layer was read."""
    applied_s: float | None = None
    """Consumer: every byte verified and in its granted place."""
    acked_s: float | None = None
    """Producer: every byte acknowledged."""


@dataclass(slots=True)
class TransferStats:
    """Counters of one side of one transfer. Sizes in bytes, times in seconds."""

    total_bytes: int = 0
    moved_bytes: int = 0
    """Distinct payload bytes sent (or verified and applied)."""
    chunks: int = 0
    resent_bytes: int = 0
    duplicate_bytes: int = 0
    spilled_bytes: int = 0
    coded_raw_bytes: int = 0
    """Of the moved bytes those that travelled coded,"""
    coded_bytes: int = 0
    """and what they were on the wire."""
    corrupt_chunks: int = 0
    checksums_verified: int = 0
    credit_stall_s: float = 0.0
    opened_s: float | None = None
    sealed_s: float | None = None
    layers: dict[int, LayerTimes] = field(default_factory=dict)


class Handover(Protocol):
    """A ready unit that was handed over."""

    async def released(self) -> None:
        """Wait until the source memory may be reused: acknowledged, spilled, or the transfer has ended.

        Never raises because the transfer failed: memory is free then too.
        """

    @property
    def done(self) -> bool: ...


@runtime_checkable
class OutgoingTransfer(Protocol):
    """The producer's side."""

    @property
    def manifest(self) -> Manifest: ...

    @property
    def stats(self) -> TransferStats: ...

    def ready(
        self,
        layer: int,
        tensor: int,
        pages: PageList,
        *,
        first: int | None = None,
        tokens: int = 0,
        event: Callable[[], bool] | None = None,
    ) -> Handover:
        """Hand over a ready unit: ``tokens`` tokens from ``first`` (0 tokens: the state at ``first``); None means the whole extent.

        Returns at once. ``pages`` must hold exactly the unit's bytes and stay unchanged until the handover
        is released. ``event`` says whether the bytes are there yet (a device copy in flight); it is polled.
        Raises LayoutError when the manifest has no such unit, DestinationError when the sizes differ,
        TransferError when the transfer has ended.
        """

    async def seal(self) -> None:
        """Wait until every byte of the manifest was acknowledged and the consumer confirmed the seal.

        Raises ManifestError at once when something of the manifest was never handed over, else the transfer's error.
        """

    async def cancel(self, reason: str = "") -> None:
        """End the transfer; when this returns no source memory is touched again. Idempotent."""


@runtime_checkable
class IncomingTransfer(Protocol):
    """The consumer's side."""

    @property
    def manifest(self) -> Manifest:
        """What is coming; raises TransferError before the producer opened the transfer."""

    @property
    def stats(self) -> TransferStats: ...

    async def layer(self, layer: int) -> None:
        """Wait until every range of ``layer`` is verified and applied. Raises the transfer's error."""

    def layers(self) -> AsyncIterator[int]:
        """Layer indices in the order they complete; ends with the last one, raises the transfer's error."""

    async def sealed(self) -> None:
        """Wait for the seal: every layer of every group, one boundary, one fingerprint, all verified."""

    async def cancel(self, reason: str = "") -> None:
        """End the transfer; when this returns nothing writes to the granted memory again. Idempotent."""
