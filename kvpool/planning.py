"""What a put must allocate; sources of a get: from the index, and from a put in progress behind which it reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvtransport.buffers import PageList
from kvtransport.layout import Extent, GroupKind

from .arena import BlockClass, PageArena, Slabs
from .errors import MissError
from .index import Nodes, Selection, Tree
from .keys import Namespace
from .memory import Rows
from .placement import Blocks, Geometry, Held, PutPlan, Slot, before, overlaps, page_lists, plan_put
from .put import Put


@dataclass(frozen=True, slots=True)
class Needs:
    """The slabs of a put: ``rows`` to allocate, in the order in which :meth:`hand` takes them. ``plan`` None: a transfer's bytes."""

    plan: PutPlan | None
    rows: list[Rows]

    def hand(self, put: Put, allocated: Sequence[Slabs]) -> None:
        """Let ``put`` hold what was allocated."""
        slabs = iter(allocated)
        if self.plan is None:
            put.transfer_slab = next(slabs)[0]
            return
        put.held = {group: Held() for group in range(len(put.ns.layout.groups))}
        for group, index, _ in self.plan.blocks:
            put.held[group].blocks = Blocks(index, next(slabs))
        for group, position, _ in self.plan.tails:
            slab = next(slabs)[0]
            if (group, position) in self.plan.copies:
                put.pending_tails.append((group, position, slab))
            else:
                put.held[group].tails[position] = slab
        for group, position, _ in self.plan.states:
            put.held[group].states[position] = next(slabs)[0]


def needs(
    ns: Namespace, geometry: Geometry, extents: Sequence[Extent], points: Iterable[int], *, transfer: bool
) -> Needs:
    """What a put of ``extents`` with endpoints at ``points`` allocates; ``transfer``: bytes for one request alone."""
    if transfer:
        return Needs(None, [(1, sum(e.nbytes for e in extents), BlockClass.TRANSFER)])
    plan = plan_put(ns.layout, geometry, ns.block_tokens, extents, points)
    return Needs(
        plan,
        [(len(index), nbytes, BlockClass.PREFIX) for _, index, nbytes in plan.blocks]
        + [(1, nbytes, BlockClass.PREFIX) for *_, nbytes in plan.tails]
        + [(1, nbytes, BlockClass.STATE) for *_, nbytes in plan.states],
    )


def held_at(tree: Tree, path: Nodes, tail: int | None, boundary: int) -> dict[int, Held]:
    """What the index holds for restoring ``boundary``, by group; ``tail`` is the node of an off-grid boundary."""
    step = tree.ns.block_tokens
    blocks = boundary // step
    held: dict[int, Held] = {}
    for group, rule in enumerate(tree.rules):
        own = held[group] = Held()
        if rule.kind is GroupKind.RECURRENT:
            node = int(path[blocks - 1]) if tail is None else tail
            own.states[boundary] = tree.slab(group, node)
            continue
        first = 0 if rule.window is None else max(0, boundary - (rule.window - 1)) // step
        own.blocks = Blocks(np.arange(first, blocks), tree.slabs(group, path[first:blocks]))
        if tail is not None:
            own.tails[boundary] = tree.slab(group, tail)
    return held


def follow(
    arena: PageArena, tree: Tree, geometry: Geometry, put: Put, extents: Mapping[Slot, Extent]
) -> tuple[Selection, dict[Slot, PageList]]:
    """What a reader of ``extents`` behind ``put`` needs of the index, and all its sources.

    What lies before the put's start comes from the index; MissError when it is not (all) there.
    """
    step, start = tree.ns.block_tokens, put.start
    early = [Extent(e.layer, e.tensor, e.unit, spans) for e in extents.values() if (spans := before(e.spans, start))]
    selection: Selection = []
    lists: dict[Slot, PageList] = {}
    if early:
        path = tree.find([] if put.chain is None else put.chain.blocks[: start // step])
        held: dict[int, Held] = {}
        wanted: dict[int, Nodes] = {}
        if tree.full is not None:
            wanted[tree.full] = path
        for group, spans in geometry.spans(early).items():
            blocks = range(spans[0].first // step, start // step)
            nodes, unit = path[blocks.start : blocks.stop], tree.unit_of[group]
            if len(nodes) < len(blocks) or not tree.holds([(unit, nodes)]):
                raise MissError(
                    f"the request brings tokens {start}..{put.boundary} only, and group {tree.rules[group].name!r} is not in "
                    f"the pool from {spans[0].first} to {start}: get from start {start} on"
                )
            held[group] = Held(Blocks(np.arange(blocks.start, blocks.stop), tree.slabs(group, nodes)))
            wanted.setdefault(unit, nodes)
        selection = list(wanted.items())
        lists = page_lists(arena, geometry, step, early, held)
    sources: dict[Slot, PageList] = {}
    for slot, extent in extents.items():
        pages = put.destinations[slot]
        parts = [lists[slot].pieces] if slot in lists else []
        parts += [pages.slice(low, high).pieces for low, high, _ in overlaps(put.extents[slot], extent)]
        sources[slot] = arena.page_list(parts)
    return selection, sources
