"""What was evicted lately: for explaining misses, and for knowing a conversation again whose blocks are gone."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import groupby

from kvpool.match import Ghost

DEFAULT_LIMIT = 65_536

_Place = tuple[int, int]
"""(shelf, unit)"""


class GhostList:
    """The last ``limit`` evictions, in whole runs of entries that went together; the oldest are forgotten first.

    A run of thousands of blocks costs a few calls of dicts, not a few per block.
    """

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self._limit = limit
        self._ghosts: dict[_Place, dict[bytes, Ghost]] = {}
        self._runs: deque[tuple[_Place, Sequence[bytes], Ghost]] = deque()
        self._count = 0
        """Keys in all runs, those that came back included."""

    def add(self, shelf: int, unit: int, keys: Sequence[bytes], at: float, why: str, turns: Iterable[int]) -> None:
        """Entries that were evicted together; see :class:`kvpool.match.Ghost`."""
        here = self._ghosts.setdefault((shelf, unit), {})
        first = 0
        for turn, same in groupby(turns):
            run = keys[first : first + sum(1 for _ in same)]
            first += len(run)
            ghost = Ghost(at, why, turn)
            here.update(dict.fromkeys(run, ghost))
            self._runs.append(((shelf, unit), run, ghost))
        self._count += first
        while self._count > self._limit:
            self._forget(self._count - self._limit)

    def _forget(self, most: int) -> None:
        """The oldest run, or so many of its keys."""
        place, keys, ghost = self._runs.popleft()
        here = self._ghosts[place]
        for key in keys[:most]:
            if here.get(key) is ghost:  # else it came back, or went again later
                del here[key]
        self._count -= min(most, len(keys))
        if len(keys) > most:
            self._runs.appendleft((place, keys[most:], ghost))

    def drop(self, shelf: int, unit: int, keys: Sequence[bytes]) -> None:
        """They are there again."""
        here = self._ghosts.get((shelf, unit))
        if here and not here.keys().isdisjoint(keys):
            for key in here.keys() & keys:
                del here[key]

    def get(self, shelf: int, unit: int, key: bytes) -> Ghost | None:
        here = self._ghosts.get((shelf, unit))
        return None if here is None else here.get(key)

    def __len__(self) -> int:
        return sum(map(len, self._ghosts.values()))
