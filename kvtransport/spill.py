"""Transfer-cache blocks on the producer's side: where ready units wait when the consumer gives no credit.

One lazily mapped area per process, cut into fixed pages, so that a spilled unit of any length fits wherever
pages are free.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .buffers import Arena, PageList
from .errors import ArenaError

PAGE_BYTES = 256 * 1024


@dataclass(slots=True)
class Spilled:
    """Pages that hold one spilled unit."""

    ids: npt.NDArray[np.int64]
    pages: PageList


class SpillArea:
    """At most ``budget_bytes`` of spilled units. Belongs to one event loop."""

    def __init__(self, budget_bytes: int) -> None:
        self._count = budget_bytes // PAGE_BYTES
        self._free = np.arange(self._count, dtype=np.int64)[::-1].copy()
        self._left = self._count
        self._arena: Arena | None = None
        self._view: memoryview | None = None

    @property
    def used_bytes(self) -> int:
        return (self._count - self._left) * PAGE_BYTES

    @property
    def budget_bytes(self) -> int:
        return self._count * PAGE_BYTES

    def take(self, nbytes: int) -> Spilled | None:
        """Pages for ``nbytes``, or None when the budget does not allow it."""
        wanted = -(-nbytes // PAGE_BYTES)
        if wanted > self._left:
            return None
        if self._view is None:
            # Not populated: spilling is the exception, memory should cost nothing until it happens.
            try:
                self._arena = Arena(
                    self._count * PAGE_BYTES,
                    memfd=False,
                    populate=False,
                    lock="off",
                    cuda="off",
                    name="kvtransport-spill",
                )
            except ArenaError as error:
                # Spilling is a help, not a duty: without its memory the policy for a full budget applies.
                warnings.warn(f"nothing will be spilled: {error}", RuntimeWarning, stacklevel=2)
                self._count = self._left = 0
                return None
            self._view = memoryview(self._arena)
        self._left -= wanted
        ids = self._free[self._left : self._left + wanted].copy()
        ids.sort()
        return Spilled(ids, PageList.pages(self._view, ids * PAGE_BYTES, PAGE_BYTES, nbytes).merged())

    def give_back(self, spilled: Spilled) -> None:
        n = len(spilled.ids)
        self._free[self._left : self._left + n] = spilled.ids
        self._left += n

    def close(self) -> None:
        """Unmap once nothing refers to the area any more."""
        if self._view is not None and self._arena is not None:
            self._view = None
            self._arena.close()
            self._arena = None
