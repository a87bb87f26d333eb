"""The interface of eviction: what owns entries, what ranks them, and what puts a tenant's entries in order.

Pure policy: no clock and no randomness but what is passed in. Time is counted in *ticks* (one per entry touched) and
*pages* (placed so far). An entry is named by (shelf, unit, node, generation).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ticks = NDArray[np.int64]

BLOCKED = float("-inf")
"""The entry is pinned, or others depend on it: its shelf offers it again when that changes."""
GONE = float("inf")
"""The entry is no more."""
FIRST = -1e300
"""The rank of what nothing can use any more: it goes before everything else."""

Name = tuple[int, int, int, int]
"""(shelf, unit, node, generation)"""


class Shelf(Protocol):
    """Owns evictable entries, named by (unit, node, generation)."""

    @property
    def tenant(self) -> str: ...

    @property
    def unpinned_pages(self) -> int:
        """Pages that evictions could free."""

    def check(self, unit: int, node: int, generation: int) -> float:
        """The entry's current rank, BLOCKED or GONE; after BLOCKED the shelf must push it again to have it evicted."""

    def uses(self, unit: int, node: int) -> int:
        """How often the entry was used since it was placed, or since :meth:`set_uses`."""

    def set_uses(self, unit: int, node: int, uses: int) -> None: ...

    def pages_of(self, unit: int, node: int) -> int: ...

    def key(self, unit: int, node: int) -> bytes:
        """What the entry will be called when it comes again."""

    def evict(self, unit: int, node: int, why: str, *, below: float = float("-inf"), pages: int = 0) -> int:
        """Free the entry; returns how many entries the policy lost its places of.

        While fewer than ``pages`` pages came free it goes on with those that only the last one kept, as long as they rank
        ``below`` whatever would go next: the same as evicting them one by one, without queueing them first.
        """


class Order(Protocol):
    """What can be evicted of one tenant, in order. All operations are O(log n), amortised."""

    def push(self, name: Name, rank: float) -> None:
        """Queue an entry that can be evicted."""

    def push_all(self, names: Iterable[Name], ranks: Iterable[float]) -> None:
        """:meth:`push` of many."""

    def head(self) -> tuple[float, Name] | None:
        """The entry that goes next; ranks of heads are comparable between tenants."""

    def pop(self) -> None:
        """The entry that :meth:`head` gave last is being evicted."""

    def forget(self, count: int) -> None:
        """``count`` queued entries went without being popped."""

    def __len__(self) -> int:
        """Entries queued, void ones included."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One sequence as it was stored, for policies that learn; in segments of one or more blocks.

    ``keys`` name the segments for as long as the process lives; ``pages``, ``tokens`` and ``value`` (as in :meth:`Policy.rank`)
    are by segment. ``ends`` are (segment index, pages, value) of its checkpoints; ``needs_ends`` says whether it can be
    restored at checkpoints only. Segments from ``added`` on were new. ``kind`` as in :meth:`Policy.kind_of`.
    """

    keys: Sequence[tuple[int, bytes]]
    pages: Sequence[int]
    value: Sequence[float]
    tokens: Sequence[int]
    ends: Sequence[tuple[int, int, float]]
    needs_ends: bool
    added: int
    kind: int


class Policy(Protocol):
    """Ranks entries; the lowest goes first. One per pool."""

    name: str
    learns: bool
    """Whether :meth:`learn` wants sequences."""
    orphans_first: bool
    """Whether blocks that no checkpoint needs any more go before everything else."""
    queues_interior: bool
    """Whether blocks that others depend on are queued too (queues keep places for them), not only when they become leaves."""

    def bind(self, shelves: Sequence[Shelf], capacity_pages: int) -> None:
        """Called once; ``shelves`` grows."""

    def order(self) -> Order:
        """The order of one more tenant."""

    def kind_of(self, turn: int, added_tokens: int) -> int:
        """A number (below 32,768) for a kind of sequence, given back to :meth:`rank`; 0 is for what belongs to none.

        ``turn``: how many sequences continued one another up to it (1: a new one); ``added_tokens``: what it added.
        """

    def rank(self, touches: Ticks, uses: NDArray[np.int32], value: NDArray[np.float32], kind: int) -> Floats | None:
        """Ranks of entries of a sequence of ``kind`` touched at ``touches`` (ticks); None keeps those they have.

        ``uses`` counts uses since the entries were placed; ``value`` is the FLOPs a hit saves relative to the entry's parent
        over its bytes (NaN: unknown).
        """

    def first_rank(self, touches: Ticks, value: NDArray[np.float32], pages: NDArray[np.int32], kind: int) -> Floats:
        """Ranks of entries of ``pages`` pages that were just placed; the rest as in :meth:`rank`."""

    def superseded(self, rank: float) -> float:
        """The rank of a checkpoint after its sequence went on to a later one, without having branched."""

    def evicted(self, rank: float) -> None:
        """An entry of this rank went."""

    def learn(self, sequence: Stored) -> None:
        """A sequence was stored. What takes long of learning from it is left to :meth:`work`."""

    def work(self) -> bool:
        """A step of what is left of learning, a millisecond at most; whether more is left."""

    def describe(self) -> dict[str, Any]:
        """What it has learnt, for people: plain values by name."""
