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
from .hedging import Hedges
from .loads import Loads
from .put import add_stats, latest
from .segments import Slot

Open = Callable[[str, Part, Mapping[Slot, PageList], float], Awaitable[IncomingTransfer]]
"""(node, part, destinations by the part's slots, seconds left) -> the transfer, opened there."""


@dataclass(frozen=True)
class Routes:
    """How the parts of a get are read. ``order(nodes)`` puts the best first; ``again(part)`` looks anew for nodes that hold it (none:
    raises MissError); ``hedges`` None: of one node at a time.
    """

    order: Callable[[Sequence[str]], list[str]]
    loads: Loads
    hedges: Hedges | None
    again: Callable[[Part], Awaitable[Sequence[str]]]
    random: Callable[[], float]


ROUNDS = 3
"""Times that the nodes of a part are tried, when what went wrong may be tried again."""
PAUSE_S = 0.1
"""Before the second; twice as long before the third, each between half and all of it."""


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
        routes: Routes,
    ) -> None:
        self.manifest = manifest
        self._routes = routes
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
        """Read one part from the best of its nodes, from the others where it fails; look anew and try again if that is of use."""
        part, nodes = source.part, source.nodes
        state = _Fetched(part)
        for again in range(ROUNDS):
            try:
                stats = await self._hedged(state, self._routes.order(nodes), into)
            except KVError as error:
                pause = PAUSE_S * 2**again * (0.5 + self._routes.random() / 2)
                hopeless = not error.retryable or isinstance(error, MissError) or again + 1 == ROUNDS
                if hopeless or self._clock() + pause >= self._deadline:
                    raise
                await asyncio.sleep(pause)
                nodes = await self._routes.again(part)
            else:
                self._done.append((part, stats))
                return

    async def _hedged(self, state: _Fetched, nodes: Sequence[str], into: Mapping[Slot, PageList]) -> TransferStats:
        """Read a part; when it takes longer than nearly all like it did, from a second node as well: the first to end wins."""
        hedges, nbytes = self._routes.hedges, sum(p.nbytes for p in into.values())
        if hedges is None:
            return await self._read(state, nodes, into, first=True)
        hedges.read()
        begin = self._clock()
        delay = hedges.delay(nbytes) if len(nodes) > 1 else None
        first = asyncio.ensure_future(self._read(state, nodes, into, first=True))
        tasks = {first}
        taken = 0
        try:
            await asyncio.wait(tasks, timeout=delay)
            if not first.done() and hedges.take(nbytes):
                taken = nbytes
                # The second writes elsewhere: a chunk of its that does not verify must not land on what has verified.
                scratch = {slot: PageList.of(bytearray(pages.nbytes)) for slot, pages in into.items()}
                second = asyncio.ensure_future(self._read(state, nodes[1:], scratch, first=False))
                tasks.add(second)
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if not _won(first) and not _won(second):
                    await asyncio.wait(tasks)
                if _won(second) and not _won(first):
                    await self._end(first)  # after this nothing of it touches the destinations
                    for slot, pages in scratch.items():
                        into[slot].copy_from(pages)
                    hedges.won += 1
                    for layer in state.rest():
                        self._count(layer)
                    return second.result()
            return await first
        finally:
            try:
                await self._end(*tasks)
            finally:
                hedges.give_back(taken)
            if any(map(_won, tasks)):
                hedges.latencies.add(nbytes, self._clock() - begin)

    @staticmethod
    async def _end(*tasks: asyncio.Future[TransferStats]) -> None:
        """Cancel and wait to the end, however often this is cancelled itself: they write into destinations."""
        for task in tasks:
            task.cancel()
        interrupted: asyncio.CancelledError | None = None
        while left := [t for t in tasks if not t.done()]:
            try:
                await asyncio.wait(left)
            except asyncio.CancelledError as error:
                interrupted = error
        for task in tasks:
            if not task.cancelled():
                task.exception()  # looked at
        if interrupted is not None:
            raise interrupted

    async def _read(
        self, state: _Fetched, nodes: Sequence[str], into: Mapping[Slot, PageList], *, first: bool
    ) -> TransferStats:
        """Read a part from the first of the nodes that gives it; ``first``: layers count as they come."""
        nbytes = sum(p.nbytes for p in into.values())
        error: KVError = MissError("no node holds a part of what was asked for (any more)")
        for node in nodes:
            left = self._deadline - self._clock()
            if left <= 0:
                raise DeadlineError("the get did not end before its deadline")
            transfer: IncomingTransfer | None = None
            self._routes.loads.begin(node, nbytes)
            try:
                transfer = await self._open(node, state.part, into, left)
                async for layer in transfer.layers():
                    if first and state.news(layer):
                        self._count(state.layers[layer])
                await transfer.sealed()
            except KVError as why:
                error = why
                continue
            finally:
                self._routes.loads.end(node, nbytes)
                if transfer is not None:
                    # After this nothing of it touches the destinations: the next node may write there.
                    await transfer.cancel("done")
            return transfer.stats
        raise error

    def _count(self, layer: int) -> None:
        self._left[layer] -= 1
        if not self._left[layer]:
            self._order.append(layer)
            self._applied[layer].set()
            self._news.set()


class _Fetched:
    """A part and its layers that are there already."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.layers = {m[0]: w[0] for m, w in part.unit.whole.items()}
        """The part's layer -> the whole's."""
        self._seen: set[int] = set()

    def news(self, layer: int) -> bool:
        """Whether this is the first time that ``layer`` is there."""
        fresh = layer not in self._seen
        self._seen.add(layer)
        return fresh

    def rest(self) -> list[int]:
        """Layers of the whole that were not there yet; now they are."""
        return [whole for layer, whole in self.layers.items() if self.news(layer)]


def _won(task: asyncio.Future[TransferStats]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None
