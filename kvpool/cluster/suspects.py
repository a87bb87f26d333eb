"""Nodes that failed lately: left alone for a while that grows with every failure, so that nobody herds at a node that is ill."""

from __future__ import annotations

from collections.abc import Callable

FIRST_S = 0.25
MOST_S = 10.0


class Suspects:
    """``random()`` gives numbers from [0, 1): everybody comes back at another time."""

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random
        self._failures: dict[str, tuple[int, float]] = {}  # node -> (failures in a row, left alone until)

    def failed(self, now: float, node: str) -> None:
        count = self._failures.get(node, (0, 0.0))[0] + 1
        pause = min(FIRST_S * 2 ** (count - 1), MOST_S) * (0.5 + self._random())
        self._failures[node] = (count, now + pause)

    def probing(self, now: float, node: str, seconds: float) -> None:
        """Somebody tries a node that had failed: for others it is suspect for so long, unless it turns out well."""
        failed = self._failures.get(node)
        if failed is not None:
            self._failures[node] = (failed[0], now + seconds)

    def well(self, node: str) -> None:
        self._failures.pop(node, None)

    def suspect(self, now: float, node: str) -> bool:
        """Whether the node is to be left alone now."""
        return self._failures.get(node, (0, 0.0))[1] > now

    def sorted(self, now: float, nodes: list[str]) -> list[str]:
        """``nodes`` in their order, suspects last."""
        return sorted(nodes, key=lambda n: self.suspect(now, n))
