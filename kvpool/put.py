"""A put in progress: slabs that fill up, invisible until committed, that readers may already follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from kvtransport.buffers import PageList
from kvtransport.errors import DeadlineError, KVError, ManifestError, TransferCancelledError, TransferError
from kvtransport.layout import Extent, Span
from kvtransport.manifest import Manifest
from kvtransport.wire.ranges import RangeSet

from .arena import Slab, Slabs
from .index import Nodes, Selection
from .keys import KeyChain, Namespace
from .placement import Held, Slot, page_lists, parts_of, whole_group

if TYPE_CHECKING:
    from .core import PoolCore
    from .get import Get
    from .rooms import Room

Progress = Callable[[int, int, int, int], None]
"""(layer, tensor, start, stop): these bytes of the extent's byte space are verified and in place."""


class PutState(StrEnum):
    OPEN = "open"
    COMMITTED = "committed"
    FAILED = "failed"
    """Past its deadline; nothing can be committed, the memory waits for :meth:`Put.abort`."""
    ABORTED = "aborted"


class Put:
    """Made by :meth:`kvpool.core.PoolCore.begin_put`.

    The writer fills ``destinations`` and says so with :meth:`progress`; then :meth:`commit` or :meth:`abort`. When the
    deadline passes, ``on_failed`` is called: the writer stops whatever may still write into the destinations,
    then calls :meth:`abort`, and only then is the memory free. Without an ``on_failed`` it is freed at once.
    """

    def __init__(
        self,
        core: PoolCore,
        room: Room,
        chain: KeyChain | None,
        *,
        boundary: int,
        start: int,
        points: tuple[int, ...],
        request: bytes | None,
        deadline: float,
        extents: tuple[Extent, ...],
    ) -> None:
        self.ns: Namespace = room.tree.ns
        self.chain = chain
        self.boundary = boundary
        self.start = start
        self.points = points
        self.request = request
        self.deadline = deadline
        self.extents: dict[Slot, Extent] = {(e.layer, e.tensor): e for e in extents}
        self.state = PutState.OPEN
        self.error: KVError | None = None
        self.on_failed: Callable[[KVError], None] | None = None
        self.followers: list[Get] = []
        self._core = core
        self._room = room
        self._verified: dict[Slot, RangeSet] = {}
        self._open_bytes = sum(e.nbytes for e in extents)
        self._listeners: list[Progress] = []
        # What it holds, set by the core right after making it.
        self.held: dict[int, Held] = {}
        self.pending_tails: list[tuple[int, int, Slab]] = []
        self.transfer_slab: Slab | None = None
        self.lease: Selection = []
        self._kept: Selection = []
        self._spare: list[Slab | Slabs] = []
        self._over = False

    # -- describing ------------------------------------------------------------------------------

    def manifest(self, transfer: bytes) -> Manifest:
        """What the writer promises under the 16-byte id ``transfer``."""
        return Manifest.of_layout(
            self.ns.layout,
            self.boundary,
            transfer=transfer,
            start=self.start,
            checkpoints=self.points,
            block_tokens=self.ns.block_tokens,
        )

    @cached_property
    def destinations(self) -> Mapping[Slot, PageList]:
        """For every extent of the manifest the pages it goes to, in its byte space."""
        arena = self._core.arena
        if self.transfer_slab is None:
            return page_lists(arena, self._room.geometry, self.ns.block_tokens, self.extents.values(), self.held)
        lists, at = {}, 0
        for slot, extent in self.extents.items():
            lists[slot] = arena.pages(self.transfer_slab, at, at + extent.nbytes)
            at += extent.nbytes
        return lists

    @property
    def closed(self) -> bool:
        return self.state in (PutState.ABORTED, PutState.COMMITTED) and not (
            self.transfer_slab is not None or self.followers
        )

    # -- filling ---------------------------------------------------------------------------------

    def progress(self, layer: int, tensor: int, start: int, stop: int) -> int:
        """Bytes ``[start, stop)`` of an extent are verified and in place; returns how many are new.

        Raises ManifestError for bytes the manifest does not have, TransferError when the put has ended.
        """
        if self.state is not PutState.OPEN:
            raise self.error or TransferError(f"the put is {self.state}: nothing can be added to it")
        extent = self.extents.get((layer, tensor))
        if extent is None or not 0 <= start <= stop <= extent.nbytes:
            has = "not in it" if extent is None else f"{extent.nbytes} bytes long"
            raise ManifestError(f"bytes {start}..{stop} of layer {layer} tensor {tensor}: that extent is {has}")
        if start == stop:
            return 0
        ranges = self._verified.get((layer, tensor))
        if ranges is None:
            ranges = self._verified[layer, tensor] = RangeSet(max_ranges=65_536)
        new = ranges.add(start, stop)
        self._open_bytes -= new
        for listener in tuple(self._listeners):
            listener(layer, tensor, start, stop)
        return new

    def verified(self, slot: Slot) -> list[tuple[int, int]]:
        """Byte ranges of an extent that are in place."""
        return list(self._verified.get(slot, ()))

    def missing(self) -> list[tuple[int, int, int, int]]:
        """(layer, tensor, start, stop) of what is not in place yet."""
        if not self._open_bytes:
            return []
        return [
            (*slot, low, high)
            for slot, extent in self.extents.items()
            for low, high in self._verified.get(slot, RangeSet()).missing(0, extent.nbytes)
        ]

    def complete_without_bytes(self) -> None:
        """Count everything as in place: for a pool that keeps accounts and no bytes (see :mod:`kvpool.replay`)."""
        self._open_bytes = 0

    def subscribe(self, listener: Progress) -> Callable[[], None]:
        """Call ``listener`` at every progress from now on; returns what ends it."""
        self._listeners.append(listener)

        def unsubscribe() -> None:
            if listener in self._listeners:
                self._listeners.remove(listener)

        return unsubscribe

    # -- ending ----------------------------------------------------------------------------------

    def commit(self) -> None:
        """Make everything visible at once.

        Blocks and states that are there already stay; the new copies are freed. Raises ManifestError when
        bytes are missing, TransferError when the put has ended. After an error only :meth:`abort` is left.
        """
        if self.state is not PutState.OPEN:
            raise self.error or TransferError(f"the put is {self.state}: it cannot be committed")
        gaps = self.missing()
        if gaps:
            layer, tensor, low, high = gaps[0]
            raise ManifestError(
                f"the put is not complete: {self._open_bytes} bytes in {len(gaps)} ranges are missing, the first is layer "
                f"{layer} tensor {tensor} bytes {low}..{high}"
            )
        if self.chain is not None:
            self._insert(self.chain)
        self.state = PutState.COMMITTED
        self._listeners.clear()
        self._core._put_ended(self, None)
        for follower in tuple(self.followers):
            follower._put_sealed()
        self._settle()

    def abort(self, error: KVError | None = None) -> None:
        """Drop everything; readers that follow get ``error``. Idempotent; does nothing after a commit.

        Memory that a follower reads is freed when that follower closes.
        """
        if self.state in (PutState.COMMITTED, PutState.ABORTED):
            return
        first = self.state is PutState.OPEN
        self.error = self.error or error or TransferCancelledError("the put was aborted by its writer")
        self.state = PutState.ABORTED
        self._listeners.clear()
        if first:
            self._core._put_ended(self, self.error)
            self._fail_followers(self.error)
        self._settle()

    def expire(self) -> None:
        """The deadline has passed (called by :meth:`kvpool.core.PoolCore.expire`)."""
        if self.state is PutState.COMMITTED:
            # Of a request without a chain: nobody came for it, or its readers have deadlines of their own.
            self._settle(drop=True)
        elif self.state is PutState.OPEN:
            self.error = DeadlineError(f"the put of {self.boundary} tokens was not sealed before its deadline")
            self.state = PutState.FAILED
            self._listeners.clear()
            self._core._put_ended(self, self.error)
            self._fail_followers(self.error)
            if self.on_failed is None:
                self.abort()
            else:
                self.on_failed(self.error)

    def attach(self, follower: Get) -> None:
        self.followers.append(follower)

    def detach(self, follower: Get) -> None:
        """A reader is done; the last one of a committed request without a chain frees its bytes."""
        if follower in self.followers:
            self.followers.remove(follower)
            self._settle(drop=True)

    # -- inside ----------------------------------------------------------------------------------

    def _fail_followers(self, error: KVError) -> None:
        for follower in tuple(self.followers):
            follower.fail(error)

    def _settle(self, *, drop: bool = False) -> None:
        """Free what nobody needs any more."""
        if self.followers or self.state in (PutState.OPEN, PutState.FAILED):
            return
        tree = self._room.tree
        slabs, self._spare = self._spare, []
        if self.state is PutState.ABORTED:
            slabs += [slab for held in self.held.values() for slab in held.slabs()]
            slabs += [slab for _, _, slab in self.pending_tails]
        if self.transfer_slab is not None and (drop or self.state is PutState.ABORTED):
            slabs.append(self.transfer_slab)
            self.transfer_slab = None
        self.held, self.pending_tails = {}, []
        tree.unpin(self._kept)
        tree.unpin(self.lease)
        self._kept, self.lease = [], []
        self._core._free(self.ns.tenant, slabs)
        if self.closed and not self._over:
            self._over = True
            self.__dict__.pop("destinations", None)
            self._core._put_closed(self)

    def _insert(self, chain: KeyChain) -> None:
        """Copy what is to be copied, then hang everything into the tree."""
        tree, step, arena = self._room.tree, self.ns.block_tokens, self._core.arena
        keys = chain.blocks[: self.boundary // step]
        path = tree.grow_path(keys)
        try:
            tails = {p: tree.grow_tail(chain, p, path) for p in self.points if p % step}
        except KVError:
            if len(path):
                tree.prune(int(path[-1]))
            raise
        for group, position, slab in self.pending_tails:
            spans = [Span(position - position % step, position % step)]
            source = whole_group(arena, self._room.geometry, group, parts_of(arena, step, spans, self.held[group]))
            arena.pages(slab).copy_from(source)
        for group, position, slab in self.pending_tails:
            self.held[group].tails[position] = slab
        self.pending_tails = []
        placed: Selection = []
        for unit, groups in enumerate(tree.units):
            held = [self.held[g] for g in groups]
            for nodes, columns in _columns(held, path, tails, step):
                self._spare += tree.place(unit, nodes, columns, path)
                placed.append((unit, nodes))
        self.held = {}
        if tree.full is not None and len(path):
            tree.touch([(tree.full, path)])
        tree.stored(path)
        if self.followers:
            # They may read what was placed: it stays until they are done, and so does the path that leads to it.
            whole = [(tree.full, path)] if tree.full is not None else []
            self._kept = [*placed, *whole]
            tree.pin(self._kept)


def _columns(held: list[Held], path: Nodes, tails: Mapping[int, int], step: int) -> list[tuple[Nodes, list[Slabs]]]:
    """(nodes, slabs by group) of one unit; its groups hold the same blocks, tails and states."""
    out: list[tuple[Nodes, list[Slabs]]] = []
    first = held[0]
    if len(first.blocks.index):
        out.append((path[first.blocks.index], [h.blocks.slabs for h in held]))
    on_grid = [p for p in first.states if p % step == 0]
    if on_grid:
        out.append((path[[p // step - 1 for p in on_grid]], [Slabs.of([h.states[p] for p in on_grid]) for h in held]))
    for name in ("tails", "states"):
        for position in getattr(first, name):  # one by one: partial blocks differ in size
            if position % step:
                node = np.array([tails[position]], dtype=np.int32)
                out.append((node, [Slabs.of([getattr(h, name)[position]]) for h in held]))
    return out
