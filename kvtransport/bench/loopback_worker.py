"""One end of ``kvbench loopback``: a process that does what :mod:`.worker` hears on its standard input.

Run as ``python -m kvtransport.bench.loopback_worker``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from .. import presets
from ..endpoint import Endpoint, EndpointConfig
from ..io.tcp import TcpOptions
from ..link import Link
from ..manifest import Manifest
from ..receiver import Expectation
from ..tls import TlsConfig
from .connections import congestion_of_link
from .loopback_memory import CacheMemory, copies, page_sizes
from .worker import Reply, Say, cpu_seconds, main

PROGRESS_S = 0.1


class Worker:
    """What both ends share: the layout, the memory, the endpoint."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.layout = presets.load(config["preset"])
        sizes = page_sizes(self.layout, config["page_bytes"], contiguous=config["contiguous"])
        manifest = self.manifest(bytes(16))
        self.count = copies(manifest.total_bytes, config["buffer_bytes"])
        role = config["role"]
        self.memory = CacheMemory(manifest, sizes, count=self.count, seed=config["seed"], name=f"kvbench-{role}")
        options = TcpOptions(congestion=config["congestion"])
        files = config.get("tls_files")
        self.endpoint = Endpoint(
            EndpointConfig(
                name=f"kvbench-{role}",
                chunk_bytes=config["chunk_bytes"],
                tcp=options,
                tls=None if files is None else TlsConfig(*files),
            )
        )

    def manifest(self, transfer: bytes) -> Manifest:
        return Manifest.of_layout(self.layout, self.config["tokens"], transfer=transfer)

    async def close(self) -> None:
        await self.endpoint.close()
        self.memory.close()


class ReceiverEnd(Worker):
    """The consumer: expects a transfer, says how far it is, verifies what arrived."""

    async def start(self, say: Say) -> None:
        host, port = await self.endpoint.listen()
        say({"event": "started", "host": host, "port": port, "copies": self.count})

    async def round(self, command: Reply, say: Say) -> None:
        copy = command["round"] % self.count
        self.memory.blank(copy)
        receiver = self.endpoint.expect(
            bytes.fromhex(command["transfer"]),
            Expectation(
                grant=lambda manifest: self.memory.pages[copy],
                layout=self.layout,
                allow_unchecked=not self.config["checksum"],
                deadline_s=self.config["deadline_s"],
            ),
        )
        say({"event": "expecting"})
        cpu = cpu_seconds()
        telling = asyncio.ensure_future(self._tell(lambda: receiver.stats.moved_bytes, say))
        try:
            await receiver.sealed()
        finally:
            telling.cancel()
        cpu = cpu_seconds() - cpu
        stats = receiver.stats
        say(
            {
                "event": "done",
                "cpu_s": cpu,
                "bytes": stats.moved_bytes,
                "chunks": stats.chunks,
                "checksums_verified": stats.checksums_verified,
                "digests": self.memory.digests(copy),
            }
        )

    async def _tell(self, moved: Callable[[], int], say: Say) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            say({"event": "progress", "bytes": moved()})


class SenderEnd(Worker):
    """The producer: dials, and sends one whole cache a round, all of it ready at once."""

    link: Link

    async def start(self, say: Say) -> None:
        self.memory.fill_random()
        self._digests = [self.memory.digests(copy) for copy in range(self.count)]
        self.link = await self.endpoint.connect(
            self.config["host"], self.config["port"], connections=self.config["connections"]
        )
        session = self.link.connections[0].stream.session
        say(
            {
                "event": "started",
                "congestion": congestion_of_link(self.link),
                "cipher": "" if session is None else session.cipher,
                "kernel_tls": session is not None and session.kernel,
            }
        )

    async def round(self, command: Reply, say: Say) -> None:
        copy = command["round"] % self.count
        manifest = self.manifest(bytes.fromhex(command["transfer"]))
        cpu, started = cpu_seconds(), time.perf_counter()
        sender = self.link.open(manifest, checksum=self.config["checksum"], deadline_s=self.config["deadline_s"])
        for (layer, tensor), pages in self.memory.pages[copy].items():
            sender.ready(layer, tensor, pages)
        await sender.seal()
        seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
        say(
            {
                "event": "done",
                "seconds": seconds,
                "cpu_s": cpu,
                "spilled_bytes": sender.stats.spilled_bytes,
                "resent_bytes": sender.stats.resent_bytes,
                "chunks": sender.stats.chunks,
                "digests": self._digests[copy],
            }
        )


if __name__ == "__main__":
    main(lambda config: ReceiverEnd(config) if config["role"] == "receiver" else SenderEnd(config))
