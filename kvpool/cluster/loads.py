"""Which replica has the least to do: what nodes said with their last beat, and what this client is reading from them now."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .members import Member
from .suspects import Suspects


class Loads:
    """Bytes in progress by node. ``random()`` gives numbers from [0, 1): clients that know the same choose differently."""

    def __init__(self, suspects: Suspects, random: Callable[[], float]) -> None:
        self._suspects = suspects
        self._random = random
        self._own: dict[str, int] = {}

    def begin(self, node: str, nbytes: int) -> None:
        self._own[node] = self._own.get(node, 0) + nbytes

    def end(self, node: str, nbytes: int) -> None:
        left = self._own.get(node, 0) - nbytes
        if left > 0:
            self._own[node] = left
        else:
            self._own.pop(node, None)

    def order(self, now: float, nodes: Sequence[str], members: Mapping[str, Member]) -> list[str]:
        """``nodes``, those with the least load first, suspects last."""
        if len(nodes) < 2:
            return list(nodes)

        def rank(node: str) -> tuple[bool, int, float]:
            told = members[node].load if node in members else 0
            return self._suspects.suspect(now, node), told + self._own.get(node, 0), self._random()

        return sorted(nodes, key=rank)
