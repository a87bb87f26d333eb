"""Which connections hold chunks that had better go over others. Pure: the caller brings readings at its own pace."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

K = TypeVar("K")


PATIENCE = 4
"""Readings in a row without a byte delivered. One says little: connections that share a narrow link take turns, and what was
sent again for that on 60 Mbit/s was up to most of the transfer."""


class Stalls(Generic[K]):
    """A connection stalls when, for :data:`PATIENCE` readings in a row, nothing of what waits on it was delivered.

    It is worth a word only while another connection of the link does better: otherwise chunks would have nowhere to go.
    """

    def __init__(self) -> None:
        self._delivered: dict[K, int] = {}
        self._still: dict[K, int] = {}
        self.stalled: set[K] = set()

    def judge(self, readings: Iterable[tuple[K, int, int]]) -> list[K]:
        """Readings are (connection, bytes delivered since it was made, bytes that wait); returns who has just stalled."""
        now = list(readings)
        self._still = {
            c: self._still.get(c, 0) + 1 if waiting and self._delivered.get(c) == delivered else 0
            for c, delivered, waiting in now
        }
        stands = {c for c, readings in self._still.items() if readings >= PATIENCE}
        if len(stands) == len(now):
            stands = set()
        fresh = [c for c, _, _ in now if c in stands and c not in self.stalled]
        self.stalled = stands
        self._delivered = {c: delivered for c, delivered, _ in now}
        return fresh
