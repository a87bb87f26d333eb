"""What was evicted lately: for explaining misses, and for knowing a conversation again whose blocks are gone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvpool.match import Ghost
from kvpool.table import new_table

DEFAULT_LIMIT = 65_536
NOBODY = -1
"""In the place of an eviction: the key came back."""

Numbers = NDArray[np.int32]
Evictions = NDArray[np.int64]


class _Place:
    """The keys of one (shelf, unit). Arrays and a table: dicts of as many keys would pause when they grow, and garbage collections
    would look at each key."""

    def __init__(self, name: tuple[int, int]) -> None:
        self.name = name
        self.table = new_table()
        self.eviction: Evictions = np.empty(0, np.int64)  # by number of the key
        self.turn: Numbers = np.empty(0, np.int32)

    def add(self, keys: list[bytes], evictions: Evictions, turns: Numbers) -> Numbers:
        """The numbers of new ``keys``; ValueError, adding none, when one is known."""
        numbers = np.empty(len(keys), np.int32)
        self.table.add(keys, 0, numbers)
        if self.table.high > len(self.eviction):
            more = max(64, self.table.high - len(self.eviction), len(self.eviction) // 4)
            self.eviction = np.concatenate([self.eviction, np.full(more, NOBODY, np.int64)])
            self.turn = np.concatenate([self.turn, np.zeros(more, np.int32)])
        self.eviction[numbers] = evictions
        self.turn[numbers] = turns
        return numbers

    def leading(self, keys: list[bytes]) -> Numbers:
        """The numbers of the first of ``keys``, as far as they are known."""
        numbers = np.empty(len(keys), np.int32)
        return numbers[: self.table.find(keys, 0, numbers)]


class GhostList:
    """The last ``limit`` evictions, those of keys that came back included; the oldest are forgotten first.

    A ring of columns, 22 bytes an eviction, and a table of the keys that are gone still, some 80 bytes a key (of 32 bytes): what it takes is
    bounded by ``limit`` whether entries go one by one or thousands together, and those are a few calls, not a few per block.
    """

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self._limit = limit
        self._places: dict[tuple[int, int], _Place] = {}
        self._reasons: list[str] = []
        # The ring: eviction number n stands at n % limit. Its memory comes as it fills.
        self._shelf = np.zeros(limit, np.int32)
        self._unit = np.zeros(limit, np.int32)
        self._number: Numbers = np.zeros(limit, np.int32)
        self._at = np.zeros(limit, np.float64)
        self._why = np.zeros(limit, np.int16)
        self._next = 0
        """The number of the next eviction."""

    def add(self, shelf: int, unit: int, keys: list[bytes], at: float, why: str, turns: Numbers) -> None:
        """Different keys of entries that were evicted together; see :class:`kvpool.match.Ghost`."""
        if len(keys) > self._limit:
            self.drop(shelf, unit, keys[: -self._limit])
            keys, turns = keys[-self._limit :], turns[-self._limit :]
        self._forget(len(keys) - max(0, self._limit - self._next))
        evictions = np.arange(self._next, self._next + len(keys))
        place = self._places.get((shelf, unit))
        if place is None:
            place = self._places[shelf, unit] = _Place((shelf, unit))
        try:
            numbers = place.add(keys, evictions, turns)
        except ValueError:  # one went before, and nobody said that it was there again
            self.drop(shelf, unit, keys)
            place = self._places.setdefault((shelf, unit), place)
            numbers = place.add(keys, evictions, turns)
        if why not in self._reasons:
            self._reasons.append(why)
        where = evictions % self._limit
        self._shelf[where], self._unit[where], self._number[where] = shelf, unit, numbers
        self._at[where], self._why[where] = at, self._reasons.index(why)
        self._next += len(keys)

    def _forget(self, count: int) -> None:
        """The oldest ``count`` evictions."""
        if count <= 0:
            return
        oldest = max(0, self._next - self._limit)
        evictions = np.arange(oldest, oldest + count)
        where = evictions % self._limit
        shelves, units, numbers = self._shelf[where], self._unit[where], self._number[where]
        for name in set(zip(shelves.tolist(), units.tolist(), strict=True)):
            place = self._places.get(name)
            if place is not None:
                here = (shelves == name[0]) & (units == name[1]) & (numbers < len(place.eviction))
                own = numbers[here]
                self._remove(
                    place, own[place.eviction[own] == evictions[here]]
                )  # else it came back, or went again later

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
        place.eviction[numbers] = NOBODY
        if not len(place.table) and self._places.get(place.name) is place:
            del self._places[place.name]  # a table does not shrink, and there may be thousands of them

    def get(self, shelf: int, unit: int, key: bytes) -> Ghost | None:
        place = self._places.get((shelf, unit))
        number = -1 if place is None else place.table.get(key)
        if place is None or number < 0:
            return None
        where = int(place.eviction[number]) % self._limit
        return Ghost(float(self._at[where]), self._reasons[int(self._why[where])], int(place.turn[number]))

    def turns(self, shelf: int, unit: int, keys: list[bytes]) -> Numbers:
        """The turns of the first of ``keys``, as far as they are known."""
        place = self._places.get((shelf, unit))
        return np.empty(0, np.int32) if place is None else place.turn[place.leading(keys)]

    def __len__(self) -> int:
        return sum(len(place.table) for place in self._places.values())
