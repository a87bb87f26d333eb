"""The garbage collector of a process that holds millions of things and must not pause.

A full collection looks at every container alive, and is due whenever a quarter more have come: some 10 ms per 100,000. Here what has
survived one is *frozen*: moved out of the collector's sight, so that the next looks only at what came since. Frozen objects still go
when nothing refers to them; only cycles among them do not. For their sake everything is looked at again, rarely, and when it is quiet.

Python looks at the young ones in the middle of whatever creates one too many: that may be a call that holds lists of thousands of keys,
each of which is looked at too. Here they have their turn between calls, when such lists are gone.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

NEVER = 1 << 30
MOST_YOUNG = 20_000
"""So many new containers are not waited with: they came between two ticks."""
OLD = 10
"""Collections of the middle generation, after which what is left of all is frozen."""
EVERYTHING_S = 600.0
"""Between two looks at everything, when it is quiet."""
AT_LAST_S = 6 * 3_600.0
"""The same when it never is."""


class Collector:
    """Takes over collections from :meth:`start` to :meth:`stop`. ``clock`` in seconds.

    One per process.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._thresholds = gc.get_threshold()
        self._last = clock()

    def start(self) -> None:
        """What is there now (modules, mostly) stays."""
        self._thresholds = gc.get_threshold()
        gc.set_threshold(MOST_YOUNG, self._thresholds[1], NEVER)
        self._everything()

    def tick(self, *, quiet: bool) -> bool:
        """Collect what came since the last time; called a few times a second, between calls. Whether everything was looked at.

        ``quiet``: nobody waits, a pause would not be noticed.
        """
        if self._clock() - self._last >= (EVERYTHING_S if quiet else AT_LAST_S):
            self._everything()
            return True
        # Python counts what came less what went: by that, thousands may be young although it says that none is.
        _, middle, old = gc.get_count()
        if old >= OLD:
            gc.collect()
            gc.freeze()
        else:
            gc.collect(1 if middle >= self._thresholds[1] else 0)
        return False

    def _everything(self) -> None:
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        self._last = self._clock()

    def stop(self) -> None:
        """As it was before."""
        gc.set_threshold(*self._thresholds)
        gc.unfreeze()
