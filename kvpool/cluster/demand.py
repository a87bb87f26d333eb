"""How much segments are read: hits that fade with time."""

from __future__ import annotations

HALF_LIFE_S = 60.0
MOST = 65_536
"""Segments remembered; the one not read for longest is forgotten first."""


class Demand:
    """Hits per segment, each worth half after ``half_life_s`` seconds. ``now`` never goes back."""

    def __init__(self, half_life_s: float = HALF_LIFE_S, most: int = MOST) -> None:
        self._half_life_s = half_life_s
        self._most = most
        self._heat: dict[bytes, tuple[float, float]] = {}  # segment -> (hits, when they were worth so many)

    def __len__(self) -> int:
        return len(self._heat)

    def hit(self, now: float, name: bytes) -> float:
        """A segment was read; returns its :meth:`heat`."""
        heat = self.heat(now, name) + 1.0
        self._heat.pop(name, None)
        self._heat[name] = (heat, now)
        if len(self._heat) > self._most:
            del self._heat[next(iter(self._heat))]
        return heat

    def heat(self, now: float, name: bytes) -> float:
        """Hits of the segment, the older the less they count."""
        hits, then = self._heat.get(name, (0.0, now))
        return float(hits * 0.5 ** ((now - then) / self._half_life_s))
