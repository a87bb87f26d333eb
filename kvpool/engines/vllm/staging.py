"""Host memory between the wire and the engine's cache, where bytes cannot go straight into place.

Two cases. A prefix that decode has already: its blocks are shared with other requests and must not be written, so the layer is received
aside and only what is missing is copied. And caches on a device: copies run on a stream of their own and are ordered by events, never
by waiting inside forward(). The device part was developed against CUDA's documented stream semantics and its logic is tested with
host tensors; it has not run on a GPU yet (docs/engines.md says so).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from kvtransport.buffers import PageList
from kvtransport.errors import ArenaError, LayoutError

from .pages import PageShape

Event = Callable[[], bool]
"""Says whether something queued on a device has run; asking costs no wait."""

EVENT_POLL_S = 0.001


async def happened(event: Event) -> None:
    """Wait for ``event``: devices call nobody back, so it is asked every millisecond."""
    while not event():  # noqa: ASYNC110 - there is nothing to await
        await asyncio.sleep(EVENT_POLL_S)


class Budget:
    """Bytes of staging memory in use, from any thread."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        return self._used

    def take(self, nbytes: int) -> None:
        """Raises ArenaError when the limit does not allow it."""
        with self._lock:
            if self._used + nbytes > self._limit:
                raise ArenaError(
                    f"staging {nbytes} bytes would exceed staging_bytes = {self._limit} ({self._used} in use); raise it"
                )
            self._used += nbytes

    def give_back(self, nbytes: int) -> None:
        with self._lock:
            self._used -= nbytes


class Streams(Protocol):
    """The few operations on a device's queues that copying needs; :class:`CudaStreams` in an engine, a fake in tests."""

    def computed(self) -> Any:
        """A mark after everything the engine has queued so far."""

    def copying(self, after: Any) -> Any:
        """A context in which operations are queued on the copy stream, after the mark ``after`` (None: after nothing)."""

    def done(self) -> Event:
        """Says whether what was queued on the copy stream up to now has run."""

    def pinned(self, nbytes: int) -> Any:
        """A uint8 host tensor that the device can copy to and from without blocking."""

    def upload(self, values: Any) -> Any:
        """``values`` (a host tensor) on the device, queued on the copy stream without waiting for anything."""


class CudaStreams:
    """Streams of the current CUDA device."""

    def __init__(self) -> None:
        import torch

        self._torch: Any = torch
        self._stream: Any = self._torch.cuda.Stream()

    def computed(self) -> Any:
        event = self._torch.cuda.Event()
        event.record()
        return event

    def copying(self, after: Any) -> Any:
        if after is not None:
            self._stream.wait_event(after)
        return self._torch.cuda.stream(self._stream)

    def done(self) -> Event:
        event = self._torch.cuda.Event()
        event.record(self._stream)
        query: Event = event.query
        return query

    def pinned(self, nbytes: int) -> Any:
        return self._torch.empty(nbytes, dtype=self._torch.uint8, pin_memory=True)

    def upload(self, values: Any) -> Any:
        # From pageable memory the copy would wait for the stream: for the computation that the copies are queued behind.
        return values.pin_memory().to(self._stream.device, non_blocking=True)


class DeviceCopies:
    """Blocks of device tensors to and from pinned host memory. ``storage`` is the cache's whole memory as a flat uint8 tensor."""

    def __init__(self, storage: Any, streams: Streams, budget: Budget) -> None:
        self._storage = storage
        self._streams = streams
        self._budget = budget

    def mark(self) -> Any:
        """Call where the engine has queued the computation of what is copied next; costs no wait."""
        return self._streams.computed()

    def out(self, pages: PageShape, ids: Sequence[int], after: Any) -> tuple[PageList, Event, Callable[[], None]]:
        """Start copying blocks ``ids`` to the host: their bytes, whether they are there, how to give the memory back.

        Raises ArenaError when staging memory is used up.
        """
        host = self.host(len(ids) * pages.nbytes)
        give_back = self._give_back(host.numel())
        try:
            with self._streams.copying(after):
                host.copy_(self._rows(pages)[self._index(ids)].reshape(-1), non_blocking=True)
                done = self._streams.done()
        except BaseException:
            give_back()
            raise
        return PageList.of(host), done, give_back

    def host(self, nbytes: int) -> Any:
        """Pinned memory from the budget, to receive into; the caller gives the bytes back to the budget."""
        self._budget.take(nbytes)
        try:
            return self._streams.pinned(nbytes)
        except BaseException:
            self._budget.give_back(nbytes)
            raise

    def into(self, pages: PageShape, ids: Sequence[int], host: Any) -> Event:
        """Start copying ``host`` (the content of blocks ``ids`` in order) to the device."""
        with self._streams.copying(None):
            rows = host.view(len(ids), pages.nbytes).to(self._storage.device, non_blocking=True)
            self._rows(pages).index_copy_(0, self._index(ids), rows)
            return self._streams.done()

    def _give_back(self, nbytes: int) -> Callable[[], None]:
        left = [nbytes]

        def drop() -> None:
            while left:
                self._budget.give_back(left.pop())

        return drop

    def _index(self, ids: Sequence[int]) -> Any:
        import torch

        return self._streams.upload(torch.tensor(list(ids), dtype=torch.int64))

    def _rows(self, pages: PageShape) -> Any:
        require_dense(pages)
        start = pages.offset + int(pages.pieces[0, 0])
        return self._storage.as_strided(
            (pages.blocks, pages.nbytes), (pages.stride, 1), self._storage.storage_offset() + start
        )


def require_dense(pages: PageShape) -> None:
    """Raises LayoutError where a block is more than one run of bytes: what a device copies is one run."""
    if len(pages.pieces) != 1:
        raise LayoutError(
            "the engine's cache layout scatters a block's bytes over device memory; use one whose blocks are dense (VLLM_KV_CACHE_LAYOUT=LBHNC)"
        )


def aside(nbytes: int) -> PageList:
    """Plain host memory to receive into."""
    return PageList.of(np.empty(nbytes, np.uint8))
