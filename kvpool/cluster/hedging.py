"""When a read is asked of a second node: past the p99 of reads like it, and seldom.

Dean and Barroso, "The Tail at Scale", CACM 56(2), 2013: hedged requests.
"""

from __future__ import annotations

import math

LEAST = 50
"""Reads of a size before their p99 means anything."""
FADE = 2_000
"""After so many reads of a size older ones count half."""
STEPS = 8
"""Buckets per doubling of the time: 9% apart."""


class Latencies:
    """How long reads took (seconds), by their size (bytes) in powers of two."""

    def __init__(self) -> None:
        self._counts: dict[int, dict[int, float]] = {}
        self._added: dict[int, int] = {}

    def add(self, nbytes: int, seconds: float) -> None:
        size = nbytes.bit_length()
        counts = self._counts.setdefault(size, {})
        bucket = math.floor(math.log2(max(seconds, 1e-6)) * STEPS)
        counts[bucket] = counts.get(bucket, 0.0) + 1.0
        self._added[size] = self._added.get(size, 0) + 1
        if self._added[size] % FADE == 0:
            self._counts[size] = {b: n / 2 for b, n in counts.items() if n >= 0.5}

    def p99(self, nbytes: int) -> float | None:
        """Seconds that 99 of 100 reads of this size take at most; None: too few are known."""
        counts = self._counts.get(nbytes.bit_length(), {})
        total = sum(counts.values())
        if total < LEAST:
            return None
        over = total * 0.01
        for bucket in sorted(counts, reverse=True):
            over -= counts[bucket]
            if over < 0:
                return float(2.0 ** ((bucket + 1) / STEPS))
        return None


class Hedges:
    """Decides about second reads: at most ``part`` of all reads, ``burst`` at once, ``scratch_bytes`` of memory for them together."""

    def __init__(self, *, part: float = 0.03, burst: float = 4.0, scratch_bytes: int = 256 << 20) -> None:
        self.latencies = Latencies()
        self._part, self._burst = part, burst
        self._tokens = 0.0
        self._scratch = scratch_bytes
        self.reads = self.asked = self.won = 0

    def read(self) -> None:
        """A read began."""
        self.reads += 1
        self._tokens = min(self._tokens + self._part, self._burst)

    def delay(self, nbytes: int) -> float | None:
        """Seconds after which a second node may be asked; None: not for this one."""
        return self.latencies.p99(nbytes) if self._tokens >= 1.0 and nbytes <= self._scratch else None

    def take(self, nbytes: int) -> bool:
        """Whether a second node is asked now; give the memory back with :meth:`give_back`."""
        if self._tokens < 1.0 or nbytes > self._scratch:
            return False
        self._tokens -= 1.0
        self._scratch -= nbytes
        self.asked += 1
        return True

    def give_back(self, nbytes: int) -> None:
        self._scratch += nbytes
