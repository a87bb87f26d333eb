"""What a node announces: the entry of every segment it holds something of, and which of them changed."""

from __future__ import annotations

from collections.abc import Iterable

from kvpool.index import ROOT, Nodes, Tree

from .entries import Draft
from .segments import SEGMENT_BLOCKS, segment_key


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

    def __len__(self) -> int:
        """Segments that hold something."""
        return len(self._drafts)

    @property
    def pending(self) -> int:
        """Segments whose change has not been announced."""
        return len(self._dirty)

    # -- watching --------------------------------------------------------------------------------

    def stored(self, tree: Tree, unit: int, nodes: Nodes) -> None:
        firsts: dict[int, int] = {}
        for node in nodes.tolist():
            self._change(tree, unit, node, True, firsts)

    def removed(self, tree: Tree, unit: int, nodes: Nodes) -> None:
        firsts: dict[int, int] = {}
        for node in nodes.tolist():
            self._change(tree, unit, node, False, firsts)

    def _change(self, tree: Tree, unit: int, node: int, there: bool, firsts: dict[int, int]) -> None:
        step = tree.ns.block_tokens
        parent, position = tree.place_of(node)
        offset = position % step
        at = parent if offset else node  # an off-grid checkpoint hangs on the block before it
        if at == ROOT:
            return  # inside the very first block: shorter than anything worth finding
        block = position // step - 1
        first = self._first(tree, at, block, firsts)
        name = segment_key(tree.ns, tree.key(unit, first))
        draft = self._drafts.get(name)
        if draft is None:
            draft = self._drafts[name] = Draft()
        draft.set(block % SEGMENT_BLOCKS, offset, tree.key(unit, node), unit, there)
        self._dirty[name] = None

    @staticmethod
    def _first(tree: Tree, node: int, block: int, firsts: dict[int, int]) -> int:
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

    # -- announcing ------------------------------------------------------------------------------

    def entries(self, names: Iterable[bytes]) -> list[bytes]:
        """The current entry of each segment; empty where there is none."""
        return [d.encode(self.incarnation) if (d := self._drafts.get(n)) else b"" for n in names]

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
                self._said[name] = now
            else:
                out[name] = None
                self._drafts.pop(name, None)
        return out

    def failed(self, names: Iterable[bytes]) -> None:
        """These could not be announced: they are due again."""
        for name in names:
            self._dirty[name] = None

    def again(self) -> None:
        """The directory has lost everything, or this node was thought dead: all is due again."""
        self._dirty = dict.fromkeys(self._drafts)

    def refresh(self, before: float, most: int) -> None:
        """Make up to ``most`` segments due that were last announced before the time ``before``."""
        due: list[bytes] = []
        for name, said in self._said.items():
            if said >= before or len(due) >= most:
                break
            due.append(name)
        for name in due:
            del self._said[name]
            self._dirty[name] = None
