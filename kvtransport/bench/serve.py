"""``kvbench serve``: the receiving end of ``kvbench send``, on another machine or on this one.

Two verbs over the link itself. ``kvbench.prepare`` makes memory for one request's cache and names the transfer that
will fill it; ``kvbench.report`` tells what arrived. One sender at a time; its memory goes with its link.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec

from .. import presets
from ..endpoint import Endpoint, EndpointConfig
from ..errors import LimitError, ProtocolError
from ..link import Link
from ..manifest import Manifest, new_transfer_id
from ..receiver import Expectation, Receiver
from .loopback_memory import CacheMemory, page_sizes
from .worker import cpu_seconds

PREPARE, REPORT = "kvbench.prepare", "kvbench.report"
MAX_MEMORY = 8 << 30


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Arguments of ``kvbench.prepare``: what will be sent. ``page_bytes`` None: blocks of 16 tokens."""

    preset: str
    tokens: int
    contiguous: bool
    checksum: bool
    page_bytes: int | None = None
    deadline_s: float = 120.0


class Served:
    """One sender's memory and the transfer it is filled by."""

    def __init__(self, wanted: Wanted, limit_bytes: int) -> None:
        self.wanted = wanted
        self.layout = presets.load(wanted.preset)
        if not 1 <= wanted.tokens <= 1 << 24 or (wanted.page_bytes is not None and wanted.page_bytes < 64):
            raise ProtocolError(f"cannot prepare {wanted.tokens} tokens in pages of {wanted.page_bytes} bytes")
        manifest = Manifest.of_layout(self.layout, wanted.tokens, transfer=bytes(16))
        # A page more in four, as kvbench's memory keeps them.
        if manifest.total_bytes * 5 // 4 > limit_bytes:
            raise LimitError(
                f"{manifest.total_bytes / 1e6:,.0f} MB of cache, and pages to spare, do not fit into the {limit_bytes / 1e6:,.0f} MB this "
                "server gives (kvbench serve --max-memory)"
            )
        sizes = page_sizes(self.layout, wanted.page_bytes, contiguous=wanted.contiguous)
        self.memory = CacheMemory(manifest, sizes, count=1, seed=1, name="kvbench-serve")
        self.receiver: Receiver | None = None
        self.cpu_before = 0.0

    def expect(self, endpoint: Endpoint, link: Link) -> bytes:
        """Expect the next transfer over ``link``; returns its name."""
        self.memory.blank(0)
        transfer = new_transfer_id()
        wanted = Expectation(
            grant=lambda manifest: self.memory.pages[0],
            layout=self.layout,
            allow_unchecked=not self.wanted.checksum,
            deadline_s=self.wanted.deadline_s,
        )
        self.receiver = endpoint.expect(transfer, wanted, link=link)
        self.cpu_before = cpu_seconds()
        return transfer

    async def close(self) -> None:
        if self.receiver is not None:
            await self.receiver.cancel("the sender is gone")
            self.receiver = None
        self.memory.close()


class Server:
    """Answers senders until it is closed; use as an async context manager. ``say`` hears who comes and goes."""

    def __init__(self, config: EndpointConfig, *, max_memory: int, say: Callable[[str], None]) -> None:
        self._endpoint = Endpoint(config)
        self._max_memory = max_memory
        self._say = say
        self._served: dict[Link, Served] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._endpoint.handlers[PREPARE] = self._prepare
        self._endpoint.handlers[REPORT] = self._report

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def listen(self, host: str, port: int) -> tuple[str, int]:
        """Raises InsecureBindError beyond loopback where the configuration is not insecure."""
        return await self._endpoint.listen(host, port)

    async def _prepare(self, link: Link, args: dict[str, Any]) -> dict[str, Any]:
        try:
            wanted = msgspec.convert(args, Wanted)
        except msgspec.ValidationError as error:
            raise ProtocolError(f"kvbench.prepare: {error}") from error
        served = self._served.get(link)
        if served is not None and served.wanted != wanted:
            await self._forget(link)
            served = None
        if served is None:
            if any(other is not link for other in self._served):
                raise LimitError("this server is busy with another sender; try again when it is done", retryable=True)
            served = Served(wanted, self._max_memory)
            self._served[link] = served
            link.on_end(lambda: self._left(link))
            self._say(f"{link.peer} sends {wanted.preset}, {wanted.tokens:,} tokens")
        return {"transfer": served.expect(self._endpoint, link)}

    async def _report(self, link: Link, args: dict[str, Any]) -> dict[str, Any]:
        served = self._served.get(link)
        if served is None or served.receiver is None:
            raise ProtocolError("nothing was prepared for this sender")
        stats = served.receiver.stats
        return {
            "bytes": stats.moved_bytes,
            "chunks": stats.chunks,
            "checksums_verified": stats.checksums_verified,
            "cpu_s": cpu_seconds() - served.cpu_before,
            "digests": served.memory.digests(0),
        }

    def _left(self, link: Link) -> None:
        task = asyncio.get_running_loop().create_task(self._forget(link))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _forget(self, link: Link) -> None:
        served = self._served.pop(link, None)
        if served is not None:
            await served.close()
            self._say(f"{link.peer} is done")

    async def close(self) -> None:
        for link in list(self._served):
            await self._forget(link)
        await self._endpoint.close()
        if self._leaving:
            await asyncio.wait(self._leaving)


async def serve(
    config: EndpointConfig, host: str, port: int, *, max_memory: int, say: Callable[[str], None], stop: asyncio.Event
) -> None:
    """Serve until ``stop`` is set. Raises KVError when it cannot listen."""
    async with Server(config, max_memory=max_memory, say=say) as server:
        bound = await server.listen(host, port)
        say(f"listening on {bound[0]}:{bound[1]}")
        await stop.wait()
