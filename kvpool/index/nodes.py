"""Nodes of a prefix tree: numbers that keys lead to, their properties in columns, one row a node.

A hash table leads from key to node; a node knows its parent and the position (tokens) at the end of what it holds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpool.arena import PageArena
from kvpool.columns import Column
from kvpool.keys import KeyChain, Namespace
from kvpool.match import rules_of, unit_numbers
from kvpool.placement import Geometry
from kvpool.slabstore import SlabStore, new_store
from kvpool.table import ancestors, new_table
from kvtransport.layout import GroupKind

Nodes = NDArray[np.int32]

ROOT = -1
_FIRST_ROWS = 64


class Path(NamedTuple):
    """Block keys from a first block on, and the off-grid checkpoint at the end if there is one: its position (tokens) and key."""

    keys: list[bytes]
    tail: tuple[int, bytes] | None = None


class NodeTable:
    """The nodes of ``ns``: found by key, made and forgotten. ``arena`` and ``geometry`` say how large the slabs of its groups are."""

    def __init__(self, ns: Namespace, geometry: Geometry, arena: PageArena) -> None:
        self.ns = ns
        self.rules = rules_of(ns.layout)
        self.unit_of = unit_numbers(self.rules)
        """Unit of each group."""
        self.units: list[list[int]] = [[] for _ in range(1 + max(self.unit_of, default=-1))]
        """Groups of each unit."""
        for group, unit in enumerate(self.unit_of):
            self.units[unit].append(group)
        by_kind = {rule.kind: unit for rule, unit in zip(self.rules, self.unit_of, strict=True)}
        self.full: int | None = by_kind.get(GroupKind.FULL)
        self.state: int | None = by_kind.get(GroupKind.RECURRENT)
        self._ends = [u for u in range(len(self.units)) if u != self.full]
        self._table = new_table()
        self._slabs: list[SlabStore] = [
            new_store(rule.kind, arena, geometry.group_bytes[group], ns.block_tokens)
            for group, rule in enumerate(self.rules)
        ]
        self._tails: dict[int, dict[int, int]] = {}  # parent -> position -> tails there
        self._capacity = 0
        units = (len(self.units),)
        self._columns = {
            "_parent": Column(np.int32),
            "_position": Column(np.int32),
            "_children": Column(np.int32),
            "_with_tails": Column(np.bool_),
            "_turn": Column(np.int32),
            "_kind": Column(np.int16),
            # by unit
            "_resident": Column(np.bool_, units),
            "_queued": Column(np.bool_, units),
            "_pins": Column(np.int32, units),
            "_pages": Column(np.int32, units),
            "_rank": Column(np.float64, units),
            "_uses": Column(np.int32, units),
            "_value": Column(np.float32, units),
            "_generation": Column(np.int32, units),
        }
        self._show_columns()

    @property
    def tenant(self) -> str:
        return self.ns.tenant

    def __len__(self) -> int:
        """Nodes."""
        return len(self._table)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the index takes, room for nodes to come included (which takes none until they do)."""
        columns = sum(c.rows.nbytes for c in self._columns.values())
        return self._table.nbytes + columns + sum(s.nbytes for s in self._slabs)

    def place_of(self, node: int) -> tuple[int, int]:
        """(parent, position in tokens at the end of what the node holds); ROOT is the parent of first blocks."""
        return int(self._parent[node]), int(self._position[node])

    def places_of(self, nodes: Nodes) -> tuple[list[int], list[int]]:
        """Parents and positions of ``nodes``, as of :meth:`place_of`."""
        return self._parent[nodes].tolist(), self._position[nodes].tolist()

    def path_to(self, node: int) -> Path:
        """The path that ends with ``node``."""
        position = int(self._position[node])
        path = []
        while node != ROOT:
            path.append(node)
            node = int(self._parent[node])
        keys = self._table.keys(np.array(path[::-1], np.int32))
        if position % self.ns.block_tokens:
            return Path(keys[:-1], (position, keys[-1]))
        return Path(keys)

    # -- finding ---------------------------------------------------------------------------------

    def find(self, keys: list[bytes]) -> Nodes:
        """The nodes of the longest known prefix of the chain ``keys``."""
        nodes = np.empty(len(keys), np.int32)
        nodes = nodes[: self._table.find(keys, 0, nodes)]
        # An opaque key may be known under another parent, or as a tail: then this is not its chain.
        right = self._position[nodes] == np.arange(1, len(nodes) + 1, dtype=np.int32) * self.ns.block_tokens
        right[:1] &= self._parent[nodes[:1]] == ROOT
        right[1:] &= self._parent[nodes[1:]] == nodes[:-1]
        return nodes if right.all() else nodes[: int(np.argmin(right))]

    def branches_after(self, path: Nodes) -> bool:
        """Whether something follows the last node of ``path`` (False at the root: nothing comes before it)."""
        return bool(len(path)) and bool(self._children[path[-1]])

    def find_tail(self, chain: KeyChain, position: int, path: Nodes) -> int | None:
        """The node of the off-grid checkpoint at ``position``, given the path of the blocks before it."""
        block = position // self.ns.block_tokens
        if not chain.names(position) or len(path) < block:
            return None
        node = self._table.get(chain.key_at(position))
        parent = int(path[block - 1]) if block else ROOT
        if node < 0 or self._parent[node] != parent or self._position[node] != position:
            return None
        return node

    @property
    def has_tails(self) -> bool:
        """Whether there is any off-grid checkpoint."""
        return bool(self._tails)

    def tails_along(self, path: Nodes) -> bool:
        """Whether off-grid checkpoints hang on ``path``, or on the root."""
        return ROOT in self._tails or bool(self._with_tails[path].any())

    def _ancestors(self, node: int, most: int) -> Nodes:
        """The nearest ancestors of ``node``, at most so many."""
        found = np.empty(most, np.int32)
        return found[: ancestors(self._parent, node, found)]

    # -- making and forgetting -------------------------------------------------------------------

    def _new_nodes(self, keys: list[bytes]) -> Nodes:
        """Nodes for new keys; ValueError, making none, when one is known."""
        while self._table.high + len(keys) > self._capacity:
            self._extend()
        nodes = np.empty(len(keys), np.int32)
        self._table.add(keys, 0, nodes)
        self._children[nodes] = 0
        return nodes

    def _forget(self, node: int) -> None:
        """The node's number is free for another key."""
        self._table.remove(node)
        position = int(self._position[node])
        if position % self.ns.block_tokens:
            parent = int(self._parent[node])
            here = self._tails[parent]
            here[position] -= 1
            if not here[position]:
                del here[position]
            if not here:
                del self._tails[parent]
                if parent != ROOT:
                    self._with_tails[parent] = False

    def _extend(self) -> None:
        """Double the columns: only addresses, memory comes as nodes do."""
        capacity = max(_FIRST_ROWS, 2 * self._capacity)
        for name in self._columns:
            delattr(self, name)
        try:
            for column in self._columns.values():
                column.grow(capacity)
            for store in self._slabs:
                store.grow(capacity)
        finally:
            self._show_columns()
        self._capacity = capacity

    def _show_columns(self) -> None:
        """Have the columns as attributes: indexed by node, or by unit and node."""
        rows = {name: column.rows.T for name, column in self._columns.items()}
        self._parent: NDArray[np.int32] = rows["_parent"]
        self._position: NDArray[np.int32] = rows["_position"]
        self._children: NDArray[np.int32] = rows["_children"]
        self._with_tails: NDArray[np.bool_] = rows["_with_tails"]
        self._turn: NDArray[np.int32] = rows["_turn"]
        self._kind: NDArray[np.int16] = rows["_kind"]
        self._resident: NDArray[np.bool_] = rows["_resident"]
        self._queued: NDArray[np.bool_] = rows["_queued"]
        self._pins: NDArray[np.int32] = rows["_pins"]
        self._pages: NDArray[np.int32] = rows["_pages"]
        self._rank: NDArray[np.float64] = rows["_rank"]
        self._uses: NDArray[np.int32] = rows["_uses"]
        self._value: NDArray[np.float32] = rows["_value"]
        self._generation: NDArray[np.int32] = rows["_generation"]
