"""Which lengths of a sequence can be restored: pure arithmetic over what is resident.

The three hit rules. A length b is restorable when

* **full attention**: every block up to b is there,
* **sliding window** of W tokens: every block overlapping ``[b - (W - 1), b)`` is there,
* **recurrent**: the exact state at b is there, of every recurrent group,

for all groups of the layout at once. The match is the largest such length, never the minimum of what each
group alone would allow: per-group maxima need not be a length that all of them can restore.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtransport.layout import CacheLayout, GroupKind

Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class GroupRule:
    """How one group is cached; ``window`` in tokens for sliding groups."""

    name: str
    kind: GroupKind
    window: int | None = None


def rules_of(layout: CacheLayout) -> tuple[GroupRule, ...]:
    return tuple(GroupRule(g.name, g.kind, g.window) for g in layout.groups)


def unit_numbers(rules: Sequence[GroupRule]) -> list[int]:
    """The unit of each group: what is kept and evicted together (see :mod:`kvpool.index`). Announced entries number their bits so."""
    out: list[int] = []
    joint: dict[GroupKind, int] = {}
    count = 0
    for rule in rules:
        if rule.kind not in joint or rule.kind is GroupKind.SLIDING:
            joint[rule.kind] = count
            count += 1
        out.append(joint[rule.kind])
    return out


@dataclass(frozen=True, slots=True)
class Tail:
    """An off-grid checkpoint at ``position`` tokens; ``resident[g]``: group g's partial block, or its state, is there."""

    position: int
    resident: tuple[bool, ...]


@dataclass(frozen=True)
class View:
    """What is resident of one sequence.

    ``resident`` is bool of shape (groups, blocks): for full and sliding groups whether block i is there, for
    recurrent groups whether the state *after* block i is, at ``(i + 1) * block_tokens`` tokens.
    """

    block_tokens: int
    rules: tuple[GroupRule, ...]
    resident: Bools
    tails: tuple[Tail, ...] = ()


@dataclass(frozen=True)
class Match:
    """The answer to a lookup; lengths in tokens.

    ``length`` is the largest member of ``restorable`` (ascending; 0 when that is empty), ``reach`` says how far each
    group alone would reach, ``limit`` is the longest length asked for: at most all but the prompt's last token.
    """

    length: int
    restorable: tuple[int, ...]
    reach: dict[str, int]
    limit: int


def _run_lengths(present: Bools) -> NDArray[np.int64]:
    """For every block, how many blocks without a gap end with it."""
    at = np.arange(len(present), dtype=np.int64)
    last_gap = np.maximum.accumulate(np.where(present, -1, at)) if len(present) else at
    return at - last_gap


