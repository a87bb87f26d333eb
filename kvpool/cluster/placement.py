"""Which nodes a segment goes to.

Rendezvous hashing with weights (Thaler and Ravishankar 1998; weights as in Mosharaf et al.): every node draws a number from (segment,
node), ``-ln(u) / capacity``, and the smallest ones win. A node that comes or goes moves only the segments it wins
or had. A node's share is its part of the capacity.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Protocol

from .members import Member


def score(segment: bytes, member: Member) -> float:
    """The member's draw for the segment; smaller is better, inf without capacity."""
    if member.capacity <= 0:
        return math.inf
    digest = hashlib.blake2b(segment, digest_size=8, key=member.id.encode()[:64]).digest()
    # In (0, 1): half a step away from both ends.
    draw = (int.from_bytes(digest, "little") + 0.5) / 2**64
    return -math.log(draw) / member.capacity


class Placement(Protocol):
    """Where segments are written; where they are read from is what the directory says."""

    def order(self, segment: bytes, members: Sequence[Member]) -> list[Member]:
        """The members that may take ``segment`` (its placement name, 16 bytes), best first."""
        ...


class Rendezvous:
    """By segment over the members of one cluster, or of all (``cluster`` None)."""

    def __init__(self, cluster: str | None = None) -> None:
        self.cluster = cluster

    def order(self, segment: bytes, members: Sequence[Member]) -> list[Member]:
        found = [m for m in members if self.cluster is None or m.cluster == self.cluster]
        return sorted(found, key=lambda m: (score(segment, m), m.id))


class LocalFirst:
    """The node ``local`` first, the others by rendezvous."""

    def __init__(self, local: str, cluster: str | None = None) -> None:
        self.local = local
        self._others = Rendezvous(cluster)

    def order(self, segment: bytes, members: Sequence[Member]) -> list[Member]:
        others = self._others.order(segment, members)
        return [m for m in members if m.id == self.local] + [m for m in others if m.id != self.local]
