"""Which transfers travel in their OPEN: those so small that a round trip costs more than a few copies of their bytes."""

from __future__ import annotations

from .tuning import SHORT_RTT_S

LOCAL_BYTES = 64 << 10
"""On a local path: more, and copies through the event loops cost more than the trip (docs/performance.md)."""
MOST_BYTES = 256 << 10
"""On any other, and what the wire allows."""
MAX_MANIFEST = 64 << 10
"""A manifest beside it has at most so many bytes."""
TOGETHER_BYTES = 4 << 20
"""Of all transfers of a link that are on their way like this: they are copies, they need no credit, and they stand before all DATA."""


def most_whole(wanted: int | None, min_rtt_s: float | None) -> int:
    """Bytes of the largest transfer that travels whole; ``wanted``: by whoever configured this side, None: what suits the path."""
    if wanted is not None:
        return min(wanted, MOST_BYTES)
    return LOCAL_BYTES if min_rtt_s is None or min_rtt_s < SHORT_RTT_S else MOST_BYTES


def travels_whole(total_bytes: int, manifest_bytes: int, *, most: int, capped: bool, others: int = 0) -> bool:
    """Whether a transfer that is complete and sealed when it is opened goes with its OPEN.

    ``most``: as :func:`most_whole`, 0 where the peer does not take such an OPEN. ``capped``: its tenant's rate is limited,
    and what is in a control frame would not count. ``others``: bytes of those of the link that are on their way in their OPEN.
    """
    fits = 0 < total_bytes <= most and total_bytes + others <= TOGETHER_BYTES
    return fits and manifest_bytes <= MAX_MANIFEST and not capped
