"""Rates that are kept to: a token bucket, and how transfers share what is in it. Pure: the caller brings the clock."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

K = TypeVar("K")
MOST_UNUSED = 16 << 20
"""A transfer that does not send is allowed so many bytes more: the largest chunk, which may have to go in one piece."""


class TokenBucket:
    """``rate`` bytes a second, of which those of ``burst_s`` seconds are kept when nobody takes them."""

    def __init__(self, rate: float, now: float, burst_s: float = 0.05) -> None:
        self._rate = rate
        self._burst_s = burst_s
        self._at = now
        self._tokens = 0.0

    @property
    def rate(self) -> float:
        return self._rate

    def set_rate(self, rate: float, now: float) -> None:
        self.available(now)
        self._rate = rate

    def available(self, now: float) -> int:
        """Bytes that may be taken now; 0 while more were taken than there were."""
        passed, self._at = max(0.0, now - self._at), max(now, self._at)
        self._tokens = min(self._rate * self._burst_s, self._tokens + passed * self._rate)
        return max(0, int(self._tokens))

    def take(self, nbytes: int) -> None:
        self._tokens -= nbytes


class Allowances(Generic[K]):
    """Divides a bucket among transfers: absolute numbers of bytes that each may have sent since it began."""

    def __init__(self, bucket: TokenBucket, most_unused: int = MOST_UNUSED) -> None:
        self.bucket = bucket
        self._most_unused = most_unused
        self.allowed: dict[K, int] = {}

    def join(self, key: K) -> None:
        self.allowed[key] = 0

    def leave(self, key: K, sent: int) -> None:
        """What it was allowed and did not send goes back."""
        self.bucket.take(min(0, sent - self.allowed.pop(key, sent)))

    def divide(self, now: float, sent: Iterable[tuple[K, int]]) -> list[K]:
        """``sent``: bytes by transfer, since it began. Returns those that may send more now.

        Equal shares, but nothing to those that do not use what they have: who has nothing to send does not hold back the others.
        """
        wanting = [key for key, n in sent if key in self.allowed and self.allowed[key] - n < self._most_unused]
        share = self.bucket.available(now) // len(wanting) if wanting else 0
        if share == 0:
            return []
        for key in wanting:
            self.allowed[key] += share
            self.bucket.take(share)
        return wanting
