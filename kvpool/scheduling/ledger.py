"""What a router knows of a pool of prefill instances: when the next one will be free.

A pool serves first come, first served. The ledger replays that with predicted service times, so that requests
routed between two reports of the pool see each other; a report corrects it.
"""

from __future__ import annotations

import heapq
import math
from collections import deque

from kvtransport.errors import ConfigError


class PoolLedger:
    """The times (seconds) at which each of ``instances`` will have done its assigned work."""

    __slots__ = ("_free", "_jobs")

    def __init__(self, instances: int) -> None:
        if instances < 0:
            raise ConfigError(f"a pool cannot have {instances} instances")
        self._free = [0.0] * instances
        self._jobs: deque[tuple[float, float]] = deque()  # (begin, seconds) in the order of begin; done ones linger

    @property
    def instances(self) -> int:
        return len(self._free)

    def wait(self, now: float) -> float:
        """Seconds a request routed now waits for an instance; inf without instances."""
        if not self._free:
            return math.inf
        return max(self._free[0] - now, 0.0)

    def assign(self, now: float, seconds: float) -> float:
        """Put ``seconds`` of work on the pool; returns when it will begin."""
        begin = max(self._free[0], now)
        heapq.heapreplace(self._free, begin + seconds)
        jobs = self._jobs
        while jobs and jobs[0][0] + jobs[0][1] <= now:
            jobs.popleft()
        jobs.append((begin, seconds))
        return begin

    def backlog(self, now: float) -> float:
        """Instance-seconds of work assigned and not done."""
        return sum(max(f - now, 0.0) for f in self._free)

    def correct(self, now: float, wait_s: float) -> None:
        """The pool reports that a request arriving ``now`` would wait ``wait_s``: shift what is believed.

        With idle instances reported, whatever the ledger still had waiting is forgotten.
        """
        if not self._free:
            return
        shift = wait_s - self.wait(now)
        if abs(shift) > 1e-9:
            self._free = [max(f, now) + shift for f in self._free]
            heapq.heapify(self._free)
            kept = (
                (begin + shift if begin > now else begin, seconds)
                for begin, seconds in self._jobs
                if wait_s > 0 or begin <= now
            )
            self._jobs = deque(kept)

    def resize(self, now: float, instances: int) -> None:
        """The pool has ``instances`` from now on, and what waits is shared out again.

        New ones are free; of those that leave, each finishes what it has begun, the first to finish first.
        """
        if instances < 0:
            raise ConfigError(f"a pool cannot have {instances} instances")
        running = sorted(begin + s for begin, s in self._jobs if begin <= now < begin + s)
        waiting = [s for begin, s in self._jobs if begin > now]
        running = running[max(len(running) - instances, 0) :]
        self._free = [now] * (instances - len(running)) + running
        heapq.heapify(self._free)
        self._jobs = deque((now, end - now) for end in running)
        if instances:
            for seconds in waiting:
                self.assign(now, seconds)
