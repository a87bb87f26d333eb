"""Cutting ready units into chunks."""

from __future__ import annotations

MIN_CHUNK = 512 * 1024
"""Smaller chunks only where the ready unit or the credit is smaller."""


def next_cut(start: int, stop: int, chunk_bytes: int) -> int:
    """Length of the next chunk of ``[start, stop)``: at most ``chunk_bytes``, without leaving a runt.

    A remainder below half a chunk is spread over the last two chunks instead of becoming one of its own.
    """
    left = stop - start
    if left <= chunk_bytes:
        return left
    if left < chunk_bytes + chunk_bytes // 2:
        return (left + 1) // 2
    return chunk_bytes
