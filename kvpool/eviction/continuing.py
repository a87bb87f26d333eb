"""How likely a sequence is to be continued, learnt from those of its kind.

A kind is how many sequences continued one another up to it, and how much this one added: short messages late in a conversation
are answered far more often than long documents behind a template. What is stored is remembered, whether or not its blocks are, until it is
too late to be continued; a sequence is continued when a later one runs through the middle of what it added.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np

from kvpool.table import new_table

UNKNOWN = 0
"""The kind of what belongs to no sequence."""
MOST_TURNS = 8
"""Later turns are of one kind."""
SIZES = (1_024, 2_048, 4_096, 8_192)
"""Tokens added: kinds end below these."""
KINDS = 1 + MOST_TURNS * (len(SIZES) + 1)
TEMPLATE_TURNS = 2
"""What stands before a sequence of these turns may be a template that everybody shares."""
PRIOR = 20.0
"""Sequences of the mean that a kind starts with."""
REMEMBERED = 65_536
"""Sequences remembered at most, some 80 bytes each."""
NOWHERE = -1
LATE = 4
"""Sequences that came too late to be continued are forgotten so many at a time, never thousands at once."""

Name = tuple[int, bytes]


def kind_of(turn: int, added_tokens: int) -> int:
    """``turn``: 1 for a sequence that continues nothing."""
    size = sum(added_tokens >= s for s in SIZES)
    return 1 + (min(max(turn, 1), MOST_TURNS) - 1) * (len(SIZES) + 1) + size


def turn_of(kind: int) -> int:
    return (kind - 1) // (len(SIZES) + 1) + 1


class Continuing:
    """Counts by kind. Times are ticks. Remembers the last ``remembered`` sequences that were stored, at most."""

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._remembered = remembered
        self._seen = [0.0] * KINDS
        self._continued = [0.0] * KINDS
        # A table and columns: a dict of as many sequences stands still for milliseconds when it grows. Their memory comes as they fill.
        self._table = new_table()
        self._one = np.zeros(1, np.int32)
        self._kind = np.zeros(remembered, np.int16)  # by number in the table
        self._at = np.zeros(remembered, np.float64)
        self._tag = np.zeros(remembered, np.uint32)
        self._order = np.zeros(remembered, np.int64)
        self._numbers = np.zeros(remembered, np.int32)  # by order of storing: n stands at n % remembered
        self._first = self._next = 0

    def __len__(self) -> int:
        """Sequences remembered."""
        return len(self._table)

    def odds(self, kind: int) -> float:
        """log2 of how much likelier than the mean a sequence of ``kind`` is to be continued."""
        if kind == UNKNOWN:
            return 0.0
        mean = (sum(self._continued) + 1.0) / (sum(self._seen) + 3.0)
        own = (self._continued[kind] + PRIOR * mean) / (self._seen[kind] + PRIOR)
        return math.log2(own / mean)

    def stored(self, names: Sequence[Name], added: int, kind: int, now: float, horizon: float) -> int:
        """A sequence of segments ``names`` of which those from ``added`` on are new; what comes after ``horizon`` comes too late.

        Returns a number below 2**32 that it shares with all that it continues, and that is spread evenly otherwise.
        """
        tag = zlib.crc32(names[min(added, len(names) - 1)][1])
        for name in reversed(names):
            number = self._table.get(_key(name))
            if number >= 0:
                if now - self._at[number] < horizon:
                    self._continued[self._kind[number]] += 1
                tag = int(self._tag[number])
                self._remove(number)
                break
        new = len(names) - added
        middle = added + (new - 1) // 2 if new > 0 else len(names) - 1
        if new == 1 and added and turn_of(kind) > TEMPLATE_TURNS:
            middle -= 1  # the one segment may be an unfinished block, which what continues it replaces
        self._remember(_key(names[middle]), kind, now, tag)
        self._seen[kind] += 1
        self._forget(now - horizon)
        return tag

    def _remember(self, key: bytes, kind: int, now: float, tag: int) -> None:
        if self._next - self._first == self._remembered:
            self._drop_first()
        number = self._table.get(key)
        if number < 0:
            self._table.add([key], 0, self._one)
            number = int(self._one[0])
        self._kind[number], self._at[number], self._tag[number], self._order[number] = kind, now, tag, self._next
        self._numbers[self._next % self._remembered] = number
        self._next += 1

    def _forget(self, before: float) -> None:
        """What was stored by then can be continued in time no more."""
        for _ in range(min(LATE, self._next - self._first)):
            number = int(self._numbers[self._first % self._remembered])
            if self._order[number] == self._first and self._at[number] > before:
                break
            self._drop_first()

    def _drop_first(self) -> None:
        number = int(self._numbers[self._first % self._remembered])
        if self._order[number] == self._first:  # else it was continued, or stored again
            self._remove(number)
        self._first += 1

    def _remove(self, number: int) -> None:
        self._table.remove(number)
        self._order[number] = NOWHERE


def _key(name: Name) -> bytes:
    return hash(name).to_bytes(8, "little", signed=True)
