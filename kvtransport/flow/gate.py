"""What strangers may cost: how many handshakes at once, and what share of a processor.

A peer that is not authenticated yet has cost nothing but what stands here: a place among a bounded number of
handshakes, and time that is paid from a budget which established links do not share.
"""

from __future__ import annotations

from collections import Counter


class Gate:
    """Handshakes in progress: at most ``limit``, of one address at most ``per_address``."""

    def __init__(self, limit: int, per_address: int) -> None:
        self._limit = limit
        self._per_address = per_address
        self._by_address: Counter[str] = Counter()
        self.active = 0

    def enter(self, address: str) -> bool:
        """Take a place; False where there is none (then do not :meth:`leave`)."""
        if self.active >= self._limit or self._by_address[address] >= self._per_address:
            if not self._by_address[address]:
                del self._by_address[address]
            return False
        self.active += 1
        self._by_address[address] += 1
        return True

    def leave(self, address: str) -> None:
        """Give the place back."""
        self.active -= 1
        self._by_address[address] -= 1
        if not self._by_address[address]:
            del self._by_address[address]


class Pacer:
    """A budget of processor time: ``share`` of each second, of which ``burst_s`` seconds may be saved up.

    The clock is the caller's (seconds, any origin).
    """

    def __init__(self, share: float, burst_s: float) -> None:
        self._share = share
        self._burst = burst_s
        self._balance = burst_s
        self._last = 0.0

    def spend(self, now: float, seconds: float) -> None:
        """``seconds`` of processor time were spent."""
        self._refill(now)
        self._balance -= seconds

    def wait(self, now: float) -> float:
        """Seconds until more may be spent; 0: now."""
        self._refill(now)
        return max(0.0, -self._balance / self._share)

    def _refill(self, now: float) -> None:
        self._balance = min(self._burst, self._balance + max(0.0, now - self._last) * self._share)
        self._last = now
