"""Which of a request's blocks travel, by cache group. Pure: token counts and block ids in, block runs out.

vLLM keeps a block table per group; id 0 is its null block (outside the window, or not there) and is never sent nor written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvtransport.errors import DestinationError
from kvtransport.layout import GroupKind

from .steps import BlockRun

NULL_BLOCK = 0


@dataclass(frozen=True, slots=True)
class GroupRule:
    """One of the engine's groups: how its block table is read.

    ``window`` (tokens) for sliding groups. ``spare_blocks``: blocks of a recurrent group after the running state
    (speculative decoding's scratch). ``transfers``: False for groups that the engine rebuilds itself.
    """

    kind: GroupKind
    block_tokens: int
    window: int | None = None
    spare_blocks: int = 0
    transfers: bool = True

    def span(self, boundary: int) -> tuple[int, int]:
        """Blocks [first, stop) that continuing at ``boundary`` tokens needs; the same as CacheLayout.extents, in blocks."""
        first = 0 if self.window is None else max(0, boundary - (self.window - 1)) // self.block_tokens
        return first, -(-boundary // self.block_tokens)

    def ready(self, ids: Sequence[int], before: int, until: int, boundary: int) -> BlockRun | None:
        """What becomes ready when the computed tokens grow from ``before`` to ``until`` (at most ``boundary``).

        Whole blocks, and with ``until == boundary`` the last one whatever it holds; a recurrent state only then. None: nothing.
        Raises DestinationError when a block that is needed is not there.
        """
        last = until == boundary
        if not self.transfers:
            return None
        if self.kind is GroupKind.RECURRENT:
            return self._state(ids) if last else None
        first, stop = self.span(boundary)
        first = max(first, before // self.block_tokens)
        if not last:
            stop = until // self.block_tokens
        return self._run(ids, first, stop) if first < stop else None

    def whole(self, ids: Sequence[int], boundary: int) -> BlockRun:
        """Everything a transfer up to ``boundary`` holds; errors as :meth:`ready`."""
        if not self.transfers:
            return BlockRun(0, ())
        if self.kind is GroupKind.RECURRENT:
            return self._state(ids)
        return self._run(ids, *self.span(boundary))

    def _run(self, ids: Sequence[int], first: int, stop: int) -> BlockRun:
        run = tuple(ids[first:stop])
        if len(run) != stop - first or NULL_BLOCK in run:
            held = sum(1 for i in ids if i != NULL_BLOCK)
            raise DestinationError(
                f"blocks {first} to {stop} of a {self.kind} group are needed, the engine's table has {len(ids)} entries, {held} of them blocks"
            )
        return BlockRun(first, run)

    def _state(self, ids: Sequence[int]) -> BlockRun:
        kept = ids[: len(ids) - min(self.spare_blocks, max(0, len(ids) - 1))]
        if not kept or kept[-1] == NULL_BLOCK:
            raise DestinationError(f"the engine's table of a recurrent group holds no state: {list(ids)}")
        return BlockRun(0, (kept[-1],))
