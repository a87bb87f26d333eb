"""A pool's flat objects: told of, put and read by key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvtransport.buffers import PageList
from kvtransport.errors import IntegrityError

from .arena import BlockClass
from .errors import KeyChainError
from .flat import FlatEntry, FlatGet, FlatPut, FlatRead, FlatShelf
from .keys import check_flat_keys
from .rooms import Rooms
from .steps import Steps, run

MAX_FLAT_KEYS = 65_536
"""Flat keys of one call."""


class Shelves(Rooms):
    """The part of :class:`kvpool.core.PoolCore` that knows flat keys."""

    def exists(self, tenant: str, keys: Sequence[bytes]) -> list[bool]:
        """Which flat keys of the tenant are there; touches nothing."""
        return self._shelf(tenant).has(check_flat_keys(self._bounded(keys)))

    def exists_packed(self, tenant: str, keys: bytes, lengths: bytes) -> bytes:
        """:meth:`exists` of keys one after another, whose ``lengths`` are little-endian u16: a bit each. Raises KeyChainError."""
        self._check_count(len(lengths) // 2)
        return self._shelf(tenant).which(keys, lengths)

    def begin_put_flat(self, tenant: str, sizes: Mapping[bytes, int], *, deadline: float) -> FlatPut:
        """Allocate objects of ``sizes`` bytes by key; all or none. Raises KeyChainError, QuotaError, PoolFullError, PoolLimitError."""
        return run(self.put_flat_steps(tenant, sizes, deadline=deadline))

    def put_flat_steps(self, tenant: str, sizes: Mapping[bytes, int], *, deadline: float) -> Steps[FlatPut]:
        """:meth:`begin_put_flat` in steps, as :meth:`put_steps`."""
        shelf = self._shelf(tenant)
        self._check_active()
        keys = check_flat_keys(self._bounded(list(sizes)))
        yield from self.memory.room_for(tenant, [(1, sizes[k], BlockClass.PREFIX) for k in keys])
        self._check_active()
        slabs = self.memory.allocate(tenant, [sizes[k] for k in keys], BlockClass.PREFIX)
        put = FlatPut(self, shelf, dict(zip(keys, slabs, strict=True)), deadline)
        self._deadlines.add(put)
        self._counts["flat_puts"] += len(keys)
        return put

    def store_flat_steps(
        self, tenant: str, keys: Sequence[bytes], sizes: Sequence[int], checksums: Sequence[int], data: bytes
    ) -> Steps[None]:
        """Store objects that are here, ``data`` one after another, in steps as :meth:`put_steps`; all or none.

        Nothing is open in between. Raises IntegrityError for bytes that do not have their checksum (xxh3_64), and as
        :meth:`begin_put_flat`.
        """
        shelf = self._shelf(tenant)
        check_flat_keys(self._bounded(keys))
        yield from self.memory.room_for(tenant, [(1, n, BlockClass.PREFIX) for n in sizes])
        slabs = self.memory.allocate(tenant, sizes, BlockClass.PREFIX)
        objects = list(zip(keys, slabs, checksums, strict=True))
        try:
            at, body = 0, PageList.of(data)
            for key, slab, checksum in objects:
                pages = self.arena.pages(slab)
                pages.copy_from(body.slice(at, at + slab.nbytes))
                at += slab.nbytes
                if pages.hash() != checksum:
                    raise IntegrityError(
                        f"object {key.hex()[:16]} does not have its checksum: put it again", retryable=True
                    )
        except BaseException:
            self._free(tenant, slabs)
            raise
        shelf.put(objects)
        self._counts["flat_puts"] += len(objects)

    def _get_flat(self, tenant: str, keys: Sequence[bytes]) -> tuple[FlatShelf, list[FlatEntry | None]]:
        """The objects under ``keys``, now recently used, and counted."""
        shelf = self._shelf(tenant)
        entries = shelf.get(check_flat_keys(self._bounded(keys)))
        misses = entries.count(None)
        self._counts["flat_hits"] += len(entries) - misses
        self._counts["flat_misses"] += misses
        return shelf, entries

    def plan_get_flat(self, tenant: str, keys: Sequence[bytes], *, deadline: float) -> FlatGet:
        """Pin the objects under ``keys`` that are there, and make them recently used."""
        self._check_active()
        return self._pinned(*self._get_flat(tenant, keys), deadline)

    def _pinned(self, shelf: FlatShelf, entries: Sequence[FlatEntry | None], deadline: float) -> FlatGet:
        get = FlatGet(self, shelf, entries, deadline)
        self._deadlines.add(get)
        return get

    def read_flat(self, tenant: str, keys: Sequence[bytes], *, most: int, deadline: float) -> FlatRead | FlatGet:
        """The objects under ``keys`` copied out when they have ``most`` bytes together, otherwise :meth:`plan_get_flat`."""
        self._check_active()
        shelf, entries = self._get_flat(tenant, keys)
        there = [e for e in entries if e is not None]
        if sum(e.slab.nbytes for e in there) > most:
            return self._pinned(shelf, entries, deadline)
        data = b"".join([self.arena.pages(e.slab).tobytes() for e in there])
        return FlatRead(
            [e is not None for e in entries], [e.slab.nbytes for e in there], [e.checksum for e in there], data
        )

    def drop_flat(self, tenant: str, key: bytes, *, corrupt: bool = False) -> bool:
        """Forget one object; ``corrupt`` when its bytes no longer have their checksum. Whether it was there."""
        self._counts["flat_corrupt"] += corrupt
        return self._shelf(tenant).drop(key)

    @staticmethod
    def _check_count(count: int) -> None:
        if count > MAX_FLAT_KEYS:
            raise KeyChainError(f"{count} flat keys in one call, at most {MAX_FLAT_KEYS} are possible: split the call")

    @classmethod
    def _bounded(cls, keys: Sequence[bytes]) -> Sequence[bytes]:
        cls._check_count(len(keys))
        return keys
