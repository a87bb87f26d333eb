"""Which nodes a segment goes to.

Rendezvous hashing with weights (Thaler and Ravishankar 1998; weights as in Schindelhauer and Schomaker 2005): every node draws a
number from (segment, node), ``-ln(u) / capacity``, and the smallest ones win. A node that comes or goes moves only the segments it
wins or had. A node's share is its part of the capacity.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .members import Member

Floats = NDArray[np.float64]


@lru_cache(maxsize=65_536)
def _seed(node: str) -> int:
    return int.from_bytes(hashlib.blake2b(node.encode(), digest_size=8, person=b"kvt1-node").digest(), "little")


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64: every bit of the input moves every bit of the output."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


def scores(segment: bytes, seeds: NDArray[np.uint64], capacities: Floats) -> Floats:
    """Each node's draw for the segment (its placement name, at least 8 bytes); smaller is better, inf without capacity."""
    mixed = _mixed(seeds ^ np.uint64(int.from_bytes(segment[:8], "little")))
    # In (0, 1): half a step away from both ends. 53 bits fit a float.
    draws = ((mixed >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53
    with np.errstate(divide="ignore"):
        return np.asarray(np.where(capacities > 0, -np.log(draws) / capacities, np.inf))


def weights(members: Sequence[Member]) -> tuple[NDArray[np.uint64], Floats]:
    """(seeds, capacities) for :func:`scores`."""
    seeds = np.fromiter((_seed(m.id) for m in members), np.uint64, len(members))
    return seeds, np.fromiter((m.capacity for m in members), np.float64, len(members))


class Placement(Protocol):
    """Where segments are written; where they are read from is what the directory says."""

    def order(self, segment: bytes, members: Sequence[Member]) -> list[Member]:
        """The members that may take ``segment`` (its placement name, 16 bytes), best first."""
        ...


class Rendezvous:
    """By segment over the members of one cluster, or of all (``cluster`` None)."""

    def __init__(self, cluster: str | None = None) -> None:
        self.cluster = cluster
        self._known: tuple[tuple[Any, ...], NDArray[np.uint64], Floats] | None = None

    def order(self, segment: bytes, members: Sequence[Member]) -> list[Member]:
        found = [m for m in members if self.cluster is None or m.cluster == self.cluster]
        who = tuple((m.id, m.capacity) for m in found)
        if self._known is None or self._known[0] != who:
            self._known = (who, *weights(found))
        best = np.argsort(scores(segment, self._known[1], self._known[2]), kind="stable")
        return [found[i] for i in best.tolist()]


class LocalFirst:
    """The node ``local`` first, the others by rendezvous."""

    def __init__(self, local: str, cluster: str | None = None) -> None:
        self.local = local
        self._others = Rendezvous(cluster)

    def order(self, segment: bytes, members: Sequence[Member]) -> list[Member]:
        others = self._others.order(segment, members)
        return [m for m in members if m.id == self.local] + [m for m in others if m.id != self.local]
