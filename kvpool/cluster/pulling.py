"""Pulling a prefix into a cluster: its nodes are asked to read, from the nodes of others, what they lack of it.

The client decides what and where; the bytes go once over the inter-cluster link, from node to node. Blocks first, then the state at the
end, so that what was interrupted is no less than before, and the next pull copies only what is missing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from kvpool.errors import NoNodeError, PoolFullError
from kvpool.keys import KeyChain, Namespace
from kvpool.match import match
from kvpool.messages import chain_to_wire
from kvtransport.errors import ConfigError, DeadlineError, KVError
from kvtransport.layout import GroupKind

from .cut import Part, cut_get
from .fetching import MAX_SOURCES
from .links import NodeLinks
from .locate import Cut, Whole
from .lookup import Lookup
from .members import Member, Roster
from .placement import Rendezvous
from .segments import SEGMENT_BLOCKS, placement_name

WIDTH = 2
"""Parts that are under way at a time: while one is being asked for the other moves. Each may take its share of the bandwidth."""
TRIES = 3
"""Nodes that are asked to take a part."""
ANSWER_S = 1.0
"""Beyond the deadline, for a node's own answer that it has passed."""
DEADLINE_S = 300.0


class Pulled(msgspec.Struct):
    """What a pull has done so far. Lengths in tokens, of the chain's beginning."""

    cluster: str
    sources: list[str]
    """The clusters it may read from."""
    before: int = 0
    """What the cluster could restore by itself when it began."""
    wanted: int = 0
    """The longest that it could with what the sources have."""
    reached: int = 0
    """What it can now."""
    parts: int = 0
    """Parts that were missing."""
    done: int = 0
    moved_bytes: int = 0
    refused: int = 0
    """Times that a node had no memory for a part."""
    finished: bool = False
    """Whether all that was wanted is there."""
    note: str = ""
    """Why it is not."""


@dataclass(frozen=True)
class Piece:
    """One part to be read: tokens ``[start, boundary)`` of ``chain``, by the first of ``nodes`` that takes it, from ``sources``."""

    ns: Namespace
    chain: KeyChain
    start: int
    boundary: int
    sources: Sequence[str]
    nodes: Sequence[Member]


Order = Callable[[bytes], list[Member]]
Progress = Callable[[Pulled], None]


class Puller:
    """Of one client; ``order(name)`` says where a put of its would go. Seconds are those of ``now``."""

    def __init__(
        self, lookup: Lookup, links: NodeLinks, roster: Roster, order: Order, now: Callable[[], float]
    ) -> None:
        self._lookup, self._links, self._roster, self._order = lookup, links, roster, order
        self._now = now

    async def pull(
        self,
        ns: Namespace,
        chain: KeyChain,
        *,
        into: str,
        sources: Collection[str] | None,
        length: int | None,
        deadline_s: float,
        bytes_per_s: float | None,
        on_progress: Progress,
    ) -> Pulled:
        deadline = self._now() + deadline_s
        members = self._roster.members.values()
        clusters = {m.cluster for m in members}
        for name in {into, *(sources or ())} - clusters:
            raise ConfigError(f"there is no cluster {name!r}; there are {', '.join(sorted(clusters)) or 'none'}")
        others = sorted((clusters if sources is None else set(sources)) - {into})
        here = frozenset(m.id for m in members if m.cluster == into)
        there = frozenset(m.id for m in members if m.cluster in others)
        pulled = Pulled(into, others)
        limit = chain.tokens if length is None else min(length, chain.tokens)
        known = await self._lookup.find(ns, chain)
        work = _OfCut(known, here, there, limit) if isinstance(known, Cut) else _OfWhole(known, here, there, limit)
        pulled.before = pulled.reached = work.before
        pulled.wanted = work.wanted
        rate = None if bytes_per_s is None else bytes_per_s / WIDTH

        # Where this client would put it; one that writes to other clusters goes by the order of all who write to this one.
        home = Rendezvous(into)

        def nodes(name: bytes, first: str | None) -> list[Member]:
            found = [m for m in self._order(name) if m.cluster == into] or home.order(name, self._roster.writable())
            return sorted(found, key=lambda m: m.id != first)[:TRIES]

        if pulled.wanted > pulled.before:
            pulled.parts = work.count(nodes)
            on_progress(pulled)
            for stage in work.stages(nodes):
                if not await self._stage(stage, pulled, deadline, rate, on_progress):
                    break
            else:
                pulled.reached = pulled.wanted
        pulled.finished = pulled.reached >= pulled.wanted
        on_progress(pulled)
        return pulled

    async def _stage(
        self, stage: Sequence[Piece], pulled: Pulled, deadline: float, rate: float | None, on_progress: Progress
    ) -> bool:
        """Have pieces read that do not depend on each other; whether all of them were. The first that cannot be ends it."""
        left = iter(stage)
        ended = False

        async def lane(pieces: Iterator[Piece]) -> None:
            nonlocal ended
            for piece in pieces:
                if ended:
                    return
                try:
                    nbytes = await self._piece(piece, pulled, deadline, rate)
                except KVError as error:
                    ended = True
                    pulled.note = error.message
                    return
                pulled.moved_bytes += nbytes
                pulled.done += 1
                on_progress(pulled)

        async with asyncio.TaskGroup() as group:
            for _ in range(WIDTH):
                group.create_task(lane(left))
        return not ended

    async def _piece(self, piece: Piece, pulled: Pulled, deadline: float, rate: float | None) -> int:
        error: KVError = NoNodeError(f"cluster {pulled.cluster!r} has no node that takes new data")
        for member in piece.nodes:
            left = deadline - self._now()
            if left <= 0:
                raise DeadlineError("the deadline came first; the next pull goes on from here")
            args = {
                "ns": piece.ns.id,
                "chain": chain_to_wire(piece.chain),
                "boundary": piece.boundary,
                "start": piece.start,
                "sources": list(piece.sources[:MAX_SOURCES]),
                "deadline_s": left,
                **({} if rate is None else {"bytes_per_s": rate}),
            }
            try:
                client = await self._links.open(member, piece.ns)
                reply = await client.link.call("pull", args, timeout_s=left + ANSWER_S)
                return int(reply["bytes"])
            except DeadlineError:
                raise DeadlineError("the deadline came first; the next pull goes on from here") from None
            except PoolFullError as why:
                pulled.refused += 1
                error = why
            except KVError as why:
                self._links.failed(member, why)
                error = why
        raise error


