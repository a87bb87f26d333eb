"""The tree itself: paths and checkpoints grown from key chains, slabs placed, and what a stored sequence says to the policy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kvpool.arena import Slabs
from kvpool.errors import KeyChainError
from kvpool.eviction import Stored
from kvpool.eviction.flops import FlopsModel
from kvpool.eviction.segments import describe
from kvpool.keys import KeyChain

from .evicting import Evicting
from .nodes import ROOT, Nodes
from .residency import NO_NODES

Floats = NDArray[np.float64]


class Tree(Evicting):
    """The index of ``ns``. ``free`` takes the slabs of what is evicted, ``clock`` gives seconds for ghosts.

    ``arena`` is where the slabs lie, ``geometry`` how large they are.
    """

    @cached_property
    def flops(self) -> FlopsModel:
        """What a prefix saves; may be set to another model."""
        return FlopsModel(self.ns.layout)

    def check_path(self, keys: list[bytes]) -> None:
        """Raise KeyChainError when a key of the chain is known at another place.

        Only engines' own hashes can do that: they must depend on everything before the block.
        """
        new = keys[len(self.find(keys)) :]
        absent = self._table.absent(new, 0)
        if absent < len(new):
            raise KeyChainError(
                f"block hash {new[absent].hex()[:16]} ({absent} after the known prefix) is already known after other blocks: "
                "hashes must depend on everything before them"
            )

    def grow_path(self, keys: list[bytes]) -> Nodes:
        """The nodes of the whole chain ``keys``, made where they are missing. Raises as :meth:`check_path`."""
        path = self.find(keys)
        first = len(path)
        if first == len(keys):
            return path
        try:
            new = self._new_nodes(keys[first:])
        except ValueError:
            self.check_path(keys)
            raise
        path = np.concatenate([path, new])
        self._parent[new] = path[first - 1 : -1] if first else np.r_[np.int32(ROOT), new[:-1]]
        self._position[new] = np.arange(first + 1, len(path) + 1, dtype=np.int32) * self.ns.block_tokens
        self._take_turns(keys, path, first)
        parents = path[max(0, first - 1) : -1]
        self._children[parents] += 1
        return path

    def grow_tail(self, chain: KeyChain, position: int, path: Nodes) -> int:
        """The node of an off-grid checkpoint, made when it is missing."""
        known = self.find_tail(chain, position, path)
        if known is not None:
            return known
        block = position // self.ns.block_tokens
        parent = int(path[block - 1]) if block else ROOT
        key = chain.key_at(position)
        if self._table.get(key) >= 0:
            raise KeyChainError(f"checkpoint key {key.hex()[:16]} is already known as an engine's block hash")
        node = int(self._new_nodes([key])[0])
        self._parent[node], self._position[node] = parent, position
        self._turn[node] = 1 if parent == ROOT else self._turn[parent]
        added = self._policy.kind_of(1, position)
        self._kind[node] = added if parent == ROOT else self._kind[parent]
        if parent != ROOT:
            self._children[parent] += 1
            self._with_tails[parent] = True
        here = self._tails.setdefault(parent, {})
        here[position] = here.get(position, 0) + 1
        return node

    def turn_after(self, path: Nodes) -> int:
        """The turn of a sequence that goes on after ``path``: one more than that of its last node, 1 after the root."""
        return int(self._turn[path[-1]]) + 1 if len(path) else 1

    def _take_turns(self, keys: list[bytes], path: Nodes, first: int) -> None:
        """Turns and kinds of the new nodes ``path[first:]``; the turns of nodes that were evicted lately are remembered."""
        turn, unit = self.turn_after(path[:first]), 0 if self.full is None else self.full
        known = self._ghosts.turns(self.number, unit, keys[first:])
        at = first + len(known)
        if len(known):
            self._turn[path[first:at]] = known
            turn = int(known[-1]) + 1
        self._turn[path[at:]] = turn
        self._kind[path[first:]] = self._policy.kind_of(
            int(self._turn[path[-1]]), (len(keys) - at) * self.ns.block_tokens
        )

    def place(self, unit: int, nodes: Nodes, slabs: Sequence[Slabs], path: Nodes = NO_NODES) -> list[Slabs]:
        """Make ``slabs[i][j]`` (group ``units[unit][i]``, node ``nodes[j]``) resident; returns those of nodes that have them already.

        ``path`` leads to the last of ``nodes``: what a checkpoint saves is counted from the one before it.
        """
        there = self._resident[unit, nodes]
        spare: list[Slabs] = [column.take(there) for column in slabs] if there.any() else []
        fresh = nodes[~there]
        if not len(fresh):
            return spare
        pages = 0
        for group, column in zip(self.units[unit], slabs, strict=True):
            new = column.take(~there)
            self._slabs[group].put(fresh, new)
            self.group_slabs[group] += len(new)
            self.group_pages[group] += new.page_count
            pages += new.pages.shape[1]
        self._resident[unit, fresh] = True
        self._entries[unit] += len(fresh)
        self._pages[unit, fresh] = pages
        self._uses[unit, fresh] = 0
        self._value[unit, fresh] = self._saved(unit, fresh, path) / (self._pages[unit, fresh] * self._arena.page_bytes)
        touches = self._eviction.tick(len(fresh) + 1) + np.arange(len(fresh) - 1, -1, -1)
        self._rank[unit, fresh] = self._policy.first_rank(
            touches, self._value[unit, fresh], self._pages[unit, fresh], int(self._kind[fresh[-1]])
        )
        self.unpinned_pages += pages * len(fresh)
        if len(self._ghosts):
            self._ghosts.drop(self.number, unit, self._table.keys(fresh))
        self._offer(unit, fresh)
        if self.watcher is not None:
            self.watcher.stored(self, unit, fresh)
        return spare

    def _saved(self, unit: int, nodes: Nodes, path: Nodes) -> Floats:
        """FLOPs that each of ``nodes`` saves relative to its parent: the block before it, or the checkpoint before it.

        The blocks of one window serve one checkpoint and share what it saves.
        """
        stops = self._position[nodes].astype(np.int64)
        if unit == self.full:
            step = self.ns.block_tokens
            return self.flops.upto(stops) - self.flops.upto(np.maximum(0, (stops - 1) // step * step))
        ends = self._position[path[self._resident[unit, path]]].astype(np.int64)
        gap = 0 if unit == self.state else self.ns.block_tokens
        return self.flops.between_checkpoints(stops, ends, gap)

    def stored(self, path: Nodes) -> None:
        """Everything of a sequence along ``path`` is placed: demote what it supersedes, tell a policy that learns."""
        if not len(path):
            return
        for unit in self._ends:
            for node in self._superseded(unit, path):
                self._demote(unit, node, self._policy.superseded(float(self._rank[unit, node])))
        if self._policy.learns and self.full is not None:
            self._policy.learn(self._describe(path, self.full))

    def _superseded(self, unit: int, path: Nodes) -> list[int]:
        """What served the last checkpoint but one of ``path``, if its sequence only went on from there: a state, or a window's blocks."""
        window = self.rules[self.units[unit][0]].window
        need = 1 if window is None else -(-(window - 1) // self.ns.block_tokens)
        at = np.flatnonzero(self._resident[unit, path])
        if not len(at):
            return []
        at = at[at <= at[-1] - need]
        if not len(at) or self._children[path[at[-1]]] > 1:
            return []
        older: list[int] = path[at[at > at[-1] - need]].tolist()
        return older

    def _added(self, path: Nodes) -> int:
        """How many blocks of ``path`` were known before the sequence that grew it last: all of its own have one turn."""
        turns = self._turn[path]
        return len(path) - int(np.argmin(np.append(turns[::-1] == turns[-1], False)))

    def _describe(self, path: Nodes, full: int) -> Stored:
        """The sequence as a policy that learns sees it."""
        ends = np.asarray(self._ends, dtype=np.intp)[:, None]
        resident = self._resident[ends, path]
        pages = self._pages[ends, path] * resident
        values = np.where(resident, self._value[ends, path], 0.0).sum(axis=0) / np.maximum(1, resident.sum(axis=0))
        return describe(
            lambda at: [(self.number, key) for key in self._table.keys(path[at])],
            positions=self._position[path].astype(np.int64),
            pages=self._pages[full, path],
            end_pages=pages.sum(axis=0),
            end_values=values,
            needs_ends=bool(self._ends),
            flops=self.flops,
            page_bytes=self._arena.page_bytes,
            added=self._added(path),
            kind=int(self._kind[path[-1]]),
        )
