"""What a node announces: the entry of every segment it holds something of, and which of them changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kvpool.index import ROOT, Nodes, Residency, Watcher

from .entries import Draft
from .segments import SEGMENT_BLOCKS, segment_key

ENTRY_TTL_S = 1800.0
"""Entries are forgotten after this unless said again; they are, at half of it."""
LATE_S = 5.0
"""An announcement that was given up does not arrive after this any more."""


class Announcer:
    """A :class:`kvpool.index.Watcher` that keeps entries up to date. Give it to the core before anything is stored.

    ``incarnation`` (16 bytes) is that of the node's process.
    """

    def __init__(self, incarnation: bytes) -> None:
        self.incarnation = incarnation
        self._drafts: dict[bytes, Draft] = {}
        self._dirty: dict[bytes, None] = {}
        # When each was last announced, oldest first: what the directory would forget is said again.
        self._said: dict[bytes, float] = {}
        # Of announcements that got no answer: when to say them once more, lest a late one has overwritten what came after it.
        self._unsure: dict[bytes, float] = {}

    def __len__(self) -> int:
        """Segments that hold something."""
        return len(self._drafts)

    @property
    def names(self) -> list[bytes]:
        """Keys of the segments that hold something."""
        return list(self._drafts)

    @property
    def pending(self) -> int:
        """Segments whose change has not been announced."""
        return len(self._dirty)

    # -- watching --------------------------------------------------------------------------------

    def stored(self, tree: Residency, unit: int, nodes: Nodes) -> None:
        self._change(tree, unit, nodes, True)

    def removed(self, tree: Residency, unit: int, nodes: Nodes) -> None:
        self._change(tree, unit, nodes, False)

    def _change(self, tree: Residency, unit: int, nodes: Nodes, there: bool) -> None:
        step = tree.ns.block_tokens
        firsts: dict[int, int] = {}
        drafts: dict[int, Draft] = {}
        touched: list[bytes] = []
        parents, positions = tree.places_of(nodes)
        for node, parent, position in zip(nodes.tolist(), parents, positions, strict=True):
            offset = position % step
            at = parent if offset else node  # an off-grid checkpoint hangs on the block before it
            if at == ROOT:
                continue  # inside the very first block: shorter than anything worth finding
            block = position // step - 1
            # Nodes of a path come one after the other: mostly the parent was the last one.
            first = firsts[at] = (firsts.get(parent) if block % SEGMENT_BLOCKS else at) or self._first(
                tree, at, block, firsts
            )
            draft = drafts.get(first)
            if draft is None:
                touched.append(segment_key(tree.ns, tree.key(unit, first)))
                draft = drafts[first] = self._draft(touched[-1])
            draft.set(block % SEGMENT_BLOCKS, offset, tree.key(unit, node), unit, there)
        if not there:
            self._forget(touched)

    def _forget(self, names: Iterable[bytes]) -> None:
        """What is gone before anybody heard of it need not be told; a node that has no directory to tell it would keep it for ever."""
        for name in names:
            draft = self._drafts[name]
            if not draft and not draft.told:
                del self._drafts[name], self._dirty[name]

    def _draft(self, name: bytes) -> Draft:
        """The entry of a segment that is about to change."""
        draft = self._drafts.get(name)
        if draft is None:
            draft = self._drafts[name] = Draft(told=name in self._dirty or name in self._unsure)
        self._dirty[name] = None
        return draft

    @staticmethod
    def _first(tree: Residency, node: int, block: int, firsts: dict[int, int]) -> int:
        """The first node of the segment that ``node``, at ``block``, is in."""
        passed = []
        while block % SEGMENT_BLOCKS and node not in firsts:
            passed.append(node)
            node = tree.place_of(node)[0]
            block -= 1
        first = firsts.get(node, node)
        for known in passed:
            firsts[known] = first
        return first

    def validate(self, seen: Mapping[bytes, int]) -> list[bool]:
        """Whether each segment's generation, as somebody saw it, is the current one; those that are not are due again."""
        out = []
        for name, generation in seen.items():
            draft = self._drafts.get(name)
            current = draft is not None and draft.generation & 0xFFFFFFFF == generation
            out.append(current)
            if not current:
                self._dirty[name] = None
        return out

    # -- announcing ------------------------------------------------------------------------------

    def entries(self, names: Iterable[bytes]) -> list[bytes]:
        """The current entry of each segment; empty where there is none."""
        out = []
        for name in names:
            draft = self._drafts.get(name)
            if draft:
                draft.told = True
            out.append(draft.encode(self.incarnation) if draft else b"")
        return out

    def take(self, now: float, most: int) -> dict[bytes, bytes | None]:
        """Up to ``most`` changed segments and their entries, None for those that hold nothing any more; they count as said.

        Give them to :meth:`failed` when they could not be announced.
        """
        out: dict[bytes, bytes | None] = {}
        while self._dirty and len(out) < most:
            name = next(iter(self._dirty))
            del self._dirty[name]
            draft = self._drafts.get(name)
            self._said.pop(name, None)
            if draft:
                out[name] = draft.encode(self.incarnation)
                draft.told = True
                self._said[name] = now
            else:
                out[name] = None
                self._drafts.pop(name, None)
        return out

    def failed(self, now: float, names: Iterable[bytes]) -> None:
        """Nobody answered to the announcement of these: they are due again, and once more when it cannot arrive any more."""
        for name in names:
            self._dirty[name] = None
            self._unsure.pop(name, None)
            self._unsure[name] = now + LATE_S

    def again(self) -> None:
        """The directory has lost everything, or this node was thought dead: all is due again."""
        self._dirty = dict.fromkeys(self._drafts)

    def refresh(self, now: float, most: int) -> None:
        """Make up to ``most`` segments due that the directory would forget, or may have wrongly."""
        before = now - ENTRY_TTL_S / 2
        while self._unsure and next(iter(self._unsure.values())) <= now:
            name = next(iter(self._unsure))
            del self._unsure[name]
            self._dirty[name] = None
        due: list[bytes] = []
        for name, said in self._said.items():
            if said >= before or len(due) >= most:
                break
            due.append(name)
        for name in due:
            del self._said[name]
            self._dirty[name] = None


class Watchers:
    """Tells all of several watchers."""

    def __init__(self, *watchers: Watcher) -> None:
        self._all = list(watchers)

    def add(self, watcher: Watcher) -> None:
        self._all.append(watcher)

    def stored(self, tree: Residency, unit: int, nodes: Nodes) -> None:
        for watcher in self._all:
            watcher.stored(tree, unit, nodes)

    def removed(self, tree: Residency, unit: int, nodes: Nodes) -> None:
        for watcher in self._all:
            watcher.removed(tree, unit, nodes)
