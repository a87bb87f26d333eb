"""Copying one chain of this node to another node. Nothing is deleted here: a copy is sealed and announced by its new node."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from kvpool.core import PoolCore
from kvpool.index import Path
from kvpool.keys import KeyChain, Namespace
from kvpool.match import View, restorable, unit_numbers
from kvtransport.errors import KVError
from kvtransport.layout import GroupKind

from .entries import Entry, decode, resident, short, tails
from .links import NodeLinks
from .locate import Whole
from .members import Member
from .pacing import Pacer
from .peers import MAX_KEYS
from .segments import SEGMENT_BLOCKS, segment_key

STEP_S = 30.0
"""Deadline of one transfer, and as long again for every STEP_BYTES: a whole chain of 128K tokens may be gigabytes."""
STEP_BYTES = 256 << 20
ANSWER_S = 5.0
PRIORITY = -1
"""Below transfers that somebody waits for."""


def last_segment(ns: Namespace, keys: Sequence[bytes]) -> tuple[bytes, int]:
    """(segment key, first block) of a chain's last segment."""
    first = (len(keys) - 1) // SEGMENT_BLOCKS * SEGMENT_BLOCKS
    return segment_key(ns, keys[first]), first


class Copyable:
    """What this node can restore of a path, as of now: at ``points`` (tokens, ascending; none: nothing is worth copying)."""

    def __init__(self, core: PoolCore, ns: Namespace, path: Path) -> None:
        self._view: View = core.view(ns, _chain_of(ns, path))
        points = restorable(self._view)
        if not any(g.kind is GroupKind.RECURRENT for g in ns.layout.groups):
            points = points[-1:]
        self.ns, self.points = ns, points
        # Blocks behind the last state restore nothing.
        self.keys = list(path.keys[: points[-1] // ns.block_tokens]) if points else []
        self.tail = path.tail if path.tail is not None and points and points[-1] == path.tail[0] else None
        self.chain = _chain_of(ns, Path(self.keys, self.tail))

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
        ends = [p // step - 1 - first for p in self.points if p > first * step and p % step == 0]
        if self.tail is not None and not self._tail_in(entry, first, max(numbers) + 1):
            return False
        for group, rule in enumerate(self._view.rules):
            row = there[numbers[group]]
            if rule.kind is GroupKind.RECURRENT and not bool(row[ends].all()):
                return False
            if rule.kind is GroupKind.FULL and not bool(row.all()):
                return False
            if rule.kind is GroupKind.SLIDING and not bool(row[ends].all()):
                return False
        return True

    def _tail_in(self, entry: Entry, first: int, units: int) -> bool:
        assert self.tail is not None
        position, key = self.tail
        where = (position // self.ns.block_tokens - 1 - first, position % self.ns.block_tokens, int(short([key])[0]))
        return any((t.block, t.offset, t.key) == where and all(t.units) for t in tails(entry, units))


def _chain_of(ns: Namespace, path: Path) -> KeyChain:
    if path.tail is None:
        return KeyChain.of_hashes(ns, path.keys, len(path.keys) * ns.block_tokens)
    return KeyChain.of_hashes(ns, path.keys, path.tail[0], dict([path.tail]))


def _stay(error: KVError) -> None:
    """Nothing is given up before the copy is over."""


class Copier:
    """Copies over ``links``; ``clock`` gives seconds."""

    def __init__(self, core: PoolCore, links: NodeLinks, clock: Callable[[], float]) -> None:
        self._core, self._links, self._clock = core, links, clock

    async def held(self, member: Member, what: Copyable) -> set[int]:
        """At which lengths (tokens) ``member``, by its own word, can restore the chain."""
        client = await self._links.client(member)
        known = Whole(what.ns, what.chain)
        answers: list[dict[str, bytes]] = []
        for at in range(0, len(known.keys), MAX_KEYS):
            keys = known.keys[at : at + MAX_KEYS]
            reply = await client.link.call("entries", {"keys": keys}, timeout_s=ANSWER_S)
            answers += [{member.id: entry} if entry else {} for entry in reply["entries"]]
        known.fill(answers, {member.id: member.incarnation})
        return {n for view in known.views.values() for n in restorable(view)}

    async def copy(self, member: Member, what: Copyable, held: set[int], pacer: Pacer, may: Callable[[], bool]) -> int:
        """Copy to ``member`` what it lacks of the chain when it has what :meth:`held` says; returns the bytes, fewer than all
        when ``may`` says no in between.

        Raises MissError (evicted here meanwhile), PoolFullError, PrefixMissingError, LinkError, NoNodeError, and RefusedError
        when it does not take this node for one that speaks for the chain's tenant.
        """
        client = await self._links.open(member, what.ns)
        there, moved = set(held), 0
        for point in what.points:
            if point in there:
                continue
            start = max((n for n in there if n <= point and n % what.ns.block_tokens == 0), default=0)
            extents = what.ns.layout.extents(point, start=start, align=what.ns.block_tokens)
            nbytes = sum(e.nbytes for e in extents)
            # Before anything is pinned: the pace may take longer than a transfer has.
            await asyncio.sleep(pacer.wait(self._clock(), nbytes))
            if not may():  # it waited, and what it goes by may have grown old
                return moved
            deadline_s = STEP_S * (1 + nbytes / STEP_BYTES)
            get = self._core.plan_get(
                what.ns, what.chain, boundary=point, start=start, deadline=self._core.clock() + deadline_s + 1.0
            )
            # Its deadline is the sender's: the blocks are not given up while that may still read them.
            get.on_failed = _stay
            try:
                sender = await client.put(
                    what.ns, what.chain, boundary=point, start=start, deadline_s=deadline_s, priority=PRIORITY
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
            there.add(point)
        return moved
