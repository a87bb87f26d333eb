"""Who gets memory, and what goes for it: quotas, the floor of the prefix cache, eviction until there is room.

Evicting thousands of blocks takes milliseconds. :meth:`Memory.room_for` does it in slices, so that whoever serves others too can do
so in between; allocating then evicts what is missing still, which is nothing unless others took the room meanwhile.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Mapping, Sequence

from kvtransport.errors import ConfigError

from .arena import BlockClass, PageArena, Slab, Slabs
from .errors import PoolFullError, QuotaError
from .eviction import Eviction

SLICE_ENTRIES = 256
"""Entries evicted in one slice: less than a millisecond when many go together, as blocks of one sequence do."""
SLICE_EVICTIONS = 8
"""Evictions in one slice: each takes some 0.1 ms, however little goes with it."""
Steps = Generator[None, None, None]

Rows = tuple[int, int, BlockClass]
"""How many slabs of how many bytes each, for what."""


class Memory:
    """Allocates from ``arena`` for tenants, evicting through ``eviction``.

    ``quota_bytes`` limits tenants by name, in whole pages. ``floor_bytes`` of blocks and states are not evicted for
    the sake of transfer-cache bytes (None: half the arena). Raises ConfigError for a floor outside the arena.
    """

    def __init__(
        self, arena: PageArena, eviction: Eviction, quota_bytes: Mapping[str, int] | None, floor_bytes: int | None
    ) -> None:
        floor = arena.total_bytes // 2 if floor_bytes is None else floor_bytes
        if not 0 <= floor <= arena.total_bytes:
            raise ConfigError(f"prefix_floor_bytes must be within the arena's {arena.total_bytes} bytes, got {floor}")
        self.arena = arena
        self.evictions: Counter[str] = Counter()
        """Evictions by reason."""
        self._eviction = eviction
        self._quota = {tenant: n // arena.page_bytes for tenant, n in (quota_bytes or {}).items()}
        self._floor = floor // arena.page_bytes
        self._used: Counter[str] = Counter()

    def used_bytes(self, tenant: str) -> int:
        """Bytes of the pages that the tenant holds, puts in progress included."""
        return self._used[tenant] * self.arena.page_bytes

    def evictable_bytes(self, tenant: str | None = None) -> int:
        """Bytes that are in the cache and neither leased nor being read."""
        return self._eviction.unpinned_pages(tenant) * self.arena.page_bytes

    def free(self, tenant: str, slabs: Sequence[Slab | Slabs]) -> None:
        self.arena.free_many(slabs)
        self._used[tenant] -= sum(s.page_count for s in slabs)

    def room_for(self, tenant: str, wanted: Sequence[Rows]) -> Steps:
        """Evict, a slice at a step, what allocating ``wanted`` would; raises as :meth:`allocate_rows`."""
        yield from self._make_room(tenant, *self._pages_of(wanted))

    def _pages_of(self, wanted: Sequence[Rows]) -> tuple[int, bool]:
        """Pages of ``wanted``, and whether they are for a transfer."""
        pages = sum(count * self.arena.pages_for(nbytes) for count, nbytes, _ in wanted)
        return pages, any(kind is BlockClass.TRANSFER for *_, kind in wanted)

    def allocate(self, tenant: str, sizes: Sequence[int], kind: BlockClass) -> list[Slab]:
        """A slab of each size, or an error and none; evicts what it must, nothing when that would not be enough.

        Raises QuotaError or PoolFullError, with the numbers.
        """
        pages = sum(map(self.arena.pages_for, sizes))
        for _ in self._make_room(tenant, pages, kind is BlockClass.TRANSFER):
            pass
        slabs = self.arena.allocate_many(sizes, kind)
        self._used[tenant] += pages
        return slabs

    def allocate_rows(self, tenant: str, wanted: Sequence[Rows]) -> list[Slabs]:
        """All of ``wanted``, or an error and none; otherwise as :meth:`allocate`."""
        pages, transfer = self._pages_of(wanted)
        for _ in self._make_room(tenant, pages, transfer):
            pass
        slabs = [self.arena.allocate_rows(*rows) for rows in wanted]
        self._used[tenant] += pages
        return slabs

    def _make_room(self, tenant: str, pages: int, transfer: bool) -> Steps:
        while True:
            over, short = self._lacking(tenant, pages, transfer)  # again after every step: others ran meanwhile
            if over <= 0 and short <= 0:
                return
            # One entry may hold many pages: what the quota frees counts for the shortage too.
            target, done, least = self._used[tenant] - max(0, over), 0, SLICE_ENTRIES // SLICE_EVICTIONS
            while done < SLICE_ENTRIES:
                # What rests on one entry may go with it: no more of that than a slice either.
                if self._used[tenant] > target:
                    count = self._evict(tenant, "quota", min(SLICE_ENTRIES, self._used[tenant] - target))
                elif self.arena.free_pages < pages:
                    count = self._evict(None, "capacity", min(SLICE_ENTRIES, pages - self.arena.free_pages))
                else:
                    return
                done += max(count, least)
            yield

    def _lacking(self, tenant: str, pages: int, transfer: bool) -> tuple[int, int]:
        """Pages over the tenant's quota, and pages short (not above 0: none). Raises when evicting would not be enough."""
        size, arena = self.arena.page_bytes, self.arena
        quota = self._quota.get(tenant)
        over = 0 if quota is None else self._used[tenant] + pages - quota
        short = pages - arena.free_pages
        if over <= 0 and short <= 0:
            return over, short
        spare = self._eviction.unpinned_pages()
        if transfer:
            kept = (arena.bytes_of(BlockClass.PREFIX) + arena.bytes_of(BlockClass.STATE)) // size
            spare = min(spare, max(0, kept - self._floor))
        own = min(self._eviction.unpinned_pages(tenant), spare)
        if quota is not None and over > own:
            raise QuotaError(
                f"{pages * size} bytes asked for; tenant {tenant!r} holds {self._used[tenant] * size} of its quota of "
                f"{quota * size} bytes, and {own * size} of them could be evicted: release leases, ask for less, or raise "
                "the quota"
            )
        if short > spare:
            floor = f" or under the floor of {self._floor * size} bytes kept for the prefix cache" if transfer else ""
            raise PoolFullError(
                f"{pages * size} bytes asked for; {arena.free_bytes} of {arena.total_bytes} are free and {spare * size} could "
                f"be evicted, the rest is leased, being read or being written{floor}: try again later, ask for less, or give "
                "the pool more memory"
            )
        return over, short

    def _evict(self, tenant: str | None, why: str, pages: int) -> int:
        count = self._eviction.evict(tenant, why, pages)
        if not count:
            raise PoolFullError(
                "nothing is left to evict although the pool counted on it: this is a defect, please report it"
            )
        self.evictions[why] += count
        return count
