"""The pool for threads: :class:`~kvpool.protocol.PoolProtocol` with futures and timeouts, on kvtransport's background loop."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Self, TypeVar

from kvtransport.buffers import PageList
from kvtransport.endpoint import EndpointConfig
from kvtransport.layout import CacheLayout
from kvtransport.sync import LoopThread, SyncIncoming, SyncOutgoing, loop_thread

from .admission import CheckpointHints
from .client import connect as connect_async
from .keys import KeyChain, Namespace
from .match import Explanation, Match
from .pool import Pool
from .protocol import DEFAULT_BLOCK_TOKENS, DEFAULT_DEADLINE_S, LeaseInfo, PoolProtocol

T = TypeVar("T")


class SyncPool:
    """A pool for threads; made by :func:`connect` or :func:`embedded`. Use as a context manager.

    Every method waits for at most ``timeout_s`` seconds (DeadlineError), or the operation's own deadline.
    """

    def __init__(self, thread: LoopThread, pool: PoolProtocol, timeout_s: float) -> None:
        self._thread = thread
        self._pool = pool
        self._timeout_s = timeout_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, T], more_s: float = 0.0) -> T:
        return self._thread.run(work, self._timeout_s + more_s)

    def namespace(
        self, layout: CacheLayout, block_tokens: int = DEFAULT_BLOCK_TOKENS, *, salt: bytes = b""
    ) -> Namespace:
        return self._run(self._pool.namespace(layout, block_tokens, salt=salt))

    def match(self, ns: Namespace, chain: KeyChain, limit: int | None = None) -> Match:
        return self._run(self._pool.match(ns, chain, limit))

    def explain(self, ns: Namespace, chain: KeyChain) -> Explanation:
        return self._run(self._pool.explain(ns, chain))

    def checkpoint_hints(self, ns: Namespace, chain: KeyChain, insists: Iterable[int] = ()) -> CheckpointHints:
        return self._run(self._pool.checkpoint_hints(ns, chain, insists))

    def put(
        self,
        ns: Namespace,
        chain: KeyChain | None,
        *,
        boundary: int,
        start: int = 0,
        checkpoints: Iterable[int] = (),
        request: bytes | None = None,
        deadline_s: float = DEFAULT_DEADLINE_S,
    ) -> SyncOutgoing:
        work = self._pool.put(
            ns, chain, boundary=boundary, start=start, checkpoints=checkpoints, request=request, deadline_s=deadline_s
        )
        return SyncOutgoing(self._thread, self._run(work, deadline_s))

    def get(
        self,
        ns: Namespace,
        chain: KeyChain | None,
        *,
        boundary: int,
        into: Mapping[tuple[int, int], PageList],
        start: int = 0,
        request: bytes | None = None,
        deadline_s: float = DEFAULT_DEADLINE_S,
    ) -> SyncIncoming:
        work = self._pool.get(
            ns, chain, boundary=boundary, into=into, start=start, request=request, deadline_s=deadline_s
        )
        return SyncIncoming(self._thread, self._run(work, deadline_s))

    def lease(self, ns: Namespace, chain: KeyChain, length: int, seconds: float) -> LeaseInfo:
        return self._run(self._pool.lease(ns, chain, length, seconds))

    def release(self, lease_id: int) -> None:
        self._run(self._pool.release(lease_id))

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        return self._run(self._pool.exists(keys))

    def put_objects(self, objects: Mapping[bytes, Any]) -> None:
        self._run(self._pool.put_objects(objects))

    def get_objects(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return self._run(self._pool.get_objects(keys))

    def get_objects_into(self, keys: Sequence[bytes], into: Sequence[Any]) -> list[int | None]:
        return self._run(self._pool.get_objects_into(keys, into))

    def stat(self) -> dict[str, Any]:
        return self._run(self._pool.stat())

    def clear(self) -> int:
        return self._run(self._pool.clear())

    def close(self) -> None:
        self._run(self._pool.close())


def connect(
    host: str, port: int, *, connections: int | None = None, config: EndpointConfig | None = None, timeout_s: float = 30.0
) -> SyncPool:
    """Connect to a kvpoold; errors as in :func:`kvpool.client.connect`."""
    thread = loop_thread()
    return SyncPool(thread, thread.run(connect_async(host, port, connections=connections, config=config)), timeout_s)


def embedded(make: Callable[[], Pool], *, timeout_s: float = 30.0) -> SyncPool:
    """A pool in this process, for threads: ``embedded(lambda: Pool.create(1 << 30))``; ``make`` runs on the loop."""
    thread = loop_thread()

    async def work() -> Pool:
        return make()

    return SyncPool(thread, thread.run(work()), timeout_s)
