"""What was evicted lately: for explaining misses, and for knowing a conversation again whose blocks are gone."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvpool.match import Ghost
from kvpool.table import new_table

DEFAULT_LIMIT = 65_536
NOBODY = -1
"""In the place of a run: the key came back."""

Numbers = NDArray[np.int32]


class _Place:
    """The keys of one (shelf, unit). Arrays and a table: dicts of as many keys would pause when they grow, and garbage collections
    would look at each key."""

    def __init__(self, name: tuple[int, int]) -> None:
        self.name = name
        self.table = new_table()
        self.run: NDArray[np.int64] = np.empty(0, np.int64)  # by number of the key
        self.turn: Numbers = np.empty(0, np.int32)

    def add(self, keys: list[bytes], run: int, turns: Numbers) -> Numbers:
        """The numbers of new ``keys``; ValueError, adding none, when one is known."""
        numbers = np.empty(len(keys), np.int32)
        self.table.add(keys, 0, numbers)
        if self.table.high > len(self.run):
            more = max(64, self.table.high - len(self.run), len(self.run) // 4)
            self.run = np.concatenate([self.run, np.full(more, NOBODY, np.int64)])
            self.turn = np.concatenate([self.turn, np.zeros(more, np.int32)])
        self.run[numbers] = run
        self.turn[numbers] = turns
        return numbers

    def leading(self, keys: list[bytes]) -> Numbers:
        """The numbers of the first of ``keys``, as far as they are known."""
        numbers = np.empty(len(keys), np.int32)
        return numbers[: self.table.find(keys, 0, numbers)]


@dataclass(slots=True)
class _Run:
    """Keys that were evicted together: those of ``numbers`` whose run it still is."""

    place: _Place
    numbers: Numbers
    at: float
    why: str


class GhostList:
    """The last ``limit`` evictions, in whole runs of entries that went together; the oldest are forgotten first.

    A run of thousands of blocks costs a few calls, not a few per block.
    """

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self._limit = limit
        self._places: dict[tuple[int, int], _Place] = {}
        self._runs: deque[_Run] = deque()
        self._first = 0
        """The number of the oldest run; later ones count on from it."""
        self._count = 0
        """Keys in all runs, those that came back included."""

    def add(self, shelf: int, unit: int, keys: list[bytes], at: float, why: str, turns: Numbers) -> None:
        """Different keys of entries that were evicted together; see :class:`kvpool.match.Ghost`."""
        place = self._places.get((shelf, unit))
        if place is None:
            place = self._places[shelf, unit] = _Place((shelf, unit))
        number = self._first + len(self._runs)
        try:
            numbers = place.add(keys, number, turns)
        except ValueError:  # one went before, and nobody said that it was there again
            self.drop(shelf, unit, keys)
            place = self._places.setdefault((shelf, unit), place)
            numbers = place.add(keys, number, turns)
        self._runs.append(_Run(place, numbers, at, why))
        self._count += len(keys)
        while self._count > self._limit:
            self._forget(self._count - self._limit)

    def _forget(self, most: int) -> None:
        """The oldest run, or so many of its keys."""
        run = self._runs[0]
        numbers = run.numbers[:most]
        self._remove(run.place, numbers[run.place.run[numbers] == self._first])  # else it came back, or went again later
        self._count -= len(numbers)
        run.numbers = run.numbers[most:]
        if not len(run.numbers):
            self._runs.popleft()
            self._first += 1

    def drop(self, shelf: int, unit: int, keys: list[bytes]) -> None:
        """They are there again."""
        place = self._places.get((shelf, unit))
        at = 0
        while place is not None and len(place.table) and at < len(keys):
            at += place.table.absent(keys[at:] if at else keys, 0)
            known = place.leading(keys[at:])
            self._remove(place, known)
            at += len(known)

    def _remove(self, place: _Place, numbers: Numbers) -> None:
        place.table.remove_all(numbers)
        place.run[numbers] = NOBODY
        if not len(place.table) and self._places.get(place.name) is place:
            del self._places[place.name]  # a table does not shrink, and there may be thousands of them

    def get(self, shelf: int, unit: int, key: bytes) -> Ghost | None:
        place = self._places.get((shelf, unit))
        number = -1 if place is None else place.table.get(key)
        if place is None or number < 0:
            return None
        run = self._runs[int(place.run[number]) - self._first]
        return Ghost(run.at, run.why, int(place.turn[number]))

    def turns(self, shelf: int, unit: int, keys: list[bytes]) -> Numbers:
        """The turns of the first of ``keys``, as far as they are known."""
        place = self._places.get((shelf, unit))
        return np.empty(0, np.int32) if place is None else place.turn[place.leading(keys)]

    def __len__(self) -> int:
        return sum(len(place.table) for place in self._places.values())
