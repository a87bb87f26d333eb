"""Which recurrent states to keep: at most two of a sequence, where one is likely to be of use.

After Marconi (MLSys 2025, arXiv 2411.19379; written from the paper's description). A state serves one exact length, so taking one per block
would fill any cache with states nobody comes back for. Two places are worth it:

* **the branch point**: where a sequence leaves what is known already. Inserting its keys into the index, as a trial before
  prefill, shows it: the known prefix ends at a block that has other successors. What two sequences share (a system prompt,
  a document) a third is likely to share too.
* **after the last token**: a conversation goes on from there.

Both lie on the grid of blocks, or the second one off it where the chain has keys there (see :mod:`kvpool.keys`). Windows of sliding
groups are as exact as states, and follow the same rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvtransport.layout import GroupKind

from .match import GroupRule, View, restorable


@dataclass(frozen=True, slots=True)
class CheckpointHints:
    """Where a state is worth taking; all in tokens.

    ``lengths``: ascending, to be given to ``put`` as its checkpoints and boundary. ``branch`` and ``last``: those of them (or None) that
    are the branch point and the end. ``restorable``: where prefill can start. ``start``: where the put can start, since
    the blocks before it are in the pool.
    """

    lengths: tuple[int, ...]
    branch: int | None
    last: int | None
    restorable: int
    start: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "lengths": list(self.lengths),
            "branch": self.branch,
            "last": self.last,
            "restorable": self.restorable,
            "start": self.start,
        }


def plan_checkpoints(
    rules: Sequence[GroupRule],
    block_tokens: int,
    tokens: int,
    *,
    known: int,
    branches: bool,
    restorable: Sequence[int],
    resident: int,
    off_grid: bool,
    insists: Iterable[int] = (),
) -> CheckpointHints:
    """Where to take states of a sequence of ``tokens`` tokens.

    ``known``: tokens of its longest prefix that the index knows, ``branches`` whether something else follows it there.
    ``restorable``: lengths that can be restored already, ascending. ``resident``: tokens whose full-attention blocks are
    there. ``off_grid``: the sequence has keys inside blocks. ``insists``: lengths the engine wants whatever we think; those
    outside the sequence are ignored.
    """
    reach = max((n for n in restorable if n < tokens), default=0)
    there = set(restorable)
    exact = any(rule.kind is not GroupKind.FULL for rule in rules)
    branch = last = None
    if exact:
        if branches and reach < known < tokens and known not in there:
            branch = known
        end = tokens if off_grid else tokens // block_tokens * block_tokens
        if end > reach and end not in there and end != branch:
            last = end
    wanted = {n for n in insists if 0 < n <= tokens and (off_grid or n % block_tokens == 0)} - there
    lengths = tuple(sorted(wanted | {n for n in (branch, last) if n is not None}))
    return CheckpointHints(
        lengths, branch, last, reach, _put_start(rules, block_tokens, tokens, lengths, reach, resident)
    )


def hints_of_view(
    view: View, tokens: int, *, branches: bool, off_grid: bool, known: int | None = None, insists: Iterable[int] = ()
) -> CheckpointHints:
    """:func:`plan_checkpoints` for a view of a sequence; ``known`` blocks of it are (default: as far as anything is resident)."""
    step, there = view.block_tokens, view.resident
    if known is None:
        known = int(np.flatnonzero(there.any(axis=0)).max(initial=-1)) + 1
    full = [there[g] for g, rule in enumerate(view.rules) if rule.kind is GroupKind.FULL]
    resident = int(np.argmin(np.append(np.logical_and.reduce(full), False))) if full else known
    return plan_checkpoints(
        view.rules,
        step,
        tokens,
        known=known * step,
        branches=branches,
        restorable=restorable(view),
        resident=resident * step,
        off_grid=off_grid,
        insists=insists,
    )


def _put_start(
    rules: Sequence[GroupRule], step: int, tokens: int, lengths: Sequence[int], reach: int, resident: int
) -> int:
    """The last block boundary from which a put still carries what ``lengths`` need."""
    first = lengths[0] if lengths else tokens
    window = max((rule.window for rule in rules if rule.window is not None), default=1)
    # Blocks of the first checkpoint's window must be in the put, but for those that restoring ``reach`` proves to be there.
    latest = min(resident, first - 1, max(first - (window - 1), reach))
    return max(0, latest // step * step)
