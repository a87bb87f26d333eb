"""From directory entries to restorable lengths and to the nodes that hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpool.keys import KeyChain, Namespace
from kvpool.match import Tail, View, rules_of, unit_numbers
from kvtransport.layout import GroupKind

from .entries import INCARNATION_BYTES, decode, resident, short, tails
from .segments import Segment, Unit, segments

Found = Mapping[str, bytes]
"""Node id -> its entry of one segment."""
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Holder:
    """A node that holds blocks of a segment: ``blocks`` counted from the segment's first, bool per block."""

    node: str
    generation: int
    blocks: Bools


@dataclass
class Cut:
    """What is known of a chain stored in segments; all lookups of one request go to one round trip."""

    ns: Namespace
    units: Sequence[Unit]
    blocks: Sequence[bytes]
    parts: list[tuple[int, Segment]] = field(init=False)
    """(unit, segment) in the order of :attr:`keys`."""

    def __post_init__(self) -> None:
        self.parts = [(u, s) for u, unit in enumerate(self.units) for s in segments(unit.ns, self.blocks)]
        self.holders: dict[tuple[int, int], list[Holder]] = {}

    @property
    def keys(self) -> list[bytes]:
        return [s.key for _, s in self.parts]

    def fill(self, answers: Sequence[Found], incarnations: Mapping[str, bytes]) -> list[tuple[bytes, str]]:
        """Take the directory's answers; entries of nodes unknown or of another incarnation are void.

        Returns the void ones as (segment key, node).
        """
        void = []
        for (unit, segment), found in zip(self.parts, answers, strict=True):
            wanted = short(self.blocks[segment.first : segment.stop])
            holders = []
            for node, data in found.items():
                entry = decode(data)
                known = incarnations.get(node)
                if entry is None or known is None or known[:INCARNATION_BYTES] != entry.incarnation:
                    void.append((segment.key, node))
                    continue
                there = resident(entry, wanted, 1)[0]
                if there.any():
                    holders.append(Holder(node, entry.generation, there))
            self.holders[unit, segment.index] = holders
        return void

    def view(self, nodes: frozenset[str] | None = None) -> View:
        """What ``nodes`` (None: all) together can restore, as the rules of :mod:`kvpool.match` take it."""
        rules = rules_of(self.ns.layout)
        rows = np.zeros((len(rules), len(self.blocks)), dtype=np.bool_)
        for (number, segment), unit in ((p, self.units[p[0]]) for p in self.parts):
            there = np.zeros(segment.stop - segment.first, dtype=np.bool_)
            for holder in self.holders.get((number, segment.index), ()):
                if nodes is None or holder.node in nodes:
                    # Full blocks are only of use from the segment's first on: the owner restores no others.
                    mine = holder.blocks
                    there |= np.logical_and.accumulate(mine) if unit.kind is GroupKind.FULL else mine
            rows[list(unit.groups), segment.first : segment.stop] = there
        return View(self.ns.block_tokens, rules, rows, ())

    def owners(self, unit: int, segment: Segment, stop: int) -> list[str]:
        """Nodes that can give the segment's unit up to block ``stop`` of the chain."""
        last = stop - segment.first
        full = self.units[unit].kind is GroupKind.FULL
        return [
            h.node
            for h in self.holders.get((unit, segment.index), ())
            if (h.blocks[:last].all() if full else h.blocks[last - 1])
        ]


@dataclass
class Whole:
    """What is known of a chain whose copies lie whole on one node each."""

    ns: Namespace
    chain: KeyChain
    parts: list[Segment] = field(init=False)
    views: dict[str, View] = field(init=False, default_factory=dict)
    """Node -> what it alone can restore."""

    def __post_init__(self) -> None:
        self.parts = list(segments(self.ns, self.chain.blocks))

    @property
    def keys(self) -> list[bytes]:
        return [s.key for s in self.parts]

    def fill(self, answers: Sequence[Found], incarnations: Mapping[str, bytes]) -> list[tuple[bytes, str]]:
        """As :meth:`Cut.fill`."""
        rules = rules_of(self.ns.layout)
        numbers = unit_numbers(rules)
        count = max(numbers) + 1
        blocks = self.chain.blocks
        rows: dict[str, Bools] = {}
        ends: dict[str, list[Tail]] = {}
        void: list[tuple[bytes, str]] = []
        for segment, found in zip(self.parts, answers, strict=True):
            wanted = short(blocks[segment.first : segment.stop])
            for node, data in found.items():
                entry = decode(data)
                known = incarnations.get(node)
                if entry is None or known is None or known[:INCARNATION_BYTES] != entry.incarnation:
                    void.append((segment.key, node))
                    continue
                mine = rows.setdefault(node, np.zeros((count, len(blocks)), dtype=np.bool_))
                mine[:, segment.first : segment.stop] = resident(entry, wanted, count)
                ends.setdefault(node, []).extend(self._tails(segment, entry, count, numbers))
        self.views = {
            node: View(self.ns.block_tokens, rules, mine[numbers], tuple(ends[node])) for node, mine in rows.items()
        }
        return void

    def _tails(self, segment: Segment, entry: Any, count: int, numbers: list[int]) -> list[Tail]:
        out = []
        for tail in tails(entry, count):
            position = (segment.first + tail.block + 1) * self.ns.block_tokens + tail.offset
            if self.chain.names(position) and int(short([self.chain.key_at(position)])[0]) == tail.key:
                out.append(Tail(position, tuple(tail.units[n] for n in numbers)))
        return out


def empty_view(ns: Namespace) -> View:
    """The view of a chain of which nothing is known."""
    rules = rules_of(ns.layout)
    return View(ns.block_tokens, rules, np.zeros((len(rules), 0), dtype=np.bool_), ())
