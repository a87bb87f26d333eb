"""What a router knows of the decode stage: how long a request that becomes ready later will wait for a place.

The queue at decode now says little about that: when prefill is behind, the requests that will fill the batches are
still being prefilled. So the forecast replays first come, first served over the predicted ready times of what has been
routed; every report of the stage reconciles it with what is really there.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right

from kvtransport.errors import ConfigError

MEMORY_S = 60.0
"""Time over which the stay of a request is measured."""


class DecodeForecast:
    """Requests in decode and on their way to it. Until the first report nothing is known and nobody waits.

    ``hold_s``: seconds one request is expected to keep its place, until reports have measured it.
    """

    __slots__ = ("_ends", "_finished", "_last", "_occupied", "_places", "_ready", "hold_s")

    def __init__(self, hold_s: float) -> None:
        if not hold_s > 0:
            raise ConfigError(f"decode: a request is held for more than 0 s, got {hold_s}")
        self.hold_s = hold_s
        self._places: int | None = None
        self._last: tuple[float, int, int] | None = None  # at, occupied, finished
        self._occupied = self._finished = 0.0  # place-seconds and requests, both fading
        # By the order in which they are ready; the k-th begins when it is ready and the (k - places)-th has ended.
        self._ready: list[float] = []
        self._ends: list[float] = []

    def report(self, now: float, *, present: int, places: int, finished: int) -> None:
        """Decode holds ``present`` requests, queued ones included, has ``places``, and has ``finished`` so many in all.

        Raises ConfigError for negative figures.
        """
        if present < 0 or places < 0 or finished < 0:
            raise ConfigError(f"decode reported {present} requests, {places} places and {finished} finished")
        self._measure(now, min(present, places), places, finished)
        self._places, hold = places, self.hold_s
        there = bisect_right(self._ready, now)
        # What was predicted to be over and is not, ends some time within one stay; what is over and was not, is forgotten.
        inside = [e for e in self._ends[:there] if e > now]
        missing = present - len(inside)
        if missing > 0:
            inside += [now + hold * (k + 1) / missing for k in range(missing)]
            inside.sort()
        elif missing < 0:
            del inside[:-missing]
        self._ready[:there] = [now] * len(inside)
        if places == 0:
            self._ends = [math.inf] * len(self._ready)
            return
        ends = inside[:places]
        for k in range(len(ends), len(self._ready)):
            ready = self._ready[k]
            ends.append((max(ready, ends[k - places]) if k >= places else ready) + hold)
        self._ends = ends

    def _measure(self, now: float, occupied: int, places: int, finished: int) -> None:
        """The stay by Little's law: place-seconds taken over requests finished, both over the last minute or so."""
        last, self._last = self._last, (now, occupied, finished)
        if last is None:
            # What is expected counts like a full house that has been measured.
            self._occupied, self._finished = places * self.hold_s, float(places)
            return
        dt = now - last[0]
        if dt <= 0:
            return
        keep = math.exp(-dt / MEMORY_S)
        self._occupied = self._occupied * keep + (occupied + last[1]) / 2 * dt
        self._finished = self._finished * keep + max(finished - last[2], 0)
        if self._finished >= 1.0 and self._occupied > 0:
            self.hold_s = self._occupied / self._finished

    def expect(self, ready: float) -> None:
        """A request has been routed and will be ready for decode at ``ready``."""
        if self._places is None:
            return
        end = ready + self.wait(ready) + self.hold_s
        self._ready.insert(bisect_right(self._ready, ready), ready)
        self._ends.insert(bisect_left(self._ends, end), end)

    def latest_wait(self, ready: float) -> float:
        """Seconds that whoever comes to decode last would wait, were one more request ready at ``ready``.

        A quick request overtakes slower ones on their way and takes a place that was meant for them.
        """
        return self.wait(max(ready, self._ready[-1]) if self._ready else ready)

    def wait(self, ready: float) -> float:
        """Seconds a request that is ready at ``ready`` waits for a place; inf where there is none."""
        places = self._places
        if places is None:
            return 0.0
        if places == 0:
            return math.inf
        turn = bisect_right(self._ready, ready) - places  # the one whose place this request takes
        return max(self._ends[turn] - ready, 0.0) if turn >= 0 else 0.0
