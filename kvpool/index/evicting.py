"""Evicting from a prefix tree: leaves first, with what is of no use without them, and ancestors that only they kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from kvpool.arena import PageArena, Slabs
from kvpool.eviction import FIRST, Eviction, GhostList
from kvpool.keys import Namespace
from kvpool.placement import Geometry

from .nodes import ROOT, Nodes
from .ranking import Ranking
from .residency import Residency


class Watcher(Protocol):
    """Who is told what becomes resident and what goes; called from inside the change, must not change the tree."""

    def stored(self, tree: Residency, unit: int, nodes: Nodes) -> None: ...

    def removed(self, tree: Residency, unit: int, nodes: Nodes) -> None: ...


class Evicting(Ranking):
    """Gives slabs to ``free`` and leaves ghosts at ``clock`` seconds."""

    def __init__(
        self,
        ns: Namespace,
        eviction: Eviction,
        ghosts: GhostList,
        free: Callable[[list[Slabs]], None],
        clock: Callable[[], float],
        geometry: Geometry,
        arena: PageArena,
    ) -> None:
        super().__init__(ns, eviction, ghosts, geometry, arena)
        self.number = eviction.add(self)
        self._free, self._clock = free, clock
        self.watcher: Watcher | None = None
        """Told of every change of what is resident."""

    def evict(self, unit: int, node: int, why: str, *, below: float = float("-inf"), pages: int = 0) -> int:
        """Free what :meth:`check` allowed, with what is of no use without it; see :class:`kvpool.eviction.Shelf`."""
        whole = unit == self.full or self._position[node] % self.ns.block_tokens
        run = self._run(node, below, pages) if unit == self.full else [node]
        nodes = np.array(run, dtype=np.int32)
        keys = self._table.keys(nodes)
        turns = self._turn[nodes]
        slabs: list[Slabs] = []
        lost = -int(self._queued[unit, node])  # whose place the order has given up already
        for u in range(len(self.units)) if whole else [unit]:
            there = self._resident[u, nodes]
            held = nodes[there]
            if not len(held):
                continue
            for group in self.units[u]:
                slabs.append(self._slabs_at(group, held))
                self._slabs[group].drop(held)
                self.group_slabs[group] -= len(held)
                self.group_pages[group] -= slabs[-1].page_count
            self._entries[u] -= len(held)
            self.unpinned_pages -= int(self._pages[u, held].sum())
            lost += int(self._queued[u, held].sum())
            self._resident[u, held] = self._queued[u, held] = False
            self._generation[u, held] += 1
            gone = keys if len(held) == len(run) else [k for k, was in zip(keys, there.tolist(), strict=True) if was]
            self._ghosts.add(self.number, u, gone, self._clock(), why, turns[there])
            if self.watcher is not None:
                self.watcher.removed(self, u, held)
        self._free(slabs)
        if not whole:
            self._check_orphan(node)
        self._table.remove_all(nodes[:-1])  # none of them has tails, or is one
        self._children[nodes[1:]] = 0
        self.prune(run[-1])
        if lost:
            self._eviction.forget(self.tenant, lost)
        return len(run)

    def _run(self, node: int, below: float, pages: int) -> list[int]:
        """The leaf ``node`` and what goes right after it: ancestors that only it keeps, that rank ``below``, for ``pages`` pages."""
        full = self.full
        assert full is not None
        run = [node]
        if self._position[node] % self.ns.block_tokens:
            return run
        freed = int(self._pages[:, node].sum(where=self._resident[:, node]))
        looked = 32
        while freed < pages:
            above = self._ancestors(run[-1], looked)
            there = self._resident[:, above]
            ranks = self._rank[full, above]
            bare = there.sum(axis=0) == 1  # else what else it holds has ranks of its own
            if self._policy.orphans_first and self._ends:
                ranks = np.where(bare, FIRST, ranks)
            goes = (self._children[above] == 1) & (self._pins[full, above] == 0) & there[full] & bare & (ranks < below)
            sums = freed + np.cumsum(self._pages[full, above])
            count = min(int(np.argmin(goes)) if not goes.all() else len(goes), int(sums.searchsorted(pages)) + 1)
            if count:
                run += above[:count].tolist()
                freed = int(sums[count - 1])
                self._policy.evicted(float(ranks[:count].max()))
            if count < looked:
                break
            looked *= 4
        return run

    def clear(self, why: str = "cleared") -> int:
        """Evict all that is not pinned; returns how many entries went."""
        before = sum(self._entries)
        held = np.flatnonzero(self._resident.any(axis=0))
        for node in held[np.argsort(-self._position[held], kind="stable")].tolist():
            for unit in np.flatnonzero(self._resident[:, node]).tolist():
                if not self._resident[unit, node] or self._pins[unit, node]:
                    continue
                if unit == self.full and self._children[node]:
                    continue
                queued = bool(self._queued[unit, node])
                self.evict(unit, node, why)
                if queued:
                    self._eviction.forget(self.tenant, 1)
        return before - sum(self._entries)

    def prune(self, node: int) -> None:
        """Forget ``node`` and its ancestors as far as they hold nothing and lead nowhere."""
        while node != ROOT and not self._children[node] and not self._resident[:, node].any():
            parent = int(self._parent[node])
            self._forget(node)
            if parent != ROOT:
                self._children[parent] -= 1
                if not self._children[parent] and self.full is not None:
                    self._check_orphan(parent)
                    if not self._pins[self.full, parent]:
                        self._offer(self.full, np.array([parent], dtype=np.int32))
            node = parent
