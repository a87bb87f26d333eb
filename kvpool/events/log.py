"""What changes in a pool, as numbered batches of events; the latest are kept for who missed some."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from kvpool.index import ROOT, Nodes, Residency
from kvpool.security import DEFAULT_TENANT
from kvtransport.layout import GroupKind

from .messages import (
    LOCALITY_REMOTE,
    MEDIUM_CPU,
    AllBlocksCleared,
    BlockHash,
    BlockRemoved,
    BlockStored,
    Event,
    encode,
)

BATCH_BLOCKS = 4096
"""Hashes of one batch at most (about 140 KB)."""
PENDING_BLOCKS = 1 << 18
"""Hashes that may wait for being published; beyond it they are dropped, and everybody resynchronises."""
KINDS = {
    GroupKind.FULL: "full_attention",
    GroupKind.SLIDING: "sliding_window",
    GroupKind.RECURRENT: "mamba",
}
"""vLLM's names of cache kinds."""


class EventLog:
    """A :class:`kvpool.index.Watcher`; only blocks of ``tenant`` are told of, and no off-grid checkpoints (the field has none).

    ``clock`` gives seconds since the epoch. ``max_batches`` and ``max_bytes`` bound what is kept. ``changed`` is called when
    there is something to :meth:`take`.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        tenant: str = DEFAULT_TENANT,
        max_batches: int = 10_000,
        max_bytes: int = 64 << 20,
        max_pending: int = PENDING_BLOCKS,
    ) -> None:
        self._clock, self._tenant = clock, tenant
        self._max_batches, self._max_bytes, self._max_pending = max_batches, max_bytes, max_pending
        self._pending: deque[Event] = deque()
        self._waiting = 0
        self._kept: deque[tuple[int, bytes]] = deque()
        self._kept_bytes = 0
        self._trees: dict[bytes, Residency] = {}
        self._lost = False
        self.next = int(clock()) << 20
        """The number of the next batch. A later life of a node goes on above all of an earlier one: a restart is a gap for everybody."""
        self.dropped = 0
        """Events that were never published: nobody took them in time."""
        self.changed: Callable[[], None] = lambda: None

    # -- watching --------------------------------------------------------------------------------

    def stored(self, tree: Residency, unit: int, nodes: Nodes) -> None:
        if tree.ns.tenant == self._tenant:
            self._trees[tree.ns.id] = tree
            self._add(_stored(tree, unit, nodes))

    def removed(self, tree: Residency, unit: int, nodes: Nodes) -> None:
        if tree.ns.tenant == self._tenant:
            self._add(_removed(tree, unit, nodes))

    def _add(self, events: Sequence[Event]) -> None:
        for event in events:
            self._waiting += _size(event)
            self._pending.append(event)
        if self._waiting > self._max_pending:
            self.dropped += len(self._pending)
            self._pending.clear()
            self._waiting = 0
            self._lost = True
        if events:
            self.changed()

    # -- publishing ------------------------------------------------------------------------------

    def take(self) -> tuple[int, bytes] | None:
        """The next batch and its number; None when there is none.

        After a loss a number is left out: whoever follows asks from there on, and gets all that is there instead.
        """
        if self._lost:
            self._lost = False
            self.next += 1
            self._kept.clear()
            self._kept_bytes = 0
        if not self._pending:
            return None
        events: list[Event] = []
        blocks = 0
        while self._pending and blocks < BATCH_BLOCKS:
            event = self._pending.popleft()
            blocks += _size(event)
            events.append(event)
        self._waiting -= blocks
        return self._number(events)

    def tick(self) -> tuple[int, bytes]:
        """A batch without events: whoever missed the last one before a silence sees it by the number."""
        return self._number([])

    def _number(self, events: list[Event]) -> tuple[int, bytes]:
        batch = (self.next, encode(self._clock(), events))
        self.next += 1
        self._kept.append(batch)
        self._kept_bytes += len(batch[1])
        while len(self._kept) > self._max_batches or self._kept_bytes > self._max_bytes:
            self._kept_bytes -= len(self._kept.popleft()[1])
        return batch

    def since(self, number: int) -> list[tuple[int, bytes]] | None:
        """The batches from ``number`` on; None when they are not all kept any more, see :meth:`snapshot`."""
        oldest = self._kept[0][0] if self._kept else self.next
        if not oldest <= number <= self.next:
            return None
        return [b for b in self._kept if b[0] >= number]

    def snapshot(self) -> Iterator[tuple[int, bytes]]:
        """All that is there instead of all that has happened: batches under the number of the last one taken, the first of which clears.

        What changes between two steps of the iterator may be in it or not; it comes with a later number anyway.
        """
        number = self.next - 1
        yield number, encode(self._clock(), [AllBlocksCleared()])
        for tree in tuple(self._trees.values()):
            for unit in range(len(tree.units)):
                nodes = tree.held(unit)
                for at in range(0, len(nodes), BATCH_BLOCKS):
                    part = nodes[at : at + BATCH_BLOCKS]
                    # Meanwhile some may be gone, and their places taken by others.
                    events = _stored(tree, unit, part[tree.holds_at(unit, part)])
                    if events:
                        yield number, encode(self._clock(), events)


def _size(event: Event) -> int:
    return 1 if isinstance(event, AllBlocksCleared) else len(event.block_hashes)


def _owner(tree: Residency) -> str:
    return f"kvpool/{tree.ns.id.hex()[:16]}"


def _stored(tree: Residency, unit: int, nodes: Nodes) -> list[Event]:
    """One event for every group and every run of blocks that follow each other."""
    step = tree.ns.block_tokens
    runs: list[tuple[BlockHash | None, list[BlockHash]]] = []
    last = None
    parents, positions = tree.places_of(nodes)
    for node, parent, position in zip(nodes.tolist(), parents, positions, strict=True):
        if position % step:
            continue
        if last is None or parent != last or len(runs[-1][1]) >= BATCH_BLOCKS:
            runs.append((None if parent == ROOT else tree.key(unit, parent), []))
        runs[-1][1].append(tree.key(unit, node))
        last = node
    out: list[Event] = []
    for group in tree.units[unit]:
        rule = tree.rules[group]
        out += [
            BlockStored(
                hashes, parent, [], step, None, MEDIUM_CPU, None, group_idx=group, kv_cache_spec_kind=KINDS[rule.kind],
                kv_cache_spec_sliding_window=rule.window, locality=LOCALITY_REMOTE, ownership=_owner(tree),
            )
            for parent, hashes in runs
        ]  # fmt: skip
    return out


def _removed(tree: Residency, unit: int, nodes: Nodes) -> list[Event]:
    step = tree.ns.block_tokens
    _, positions = tree.places_of(nodes)
    gone: list[BlockHash] = [tree.key(unit, n) for n, p in zip(nodes.tolist(), positions, strict=True) if p % step == 0]
    return [
        BlockRemoved(gone, MEDIUM_CPU, group_idx=group, locality=LOCALITY_REMOTE, ownership=_owner(tree))
        for group in tree.units[unit]
        if gone
    ]
