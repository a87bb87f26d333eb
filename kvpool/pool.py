"""The embedded pool: :class:`kvpool.core.PoolCore` with an asyncio face, in the engine's own process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from kvtransport.buffers import Arena, PageList
from kvtransport.errors import KVBufferError, KVError, TransferCancelledError
from kvtransport.layout import CacheLayout
from kvtransport.manifest import new_transfer_id

from .admission import CheckpointHints
from .arena import PageArena
from .core import PoolCore
from .embedded import EmbeddedGet, EmbeddedPut
from .errors import MissError, NamespaceError, PoolError
from .eviction import DEFAULT_POLICY
from .keys import KeyChain, Namespace, check_tenant
from .match import Explanation, Match
from .objects import pages_of
from .protocol import DEFAULT_BLOCK_TOKENS, DEFAULT_DEADLINE_S, LeaseInfo
from .steps import Background, run_in_turns
from .waiting import Waiting

DEFAULT_PAGE_BYTES = 65_536
T = TypeVar("T")


class _Home:
    """What the tenants' faces of one core share: waiting readers, open transfers, the timer of deadlines."""

    def __init__(self, core: PoolCore) -> None:
        self.core = core
        self.closed = False
        self.open: set[EmbeddedPut | EmbeddedGet] = set()
        self.waiting = Waiting(core)
        self._timer: asyncio.TimerHandle | None = None
        self._learning = Background(core.policy.work)
        core.on_work = self._learning.start

    def arm(self) -> None:
        """Have deadlines enforced: call after anything that adds one."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self.core.next_deadline
        if deadline is not None and not self.closed:
            delay = max(0.0, deadline - self.core.clock())
            self._timer = asyncio.get_running_loop().call_later(delay, self._expire)

    def ended(self, transfer: EmbeddedPut | EmbeddedGet) -> None:
        self.open.discard(transfer)
        self.arm()

    async def close(self) -> None:
        self.closed = True
        self._learning.stop()
        self.core.on_work = None
        for transfer in tuple(self.open):
            await transfer.cancel("the pool was closed")
        self.waiting.fail(TransferCancelledError("the pool was closed"))
        self.arm()
        self.core.arena.close()

    def _expire(self) -> None:
        self._timer = None
        self.core.expire()
        self.arm()


class Pool:
    """The pool as ``tenant`` sees it; implements :class:`kvpool.protocol.PoolProtocol`.

    Make one with :meth:`create`, or over a core of your own. Use it from one event loop; :meth:`close` (or leaving the
    ``async with`` block) cancels what is open and gives the memory back.
    """

    def __init__(self, core: PoolCore, *, tenant: str = "default") -> None:
        self.tenant = check_tenant(tenant)
        self.core = core
        self._home = _Home(core)

    @classmethod
    def create(
        cls,
        memory_bytes: int,
        *,
        page_bytes: int = DEFAULT_PAGE_BYTES,
        tenant: str = "default",
        tenant_quota_bytes: Mapping[str, int] | None = None,
        prefix_floor_bytes: int | None = None,
        policy: str = DEFAULT_POLICY,
        clock: Callable[[], float] = time.monotonic,
        arena: Arena | None = None,
    ) -> Self:
        """A pool over ``memory_bytes`` of new memory (or over ``arena``); other settings as in :class:`PoolCore`.

        Raises ArenaError or ConfigError.
        """
        memory = Arena(memory_bytes) if arena is None else arena
        try:
            core = PoolCore(
                PageArena(memory, page_bytes),
                clock=clock,
                tenant_quota_bytes=tenant_quota_bytes,
                prefix_floor_bytes=prefix_floor_bytes,
                policy=policy,
            )
        except KVError:
            if arena is None:
                memory.close()
            raise
        return cls(core, tenant=tenant)

    def as_tenant(self, tenant: str) -> Pool:
        """The same pool as another tenant sees it."""
        other = object.__new__(Pool)
        other.tenant, other.core, other._home = check_tenant(tenant), self.core, self._home
        return other

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel open transfers and give the memory back; for all tenants. Idempotent."""
        if not self._home.closed:
            await self._home.close()

    # -- prefixes --------------------------------------------------------------------------------

    async def namespace(
        self, layout: CacheLayout, block_tokens: int = DEFAULT_BLOCK_TOKENS, *, salt: bytes = b""
    ) -> Namespace:
        self._check()
        return self.core.open_namespace(self.tenant, layout, block_tokens, salt)

    async def match(self, ns: Namespace, chain: KeyChain, limit: int | None = None) -> Match:
        self._check(ns)
        return self.core.match(ns, chain, limit)

    async def explain(self, ns: Namespace, chain: KeyChain) -> Explanation:
        self._check(ns)
        return self.core.explain(ns, chain)

    async def checkpoint_hints(self, ns: Namespace, chain: KeyChain, insists: Iterable[int] = ()) -> CheckpointHints:
        self._check(ns)
        return self.core.checkpoint_hints(ns, chain, insists)

    async def put(
        self,
        ns: Namespace,
        chain: KeyChain | None,
        *,
        boundary: int,
        start: int = 0,
        checkpoints: Iterable[int] = (),
        request: bytes | None = None,
        deadline_s: float = DEFAULT_DEADLINE_S,
        priority: int = 0,
    ) -> EmbeddedPut:
        self._check(ns)
        steps = self.core.put_steps(
            ns,
            chain,
            boundary=boundary,
            start=start,
            checkpoints=checkpoints,
            request=request,
            deadline=self.core.clock() + deadline_s,
        )
        put = await run_in_turns(steps)
        if self._home.closed:  # meanwhile
            put.abort()
        self._check()
        transfer = EmbeddedPut(put, new_transfer_id(), self._home.ended)
        self._home.open.add(transfer)
        self._home.arm()
        return transfer

    async def get(
        self,
        ns: Namespace,
        chain: KeyChain | None,
        *,
        boundary: int,
        into: Mapping[tuple[int, int], PageList],
        start: int = 0,
        request: bytes | None = None,
        deadline_s: float = DEFAULT_DEADLINE_S,
        priority: int = 0,
    ) -> EmbeddedGet:
        self._check(ns)
        deadline = self.core.clock() + deadline_s
        while True:
            wait = request is not None and not self.core.request_known(self.tenant, request)
            try:
                get = self.core.plan_get(ns, chain, boundary=boundary, start=start, request=request, deadline=deadline)
                break
            except MissError:
                if not wait or request is None:
                    raise
            await self._home.waiting.for_request(self.tenant, request, max(0.0, deadline - self.core.clock()))
            self._check(ns)
        try:
            transfer = EmbeddedGet(get, into, new_transfer_id(), self._home.ended)
        except KVError:
            get.close()
            raise
        self._home.open.add(transfer)
        self._home.arm()
        return transfer

    async def lease(self, ns: Namespace, chain: KeyChain, length: int, seconds: float) -> LeaseInfo:
        self._check(ns)
        lease = self.core.lease(ns, chain, length, seconds)
        self._home.arm()
        return LeaseInfo(lease.id, length, seconds)

    async def release(self, lease_id: int) -> None:
        self._check()
        self.core.release(lease_id)

    # -- flat objects ----------------------------------------------------------------------------

    async def exists(self, keys: Sequence[bytes]) -> list[bool]:
        self._check()
        return self.core.exists(self.tenant, keys)

    async def put_objects(self, objects: Mapping[bytes, Any]) -> None:
        self._check()
        sources = {key: pages_of(buffer) for key, buffer in objects.items()}
        put = await run_in_turns(
            self.core.put_flat_steps(
                self.tenant,
                {key: pages.nbytes for key, pages in sources.items()},
                deadline=self.core.clock() + DEFAULT_DEADLINE_S,
            )
        )
        if self._home.closed:  # meanwhile
            put.abort()
        self._check()
        # No await from here to the commit: nobody sees it half done and the deadline cannot pass.
        try:
            checksums = {}
            for (key, pages), target in zip(sources.items(), put.objects, strict=True):
                checksums[key] = pages.hash(0)
                target.copy_from(pages)
            put.checksums = checksums
            put.commit()
        finally:
            put.abort()

    async def get_objects(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return self._read(keys, PageList.tobytes)

    async def get_objects_into(self, keys: Sequence[bytes], into: Sequence[Any]) -> list[int | None]:
        places = [pages_of(buffer) for buffer in into]
        if len(places) != len(keys):
            raise KVBufferError(f"{len(keys)} objects were asked for, there is memory for {len(places)}")
        waiting = iter(places)

        def copy(pages: PageList | None) -> PageList:
            place = next(waiting)
            if pages is not None:
                place = place.slice(0, pages.nbytes)
                place.copy_from(pages)
            return place

        found = self._read(keys, copy, absent=copy)
        return [None if pages is None else pages.nbytes for pages in found]

    def _read(
        self,
        keys: Sequence[bytes],
        read: Callable[[PageList], T],
        absent: Callable[[None], object] = lambda _: None,
    ) -> list[T | None]:
        """``read`` of every object that is there and has its checksum afterwards."""
        self._check()
        get = self.core.plan_get_flat(self.tenant, keys, deadline=self.core.clock() + DEFAULT_DEADLINE_S)
        found: list[T | None] = []
        corrupt: list[bytes] = []
        try:
            sources = iter(get.objects)
            for key, entry in zip(keys, get.entries, strict=True):
                if entry is None:
                    absent(None)
                    found.append(None)
                    continue
                data = read(next(sources))
                good = pages_of(data).hash(0) == entry.checksum
                found.append(data if good else None)
                if not good:
                    corrupt.append(key)
        finally:
            get.close()
        for key in corrupt:
            self.core.drop_flat(self.tenant, key, corrupt=True)
        return found

    # -- the whole -------------------------------------------------------------------------------

    async def stat(self) -> dict[str, Any]:
        self._check()
        return self.core.stat(self.tenant)

    async def clear(self) -> int:
        self._check()
        return self.core.clear(tenant=self.tenant)

    def _check(self, ns: Namespace | None = None) -> None:
        if self._home.closed:
            raise PoolError("the pool is closed")
        if ns is not None and ns.tenant != self.tenant:
            raise NamespaceError(f"the namespace belongs to tenant {ns.tenant!r}, this is the pool of {self.tenant!r}")
