"""What a cache could do that knows the future.

Belady's rule, over full-attention blocks alone: when room is needed, the block goes whose next use is farthest away. A block's parent
is always used no later than the block itself, so what this keeps is a set of whole prefixes, and no policy hits more blocks.

For layouts of full attention that is the optimum. Where states or windows are needed as well they count nothing here, and are
there whenever they could be of use: no cache of the same memory can do better, and a real one not as well. A *bound*, in blocks;
tokens differ by partial last blocks only.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from kvpool.scheduling.traces import Trace

NEVER = 1 << 60


@dataclass(frozen=True, slots=True)
class Clairvoyant:
    """Rates of the requests that are counted. ``kind``: "optimum" or "bound"."""

    token_hit_rate: float
    block_hit_rate: float
    kind: str


def clairvoyant(
    trace: Trace, capacity_blocks: int | None, *, first: int = 0, partial: bool, exact: bool
) -> Clairvoyant:
    """Replay ``trace`` with ``capacity_blocks`` blocks of the trace's size (None: unlimited), counting from request ``first`` on.

    ``partial``: a last, partial block is cached too. ``exact``: the layout has states or windows, so this is a bound.
    """
    step = trace.block_tokens
    paths: list[Sequence[int]] = [
        ids if partial else ids[: int(n) // step] for ids, n in zip(trace.blocks, trace.input_tokens, strict=True)
    ]
    following = _next_uses(paths)
    held: dict[int, int] = {}  # block -> next use
    queue: list[tuple[int, int, int]] = []  # -next use, -depth, block
    asked = hit = asked_blocks = hit_blocks = 0
    for now, path in enumerate(paths):
        if now == first:
            asked = hit = asked_blocks = hit_blocks = 0
        tokens = int(trace.input_tokens[now])
        found = 0
        while found < len(path) and path[found] in held:
            found += 1
        asked += tokens
        hit += min(tokens, found * step)
        asked_blocks += -(-tokens // step)
        hit_blocks += found
        for depth, (block, use) in enumerate(zip(path, following[now], strict=True)):
            held[block] = use
            heapq.heappush(queue, (-use, -depth, block))
        while capacity_blocks is not None and len(held) > capacity_blocks:
            use, _, block = heapq.heappop(queue)
            if held.get(block) == -use:
                del held[block]
    return Clairvoyant(hit / max(1, asked), hit_blocks / max(1, asked_blocks), "bound" if exact else "optimum")


def _next_uses(paths: Sequence[Sequence[int]]) -> list[list[int]]:
    """For every block of every request, the request that uses it next."""
    soonest: dict[int, int] = {}
    out: list[list[int]] = []
    for now in range(len(paths) - 1, -1, -1):
        out.append([soonest.get(block, NEVER) for block in paths[now]])
        soonest.update(dict.fromkeys(paths[now], now))
    out.reverse()
    return out
