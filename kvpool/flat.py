"""Flat objects: bytes under a key, without parent or position. They rank by recency and bytes beside blocks and states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvtransport.buffers import PageList
from kvtransport.errors import DeadlineError, KVError, TransferCancelledError, TransferError
from kvtransport.manifest import Manifest

from .arena import Slab
from .errors import KeyChainError
from .eviction import BLOCKED, GONE, Eviction
from .keys import MAX_FLAT_KEY_BYTES
from .local import Located
from .placement import Slot
from .put import PutState
from .table import which

if TYPE_CHECKING:
    from .rooms import Rooms

SLOT: Slot = (0, 0)
"""Where all objects of a transfer travel, one after another: a chunk may hold many small ones."""


def _unknown(count: int) -> NDArray[np.float32]:
    """What recomputing objects would cost."""
    return np.full(count, np.nan, dtype=np.float32)


@dataclass(slots=True, eq=False)
class FlatEntry:
    """One object. ``checksum`` is xxh3_64 of its bytes."""

    key: bytes
    slab: Slab
    checksum: int
    number: int = 0
    rank: float = 0.0
    uses: int = 0
    pins: int = 0
    queued: bool = False
    gone: bool = False


class FlatShelf:
    """The flat objects of one tenant."""

    def __init__(self, tenant: str, eviction: Eviction, free: Callable[[list[Slab]], None]) -> None:
        self.tenant = tenant
        self.unpinned_pages = 0
        self.pages = 0
        self.evictions = 0
        self.number = eviction.add(self)
        self._eviction, self._free = eviction, free
        self._by_key: dict[bytes, FlatEntry] = {}
        self._by_number: dict[int, FlatEntry] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._by_key)

    def has(self, keys: Sequence[bytes]) -> list[bool]:
        """Which of ``keys`` are there."""
        return list(map(self._by_key.__contains__, keys))

    def which(self, keys: bytes, lengths: bytes) -> bytes:
        """The same for keys one after another, in bits; see :func:`kvpool.table.which`."""
        try:
            return which(self._by_key, keys, lengths, MAX_FLAT_KEY_BYTES)
        except ValueError as error:
            raise KeyChainError(f"these are no flat keys: {error}") from None

    def get(self, keys: Sequence[bytes]) -> list[FlatEntry | None]:
        """The objects under ``keys``, now the most recently used, the last of them more so."""
        entries = [self._by_key.get(key) for key in keys]
        found = [entry for entry in entries if entry is not None]
        for entry in found:
            entry.uses += 1
        uses = np.array([e.uses for e in found], np.int32)
        ranks = self._eviction.policy.rank(self._ticks(len(found)), uses, _unknown(len(found)), 0) if found else None
        if ranks is not None:
            for entry, rank in zip(found, ranks.tolist(), strict=True):
                entry.rank = rank
        return entries

    def put(self, objects: Sequence[tuple[bytes, Slab, int]]) -> None:
        """Store (key, slab, checksum) each in the place of any older one."""
        if not objects:
            return
        pages = np.array([len(slab.pages) for _, slab, _ in objects], np.int32)
        ranks = self._eviction.policy.first_rank(self._ticks(len(objects)), _unknown(len(objects)), pages, 0)
        self._drop(key for key, _, _ in objects)
        entries = [
            FlatEntry(key, slab, checksum, number, rank)
            for number, ((key, slab, checksum), rank) in enumerate(zip(objects, ranks.tolist(), strict=True), self._next)
        ]
        self._next += len(entries)
        self._by_key.update((e.key, e) for e in entries)
        self._by_number.update((e.number, e) for e in entries)
        self.pages += int(pages.sum())
        self.unpinned_pages += int(pages.sum())
        self._offer(entries)

    def drop(self, key: bytes) -> bool:
        """Forget ``key``; its memory goes when nobody reads it any more."""
        return self._drop([key]) > 0

    def _drop(self, keys: Iterable[bytes]) -> int:
        """Forget those of ``keys`` that are there; how many they were."""
        count = queued = 0
        free: list[Slab] = []
        for key in keys:
            entry = self._by_key.pop(key, None)
            if entry is None:
                continue
            count += 1
            del self._by_number[entry.number]
            entry.gone = True
            self.pages -= len(entry.slab.pages)
            if not entry.pins:
                self.unpinned_pages -= len(entry.slab.pages)
                free.append(entry.slab)
            queued += entry.queued
        if free:
            self._free(free)
        if queued:
            self._eviction.forget(self.tenant, queued)
        return count

    def clear(self) -> int:
        """Forget everything that is not being read."""
        return self._drop([k for k, e in self._by_key.items() if not e.pins])

    def pin(self, entries: Iterable[FlatEntry]) -> None:
        """Keep ``entries`` until :meth:`unpin` of the same."""
        for entry in entries:
            entry.pins += 1
            if entry.pins == 1 and not entry.gone:
                self.unpinned_pages -= len(entry.slab.pages)

    def unpin(self, entries: Iterable[FlatEntry]) -> None:
        free: list[Slab] = []
        offered: list[FlatEntry] = []
        for entry in entries:
            entry.pins -= 1
            if entry.pins:
                continue
            if entry.gone:
                free.append(entry.slab)
            else:
                self.unpinned_pages += len(entry.slab.pages)
                offered.append(entry)
        if free:
            self._free(free)
        self._offer(offered)

    # -- to be evicted ------------------------------------------------------------------------

    def check(self, unit: int, node: int, generation: int) -> float:
        entry = self._by_number.get(node)
        if entry is None:
            return GONE
        if entry.pins:
            entry.queued = False
            return BLOCKED
        return entry.rank

    def uses(self, unit: int, node: int) -> int:
        return self._by_number[node].uses

    def set_uses(self, unit: int, node: int, uses: int) -> None:
        self._by_number[node].uses = uses

    def pages_of(self, unit: int, node: int) -> int:
        return len(self._by_number[node].slab.pages)

    def key(self, unit: int, node: int) -> bytes:
        return self._by_number[node].key

    def evict(self, unit: int, node: int, why: str, *, below: float = 0.0, pages: int = 0) -> int:
        entry = self._by_number[node]
        entry.queued = False
        self.evictions += 1
        self.drop(entry.key)
        return 1

    def _ticks(self, count: int) -> NDArray[np.int64]:
        return self._eviction.tick(count) + np.arange(count, dtype=np.int64)

    def _offer(self, entries: Sequence[FlatEntry]) -> None:
        """Queue for eviction what is not queued yet."""
        new = [e for e in entries if not e.queued]
        for entry in new:
            entry.queued = True
        self._eviction.push_all(self.tenant, [(self.number, 0, e.number, 0) for e in new], [e.rank for e in new])


@dataclass(frozen=True, slots=True)
class FlatRead:
    """Objects copied out: which were there, and of those the bytes, xxh3_64 as stored at the put, and ``data`` one after another."""

    found: list[bool]
    sizes: list[int]
    checksums: list[int]
    data: bytes


class FlatPut:
    """Objects being written; see :meth:`kvpool.core.PoolCore.begin_put_flat`. States and ``on_failed`` as in :class:`kvpool.put.Put`."""

    def __init__(self, core: Rooms, shelf: FlatShelf, slabs: Mapping[bytes, Slab], deadline: float) -> None:
        self.deadline = deadline
        self.state = PutState.OPEN
        self.error: KVError | None = None
        self.on_failed: Callable[[KVError], None] | None = None
        self.keys = tuple(slabs)
        self.checksums: Mapping[bytes, int] = {}
        """xxh3_64 (seed 0) of the objects' bytes at their source, where it is known."""
        self._core, self._shelf, self._slabs = core, shelf, dict(slabs)

    @property
    def closed(self) -> bool:
        return self.state in (PutState.COMMITTED, PutState.ABORTED)

    @property
    def objects(self) -> list[PageList]:
        """Where each object goes, in the order of ``keys``."""
        return [self._core.arena.pages(slab) for slab in self._slabs.values()]

    @property
    def destinations(self) -> dict[Slot, PageList]:
        """The same as one extent of a transfer."""
        return {SLOT: self._core.arena.pages_in_order(list(self._slabs.values()))}

    def manifest(self, transfer: bytes) -> Manifest:
        return Manifest.of_objects([sum(s.nbytes for s in self._slabs.values())], transfer=transfer)

    def commit(self) -> None:
        """Make all objects visible at once, replacing older ones under the same keys.

        Checksums that are not known are taken from what is in the destinations. Raises TransferError when the put has ended.
        """
        if self.state is not PutState.OPEN:
            raise self.error or TransferError(f"the put is {self.state}: it cannot be committed")
        given = self.checksums
        sums = [given[k] if k in given else self._core.arena.pages(slab).hash(0) for k, slab in self._slabs.items()]
        self._shelf.put([(k, slab, c) for (k, slab), c in zip(self._slabs.items(), sums, strict=True)])
        self._end(PutState.COMMITTED)

    def abort(self, error: KVError | None = None) -> None:
        """Drop everything. Idempotent; does nothing after a commit."""
        if self.closed:
            return
        self.error = self.error or error or TransferCancelledError("the put was aborted by its writer")
        self._core._free(self._shelf.tenant, list(self._slabs.values()))
        self._end(PutState.ABORTED)

    def expire(self) -> None:
        if self.state is PutState.OPEN:
            self.error = DeadlineError(f"the put of {len(self.keys)} objects was not finished before its deadline")
            self.state = PutState.FAILED
            if self.on_failed is None:
                self.abort()
            else:
                self.on_failed(self.error)

    def _end(self, state: PutState) -> None:
        self.state = state
        self._slabs = {}
        self._core._closed(self)


