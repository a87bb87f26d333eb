"""The other process of the process-level tests: a consumer or a producer that dies or freezes at a named stage.

``python -m tests.integration.peer CONFIG`` with one JSON object; says JSON lines on standard output and ends with its
standard input.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from typing import Any

import xxhash

from kvtransport.endpoint import Endpoint, EndpointConfig
from kvtransport.errors import KVError
from kvtransport.layout import CacheLayout
from kvtransport.link import Link
from kvtransport.manifest import Manifest
from kvtransport.receiver import Expectation
from tests.conftest import Cache


def say(**body: Any) -> None:
    sys.stdout.write(json.dumps(body) + "\n")
    sys.stdout.flush()


def digests(cache: Cache) -> dict[str, str]:
    return {f"{layer}/{tensor}": xxhash.xxh3_128_hexdigest(b) for (layer, tensor), b in cache.bytes().items()}


class Peer:
    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.layout = CacheLayout.from_description(config["layout"])
        self.manifest = Manifest.of_layout(self.layout, config["boundary"], transfer=bytes.fromhex(config["transfer"]))
        self.endpoint = Endpoint(
            EndpointConfig(
                chunk_bytes=config.get("chunk_bytes", 64 << 10),
                keepalive_s=config.get("keepalive_s", 0.2),
                dead_after_s=config.get("dead_after_s", 30.0),
            )
        )
        self._struck = False

    def strike(self, stage: str) -> None:
        """The signal of the configuration, to this very process, once, when its stage has come."""
        if stage == self.config.get("at") and not self._struck:
            self._struck = True
            os.kill(os.getpid(), getattr(signal, self.config["signal"]))

    async def consumer(self) -> None:
        target = Cache(self.manifest, blank=True)
        moved = 0

        def grant(manifest: Manifest) -> Any:
            self.strike("open")
            return target.pages

        def on_range(layer: int, tensor: int, start: int, stop: int) -> None:
            nonlocal moved
            moved += stop - start
            if moved >= self.manifest.total_bytes // 4:
                self.strike("data")

        async def wait(link: Link, args: dict[str, Any]) -> dict[str, Any]:
            self.strike("connect")
            await asyncio.Event().wait()
            raise AssertionError("nobody sets it")

        self.endpoint.handlers["wait"] = wait
        receiver = self.endpoint.expect(
            self.manifest.transfer,
            Expectation(
                grant=grant,
                layout=self.layout,
                window_bytes=self.config.get("window_bytes", 512 << 10),
                deadline_s=60,
                on_range=on_range,
                on_seal=lambda: self.strike("seal"),
            ),
        )
        say(port=(await self.endpoint.listen())[1])
        await receiver.sealed()
        say(digests=digests(target))

    async def producer(self) -> None:
        source = Cache(self.manifest, seed=self.config["seed"])
        link = await self.endpoint.connect("127.0.0.1", self.config["port"], connections=2)
        say(connected=True)
        if self.config.get("at") == "connect":
            await asyncio.sleep(0.05)
            self.strike("connect")
        sender = link.open(self.manifest, deadline_s=60)
        if self.config.get("at") == "open":
            await asyncio.sleep(0.05)
            self.strike("open")
        slots = list(source.pages.items())
        early = len(slots)
        if self.config.get("at") == "data":
            # The I/O threads would go on with what they have until the signal arrives: they do not have all of it.
            early -= 1
            assert sum(pages.nbytes for _, pages in slots[:early]) >= self.manifest.total_bytes // 4
        handovers = [sender.ready(*slot, pages) for slot, pages in slots[:early]]
        if self.config.get("at") == "data":
            while sender.stats.moved_bytes < self.manifest.total_bytes // 4:
                await asyncio.sleep(0)
            self.strike("data")
        handovers += [sender.ready(*slot, pages) for slot, pages in slots[early:]]
        for handover in handovers:
            await handover.released()
        sealing = asyncio.ensure_future(sender.seal())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for connection in link.connections:
            connection.flush()
        self.strike("seal")  # SEAL is sent, its answer not read yet
        await sealing
        say(sealed=True, digests=digests(source))


async def main() -> None:
    peer = Peer(json.loads(sys.argv[1]))
    ended = asyncio.get_running_loop().run_in_executor(None, sys.stdin.buffer.read)
    try:
        async with peer.endpoint:
            try:
                await (peer.consumer() if peer.config["role"] == "consumer" else peer.producer())
            except KVError as error:
                say(error=error.as_dict())
            await ended
    finally:
        sys.stdout.flush()


if __name__ == "__main__":
    import uvloop

    uvloop.run(main())
