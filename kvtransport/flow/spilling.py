"""When a ready unit's source is given back by copying it aside (design: "When credit runs out")."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class WhenFull(StrEnum):
    """What happens to ready units when credit *and* the spill budget are used up."""

    WAIT = "wait"
    """Handovers stay unreleased: the producer waits for its own memory."""
    FAIL = "fail"
    """The transfer fails with SpillFullError."""


@dataclass(frozen=True, slots=True)
class SpillPolicy:
    """``budget_bytes`` for one process. A unit spills when its transfer had no credit for ``stalled_s``, or when it waited
    ``after_s`` and for as long nothing of its transfer was acknowledged.

    Not at the first moment without credit: a consumer that keeps up is always a moment behind, and copying aside what
    would be sent a millisecond later doubled the producer's CPU. Nor by age alone: on a slow link that flows every unit
    waits long, and a copy frees its memory hardly sooner than the wire does.
    """

    budget_bytes: int = 256 << 20
    after_s: float = 0.25
    stalled_s: float = 0.02
    when_full: WhenFull = WhenFull.WAIT

    def wants(self, *, waited_s: float, stalled_s: float, still_s: float) -> bool:
        """Whether a unit should be copied aside.

        It ``waited_s``; its transfer was without credit for ``stalled_s``, and without progress for ``still_s``.
        """
        return self.budget_bytes > 0 and (stalled_s >= self.stalled_s or min(waited_s, still_s) >= self.after_s)


NO_SPILL = SpillPolicy(budget_bytes=0)
"""Nothing is copied aside."""
