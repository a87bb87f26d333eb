"""How long to wait before dialling again. Pure: the caller brings the random number."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential with jitter: the n-th wait lies between half and all of ``first_s * factor ** n``, at most ``most_s``.

    Jitter, so that the many links of a restarted peer do not all knock at once; at least half, so that
    nobody spins. Seconds.
    """

    first_s: float = 0.05
    factor: float = 2.0
    most_s: float = 2.0

    def delay(self, attempt: int, random: float) -> float:
        """Seconds before attempt ``attempt`` (0: the first); ``random`` is from [0, 1)."""
        # The exponent is capped: a float overflows long before anybody gives up counting.
        span = min(self.most_s, self.first_s * self.factor ** min(attempt, 64))
        return span * (0.5 + 0.5 * random)
