"""Ours among the peers: the same commands as drivers/common.py describes, answered by kvtransport with default settings.

Run as ``python -m kvtransport.bench.peers_ours target|initiator``. Two ways to move blocks:

- ``objects``: every block is an object of its own, with its own place, checksum and acknowledgement.
- ``pages``: the blocks are the scattered pages of one tensor, as an engine's cache is; a chunk covers several.

A move is over when the consumer has confirmed that all of it is verified and in place. A ping is a call of 4 KiB each way.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
import time
from typing import Any

import numpy as np

from ..buffers import Arena, PageList
from ..endpoint import Endpoint, EndpointConfig
from ..io.tcp import TcpOptions
from ..link import Link
from ..manifest import Manifest
from ..receiver import Expectation
from .connections import congestion_of_link
from .worker import Reply, Say, main

PING = 4096
_PIECE = 64 << 20


def manifest_of(command: Reply, number: int) -> Manifest:
    """What move ``number`` of a run holds: one object a block, or one object in all."""
    block, nbytes = command["block"], command["nbytes"]
    sizes = [block] * (nbytes // block) if command["op"] == "objects" else [nbytes]
    return Manifest.of_objects(sizes, transfer=number.to_bytes(16, "big"))


class PeerEnd:
    """Either end: memory, and the page lists of a move."""

    def __init__(self, config: Reply) -> None:
        self.config = config
        self.target = sys.argv[1] == "target"
        self.number = 0
        self.memory = Arena(config["region"], memfd=False, cuda="off", lock="off", name="kvbench-peers")
        self.view = memoryview(self.memory)
        if not self.target:
            rng = np.random.SFC64(1)
            whole = np.frombuffer(self.view, np.uint8)
            for start in range(0, len(whole), _PIECE):
                part = whole[start : start + _PIECE]
                part[:] = rng.random_raw(len(part) // 8).view(np.uint8)
        settings: dict[str, Any] = {"name": "kvbench-peers"}
        if config["congestion"] is not None:
            settings["tcp"] = TcpOptions(congestion=config["congestion"])
        self.endpoint = Endpoint(EndpointConfig(**settings))
        self.link: Link | None = None

    def pages(self, command: Reply) -> list[PageList]:
        """One page list per object. Pages are scattered, in the same order at both ends so that digests agree."""
        block, nbytes, offset = command["block"], command["nbytes"], command["offset"]
        places = np.arange(offset, offset + nbytes, block, dtype=np.int64)
        if command["op"] == "objects":
            return [PageList.pages(self.view, places[i : i + 1], block, block) for i in range(len(places))]
        scattered = np.random.default_rng(7).permutation(places)
        return [PageList.pages(self.view, scattered, block, nbytes)]

    async def start(self, say: Say) -> None:
        if self.target:

            async def echo(link: Link, args: dict[str, Any]) -> dict[str, Any]:
                return args

            self.endpoint.handlers["echo"] = echo
            _, port = await self.endpoint.listen()
            say({"event": "ready", "port": port})
            return
        chosen = {} if self.config["connections"] is None else {"connections": self.config["connections"]}
        self.link = await self.endpoint.connect("127.0.0.1", self.config["target"]["port"], **chosen)
        say(
            {
                "event": "ready",
                "connections": len(self.link.connections),
                "congestion": congestion_of_link(self.link),
            }
        )

    async def round(self, command: Reply, say: Say) -> None:
        if command["do"] == "digest":
            part = self.view[command["offset"] : command["offset"] + command["nbytes"]]
            say({"event": "digest", "digest": hashlib.blake2b(part, digest_size=16).hexdigest()})
        elif command["do"] == "ping":
            await self._ping(command, say)
        elif self.target:
            await self._receive(command, say)
        else:
            await self._send(command, say)

    async def _receive(self, command: Reply, say: Say) -> None:
        self.number += 1
        manifest = manifest_of(command, self.number)
        places = dict(zip(manifest.by_slot, self.pages(command), strict=True))
        receiver = self.endpoint.expect(manifest.transfer, Expectation(grant=lambda _: places))
        say({"event": "expecting"})
        await receiver.sealed()

    async def _send(self, command: Reply, say: Say) -> None:
        self.number += 1
        manifest = manifest_of(command, self.number)
        pages = list(zip(manifest.by_slot, self.pages(command), strict=True))
        assert self.link is not None
        started = time.perf_counter()
        sender = self.link.open(manifest)
        for (layer, tensor), each in pages:
            sender.ready(layer, tensor, each)
        await sender.seal()
        say({"event": "moved", "seconds": time.perf_counter() - started})

    async def _ping(self, command: Reply, say: Say) -> None:
        if self.target:
            say({"event": "expecting"})
            return
        assert self.link is not None
        seconds = []
        body = {"data": bytes(self.view[:PING])}
        for _ in range(command["count"]):
            started = time.perf_counter()
            await self.link.call("echo", body)
            seconds.append(time.perf_counter() - started)
        seconds.sort()
        count = len(seconds)
        say({"event": "pinged", "p50_s": seconds[count // 2], "p99_s": seconds[count * 99 // 100]})

    async def close(self) -> None:
        await self.endpoint.close()
        await asyncio.sleep(0)


if __name__ == "__main__":
    main(PeerEnd)