def _aligned(rule: GroupRule, present: Bools, block_tokens: int) -> Bools:
    """For block i, whether this group allows the endpoint ``(i + 1) * block_tokens``."""
    if rule.kind is GroupKind.RECURRENT:
        return present
    runs = _run_lengths(present)
    needed = np.arange(1, len(present) + 1, dtype=np.int64)
    if rule.window is not None:
        needed = np.minimum(needed, -(-(rule.window - 1) // block_tokens))
    return runs >= needed


def _tail_allowed(view: View, group: int, tail: Tail) -> bool:
    """Whether ``group`` allows the off-grid endpoint ``tail.position``."""
    rule, stop = view.rules[group], tail.position // view.block_tokens
    if not tail.resident[group] or stop > view.resident.shape[1]:
        return False
    if rule.kind is GroupKind.RECURRENT:
        return True
    first = 0
    if rule.window is not None:
        first = max(0, tail.position - (rule.window - 1)) // view.block_tokens
    return bool(view.resident[group, first:stop].all())


def endpoints(view: View, groups: Sequence[int] | None = None) -> list[int]:
    """All lengths (tokens, ascending) that every one of ``groups`` (default: all) can restore."""
    chosen = range(len(view.rules)) if groups is None else groups
    allowed = np.ones(view.resident.shape[1], dtype=np.bool_)
    for group in chosen:
        allowed &= _aligned(view.rules[group], view.resident[group], view.block_tokens)
    return _lengths(view, allowed, chosen)


def _lengths(view: View, allowed: Bools, groups: Sequence[int]) -> list[int]:
    """The endpoints of ``allowed`` (by block) and the off-grid ones of ``groups``, in tokens, ascending."""
    found: list[int] = ((np.flatnonzero(allowed) + 1) * view.block_tokens).tolist()
    tails = [t.position for t in view.tails if all(_tail_allowed(view, g, t) for g in groups)]
    return sorted(found + tails) if tails else found


def restorable(view: View) -> list[int]:
    """All restorable lengths in tokens, ascending: block boundaries and off-grid checkpoints."""
    return endpoints(view)


def match(view: View, limit: int) -> Match:
    """The restorable lengths up to ``limit`` tokens and the largest of them."""
    step = view.block_tokens
    by_group = [_aligned(rule, view.resident[g], step) for g, rule in enumerate(view.rules)]
    lengths = _up_to(_lengths(view, np.logical_and.reduce(by_group), range(len(by_group))), limit)
    reach = {}
    for g, (rule, allowed) in enumerate(zip(view.rules, by_group, strict=True)):
        blocks = np.flatnonzero(allowed[: limit // step])
        tails = [t.position for t in view.tails if t.position <= limit and _tail_allowed(view, g, t)]
        reach[rule.name] = max([int(blocks[-1] + 1) * step if len(blocks) else 0, *tails])
    return Match(lengths[-1] if lengths else 0, tuple(lengths), reach, limit)


def _up_to(ascending: list[int], limit: int) -> list[int]:
    return ascending[: bisect_right(ascending, limit)]


# -- explaining ----------------------------------------------------------------------------------


class Reason(StrEnum):
    """What ends a group's reach."""

    COMPLETE = "complete"
    """Nothing: it reaches as far as was asked."""
    NEVER_STORED = "never_stored"
    EVICTED = "evicted"
    NO_CHECKPOINT = "no_checkpoint"
    """The blocks go on, but no exact state was taken further on."""
    OTHER_FINGERPRINT = "other_fingerprint"
    """The same tokens are here under another layout, revision, dtype, block size or salt of the same tenant."""
    OTHER_TENANT = "other_tenant"
    """Another tenant has the same tokens: said to operators only, since tenants must not learn of one another."""


@dataclass(frozen=True, slots=True)
class Ghost:
    """What was there and is no more: ``at`` on the pool's clock in seconds, ``why`` in a word (capacity, quota, cleared).

    ``turn``: how many sequences had continued one another up to it.
    """

    at: float
    why: str
    turn: int = 1


@dataclass(frozen=True, slots=True)
class GroupReach:
    """How far one group alone reaches (``reach`` tokens), and what ends it at ``at`` tokens."""

    group: str
    kind: GroupKind
    reach: int
    ended_by: Reason
    at: int
    detail: str = ""


@dataclass(frozen=True)
class Explanation:
    """Why a match is as long as it is."""

    match: Match
    groups: tuple[GroupReach, ...]
    verdict: str = field(default="")

    def as_dict(self) -> dict[str, Any]:
        return {
            "length": self.match.length,
            "limit": self.match.limit,
            "restorable": list(self.match.restorable),
            "verdict": self.verdict,
            "groups": [
                {
                    "group": g.group,
                    "kind": str(g.kind),
                    "reach": g.reach,
                    "ended_by": str(g.ended_by),
                    "at": g.at,
                    "detail": g.detail,
                }
                for g in self.groups
            ],
        }

    def __str__(self) -> str:
        lines = [f"match: {self.match.length} of at most {self.match.limit} tokens ({self.verdict})"]
        for g in self.groups:
            ended = str(g.ended_by).replace("_", " ")
            lines.append(f"  {g.group} ({g.kind}): reaches {g.reach}; {ended}" + (f": {g.detail}" if g.detail else ""))
        return "\n".join(lines)


_ELSEWHERE = {
    Reason.OTHER_FINGERPRINT: "the same tokens are stored under another layout, revision, dtype, block size or salt",
    Reason.OTHER_TENANT: "the same tokens are stored by another tenant",
}

GhostLookup = Callable[[int, int], Ghost | None]
"""(group, position in tokens at the end of the block or checkpoint) -> what was evicted there."""


def explain(view: View, limit: int, now: float, ghost: GhostLookup, *, elsewhere: Reason | None = None) -> Explanation:
    """Explain the match of ``view`` up to ``limit`` tokens.

    ``elsewhere`` says that the same first block is stored under another fingerprint of the same tenant, or (to operators
    only) by another tenant.
    """
    found = match(view, limit)
    groups = tuple(_explain_group(view, g, found, now, ghost, elsewhere) for g in range(len(view.rules)))
    if found.length >= _last_endpoint(view, limit):
        verdict = "all that was asked for"
    else:
        shortest = min(groups, key=lambda g: g.reach)
        common = "" if shortest.reach == found.length else "no longer length suits all groups; "
        verdict = f"{common}{shortest.group}: {str(shortest.ended_by).replace('_', ' ')}"
    return Explanation(found, groups, verdict)


def _last_endpoint(view: View, limit: int) -> int:
    """The last length up to ``limit`` that could be asked for without an off-grid checkpoint."""
    return limit // view.block_tokens * view.block_tokens


def _explain_group(
    view: View, group: int, found: Match, now: float, ghost: GhostLookup, elsewhere: Reason | None
) -> GroupReach:
    rule, step = view.rules[group], view.block_tokens
    reach = found.reach[rule.name]
    if reach >= _last_endpoint(view, found.limit):
        return GroupReach(rule.name, rule.kind, reach, Reason.COMPLETE, reach)
    present = view.resident[group]
    wanted = found.limit // step  # full blocks that were asked for
    if rule.kind is GroupKind.RECURRENT:
        # The nearest state beyond the reach that once was there says more than the end of the blocks.
        for position in range(reach + step - reach % step, (wanted + 1) * step, step):
            gone = ghost(group, position)
            if gone is not None:
                return GroupReach(rule.name, rule.kind, reach, Reason.EVICTED, position, _gone(gone, now, position))
        tail = _evicted_tail(view, group, reach, found.limit, ghost)
        if tail is not None:
            return GroupReach(rule.name, rule.kind, reach, Reason.EVICTED, tail[0], _gone(tail[1], now, tail[0]))
        if len(present) * step > reach:
            detail = f"blocks are there up to {min(len(present), wanted) * step}, but no state beyond {reach}"
            return GroupReach(rule.name, rule.kind, reach, Reason.NO_CHECKPOINT, reach, detail)
        missing = len(present)
    elif rule.window is None:
        missing = reach // step
    else:
        missing = _missing_of_window(present, group, reach // step, wanted, -(-(rule.window - 1) // step), step, ghost)
    position = (missing + 1) * step
    gone = ghost(group, position)
    if gone is not None:
        return GroupReach(rule.name, rule.kind, reach, Reason.EVICTED, missing * step, _gone(gone, now, position))
    tail = _evicted_tail(view, group, reach, found.limit, ghost)
    if tail is not None:
        return GroupReach(rule.name, rule.kind, reach, Reason.EVICTED, tail[0], _gone(tail[1], now, tail[0]))
    if missing == 0 and elsewhere is not None:
        return GroupReach(rule.name, rule.kind, reach, elsewhere, 0, _ELSEWHERE[elsewhere])
    detail = f"nothing that goes on as this does after {missing * step} tokens" if missing else ""
    return GroupReach(rule.name, rule.kind, reach, Reason.NEVER_STORED, missing * step, detail)


def _evicted_tail(view: View, group: int, reach: int, limit: int, ghost: GhostLookup) -> tuple[int, Ghost] | None:
    """Where in the block behind all that is or was known an off-grid checkpoint beyond ``reach`` was evicted."""
    step, known = view.block_tokens, view.resident.shape[1]
    while (known + 1) * step <= limit and any(ghost(g, (known + 1) * step) for g in range(len(view.rules))):
        known += 1
    for position in range(min(limit, (known + 1) * step - 1), max(reach, known * step), -1):
        gone = ghost(group, position)
        if gone is not None:
            return position, gone
    return None


def _missing_of_window(
    present: Bools, group: int, after: int, wanted: int, needed: int, step: int, ghost: GhostLookup
) -> int:
    """The block whose absence best explains why a window of ``needed`` blocks ends no later than after block ``after``.

    That is one that was evicted, of the first endpoint whose whole window once was there; else the one
    that keeps it from one block more.
    """
    there = np.zeros(wanted, dtype=np.bool_)
    there[: len(present)] = present[:wanted]
    lost = [i for i in np.flatnonzero(~there).tolist() if ghost(group, (i + 1) * step) is not None]
    once = there.copy()
    once[lost] = True
    ends = np.flatnonzero(_run_lengths(once) >= np.minimum(np.arange(1, wanted + 1), needed))
    ends = ends[ends >= after]
    end = int(ends[0]) if len(ends) else after
    return next(i for i in range(max(0, end + 1 - needed), end + 1) if not there[i])


def _gone(ghost: Ghost, now: float, position: int) -> str:
    return f"what ended at {position} was evicted {max(0.0, now - ghost.at):.1f} s ago ({ghost.why})"
