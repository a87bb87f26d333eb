"""One end of ``kvbench crowd``: many transfers at once, and an urgent one behind bulk.

Run as ``python -m kvtransport.bench.crowd_worker``; commands name transfers as (hexadecimal name, offset, bytes).
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np

from ..buffers import Arena, PageList
from ..endpoint import Endpoint, EndpointConfig
from ..io.tcp import TcpOptions
from ..link import Link
from ..manifest import Manifest
from ..receiver import Expectation, Receiver
from ..sender import Sender
from .connections import congestion_of_link
from .worker import Reply, Say, cpu_seconds, main

_PIECE = 64 << 20
URGENT = 10
"""Priority of the urgent transfer; the others have 0."""


class CrowdEnd:
    """What both ends share: memory and the endpoint."""

    def __init__(self, config: Reply) -> None:
        self.config = config
        self.memory = Arena(config["region"], memfd=False, cuda="off", lock="off", name="kvbench-crowd")
        self.view = memoryview(self.memory)
        settings: dict[str, Any] = {"name": f"kvbench-{config['role']}", "insecure": config["insecure"]}
        if config["congestion"] is not None:
            settings["tcp"] = TcpOptions(congestion=config["congestion"])
        self.endpoint = Endpoint(EndpointConfig(**settings))

    def place(self, offset: int, nbytes: int) -> PageList:
        return PageList.of(self.view[offset : offset + nbytes])

    async def close(self) -> None:
        await self.endpoint.close()


class ReceiverEnd(CrowdEnd):
    async def start(self, say: Say) -> None:
        host, port = await self.endpoint.listen(self.config["host"], 0)
        say({"event": "started", "host": host, "port": port})

    async def round(self, command: Reply, say: Say) -> None:
        receivers = [self._expect(*each) for each in command["transfers"]]
        say({"event": "expecting"})
        cpu = cpu_seconds()
        for receiver in receivers:
            await receiver.sealed()
        say({"event": "received", "cpu_s": cpu_seconds() - cpu})

    def _expect(self, name: str, offset: int, nbytes: int) -> Receiver:
        return self.endpoint.expect(
            bytes.fromhex(name), Expectation(grant=lambda _: {(0, 0): self.place(offset, nbytes)})
        )


class SenderEnd(CrowdEnd):
    link: Link

    async def start(self, say: Say) -> None:
        rng = np.random.SFC64(1)
        whole = np.frombuffer(self.view, np.uint8)
        for start in range(0, len(whole), _PIECE):
            part = whole[start : start + _PIECE]
            part[:] = rng.random_raw(len(part) // 8).view(np.uint8)
        chosen = {} if self.config["connections"] is None else {"connections": self.config["connections"]}
        self.link = await self.endpoint.connect(self.config["host"], self.config["port"], **chosen)
        say(
            {
                "event": "started",
                "connections": len(self.link.connections),
                "congestion": congestion_of_link(self.link),
            }
        )

    def _open(self, name: str, offset: int, nbytes: int, priority: int = 0) -> Sender:
        manifest = Manifest.of_objects([nbytes], transfer=bytes.fromhex(name))
        sender = self.link.open(manifest, priority=priority)
        sender.ready(0, 0, self.place(offset, nbytes))
        return sender

    async def round(self, command: Reply, say: Say) -> None:
        """All but the last transfer at once; the last one ``after_s`` later, urgent, where the command says so."""
        transfers = command["transfers"]
        urgent = transfers.pop() if command["urgent"] else None
        cpu, started = cpu_seconds(), time.monotonic()
        open_ = [self._open(*each) for each in transfers]
        # Each transfer is sealed by its own request, whatever the others do.
        sealing = [asyncio.ensure_future(sender.seal()) for sender in open_]
        urgent_s = None
        if urgent is not None:
            await asyncio.sleep(command["after_s"])
            begun = time.monotonic()
            await self._open(urgent[0], urgent[1], urgent[2], URGENT).seal()
            urgent_s = time.monotonic() - begun
        bulk_busy = any(s.stats.sealed_s is None for s in open_)
        await asyncio.gather(*sealing)
        say(
            {
                "event": "sent",
                "seconds": time.monotonic() - started,
                "cpu_s": cpu_seconds() - cpu,
                "urgent_s": urgent_s,
                "behind_bulk": bulk_busy,
            }
        )


if __name__ == "__main__":
    main(lambda config: ReceiverEnd(config) if config["role"] == "receiver" else SenderEnd(config))
