"""Copying one chain of this node to another node. Nothing is deleted here: a copy is sealed and announced by its new node."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from kvpool.core import PoolCore
from kvpool.keys import KeyChain, Namespace
from kvpool.match import View, restorable
from kvtransport.layout import GroupKind

from .entries import decode, resident, short
from .links import NodeLinks
from .locate import unit_numbers
from .members import Member
from .pacing import Pacer
from .segments import SEGMENT_BLOCKS, segment_key

STEP_S = 30.0
"""Deadline of one transfer."""
ANSWER_S = 5.0
PRIORITY = -1
"""Below transfers that somebody waits for."""


def last_segment(ns: Namespace, keys: Sequence[bytes]) -> tuple[bytes, int]:
    """(segment key, first block) of a chain's last segment."""
    first = (len(keys) - 1) // SEGMENT_BLOCKS * SEGMENT_BLOCKS
    return segment_key(ns, keys[first]), first


class Copyable:
    """What this node can restore of a chain, as of now: at ``points`` (tokens, ascending; none: nothing is worth copying)."""

    def __init__(self, core: PoolCore, ns: Namespace, keys: Sequence[bytes]) -> None:
        chain = KeyChain.of_hashes(ns, keys, len(keys) * ns.block_tokens)
        self._view: View = core.view(ns, chain)
        points = [p for p in restorable(self._view) if p % ns.block_tokens == 0]
        if not any(g.kind is GroupKind.RECURRENT for g in ns.layout.groups):
            points = points[-1:]
        self.ns, self.points = ns, points
        # Blocks behind the last state restore nothing.
        self.keys = list(keys[: points[-1] // ns.block_tokens]) if points else []
        self.chain = KeyChain.of_hashes(ns, self.keys, len(self.keys) * ns.block_tokens)

    @property
    def name(self) -> bytes:
        """Key of its last segment."""
        return last_segment(self.ns, self.keys)[0]

    def held_by(self, data: bytes) -> bool:
        """Whether the entry ``data`` has all of the last segment that is restorable here, and thereby what leads there."""
        entry = decode(data)
        if entry is None:
            return False
        step = self.ns.block_tokens
        first = last_segment(self.ns, self.keys)[1]
        numbers = unit_numbers(self._view.rules)
        there = resident(entry, short(self.keys[first:]), max(numbers) + 1)
        ends = [p // step - 1 - first for p in self.points if p > first * step]
        for group, rule in enumerate(self._view.rules):
            row = there[numbers[group]]
            if rule.kind is GroupKind.RECURRENT and not bool(row[ends].all()):
                return False
            if rule.kind is GroupKind.FULL and not bool(row.all()):
                return False
            if rule.kind is GroupKind.SLIDING and not bool(row[ends].all()):
                return False
        return True


class Copier:
    """Copies over ``links``; ``clock`` gives seconds."""

    def __init__(self, core: PoolCore, links: NodeLinks, clock: Callable[[], float]) -> None:
        self._core, self._links, self._clock = core, links, clock

    async def has(self, member: Member, what: Copyable) -> bool:
        """Whether ``member`` itself says that it has the chain."""
        client = await self._links.client(member)
        reply = await client.link.call("entries", {"keys": [what.name]}, timeout_s=ANSWER_S)
        return what.held_by(reply["entries"][0])

    async def copy(self, member: Member, what: Copyable, pacer: Pacer, may: Callable[[], bool]) -> int:
        """Copy the chain to ``member``; returns the bytes, fewer than all when ``may`` says no in between.

        Raises MissError (evicted here meanwhile), PoolFullError, PrefixMissingError, LinkError, NoNodeError.
        """
        client = await self._links.open(member, what.ns)
        moved = start = 0
        for point in what.points:
            get = self._core.plan_get(
                what.ns, what.chain, boundary=point, start=start, deadline=self._core.clock() + STEP_S + 1.0
            )
            try:
                nbytes = sum(e.nbytes for e in get.extents.values())
                await asyncio.sleep(pacer.wait(self._clock(), nbytes))
                if not may():  # it waited, and what it goes by may have grown old
                    return moved
                sender = await client.put(
                    what.ns, what.chain, boundary=point, start=start, deadline_s=STEP_S, priority=PRIORITY
                )
                try:
                    for slot in get.extents:
                        sender.ready(*slot, get.sources[slot])
                    await sender.seal()
                finally:
                    # Before the blocks are given back nothing reads them any more.
                    await sender.cancel("done")
                moved += nbytes
            finally:
                get.close()
            start = point
        return moved
