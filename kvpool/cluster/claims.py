"""Who computes what nobody has: the first who misses gets the right for a while, so that the same prefill does not run twice."""

from __future__ import annotations

from dataclasses import dataclass

MOST = 65_536
"""Claims of one node; beyond it everybody may compute."""
MOST_S = 600.0


@dataclass(frozen=True, slots=True)
class Claim:
    holder: bytes
    until: float


class Claims:
    """Claims by name. Lost with their node: that costs a computation done twice, nothing else."""

    def __init__(self) -> None:
        self._claims: dict[bytes, Claim] = {}

    def __len__(self) -> int:
        return len(self._claims)

    def ask(self, now: float, name: bytes, holder: bytes, seconds: float) -> float:
        """0: ``holder`` may compute, for ``seconds`` (at most MOST_S); else the seconds that somebody else's right lasts."""
        known = self._claims.get(name)
        if known is not None and known.holder != holder and known.until > now:
            return known.until - now
        self._claims.pop(name, None)
        if len(self._claims) >= MOST:
            self._claims = {n: c for n, c in self._claims.items() if c.until > now}
        if len(self._claims) < MOST:
            self._claims[name] = Claim(holder, now + min(seconds, MOST_S))
        return 0.0

    def end(self, name: bytes, holder: bytes) -> None:
        """``holder`` has computed it, or has given up."""
        known = self._claims.get(name)
        if known is not None and known.holder == holder:
            del self._claims[name]
