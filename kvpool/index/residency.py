"""What is resident of a prefix tree, per unit: what lookups, leases and copies read."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvpool.arena import PageArena, Slab, Slabs
from kvpool.errors import KeyChainError
from kvpool.eviction import GhostList
from kvpool.keys import KeyChain, Namespace
from kvpool.match import Ghost, Tail, View
from kvpool.placement import Geometry
from kvtransport.layout import GroupKind

from .nodes import ROOT, Nodes, NodeTable, Path

Bools = NDArray[np.bool_]
Selection = list[tuple[int, Nodes]]
"""(unit, nodes) pairs: what an operation touches or pins."""

NO_NODES: Nodes = np.empty(0, dtype=np.int32)


class Residency(NodeTable):
    """Which units the nodes have, and where their slabs lie."""

    number: int
    """The tree's among those that evictions know."""

    def __init__(self, ns: Namespace, ghosts: GhostList, geometry: Geometry, arena: PageArena) -> None:
        super().__init__(ns, geometry, arena)
        self.group_slabs = [0] * len(self.rules)
        self.group_pages = [0] * len(self.rules)
        self._entries = [0] * len(self.units)
        self._ghosts, self._arena = ghosts, arena
        self._group_bytes = geometry.group_bytes

    def held(self, unit: int) -> Nodes:
        """All nodes that ``unit`` is resident of, parents before what follows them as far as the index grew that way."""
        return np.flatnonzero(self._resident[unit]).astype(np.int32)

    def holds_at(self, unit: int, nodes: Nodes) -> Bools:
        """Whether ``unit`` is resident of each of ``nodes``."""
        there: Bools = self._resident[unit, nodes]
        return there

    def chains(self) -> list[Path]:
        """Every path from a first block to a last one or to an off-grid checkpoint, what would be evicted last at the front.

        A checkpoint inside the very first block is left out.
        """
        held = np.flatnonzero(self._resident.any(axis=0) & (self._position >= self.ns.block_tokens))
        above = np.zeros(len(self._parent), dtype=np.bool_)
        parents = self._parent[held]
        above[parents[parents >= 0]] = True
        ends = held[~above[held]]
        ranks = np.where(self._resident[:, ends], self._rank[:, ends], -np.inf).max(axis=0)
        return [self.path_to(node) for node in ends[np.argsort(-ranks, kind="stable")].tolist()]

    def key(self, unit: int, node: int) -> bytes:
        return self._table.key(node)

    def pages_of(self, unit: int, node: int) -> int:
        return int(self._pages[unit, node])

    def entries(self) -> dict[str, int]:
        """Counts of what is resident: nodes, blocks' units, states, off-grid checkpoints."""
        state = 0 if self.state is None else self._entries[self.state]
        tails = sum(sum(here.values()) for here in self._tails.values())
        return {"nodes": len(self._table), "units": sum(self._entries), "states": state, "tails": tails}

    # -- restoring -------------------------------------------------------------------------------

    def view(self, chain: KeyChain, path: Nodes) -> View:
        """What the rules of :mod:`kvpool.match` decide on; ``path`` comes from :meth:`find`."""
        resident = self._resident[np.array(self.unit_of)[:, None], path[None, :]]
        tails = []
        if self._tails and (not chain.opaque or chain.tails):
            for parent in (ROOT, *path[self._with_tails[path]].tolist()):
                for position in self._tails.get(parent, ()):
                    node = self.find_tail(chain, position, path)
                    if node is not None:
                        tails.append(Tail(position, tuple(bool(self._resident[u, node]) for u in self.unit_of)))
        return View(self.ns.block_tokens, self.rules, resident, tuple(tails))

    def select(self, path: Nodes, length: int, tail: int | None) -> Selection:
        """What restoring ``length`` tokens needs; ``tail`` is the node of an off-grid length."""
        blocks = length // self.ns.block_tokens
        chosen: Selection = []
        for unit, groups in enumerate(self.units):
            rule = self.rules[groups[0]]
            if rule.kind is GroupKind.RECURRENT:
                nodes = path[blocks - 1 : blocks] if tail is None and blocks else NO_NODES
            else:
                first = 0
                if rule.window is not None:
                    first = max(0, length - (rule.window - 1)) // self.ns.block_tokens
                nodes = path[first:blocks]
            if tail is not None:
                nodes = np.append(nodes, np.int32(tail))
            chosen.append((unit, nodes))
        return chosen

    def only_resident(self, selection: Selection) -> Selection:
        """``selection`` without what is not there."""
        return [(unit, nodes[self._resident[unit, nodes]]) for unit, nodes in selection]

    def holds(self, selection: Selection) -> bool:
        """Whether all of ``selection`` is resident."""
        return all(bool(self._resident[unit, nodes].all()) for unit, nodes in selection)

    def ghost(self, group: int, key: bytes) -> Ghost | None:
        return self._ghosts.get(self.number, self.unit_of[group], key)

    # -- slabs -----------------------------------------------------------------------------------

    def slabs(self, group: int, nodes: Nodes) -> Slabs:
        """The slabs of one group at nodes at block boundaries. Raises KeyChainError when it is not resident at one of them."""
        there = self._resident[self.unit_of[group], nodes]
        if not there.all():
            node = nodes[int(np.argmin(there))]
            raise KeyChainError(f"group {self.rules[group].name!r} is not resident at node {node}")
        nbytes = self._slab_bytes(group, self.ns.block_tokens)
        return self._slabs[group].get(nodes, nbytes, self._arena.pages_for(nbytes))

    def slab(self, group: int, node: int) -> Slab:
        """The slab of one group at one node, which may be an off-grid checkpoint. Raises KeyChainError."""
        if not self._resident[self.unit_of[group], node]:
            raise KeyChainError(f"group {self.rules[group].name!r} is not resident at node {node}")
        return self._slabs_at(group, np.array([node], dtype=np.int32))[0]

    def _slabs_at(self, group: int, nodes: Nodes) -> Slabs:
        """The slabs of nodes that hold equally much: block boundaries, or one off-grid checkpoint."""
        nbytes = self._slab_bytes(group, int(self._position[nodes[0]]))
        return self._slabs[group].get(nodes, nbytes, self._arena.pages_for(nbytes))

    def _slab_bytes(self, group: int, position: int) -> int:
        """Bytes of what ends at ``position`` tokens: a state, a whole or a partial block."""
        if self.rules[group].kind is GroupKind.RECURRENT:
            return self._group_bytes[group]
        return self._group_bytes[group] * (position % self.ns.block_tokens or self.ns.block_tokens)
