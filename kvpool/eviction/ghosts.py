"""What was evicted lately: for explaining misses, and for knowing a conversation again whose blocks are gone."""

from __future__ import annotations

from collections import OrderedDict

from kvpool.match import Ghost

DEFAULT_LIMIT = 65_536


class GhostList:
    """The last ``limit`` evictions; the oldest are forgotten first."""

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self._limit = limit
        self._ghosts: OrderedDict[tuple[int, int, bytes], Ghost] = OrderedDict()

    def add(self, shelf: int, unit: int, key: bytes, ghost: Ghost) -> None:
        name = (shelf, unit, key)
        self._ghosts.pop(name, None)
        self._ghosts[name] = ghost
        while len(self._ghosts) > self._limit:
            self._ghosts.popitem(last=False)

    def drop(self, shelf: int, unit: int, key: bytes) -> None:
        """It is there again."""
        self._ghosts.pop((shelf, unit, key), None)

    def get(self, shelf: int, unit: int, key: bytes) -> Ghost | None:
        return self._ghosts.get((shelf, unit, key))

    def __len__(self) -> int:
        return len(self._ghosts)
