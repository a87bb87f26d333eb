"""Arrays that grow by rows without copying them: ten million rows must not wait for each other."""

from __future__ import annotations

import mmap
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

_MAPPED_BYTES = 1 << 18
"""From here on rows lie in mappings of their own: growing moves page table entries, and what is not used takes no memory."""


class Column:
    """Rows of zeros; ``rows`` is the array, of shape (capacity, *shape).

    Whoever keeps a view of ``rows`` drops it before :meth:`grow`, which raises BufferError otherwise (where rows are
    mapped; elsewhere the view would just be of the old rows).
    """

    def __init__(self, dtype: npt.DTypeLike, shape: tuple[int, ...] = ()) -> None:
        self.rows: npt.NDArray[Any] = np.zeros((0, *shape), dtype)
        self._memory: mmap.mmap | None = None

    def grow(self, capacity: int) -> None:
        """Have at least ``capacity`` rows; the new ones are zero. MemoryError or OSError leave everything as it was."""
        old = self.rows
        if capacity <= len(old):
            return
        row = old.dtype.itemsize * int(np.prod(old.shape[1:], dtype=np.int64))
        nbytes = capacity * row
        if nbytes < _MAPPED_BYTES:
            self.rows = np.concatenate([old, np.zeros((capacity - len(old), *old.shape[1:]), old.dtype)])
            return
        shape, dtype = old.shape[1:], old.dtype
        if self._memory is None or sys.platform != "linux":
            memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            rows = np.frombuffer(memory, dtype, capacity * row // dtype.itemsize).reshape(capacity, *shape)
            rows[: len(old)] = old
            self._memory, self.rows = memory, rows
            return
        count = len(old)
        del old
        self.rows = np.zeros((0, *shape), dtype)
        try:
            self._memory.resize(nbytes)
        finally:
            count = len(self._memory) // row if row else count
            self.rows = np.frombuffer(self._memory, dtype, count * row // dtype.itemsize).reshape(count, *shape)
