"""The interface that the embedded pool and the client of a daemon share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from kvtransport.buffers import PageList
from kvtransport.layout import CacheLayout
from kvtransport.transfer import IncomingTransfer, OutgoingTransfer

from .admission import CheckpointHints
from .keys import KeyChain, Namespace
from .match import Explanation, Match

DEFAULT_DEADLINE_S = 60.0
DEFAULT_BLOCK_TOKENS = 64


@dataclass(frozen=True, slots=True)
class LeaseInfo:
    """A pin on what restoring ``length`` tokens needs, for ``seconds`` from when it was taken."""

    id: int
    length: int
    seconds: float


@runtime_checkable
class PoolProtocol(Protocol):
    """A pool as one tenant sees it. Lengths and positions in tokens, times in seconds.

    All methods may raise :class:`kvpool.errors.PoolError` and, over a network, :class:`kvtransport.errors.LinkError`.
    """

    async def namespace(
        self, layout: CacheLayout, block_tokens: int = DEFAULT_BLOCK_TOKENS, *, salt: bytes = b""
    ) -> Namespace:
        """Open (or find) the namespace of a layout with one block size."""

    async def match(self, ns: Namespace, chain: KeyChain, limit: int | None = None) -> Match:
        """The restorable lengths of ``chain`` up to ``limit``; never its last token."""

    async def explain(self, ns: Namespace, chain: KeyChain) -> Explanation:
        """Why the match is as long as it is."""

    async def checkpoint_hints(self, ns: Namespace, chain: KeyChain, insists: Iterable[int] = ()) -> CheckpointHints:
        """At which lengths a state of ``chain`` is worth taking; ask before prefill. See :mod:`kvpool.admission`.

        ``insists``: lengths the engine wants in any case.
        """

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
    ) -> OutgoingTransfer:
        """Open a put of tokens ``[start, boundary)``; invisible until sealed. See :meth:`kvpool.core.PoolCore.begin_put`.

        ``priority``: over a network, chunks of a higher one go first on a link; in process it is of no matter.
        """

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
    ) -> IncomingTransfer:
        """Receive tokens ``[start, boundary)`` and the state at ``boundary`` into ``into``, by (layer, tensor).

        The page lists match the extents of ``layout.extents(boundary, start=start, align=block_tokens)``. With a
        ``request`` this waits until its put begins (or the index can answer), then reads behind it. ``priority``: as of
        :meth:`put`; a get below 0 also waits, piece by piece, while its node sends to others. Raises MissError, DestinationError,
        DeadlineError.
        """

    async def lease(self, ns: Namespace, chain: KeyChain, length: int, seconds: float) -> LeaseInfo:
        """Keep what restoring ``length`` tokens needs for ``seconds``."""

    async def release(self, lease_id: int) -> None:
        """End a lease early."""

    async def exists(self, keys: Sequence[bytes]) -> list[bool]:
        """Which flat keys are there."""

    async def put_objects(self, objects: Mapping[bytes, Any]) -> None:
        """Store buffers under flat keys, replacing older ones; all or none."""

    async def get_objects(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Verified copies of flat objects; None where there is none."""

    async def get_objects_into(self, keys: Sequence[bytes], into: Sequence[Any]) -> list[int | None]:
        """Objects into the caller's memory: ``into[i]`` (a writable buffer or page list) takes the i-th, from its start.

        Returns each one's size in bytes, None where it is not there (its memory is then undefined). Without a copy on the way
        when all page lists lie in one buffer. Raises KVBufferError for memory that is too small.
        """

    async def stat(self) -> dict[str, Any]:
        """Sizes in bytes, entries and counters."""

    async def clear(self) -> int:
        """Evict all that is not in use; returns the number of entries."""

    async def close(self) -> None:
        """End open transfers and give everything back. Idempotent."""
