"""Moving in the background: no faster than allowed, and how far it has got."""

from __future__ import annotations

import msgspec


class Pacer:
    """Bytes a second on average from ``begin`` (seconds) on; None allows all."""

    def __init__(self, bytes_per_s: float | None, begin: float) -> None:
        self._rate = bytes_per_s
        self._free = begin

    def wait(self, now: float, nbytes: int) -> float:
        """Account for ``nbytes``; returns the seconds to wait before they may go."""
        if self._rate is None:
            return 0.0
        start = max(self._free, now)
        self._free = start + nbytes / self._rate
        return start - now


class Progress(msgspec.Struct):
    """Of a drain. Chains are paths of the index; what targets held already counts as done, not as moved."""

    running: bool = False
    chains: int = 0
    done: int = 0
    moved_bytes: int = 0
    skipped: int = 0
    """Chains whose target had them already."""
    failed: int = 0
    left: int = 0
    """Chains that were not reached before the deadline."""
    finished: bool = False
    note: str = ""
