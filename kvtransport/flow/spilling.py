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
    """``budget_bytes`` for one process; a unit spills at once without credit, or when it waited ``after_s``."""

    budget_bytes: int = 256 << 20
    after_s: float = 0.25
    when_full: WhenFull = WhenFull.WAIT

    def wants(self, *, waited_s: float, credit_left: int) -> bool:
        """Whether a unit that still waits to be sent should be copied aside."""
        return self.budget_bytes > 0 and (credit_left <= 0 or waited_s >= self.after_s)