Nodes = Callable[[bytes, str | None], list[Member]]
"""(placement name, the node that must come first if any) -> the nodes that may take it, best first."""


class _OfCut:
    """A chain in segments: each of its parts for itself."""

    def __init__(self, known: Cut, here: frozenset[str], there: frozenset[str], limit: int) -> None:
        self._known, self._here, self._there = known, here, there
        self.before = match(known.view(here), limit).length
        self.wanted = match(known.view(here | there), limit).length

    def count(self, nodes: Nodes) -> int:
        return sum(map(len, self.stages(nodes)))

    def stages(self, nodes: Nodes) -> list[list[Piece]]:
        blocks: list[Piece] = []
        states: list[Piece] = []
        for part in cut_get(self._known.units, self._known.blocks, start=0, boundary=self.wanted):
            piece = self._missing(part, nodes)
            if piece is not None:
                (blocks if part.unit.kind is GroupKind.FULL else states).append(piece)
        return [blocks, states]

    def _missing(self, part: Part, nodes: Nodes) -> Piece | None:
        number = next(n for n, u in enumerate(self._known.units) if u is part.unit)
        owners = self._known.owners(number, part.segment, part.stop_block)
        if self._here.intersection(owners):
            return None
        start, first = 0, None
        if part.unit.kind is GroupKind.FULL:
            # Whoever has its beginning goes on from there.
            for holder in self._known.holders.get((number, part.segment.index), ()):
                run = int(holder.blocks.argmin()) * part.unit.ns.block_tokens
                if holder.node in self._here and start < run < part.boundary:
                    start, first = run, holder.node
        name = placement_name(self._known.blocks[part.segment.first])
        where = nodes(name, first)
        if first is not None and (not where or where[0].id != first):
            start = 0  # it takes nothing new
        return Piece(
            part.unit.ns,
            part.unit.chain(self._known.blocks, part.segment, part.stop_block),
            start,
            part.boundary,
            [n for n in owners if n in self._there],
            where if start == 0 else where[:1],
        )


class _OfWhole:
    """A chain that lies whole on each node: one node's, piece after piece."""

    def __init__(self, known: Whole, here: frozenset[str], there: frozenset[str], limit: int) -> None:
        self._known = known
        lengths = {node: match(view, limit) for node, view in known.views.items()}
        self.before = max((m.length for n, m in lengths.items() if n in here), default=0)
        self.wanted = max((m.length for n, m in lengths.items() if n in there), default=0)
        self._sources = {n: m for n, m in lengths.items() if n in there and m.length == self.wanted}
        self._holders = {n: m for n, m in lengths.items() if n in here}

    def count(self, nodes: Nodes) -> int:
        return sum(map(len, self.stages(nodes)))

    def stages(self, nodes: Nodes) -> list[list[Piece]]:
        step = self._known.ns.block_tokens

        def reached(node: str) -> int:
            return max((n for n in self._holders[node].restorable if n % step == 0), default=0)

        first = max(self._holders, key=reached, default=None)
        where = nodes(placement_name(self._known.chain.blocks[0]), first) if self._known.chain.blocks else []
        start = reached(first) if first is not None and where and where[0].id == first else 0
        # All of it must come to lie on one node.
        where = where[:1]
        source = next(iter(self._sources.values()))
        out = []
        for point in source.restorable:
            if point <= start:
                continue
            if point == self.wanted or (point % step == 0 and point - start >= SEGMENT_BLOCKS * step):
                out.append([Piece(self._known.ns, self._known.chain, start, point, list(self._sources), where)])
                start = point
        return out
