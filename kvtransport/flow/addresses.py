"""Which pair of local and remote address the next connection of a link uses. Pure: the caller brings the clock."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .backoff import Backoff

Pair = tuple[str | None, str]
"""(local address, None: the system chooses; remote address)"""


class Addresses:
    """Several of either, for connections that are spread over several paths.

    Pairs go round both lists at once: with two local and two remote addresses the first goes with the first (a rail to its rail).
    A pair that failed is left out for a while, longer each time (1 to 30 s), and then tried again.
    """

    def __init__(self, remotes: Sequence[str], locals_: Sequence[str] = ()) -> None:
        if not remotes:
            raise ValueError("a link needs a remote address")
        here: Sequence[str | None] = locals_ or (None,)
        count = math.lcm(len(here), len(remotes))
        self.pairs: tuple[Pair, ...] = tuple(
            dict.fromkeys((here[i % len(here)], remotes[i % len(remotes)]) for i in range(count))
        )
        self._used: dict[int, Pair] = {}
        self._failed: dict[Pair, tuple[int, float]] = {}
        self._backoff = Backoff(first_s=1.0, most_s=30.0)

    def pick(self, now: float, tried: Sequence[Pair] = ()) -> Pair | None:
        """For one more connection: of the pairs that are not left out, the one with the fewest. ``tried`` are not asked again.

        With all others left out or tried, the one that has been left out longest; None when every pair was tried.
        """
        left = [pair for pair in self.pairs if pair not in tried]
        if not left:
            return None
        good = [pair for pair in left if self._until(pair) <= now]
        return min(good, key=self.count) if good else min(left, key=self._until)

    def count(self, pair: Pair) -> int:
        return sum(used == pair for used in self._used.values())

    def use(self, index: int, pair: Pair) -> None:
        """The connection in place ``index`` is being made over ``pair``."""
        self._used[index] = pair

    def left(self, index: int) -> None:
        """The connection in that place is no more, or was not made."""
        self._used.pop(index, None)

    def works(self, pair: Pair) -> None:
        self._failed.pop(pair, None)

    def failed(self, pair: Pair, now: float) -> None:
        times = self._failed.get(pair, (0, 0.0))[0]
        self._failed[pair] = times + 1, now + self._backoff.delay(times, 1.0)

    def dead(self, now: float) -> tuple[Pair, ...]:
        """Those that are left out now."""
        return tuple(pair for pair in self.pairs if self._until(pair) > now)

    def idle(self, now: float) -> bool:
        """Whether a pair could be tried (again) that has no connection, while another has more than one."""
        counts = {pair: self.count(pair) for pair in self.pairs}
        return max(counts.values()) > 1 and any(not n and self._until(pair) <= now for pair, n in counts.items())

    def fullest(self) -> tuple[int, ...]:
        """Places of the connections of the pair that has most."""
        most = max(self.pairs, key=self.count)
        return tuple(sorted(index for index, pair in self._used.items() if pair == most))

    def _until(self, pair: Pair) -> float:
        return self._failed.get(pair, (0, 0.0))[1]
