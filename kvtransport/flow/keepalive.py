"""When to ping a silent peer and when to give it up. Pure: the caller brings the clock."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Verdict(Enum):
    FINE = "fine"
    PING = "ping"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Keepalive:
    """Ping after ``interval_s`` of silence; dead after ``deadline_s`` of it (seconds)."""

    interval_s: float
    deadline_s: float

    def judge(self, now: float, last_heard: float, last_ping: float) -> Verdict:
        silent = now - last_heard
        if silent >= self.deadline_s:
            return Verdict.DEAD
        if silent >= self.interval_s and now - last_ping >= self.interval_s:
            return Verdict.PING
        return Verdict.FINE

    @property
    def poll_s(self) -> float:
        """How often to judge."""
        return min(self.interval_s, self.deadline_s) / 4