class FlatGet:
    """Objects being read: ``entries[i]`` belongs to the i-th key asked for, None where it is not there.

    ``objects`` are the found ones, in order; ``sources`` and :meth:`manifest` hold them one after another. They stay until
    :meth:`close`.
    """

    def __init__(self, core: Rooms, shelf: FlatShelf, entries: Iterable[FlatEntry | None], deadline: float) -> None:
        self.deadline = deadline
        self.error: KVError | None = None
        self.on_failed: Callable[[KVError], None] | None = None
        self.closed = False
        self.entries = tuple(entries)
        self._core, self._shelf = core, shelf
        self._pinned = [e for e in self.entries if e is not None]
        shelf.pin(self._pinned)
        self._sources: dict[Slot, PageList] | None = None

    @property
    def sources(self) -> dict[Slot, PageList]:
        """All objects one after another, as one extent; nothing after :meth:`close`."""
        if self._sources is None:
            self._sources = {SLOT: self._core.arena.pages_in_order([e.slab for e in self._pinned])}
        return self._sources

    @property
    def nbytes(self) -> int:
        """Bytes of all found objects."""
        return sum(e.slab.nbytes for e in self._pinned)

    @property
    def found(self) -> list[bool]:
        return [e is not None for e in self.entries]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Bytes of each found object."""
        return np.fromiter((e.slab.nbytes for e in self._pinned), np.int64, len(self._pinned))

    @property
    def checksums(self) -> NDArray[np.uint64]:
        """xxh3_64 of each found object, as stored at its put."""
        return np.fromiter((e.checksum for e in self._pinned), np.uint64, len(self._pinned))

    @property
    def objects(self) -> list[PageList]:
        """Each found object."""
        return [self._core.arena.pages(entry.slab) for entry in self._pinned]

    def manifest(self, transfer: bytes) -> Manifest:
        """One extent."""
        return Manifest.of_objects([self.nbytes], transfer=transfer)

    def place(self) -> tuple[Located, list[int], list[int]]:
        """Where all of it lies, for who maps the memory; the size of each object asked for (-1: not there), and its pages."""
        slabs = [None if e is None else e.slab for e in self.entries]
        there = [s for s in slabs if s is not None]
        pages = np.concatenate([np.empty(0, np.int32), *(s.pages for s in there)])
        owners = np.repeat([s.generation for s in there], [len(s.pages) for s in there]).astype(np.int64)
        sizes = [-1 if s is None else s.nbytes for s in slabs]
        counts = [0 if s is None else len(s.pages) for s in slabs]
        return Located(self.sources[SLOT].pieces, pages, owners), sizes, counts

    def close(self) -> None:
        """Give the sources up. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._sources = {}
        self._shelf.unpin(self._pinned)
        self._pinned = []
        self._core._closed(self)

    def expire(self) -> None:
        if not self.closed and self.error is None:
            self.error = DeadlineError(f"the get of {len(self.entries)} objects was not finished before its deadline")
            if self.on_failed is None:
                self.close()
            else:
                self.on_failed(self.error)
