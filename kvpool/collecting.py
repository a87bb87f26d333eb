"""The garbage collector of a process that holds millions of things and must not pause.

A full collection looks at every container alive, and is due whenever a quarter more have come: some 10 ms per 100,000. Here what has
survived one is *frozen*: moved out of the collector's sight, so that the next looks only at what came since. Frozen objects still go
when nothing refers to them; only cycles among them do not. For their sake everything is looked at again, rarely, and when it is quiet.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

NEVER = 1 << 30
EVERYTHING_S = 600.0
"""Between two looks at everything, when it is quiet."""
AT_LAST_S = 6 * 3_600.0
"""The same when it never is."""


class Collector:
    """Takes over full collections from :meth:`start` to :meth:`stop`; the young generations stay Python's. ``clock`` in seconds.

    One per process.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._thresholds = gc.get_threshold()
        self._last = clock()

    def start(self) -> None:
        """What is there now (modules, mostly) stays."""
        self._thresholds = gc.get_threshold()
        young, middle, _ = self._thresholds
        gc.set_threshold(young, middle, NEVER)
        self._everything()

    def tick(self, *, quiet: bool) -> bool:
        """Collect what came since the last time, if any of it is old enough; called a few times a second. Whether everything was looked at.

        ``quiet``: nobody waits, a pause would not be noticed.
        """
        if self._clock() - self._last >= (EVERYTHING_S if quiet else AT_LAST_S):
            self._everything()
            return True
        if gc.get_count()[2]:
            gc.collect()
            gc.freeze()
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
