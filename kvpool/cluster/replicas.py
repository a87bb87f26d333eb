"""How many copies of a chain there should be, where, and who makes those that are missing.

A chain is at *home* on the first nodes of its rendezvous order, as many as it should have copies. Whatever the reason why a home lacks
it (replication is young, a node was lost, one has joined, it became popular), the same rule says what to do: the first of the nodes
that hold it copies it there. All nodes come to the same answer from the same view; when views differ, a copy is made
twice or a little later.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import msgspec

from kvpool.keys import Namespace


class ReplicaPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """``by_model`` sets the factor for namespaces of a layout's model name, or of "TENANT/MODEL"; ``factor`` that of the others.

    A chain gets one more copy for every ``hits_per_copy`` fading hits (see :mod:`kvpool.cluster.demand`), up to ``most``.
    """

    factor: int = 1
    by_model: Mapping[str, int] = {}
    most: int = 3
    hits_per_copy: float = 60.0

    def base(self, ns: Namespace) -> int:
        """Copies of what nobody reads."""
        model = ns.layout.model
        return max(1, self.by_model.get(f"{ns.tenant}/{model}", self.by_model.get(model, self.factor)))

    def wanted(self, ns: Namespace, heat: float, copies: int) -> int:
        """Copies there should be, for ``heat`` hits on one of ``copies`` among which reads are spread."""
        base = self.base(ns)
        return max(base, min(self.most, 1 + int(heat * max(copies, 1) / self.hits_per_copy)))


def missing(order: Sequence[str], holders: Collection[str], wanted: int, me: str) -> list[str]:
    """The homes that lack a chain and that ``me`` copies it to; empty when that is another holder's task.

    ``order``: the nodes that take data, in the chain's rendezvous order.
    """
    first = next((node for node in order if node in holders), None)
    if first != me:
        return []
    return [node for node in order[:wanted] if node not in holders]
