"""Credit in bytes, as absolute offsets.

The receiver says how many distinct payload bytes of a transfer the sender may have sent since its start.
Because the number is absolute, repeating or reordering CREDIT frames is harmless. Bytes sent again after a loss
cost no credit: their memory was accounted for the first time.
"""

from __future__ import annotations


class SenderCredit:
    """The sender's account."""

    def __init__(self) -> None:
        self.limit = 0
        self.used = 0
        self.allowed = 1 << 63
        """This side's own limit, absolute too."""

    @property
    def left(self) -> int:
        return max(0, min(self.limit, self.allowed) - self.used)

    def grant(self, limit: int) -> bool:
        """Take over an absolute limit; a lower one is an old frame and ignored. True when it moved."""
        if limit <= self.limit:
            return False
        self.limit = limit
        return True

    def take(self, wanted: int, least: int) -> int:
        """Bytes that may be sent now of ``wanted``: all, part of at least ``least``, or 0."""
        n = min(wanted, self.left)
        if n < min(wanted, least):
            return 0
        self.used += n
        return n


class ReceiverCredit:
    """The receiver's account: at most ``window`` bytes granted and not yet applied."""

    def __init__(self, total: int, window: int) -> None:
        self._total = total
        self._window = window
        self.granted = min(total, window)
        self._applied = 0

    def applied(self, nbytes: int) -> int | None:
        """Account for ``nbytes`` verified in place; returns a new absolute limit when it is worth a frame."""
        self._applied += nbytes
        limit = min(self._total, self._applied + self._window)
        if limit - self.granted >= max(1, self._window // 4) or (limit == self._total and limit > self.granted):
            self.granted = limit
            return limit
        return None
