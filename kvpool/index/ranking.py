"""Recency and pins of a prefix tree: when an entry would go, and what keeps it."""

from __future__ import annotations

import numpy as np

from kvpool.arena import PageArena
from kvpool.eviction import BLOCKED, FIRST, GONE, Eviction, GhostList
from kvpool.keys import Namespace
from kvpool.placement import Geometry

from .nodes import Nodes
from .residency import Residency, Selection


class Ranking(Residency):
    """Ranks entries by the policy of ``eviction`` and queues there what can be evicted."""

    def __init__(
        self, ns: Namespace, eviction: Eviction, ghosts: GhostList, geometry: Geometry, arena: PageArena
    ) -> None:
        super().__init__(ns, ghosts, geometry, arena)
        self.unpinned_pages = 0
        self._eviction, self._policy = eviction, eviction.policy

    def touch(self, selection: Selection, *, used: bool = False) -> None:
        """Make ``selection`` the most recently used, what is nearer to the root more so.

        ``used`` counts as a use of what is in it.
        """
        longest = max((len(nodes) for _, nodes in selection), default=0)
        if not longest:
            return
        base = self._eviction.tick(longest + 1)
        last = max((nodes[-1] for _, nodes in selection if len(nodes)), key=lambda n: int(self._position[n]))
        kind = int(self._kind[last])
        for unit, nodes in selection:
            if used:
                self._uses[unit, nodes] += 1
            touches = base + np.arange(len(nodes) - 1, -1, -1)
            ranks = self._policy.rank(touches, self._uses[unit, nodes], self._value[unit, nodes], kind)
            if ranks is not None:
                self._rank[unit, nodes] = ranks

    def pin(self, selection: Selection) -> None:
        """Keep ``selection`` until :meth:`unpin` of the same."""
        for unit, nodes in selection:
            self._pins[unit, nodes] += 1
            self.unpinned_pages -= int(self._pages[unit, nodes[self._pins[unit, nodes] == 1]].sum())

    def unpin(self, selection: Selection) -> None:
        for unit, nodes in selection:
            self._pins[unit, nodes] -= 1
            freed = nodes[self._pins[unit, nodes] == 0]
            self.unpinned_pages += int(self._pages[unit, freed].sum())
            self._offer(unit, freed)

    def check(self, unit: int, node: int, generation: int) -> float:
        """The entry's rank, BLOCKED or GONE (see :class:`kvpool.eviction.Shelf`)."""
        if self._generation[unit, node] != generation or not self._resident[unit, node]:
            return GONE
        if self._pins[unit, node] or (unit == self.full and self._children[node]):
            self._queued[unit, node] = False
            return BLOCKED
        return float(self._rank[unit, node])

    def uses(self, unit: int, node: int) -> int:
        return int(self._uses[unit, node])

    def set_uses(self, unit: int, node: int, uses: int) -> None:
        self._uses[unit, node] = uses

    # -- queueing --------------------------------------------------------------------------------

    def _offer(self, unit: int, nodes: Nodes) -> None:
        """Queue for eviction what is not queued yet."""
        nodes = nodes[~self._queued[unit, nodes] & self._resident[unit, nodes]]
        if unit == self.full and not self._policy.queues_interior:
            nodes = nodes[self._children[nodes] == 0]  # the others are offered when they have become leaves
        self._queued[unit, nodes] = True
        generations = self._generation[unit, nodes].tolist()
        names = [(self.number, unit, node, age) for node, age in zip(nodes.tolist(), generations, strict=True)]
        self._eviction.push_all(self.tenant, names, self._rank[unit, nodes].tolist())

    def _demote(self, unit: int, node: int, rank: float) -> None:
        """Have an entry evicted earlier than its order knows: the old place in it becomes void when it comes up."""
        if self._rank[unit, node] > rank:
            self._rank[unit, node] = rank
            if self._queued[unit, node]:
                self._queued[unit, node] = False
                self._offer(unit, np.array([node], dtype=np.int32))
                self._eviction.forget(self.tenant, 1)

    def _check_orphan(self, node: int) -> None:
        """Blocks at the end of a sequence that lost its checkpoint can only be evicted: the policy may want them first."""
        if self.full is None or not self._ends or not self._policy.orphans_first:
            return
        if self._resident[self.full, node] and not self._children[node] and not self._resident[self._ends, node].any():
            self._demote(self.full, node, FIRST)
