"""What a router knows of a pool of prefill instances: when the next one will be free.

A pool serves first come, first served. The ledger replays that with predicted service times, so that requests
routed between two reports of the pool see each other; a report corrects it.
"""

from __future__ import annotations

import heapq
import math

from kvtransport.errors import ConfigError


class PoolLedger:
    """The times (seconds) at which each of ``instances`` will have done its assigned work."""

    __slots__ = ("_free",)

    def __init__(self, instances: int) -> None:
        if instances < 0:
            raise ConfigError(f"a pool cannot have {instances} instances")
        self._free = [0.0] * instances

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

    def resize(self, now: float, instances: int) -> None:
        """The pool has ``instances`` from now on. New ones are free; the idlest leave, when their work is done."""
        if instances < 0:
            raise ConfigError(f"a pool cannot have {instances} instances")
        while len(self._free) < instances:
            heapq.heappush(self._free, now)
        while len(self._free) > instances:
            heapq.heappop(self._free)
