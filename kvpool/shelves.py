"""A pool's flat objects: told of, put and read by key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .arena import BlockClass
from .errors import KeyChainError
from .flat import FlatGet, FlatPut
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

    def plan_get_flat(self, tenant: str, keys: Sequence[bytes], *, deadline: float) -> FlatGet:
        """Pin the objects under ``keys`` that are there, and make them recently used."""
        shelf = self._shelf(tenant)
        self._check_active()
        get = FlatGet(self, shelf, shelf.get(check_flat_keys(self._bounded(keys))), deadline)
        hits = sum(get.found)
        self._counts["flat_hits"] += hits
        self._counts["flat_misses"] += len(keys) - hits
        self._deadlines.add(get)
        return get

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
