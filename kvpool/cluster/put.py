"""A put of a chain that is stored in segments: one transfer to its caller, many to the nodes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

from kvtransport.buffers import PageList
from kvtransport.errors import DestinationError, KVError
from kvtransport.layout import GroupKind
from kvtransport.manifest import Manifest
from kvtransport.transfer import Handover, LayerTimes, OutgoingTransfer, TransferStats

from .cut import Part, pieces
from .segments import Slot


class JointHandover:
    """A ready unit that went to several nodes."""

    def __init__(self, handovers: Sequence[Handover]) -> None:
        self._handovers = handovers

    @property
    def done(self) -> bool:
        return all(h.done for h in self._handovers)

    async def released(self) -> None:
        for handover in self._handovers:
            await handover.released()


def add_stats(total: TransferStats, parts: Iterable[TransferStats]) -> TransferStats:
    """Counters added up; stations of a layer are the latest of its parts (the first byte: the earliest)."""
    for stats in parts:
        for name in (
            "moved_bytes",
            "chunks",
            "resent_bytes",
            "duplicate_bytes",
            "spilled_bytes",
            "corrupt_chunks",
            "checksums_verified",
            "credit_stall_s",
        ):
            setattr(total, name, getattr(total, name) + getattr(stats, name))
    return total


def latest(times: LayerTimes, more: LayerTimes) -> None:
    """Take the later station of each (the earlier first byte)."""
    for name in ("ready_s", "applied_s", "acked_s"):
        known = [t for t in (getattr(times, name), getattr(more, name)) if t is not None]
        setattr(times, name, max(known, default=None))
    first = [t for t in (times.first_byte_s, more.first_byte_s) if t is not None]
    times.first_byte_s = min(first, default=None)


class ClusterPut:
    """An :class:`~kvtransport.transfer.OutgoingTransfer` over parts, each open on its node.

    A part whose node is lost fails the put when it is sealed; what the other nodes have sealed stays and is
    found. States are sealed after the blocks that lead to them.
    """

    def __init__(self, manifest: Manifest, parts: Sequence[tuple[Part, OutgoingTransfer]]) -> None:
        self.manifest = manifest
        self._parts = parts
        self._by_slot: dict[Slot, list[tuple[Part, Slot, OutgoingTransfer]]] = {}
        for part, transfer in parts:
            for mine, whole in part.unit.whole.items():
                self._by_slot.setdefault(whole, []).append((part, mine, transfer))
        self._errors: dict[int, KVError] = {}
        self._opened_s = asyncio.get_running_loop().time()
        self._sealed_s: float | None = None

    @property
    def stats(self) -> TransferStats:
        stats = [t.stats for _, t in self._parts]
        total = TransferStats(total_bytes=self.manifest.total_bytes, opened_s=self._opened_s, sealed_s=self._sealed_s)
        for (part, _), mine in zip(self._parts, stats, strict=True):
            layers = {m[0]: w[0] for m, w in part.unit.whole.items()}
            for layer, times in mine.layers.items():
                latest(total.layers.setdefault(layers[layer], LayerTimes()), times)
        return add_stats(total, stats)

    def ready(
        self,
        layer: int,
        tensor: int,
        pages: PageList,
        *,
        first: int | None = None,
        tokens: int = 0,
        event: Callable[[], bool] | None = None,
    ) -> JointHandover:
        extent = self.manifest.extent(layer, tensor)
        start, stop = (0, extent.nbytes) if first is None else extent.byte_range(first, tokens)
        if pages.nbytes != stop - start:
            raise DestinationError(
                f"layer {layer} tensor {tensor} bytes {start}..{stop}: the unit has {stop - start} bytes, the pages {pages.nbytes}"
            )
        ranges = [(s.first, s.tokens) for s in extent.spans] if first is None else [(first, tokens)]
        handovers: list[Handover] = []
        at = 0
        for begin, count in ranges:
            for part, slot, transfer in self._by_slot.get((layer, tensor), ()):
                for piece, length in pieces(part, begin, count):
                    low = at + (piece - begin) * extent.unit
                    mine = pages.slice(low, low + extent.unit * (length or 1))
                    try:
                        handovers.append(
                            transfer.ready(*slot, mine, first=piece - part.origin, tokens=length, event=event)
                        )
                    except KVError as error:
                        self._errors.setdefault(id(transfer), error)
            at += extent.unit * (count or 1)
        return JointHandover(handovers)

    async def seal(self) -> None:
        blocks = [t for p, t in self._parts if p.unit.kind is GroupKind.FULL]
        states = [t for p, t in self._parts if p.unit.kind is not GroupKind.FULL]
        error = await self._seal(blocks)
        if error is None:
            error = await self._seal(states)
        if error is not None:
            await self.cancel("another part of the put failed")
            raise error
        self._sealed_s = asyncio.get_running_loop().time()

    async def _seal(self, transfers: Sequence[OutgoingTransfer]) -> KVError | None:
        results = await asyncio.gather(*(t.seal() for t in transfers), return_exceptions=True)
        found: KVError | None = None
        for transfer, result in zip(transfers, results, strict=True):
            if isinstance(result, BaseException) and not isinstance(result, KVError):
                raise result
            if isinstance(result, KVError):
                found = found or self._errors.get(id(transfer), result)
        return found

    async def cancel(self, reason: str = "") -> None:
        await asyncio.gather(*(t.cancel(reason) for _, t in self._parts))
