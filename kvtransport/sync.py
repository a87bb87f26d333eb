"""The same operations for threads: futures and timeouts instead of ``await``.

One background event loop per process carries everything; a process that forked gets a loop of its own at
the first use, and objects made before the fork raise instead of hanging. Timeouts are seconds; None waits for the operation's own
deadline. A call that times out raises DeadlineError and leaves the transfer going: cancel it if it should end.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from typing import Any, Self, TypeVar

from .buffers import PageList
from .endpoint import Endpoint, EndpointConfig
from .errors import DeadlineError, Fault, KVError, TransferError
from .link import Link
from .manifest import Manifest
from .receiver import Expectation
from .telemetry import LinkTelemetry
from .transfer import Handover, IncomingTransfer, OutgoingTransfer, TransferStats

T = TypeVar("T")


class LoopThread:
    """An event loop (uvloop where installed) on a daemon thread of its own."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.loop = _new_loop()
        self._thread = threading.Thread(target=self._run, name="kvtransport-loop", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        pending = asyncio.all_tasks(self.loop)
        for task in pending:
            task.cancel()
        if pending:
            self.loop.run_until_complete(asyncio.wait(pending, timeout=5))
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()

    def check(self) -> None:
        if self.pid != os.getpid():
            raise TransferError(
                "this object was made before a fork; its connections belong to the parent process: make a new one in this process"
            )
        if threading.current_thread() is self._thread:
            raise TransferError("kvtransport.sync was called from its own event loop: use the asyncio classes there")

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Run a coroutine to its end; DeadlineError after ``timeout_s``, the work is then cancelled."""
        try:
            self.check()
        except KVError:
            work.close()
            raise
        try:
            future = asyncio.run_coroutine_threadsafe(work, self.loop)
        except RuntimeError:
            work.close()
            raise TransferError("the event loop was stopped") from None
        try:
            return future.result(timeout_s)
        except concurrent.futures.TimeoutError:
            if future.done():
                return future.result()  # done at the last moment, or the work itself raised it
            future.cancel()
            raise DeadlineError(f"not done within {timeout_s:g} s", fault=Fault.LOCAL) from None
        except concurrent.futures.CancelledError:
            raise TransferError("the event loop was stopped") from None

    def stop(self) -> None:
        if self.pid == os.getpid() and self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(10)


_lock = threading.Lock()
_shared: LoopThread | None = None


def loop_thread() -> LoopThread:
    """The process's background loop; made at the first use and again after a fork."""
    global _shared
    with _lock:
        if _shared is None or _shared.pid != os.getpid():
            _shared = LoopThread()
            atexit.register(_shared.stop)
        return _shared


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _after_fork() -> None:
    # The parent's lock may be held by a thread that does not exist here.
    global _lock, _shared
    _lock = threading.Lock()
    _shared = None


os.register_at_fork(after_in_child=_after_fork)


async def _wait(wait: Callable[[], Awaitable[T]]) -> T:
    return await wait()


class SyncHandover:
    """A ready unit that was handed over."""

    def __init__(self, thread: LoopThread, future: concurrent.futures.Future[Handover]) -> None:
        self._thread = thread
        self._future = future

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the source memory may be reused. Raises what was wrong with the unit, DeadlineError."""
        self._thread.check()
        try:
            handover = self._future.result(timeout_s)
        except concurrent.futures.TimeoutError:
            raise DeadlineError(f"the unit was not taken within {timeout_s:g} s", fault=Fault.LOCAL) from None
        self._thread.run(_wait(handover.released), timeout_s)

    @property
    def done(self) -> bool:
        return self._future.done() and (self._future.exception() is not None or self._future.result().done)


class SyncOutgoing:
    """:class:`kvtransport.transfer.OutgoingTransfer` for threads."""

    def __init__(self, thread: LoopThread, transfer: OutgoingTransfer) -> None:
        self._thread = thread
        self._transfer = transfer

    @property
    def manifest(self) -> Manifest:
        return self._transfer.manifest

    @property
    def stats(self) -> TransferStats:
        return self._transfer.stats

    def ready(
        self,
        layer: int,
        tensor: int,
        pages: PageList,
        *,
        first: int | None = None,
        tokens: int = 0,
        event: Callable[[], bool] | None = None,
    ) -> SyncHandover:
        """Hand over a ready unit; returns at once. What is wrong with it is raised by the handover and by :meth:`seal`."""
        self._thread.check()
        future: concurrent.futures.Future[Handover] = concurrent.futures.Future()

        def hand_over() -> None:
            try:
                future.set_result(self._transfer.ready(layer, tensor, pages, first=first, tokens=tokens, event=event))
            except KVError as error:
                future.set_exception(error)

        try:
            self._thread.loop.call_soon_threadsafe(hand_over)
        except RuntimeError:
            raise TransferError("the event loop was stopped") from None
        return SyncHandover(self._thread, future)

    def seal(self, timeout_s: float | None = None) -> None:
        self._thread.run(_wait(self._transfer.seal), timeout_s)

    def cancel(self, reason: str = "", timeout_s: float | None = 10.0) -> None:
        self._thread.run(self._transfer.cancel(reason), timeout_s)


class SyncIncoming:
    """:class:`kvtransport.transfer.IncomingTransfer` for threads."""

    def __init__(self, thread: LoopThread, transfer: IncomingTransfer) -> None:
        self._thread = thread
        self._transfer = transfer

    @property
    def manifest(self) -> Manifest:
        return self._transfer.manifest

    @property
    def stats(self) -> TransferStats:
        return self._transfer.stats

    def layer(self, layer: int, timeout_s: float | None = None) -> None:
        self._thread.run(self._transfer.layer(layer), timeout_s)

    def layers(self, timeout_s: float | None = None) -> Iterator[int]:
        """Layer indices as they complete; ``timeout_s`` bounds the wait for each."""
        iterator = self._transfer.layers()

        async def step() -> int | None:
            return await anext(iterator, None)

        while (layer := self._thread.run(step(), timeout_s)) is not None:
            yield layer

    def sealed(self, timeout_s: float | None = None) -> None:
        self._thread.run(_wait(self._transfer.sealed), timeout_s)

    def cancel(self, reason: str = "", timeout_s: float | None = 10.0) -> None:
        self._thread.run(self._transfer.cancel(reason), timeout_s)


class SyncLink:
    """:class:`kvtransport.link.Link` for threads."""

    def __init__(self, thread: LoopThread, link: Link) -> None:
        self._thread = thread
        self._link = link

    @property
    def peer(self) -> str:
        return self._link.peer

    @property
    def closed(self) -> bool:
        return self._link.closed

    def open(
        self, manifest: Manifest, *, deadline_s: float = 60.0, priority: int = 0, checksum: bool = True
    ) -> SyncOutgoing:
        """See :meth:`kvtransport.link.Link.open`."""

        async def work() -> OutgoingTransfer:
            return self._link.open(manifest, deadline_s=deadline_s, priority=priority, checksum=checksum)

        return SyncOutgoing(self._thread, self._thread.run(work()))

    def call(self, verb: str, args: Mapping[str, Any] | None = None, *, timeout_s: float = 10.0) -> dict[str, Any]:
        return self._thread.run(self._link.call(verb, args, timeout_s=timeout_s))

    def telemetry(self) -> LinkTelemetry:
        async def work() -> LinkTelemetry:
            return self._link.telemetry()

        return self._thread.run(work())

    def close(self) -> None:
        self._thread.run(self._link.close(), 10.0)


class SyncEndpoint:
    """:class:`kvtransport.endpoint.Endpoint` for threads; use as a context manager."""

    def __init__(self, config: EndpointConfig | None = None) -> None:
        self._thread = loop_thread()

        async def work() -> Endpoint:
            return Endpoint(config)

        self._endpoint = self._thread.run(work())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def listen(self, host: str = "127.0.0.1", port: int = 0) -> tuple[str, int]:
        return self._thread.run(self._endpoint.listen(host, port))

    def connect(self, host: str, port: int, *, connections: int | None = None, timeout_s: float | None = None) -> SyncLink:
        link = self._thread.run(self._endpoint.connect(host, port, connections=connections), timeout_s)
        return SyncLink(self._thread, link)

    def expect(self, transfer: bytes, wanted: Expectation) -> SyncIncoming:
        """See :meth:`kvtransport.endpoint.Endpoint.expect`; the callbacks of ``wanted`` run on the loop's thread."""

        async def work() -> IncomingTransfer:
            return self._endpoint.expect(transfer, wanted)

        return SyncIncoming(self._thread, self._thread.run(work()))

    def close(self) -> None:
        self._thread.run(self._endpoint.close(), 30.0)
