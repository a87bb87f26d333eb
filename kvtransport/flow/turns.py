"""Whose chunk goes next: the highest priority first, round robin within it."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """Items with work, by priority. Each operation is O(1) in the items, O(levels) in the priorities."""

    def __init__(self) -> None:
        self._levels: dict[int, deque[T]] = {}
        self._where: dict[T, int] = {}

    def __len__(self) -> int:
        return len(self._where)

    def add(self, item: T, priority: int) -> None:
        """Add at the end of its level; an item that is there already stays where it is."""
        if item not in self._where:
            self._where[item] = priority
            self._levels.setdefault(priority, deque()).append(item)

    def discard(self, item: T) -> None:
        priority = self._where.pop(item, None)
        if priority is not None:
            level = self._levels[priority]
            level.remove(item)
            if not level:
                del self._levels[priority]

    def next(self) -> T | None:
        """The item whose turn it is; its turn then comes after its level's others."""
        if not self._levels:
            return None
        level = self._levels[max(self._levels)]
        level.rotate(-1)
        return level[-1]
