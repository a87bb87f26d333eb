"""What was evicted lately: for explaining misses, and for knowing a conversation again whose blocks are gone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from kvpool.match import Ghost

DEFAULT_LIMIT = 65_536


class GhostList:
    """The last ``limit`` evictions; the oldest are forgotten first."""

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self._limit = limit
        # Tuples of plain values: the garbage collector need not look at them.
        self._ghosts: OrderedDict[tuple[int, int, bytes], tuple[float, str, int]] = OrderedDict()

    def add(self, shelf: int, unit: int, keys: Iterable[bytes], at: float, why: str, turns: Iterable[int]) -> None:
        """Entries that were evicted together; see :class:`kvpool.match.Ghost`."""
        ghosts = self._ghosts
        for key, turn in zip(keys, turns, strict=True):
            name = (shelf, unit, key)
            if name in ghosts:
                ghosts.move_to_end(name)
            ghosts[name] = (at, why, turn)
        while len(ghosts) > self._limit:
            ghosts.popitem(last=False)

    def drop(self, shelf: int, unit: int, key: bytes) -> None:
        """It is there again."""
        self._ghosts.pop((shelf, unit, key), None)

    def get(self, shelf: int, unit: int, key: bytes) -> Ghost | None:
        ghost = self._ghosts.get((shelf, unit, key))
        return None if ghost is None else Ghost(*ghost)

    def __len__(self) -> int:
        return len(self._ghosts)
