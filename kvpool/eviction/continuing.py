"""How likely a sequence is to be continued, learnt from those of its kind.

A kind is how many sequences continued one another up to it, and how much this one added: short messages late in a conversation
are answered far more often than long documents behind a template. What is stored is remembered, whether or not its blocks are, until it is
too late to be continued; a sequence is continued when a later one runs through the middle of what it added.
"""

from __future__ import annotations

import math
import zlib
from collections import OrderedDict
from collections.abc import Sequence

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
"""Sequences remembered at most, some 330 bytes each."""
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
    """Counts by kind. Times are ticks."""

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._remembered = remembered
        self._seen = [0.0] * KINDS
        self._continued = [0.0] * KINDS
        self._open: OrderedDict[Name, tuple[int, float, int]] = OrderedDict()

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
            known = self._open.pop(name, None)
            if known is not None:
                if now - known[1] < horizon:
                    self._continued[known[0]] += 1
                tag = known[2]
                break
        new = len(names) - added
        middle = added + (new - 1) // 2 if new > 0 else len(names) - 1
        if new == 1 and added and turn_of(kind) > TEMPLATE_TURNS:
            middle -= 1  # the one segment may be an unfinished block, which what continues it replaces
        self._open[names[middle]] = (kind, now, tag)
        self._open.move_to_end(names[middle])
        self._seen[kind] += 1
        if len(self._open) > self._remembered:
            self._open.popitem(last=False)
        self._forget(now - horizon)
        return tag

    def _forget(self, before: float) -> None:
        """What was stored by then can be continued in time no more."""
        for _ in range(min(LATE, len(self._open))):
            oldest = next(iter(self._open))
            if self._open[oldest][1] > before:
                break
            del self._open[oldest]
