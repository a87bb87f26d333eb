"""The bytes of puts and gets: transfers received into what a put allocated, or sent from what a get pinned."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from kvtransport.buffers import PageList
from kvtransport.endpoint import Endpoint
from kvtransport.errors import KVError, ManifestError, RefusedError
from kvtransport.layout import CacheLayout
from kvtransport.manifest import Manifest, new_transfer_id
from kvtransport.receiver import Expectation
from kvtransport.sender import Sender

from ..below import Below
from ..flat import FlatGet, FlatPut
from ..get import Get
from ..put import Put
from ..steps import Steps, run_in_turns
from .sessions import Session

T = TypeVar("T")


class Moving:
    """Of one server; ``moved`` is told of each transfer that has ended: "put" or "get", seconds, its error."""

    def __init__(
        self, endpoint: Endpoint, *, window_bytes: int, moved: Callable[[str, float, KVError | None], None]
    ) -> None:
        self._endpoint = endpoint
        self._window = window_bytes
        self._moved = moved
        self._loop = asyncio.get_running_loop()
        self._puts = 0
        self._relays: set[asyncio.Task[None]] = set()
        self._below = Below()
        self._draining = False
        self.wire: Counter[str] = Counter()
        """Bytes and events on the wire, by name."""
        self.sending_bytes = 0
        """Of gets in progress."""

    # -- life ----------------------------------------------------------------------------------

    @property
    def active(self) -> int:
        """Puts and gets in progress."""
        return self._puts + len(self._relays)

    @property
    def yielded(self) -> int:
        """Pieces of gets below all others that waited for these."""
        return self._below.yielded

    def check_open(self) -> None:
        """Raises RefusedError when no more is begun."""
        if self._draining:
            raise RefusedError("this pool node is shutting down", retryable=True)

    async def drain(self, grace_s: float) -> bool:
        """Begin no more and wait for those in progress; whether all finished within ``grace_s``."""
        self._draining = True
        deadline = self._loop.time() + grace_s
        # Puts and gets end in many places; shutting down may poll.
        while self.active and self._loop.time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        return not self.active

    async def close(self) -> None:
        """Stop at once; what is in progress fails."""
        self._draining = True
        for task in self._relays:
            task.cancel()
        if self._relays:
            await asyncio.wait(self._relays)

    # -- in ------------------------------------------------------------------------------------

    async def begin(self, steps: Steps[T]) -> T:
        """Begin a put in turns with everything else; it counts as in progress meanwhile."""
        self._puts += 1
        try:
            return await run_in_turns(steps)
        finally:
            self._puts -= 1

    def receive(
        self,
        session: Session,
        put: Put | FlatPut,
        deadline_s: float,
        *,
        layout: CacheLayout | None = None,
        block_tokens: int = 0,
        progress: Callable[[int, int, int, int], int] | None = None,
    ) -> dict[str, Any]:
        """Expect the transfer that fills ``put``; seal commits it, any other end aborts it."""
        transfer = new_transfer_id()
        promised = put.manifest(transfer)

        def grant(manifest: Manifest) -> Mapping[tuple[int, int], PageList]:
            if manifest.extents != promised.extents or manifest.fingerprint != promised.fingerprint:
                raise ManifestError("the manifest is not of the put that was asked for")
            return put.destinations

        def ranges(layer: int, tensor: int, start: int, stop: int) -> None:
            if progress is not None:
                progress(layer, tensor, start, stop)

        def seal() -> None:
            if isinstance(put, FlatPut) and len(put.checksums) != len(put.keys):
                raise ManifestError("the objects were sealed before their checksums were told")
            put.commit()

        since = time.perf_counter()  # uvloop's clock counts milliseconds

        def end(error: KVError | None) -> None:
            self._puts -= 1
            self._moved("put", time.perf_counter() - since, error)
            put.on_failed = None
            session.puts.pop(transfer, None)
            for name in ("moved_bytes", "checksums_verified", "corrupt_chunks", "duplicate_bytes"):
                self.wire[f"received_{name}"] += getattr(receiver.stats, name)
            if error is not None:
                put.abort(error)

        try:
            receiver = self._endpoint.expect(
                transfer,
                Expectation(
                    grant,
                    layout=layout,
                    block_tokens=block_tokens,
                    # The core's deadline comes first; this one is for a core that was never asked.
                    deadline_s=deadline_s + 1.0,
                    window_bytes=self._window,
                    on_range=ranges,
                    on_seal=seal,
                    on_end=end,
                ),
                link=session.link,
            )
        except KVError as error:
            put.abort(error)
            raise
        self._puts += 1
        if isinstance(put, FlatPut):
            session.puts[transfer] = put
        # Stopping the receiver ends every write into the blocks; only then are they freed (in end).
        put.on_failed = receiver.fail
        return {"transfer": transfer}

    # -- out -----------------------------------------------------------------------------------

    def send(
        self,
        session: Session,
        get: Get | FlatGet,
        transfer: bytes,
        deadline_s: float,
        *,
        priority: int = 0,
        bytes_per_s: float | None = None,
    ) -> None:
        """Open the transfer and send on, beside everything else; ``get`` is closed when that is over.

        Not faster than ``bytes_per_s``; to a tenant with a cap, as that allows all its transfers together, whatever it asks for. Nodes
        of the cluster copy for all tenants, and have a pace of their own.
        """
        tenant = "" if session.is_node else session.tenant
        free = bytes_per_s is None or self._endpoint.pacer.caps(tenant)
        pace = "" if free else f"get {transfer.hex()}"  # a name that nobody else has
        try:
            if pace:
                self._endpoint.cap_tenant(pace, bytes_per_s)
            sender = session.link.open(
                get.manifest(transfer), deadline_s=max(0.001, deadline_s), priority=priority, tenant=pace or tenant
            )
        except BaseException:
            if pace:
                self._endpoint.cap_tenant(pace, None)
            get.close()
            raise
        relay = self._spawn(self._relay(get, sender))
        if pace:
            relay.add_done_callback(lambda _: self._endpoint.cap_tenant(pace, None))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._relays.add(task)
        task.add_done_callback(self._relays.discard)
        return task

    async def _relay(self, get: Get | FlatGet, sender: Sender) -> None:
        """Hand over what is there and what still comes; seal when the source is sealed; then let go of it."""
        sealed: asyncio.Future[None] = self._loop.create_future()
        since = time.perf_counter()  # uvloop's clock counts milliseconds
        get.on_failed = sender.fail
        nbytes = sum(pages.nbytes for pages in get.sources.values())
        self.sending_bytes += nbytes
        below = sender.priority < 0
        if not below:
            self._below.live()

        def hand_over(layer: int, tensor: int, start: int, stop: int) -> None:
            if sender.error is None and stop > start:
                sender.hand_over(layer, tensor, start, get.sources[layer, tensor].slice(start, stop))

        def seal_seen() -> None:
            if not sealed.done():
                sealed.set_result(None)

        try:
            if isinstance(get, Get) and below and get.sealed:
                await self._below.hand_over(get, sender)
            elif isinstance(get, Get):
                get.on_sealed = seal_seen
                get.subscribe(hand_over)
                for item in get.ready_ranges():
                    hand_over(*item)
                if get.error is not None:
                    sender.fail(get.error)
                if not get.sealed:
                    await sender.first_of(sealed)
            else:
                for slot, pages in get.sources.items():
                    hand_over(*slot, 0, pages.nbytes)
            if sender.error is None:
                await sender.seal()
        except KVError:
            pass  # the consumer knows: it was told, or it is what went away
        finally:
            await sender.cancel("the pool stopped sending")
            self.sending_bytes -= nbytes
            if not below:
                self._below.done()
            self._moved("get", time.perf_counter() - since, sender.error)
            for name in ("moved_bytes", "resent_bytes"):
                self.wire[f"sent_{name}"] += getattr(sender.stats, name)
            get.on_failed = None
            get.close()
