"""A get of a chain that is stored in segments: read from its nodes in parallel, from another owner where one fails."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from kvpool.errors import MissError
from kvtransport.buffers import PageList
from kvtransport.errors import DeadlineError, Fault, KVError, ManifestError, TransferCancelledError, TransferError
from kvtransport.layout import GroupKind
from kvtransport.manifest import Manifest
from kvtransport.transfer import IncomingTransfer, LayerTimes, TransferStats

from .cut import Part
from .put import add_stats, latest
from .segments import Slot

Open = Callable[[str, Part, Mapping[Slot, PageList], float], Awaitable[IncomingTransfer]]
"""(node, part, destinations by the part's slots, seconds left) -> the transfer, opened there."""


@dataclass(frozen=True)
class Source:
    """A part and the nodes that can give it, best first."""

    part: Part
    nodes: Sequence[str]


def destinations(part: Part, manifest: Manifest, into: Mapping[Slot, PageList]) -> dict[Slot, PageList]:
    """Where a part's bytes go, by its own slots."""
    out = {}
    for mine, whole in part.unit.whole.items():
        extent = manifest.by_slot[whole]
        if part.unit.kind is GroupKind.FULL:
            low, high = extent.byte_range(part.origin + part.start, part.boundary - part.start)
        else:
            low, high = extent.byte_range(part.origin + part.boundary, 0)
        out[mine] = into[whole].slice(low, high)
    return out


class ClusterGet:
    """An :class:`~kvtransport.transfer.IncomingTransfer` over parts."""

    def __init__(
        self,
        manifest: Manifest,
        sources: Sequence[Source],
        into: Mapping[Slot, PageList],
        open_part: Open,
        deadline: float,
    ) -> None:
        self.manifest = manifest
        loop = asyncio.get_running_loop()
        self._open, self._deadline, self._clock = open_part, deadline, loop.time
        self._opened_s = loop.time()
        self._error: KVError | None = None
        self._done: list[tuple[Part, TransferStats]] = []
        self._applied = {layer: asyncio.Event() for layer in manifest.by_layer}
        self._order: list[int] = []
        self._news = asyncio.Event()
        self._left = Counter(
            layer for source in sources for layer in {whole[0] for whole in source.part.unit.whole.values()}
        )
        work = [(s, destinations(s.part, manifest, into)) for s in sources]
        self._task = loop.create_task(self._run(work), name="cluster get")
        self._task.add_done_callback(self._ended)

    @property
    def stats(self) -> TransferStats:
        total = TransferStats(total_bytes=self.manifest.total_bytes, opened_s=self._opened_s)
        for part, mine in self._done:
            layers = {m[0]: w[0] for m, w in part.unit.whole.items()}
            for layer, times in mine.layers.items():
                latest(total.layers.setdefault(layers[layer], LayerTimes()), times)
        return add_stats(total, [s for _, s in self._done])

    async def layer(self, layer: int) -> None:
        if layer not in self._applied:
            raise ManifestError(f"layer {layer} is not in this transfer: {self.manifest.layers}", fault=Fault.LOCAL)
        await self._applied[layer].wait()
        if self._left[layer] and self._error is not None:
            raise self._error

    async def layers(self) -> AsyncIterator[int]:
        """Layer indices as they complete."""
        for at in range(len(self._applied)):
            while at >= len(self._order):
                if self._error is not None:
                    raise self._error
                self._news.clear()
                await self._news.wait()
            yield self._order[at]

    async def sealed(self) -> None:
        await asyncio.wait([self._task])
        if self._error is not None:
            raise self._error

    async def cancel(self, reason: str = "") -> None:
        if not self._task.done():
            self._error = self._error or TransferCancelledError(
                "cancelled by the consumer" + (f": {reason}" if reason else "")
            )
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self, work: Sequence[tuple[Source, Mapping[Slot, PageList]]]) -> None:
        tasks = [asyncio.ensure_future(self._fetch(source, into)) for source, into in work]
        try:
            await asyncio.gather(*tasks)
        except KVError as error:
            self._error = self._error or error
        finally:
            # Every part has let go of its memory before this ends.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if any(self._left.values()) and self._error is None:
            why = None if task.cancelled() else task.exception()
            self._error = (
                TransferError(f"the get failed: {why!r}") if why else TransferCancelledError("the get was given up")
            )
        self._news.set()
        if self._error is not None:
            for event in self._applied.values():
                event.set()

    async def _fetch(self, source: Source, into: Mapping[Slot, PageList]) -> None:
        """Read one part, from the first of its nodes that gives it."""
        layers = {m[0]: w[0] for m, w in source.part.unit.whole.items()}
        seen: set[int] = set()
        error: KVError = MissError("no node holds a part of what was asked for (any more)")
        for node in source.nodes:
            left = self._deadline - self._clock()
            if left <= 0:
                raise DeadlineError("the get did not end before its deadline")
            transfer: IncomingTransfer | None = None
            try:
                transfer = await self._open(node, source.part, into, left)
                async for layer in transfer.layers():
                    if layer not in seen:
                        seen.add(layer)
                        self._count(layers[layer])
                await transfer.sealed()
            except KVError as why:
                error = why
                continue
            finally:
                if transfer is not None:
                    # After this nothing of it touches the destinations: the next node may write there.
                    await transfer.cancel("done")
            self._done.append((source.part, transfer.stats))
            return
        raise error

    def _count(self, layer: int) -> None:
        self._left[layer] -= 1
        if not self._left[layer]:
            self._order.append(layer)
            self._applied[layer].set()
            self._news.set()
