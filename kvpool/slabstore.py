"""Which pages the nodes of a tree hold, in arrays: a block costs its page numbers and 8 bytes, no object."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvtransport.layout import GroupKind

from .arena import BlockClass, PageArena, Slabs
from .columns import Column

Nodes = NDArray[np.int32]


class SlabStore(Protocol):
    """The slabs of one group by node. What is asked for or dropped must be there: the tree knows."""

    def grow(self, capacity: int) -> None:
        """Be ready for nodes below ``capacity``."""

    def put(self, nodes: Nodes, slabs: Slabs) -> None: ...

    def get(self, nodes: Nodes, nbytes: int, pages: int) -> Slabs:
        """Slabs of ``nbytes`` bytes, ``pages`` pages each."""

    def drop(self, nodes: Nodes) -> None: ...

    @property
    def nbytes(self) -> int:
        """Bytes of memory it takes."""


class EveryNode:
    """For groups that most nodes hold something of: a row per node. A partial block's row is shorter than the others."""

    def __init__(self, kind: BlockClass, pages_each: int) -> None:
        self._kind = kind
        self._pages = Column(np.int32, (pages_each,))
        self._owners = Column(np.int64)

    def grow(self, capacity: int) -> None:
        self._pages.grow(capacity)
        self._owners.grow(capacity)

    def put(self, nodes: Nodes, slabs: Slabs) -> None:
        self._pages.rows[nodes, : slabs.pages.shape[1]] = slabs.pages
        self._owners.rows[nodes] = slabs.generation

    def get(self, nodes: Nodes, nbytes: int, pages: int) -> Slabs:
        return Slabs(self._pages.rows[nodes, :pages], nbytes, self._owners.rows[nodes], self._kind)

    def drop(self, nodes: Nodes) -> None:
        pass  # the rows wait for the next

    @property
    def nbytes(self) -> int:
        return self._pages.rows.nbytes + self._owners.rows.nbytes


class FewNodes:
    """For groups that few nodes hold something of, but much of it (states): a row per node that does."""

    def __init__(self, kind: BlockClass, pages_each: int) -> None:
        self._store = EveryNode(kind, pages_each)
        self._row_of: dict[int, int] = {}
        self._free: list[int] = []
        self._capacity = 0

    def grow(self, capacity: int) -> None:
        pass

    def put(self, nodes: Nodes, slabs: Slabs) -> None:
        rows = []
        for node in nodes.tolist():
            if not self._free:
                more = max(16, self._capacity)
                self._store.grow(self._capacity + more)
                self._free.extend(range(self._capacity + more - 1, self._capacity - 1, -1))
                self._capacity += more
            row = self._row_of[node] = self._free.pop()
            rows.append(row)
        self._store.put(np.array(rows, dtype=np.int32), slabs)

    def get(self, nodes: Nodes, nbytes: int, pages: int) -> Slabs:
        rows = np.array([self._row_of[n] for n in nodes.tolist()], dtype=np.int32)
        return self._store.get(rows, nbytes, pages)

    def drop(self, nodes: Nodes) -> None:
        self._free.extend(self._row_of.pop(n) for n in nodes.tolist())

    @property
    def nbytes(self) -> int:
        return self._store.nbytes + 120 * len(self._row_of)


def new_store(kind: GroupKind, arena: PageArena, unit_bytes: int, block_tokens: int) -> SlabStore:
    """The store for a group of ``kind``: ``unit_bytes`` a state, or a token."""
    if kind is GroupKind.RECURRENT:
        return FewNodes(BlockClass.STATE, arena.pages_for(unit_bytes))
    return EveryNode(BlockClass.PREFIX, arena.pages_for(unit_bytes * block_tokens))
