"""The C library's allocator in a process that runs for months: what bursts took goes back.

By itself glibc keeps a heap for each thread, and takes ever larger buffers from its heaps once one was freed: what lies behind the
last of them in use is never given back, so that memory grows by a step with every new largest burst.
"""

from __future__ import annotations

import ctypes

M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # malloc.h
LARGE_BYTES = 256 << 10
"""Larger buffers are mappings of their own, and go back when they are freed."""
HEAPS = 2


def bound_heaps() -> bool:
    """Set both bounds for this process; False where the C library has none (musl, macOS)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all((mallopt(M_ARENA_MAX, HEAPS), mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)))
