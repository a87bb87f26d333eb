"""Copying what this node holds to the nodes that would hold it without it.

Nothing is deleted here: a copy is sealed and announced by its new node before the old one is forgotten.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from kvpool.core import PoolCore
from kvpool.errors import MissError, NoNodeError, PoolFullError, PrefixMissingError
from kvpool.keys import KeyChain, Namespace
from kvpool.match import restorable
from kvpool.security import DEFAULT_TENANT
from kvtransport.errors import KVError
from kvtransport.layout import GroupKind

from .entries import decode, resident, short
from .links import NodeLinks
from .locate import unit_numbers
from .members import Member
from .pacing import Pacer, Progress
from .placement import Placement
from .segments import SEGMENT_BLOCKS, placement_name, segment_key

STEP_S = 30.0
"""Deadline of one transfer."""
TRIES = 3


class Mover:
    """Moves over ``links``; ``members()`` gives those that take new data, ``clock`` seconds.

    While ``frozen()`` the view of the members is an old one, and nothing is moved by it.
    """

    def __init__(
        self,
        core: PoolCore,
        links: NodeLinks,
        placement: Placement,
        members: Callable[[], Sequence[Member]],
        clock: Callable[[], float],
        frozen: Callable[[], bool] = lambda: False,
    ) -> None:
        self._frozen = frozen
        self._core = core
        self._links = links
        self._placement = placement
        self._members = members
        self._clock = clock
        self.progress = Progress()

    async def run(self, *, deadline: float, bytes_per_s: float | None) -> Progress:
        """Copy everything that is worth it until ``deadline`` (seconds of the clock); what is most used goes first.

        Off-grid checkpoints, states that lead nowhere and blocks without a state behind them are left to be missed, and so is
        what belongs to tenants that a node cannot speak for.
        """
        progress = self.progress = Progress(running=True)
        pacer = Pacer(bytes_per_s, self._clock())
        work: list[tuple[Namespace, list[bytes]]] = []
        for ns in self._core.namespaces():
            if ns.tenant != DEFAULT_TENANT:
                progress.note = "what tenants other than the default hold is not moved"
                continue
            work += [(ns, keys) for keys in self._core.chains(ns)]
        progress.chains = len(work)
        for ns, keys in work:
            # A view thaws by being asked for again, in the background.
            while self._frozen() and self._clock() < deadline:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            if self._clock() >= deadline:
                progress.left = len(work) - progress.done
                progress.note = "the deadline came first"
                break
            try:
                await self._move(ns, keys, pacer)
            except KVError as error:
                progress.failed += 1
                progress.note = error.message
            progress.done += 1
        progress.running, progress.finished = False, True
        return progress

    async def _move(self, ns: Namespace, keys: list[bytes], pacer: Pacer) -> None:
        step = ns.block_tokens
        chain = KeyChain.of_hashes(ns, keys, len(keys) * step)
        points = restorable(self._core.view(ns, chain))
        if not any(g.kind is GroupKind.RECURRENT for g in ns.layout.groups):
            points = points[-1:]
        if not points:
            return
        error: KVError = NoNodeError("no other node takes new data")
        for member in self._placement.order(placement_name(keys[0]), self._members())[:TRIES]:
            try:
                if await self._has(member, ns, keys, points):
                    self.progress.skipped += 1
                    return
                await self._copy(member, ns, chain, points, pacer)
            except MissError:
                return  # evicted here meanwhile
            except (PoolFullError, PrefixMissingError) as why:
                error = why
                continue
            except KVError as why:
                self._links.failed(member, why)
                error = why
                continue
            return
        raise error

    async def _has(self, member: Member, ns: Namespace, keys: list[bytes], points: list[int]) -> bool:
        """Whether the member holds all that is restorable here of the chain's last segment, and thereby what leads there."""
        first = (points[-1] // ns.block_tokens - 1) // SEGMENT_BLOCKS * SEGMENT_BLOCKS
        mine = keys[first : first + SEGMENT_BLOCKS]
        client = await self._links.client(member)
        reply = await client.link.call("entries", {"keys": [segment_key(ns, keys[first])]}, timeout_s=5.0)
        entry = decode(reply["entries"][0])
        if entry is None:
            return False
        numbers = unit_numbers(self._core.view(ns, KeyChain.of_hashes(ns, keys[:1], ns.block_tokens)).rules)
        there = resident(entry, short(mine), max(numbers) + 1)
        wanted = [p // ns.block_tokens - 1 - first for p in points if p > first * ns.block_tokens]
        return all(bool(there[numbers[g], wanted].all()) for g in range(len(numbers)))

    async def _copy(self, member: Member, ns: Namespace, chain: KeyChain, points: list[int], pacer: Pacer) -> None:
        client = await self._links.open(member, ns)
        start = 0
        for point in points:
            get = self._core.plan_get(
                ns, chain, boundary=point, start=start, deadline=self._core.clock() + STEP_S + 1.0
            )
            try:
                nbytes = sum(e.nbytes for e in get.extents.values())
                await asyncio.sleep(pacer.wait(self._clock(), nbytes))
                sender = await client.put(ns, chain, boundary=point, start=start, deadline_s=STEP_S)
                try:
                    for slot in get.extents:
                        sender.ready(*slot, get.sources[slot])
                    await sender.seal()
                finally:
                    # Before the blocks are given back nothing reads them any more.
                    await sender.cancel("done")
                self.progress.moved_bytes += nbytes
            finally:
                get.close()
            start = point
