"""One end of a path that is kept full: transfers back to back, or one alone on a fresh link.

Run as ``python -m kvtransport.bench.flow_worker``; :mod:`.flow` is the other side of its standard input. The sender
sets nothing that the transport chooses itself, except where the configuration says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

from .. import presets
from ..endpoint import Endpoint, EndpointConfig
from ..errors import KVError
from ..io.tcp import TcpOptions
from ..link import Link
from ..manifest import Manifest
from ..receiver import Expectation, Receiver
from ..sender import Sender
from .connections import congestion_of_link, describe_telemetry
from .loopback_memory import CacheMemory, page_sizes
from .worker import Reply, Say, cpu_seconds, main

SAMPLE_S = 0.05
IN_FLIGHT = 2
"""Transfers open at once, so that the path is not idle between two."""


class FlowEnd:
    """What both ends share: the layout, the memory, the endpoint."""

    def __init__(self, config: Reply) -> None:
        self.config = config
        self.layout = presets.load(config["preset"])
        sizes = page_sizes(self.layout, config["page_bytes"], contiguous=config["contiguous"])
        self.memory = CacheMemory(
            self.manifest(bytes(16)), sizes, count=IN_FLIGHT, seed=config["seed"], name=f"kvbench-{config['role']}"
        )
        settings: dict[str, Any] = {"name": f"kvbench-{config['role']}", "insecure": config["insecure"]}
        if config["congestion"] is not None:
            settings["tcp"] = TcpOptions(congestion=config["congestion"])
        if config["chunk_bytes"] is not None:
            settings["chunk_bytes"] = config["chunk_bytes"]
        self.endpoint = Endpoint(EndpointConfig(**settings))

    def manifest(self, transfer: bytes) -> Manifest:
        return Manifest.of_layout(self.layout, self.config["tokens"], transfer=transfer)

    async def close(self) -> None:
        await self.endpoint.close()
        self.memory.close()


def transfer_id(run: str, number: int) -> bytes:
    """The name of transfer ``number`` of a run, whose own name is 16 hexadecimal digits."""
    return bytes.fromhex(run) + number.to_bytes(8, "big")


class ReceiverEnd(FlowEnd):
    """Expects the transfers of a run one after the other and says how many bytes are verified and in place."""

    async def start(self, say: Say) -> None:
        self._running: asyncio.Task[None] | None = None
        host, port = await self.endpoint.listen(self.config["host"], self.config["port"])
        say({"event": "started", "host": host, "port": port})

    async def round(self, command: Reply, say: Say) -> None:
        if command["do"] == "expect":
            self._running = asyncio.create_task(self._run(command["run"], command["samples"], say))
            await asyncio.sleep(0)
            say({"event": "expecting"})
        elif command["do"] == "stop" and self._running is not None:
            self._running.cancel()
            await asyncio.wait((self._running,))
            self._running = None
            say({"event": "stopped"})

    async def _run(self, run: str, samples: bool, say: Say) -> None:
        done = 0
        layers: dict[int, Any] = {}
        cpu = cpu_seconds()
        waiting: list[Receiver] = [self._expect(run, number) for number in range(IN_FLIGHT)]
        telling = asyncio.create_task(self._sample(lambda: done + sum(r.stats.moved_bytes for r in waiting), say))
        if not samples:
            telling.cancel()
        number = IN_FLIGHT
        try:
            while True:
                await waiting[0].sealed()
                first = waiting.pop(0)
                done += first.stats.moved_bytes
                layers = {i: (t.first_byte_s, t.applied_s) for i, t in first.stats.layers.items()}
                waiting.append(self._expect(run, number))
                number += 1
        except KVError:
            pass  # The sender gave up what was in flight, or it failed and says why itself.
        finally:
            telling.cancel()
            for receiver in waiting:
                with contextlib.suppress(KVError):
                    await receiver.cancel("the run is over")
            say({"event": "received", "bytes": done, "cpu_s": cpu_seconds() - cpu, "layers": layers})

    def _expect(self, run: str, number: int) -> Receiver:
        copy = number % IN_FLIGHT
        wanted = Expectation(
            grant=lambda manifest: self.memory.pages[copy],
            layout=self.layout,
            allow_unchecked=not self.config["checksum"],
            deadline_s=self.config["deadline_s"],
        )
        return self.endpoint.expect(transfer_id(run, number), wanted)

    async def _sample(self, moved: Any, say: Say) -> None:
        while True:
            say({"event": "sample", "at_s": time.monotonic(), "bytes": moved()})
            await asyncio.sleep(SAMPLE_S)


class SenderEnd(FlowEnd):
    """Dials a fresh link a run, and fills it."""

    link: Link | None = None

    async def start(self, say: Say) -> None:
        self.memory.fill_random()
        say({"event": "started"})

    async def round(self, command: Reply, say: Say) -> None:
        work = {"dial": self._dial, "flow": self._flow, "once": self._once, "layers": self._layers}
        await work[command["do"]](command, say)

    async def _dial(self, command: Reply, say: Say) -> None:
        if self.link is not None:
            await self.link.close()
        started = time.monotonic()
        connections = command.get("connections") or self.config["connections"]
        chosen = {} if connections is None else {"connections": connections}
        self.link = await self.endpoint.connect(self.config["host"], self.config["port"], **chosen)
        say({"event": "dialled", "seconds": time.monotonic() - started})

    def _open(self, run: str, number: int, chunk_bytes: int | None = None) -> Sender:
        assert self.link is not None
        return self.link.open(
            self.manifest(transfer_id(run, number)),
            checksum=self.config["checksum"],
            deadline_s=self.config["deadline_s"],
            chunk_bytes=chunk_bytes,
        )

    def _open_ready(self, run: str, number: int, chunk_bytes: int | None = None) -> Sender:
        sender = self._open(run, number, chunk_bytes)
        for (layer, tensor), pages in self.memory.pages[number % IN_FLIGHT].items():
            sender.ready(layer, tensor, pages)
        return sender

    async def _flow(self, command: Reply, say: Say) -> None:
        cpu = cpu_seconds()
        open_: list[Sender] = []
        number = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(command["seconds"]):
                while True:
                    while len(open_) < IN_FLIGHT:
                        open_.append(self._open_ready(command["run"], number))
                        number += 1
                    await open_[0].seal()
                    open_.pop(0)
        told = self._tell()
        for sender in open_:
            await sender.cancel("the run is over")
        say({"event": "flowed", "cpu_s": cpu_seconds() - cpu, **told})

    async def _once(self, command: Reply, say: Say) -> None:
        cpu, started = cpu_seconds(), time.monotonic()
        sender = self._open_ready(command["run"], command["number"], command.get("chunk_bytes"))
        await sender.seal()
        say({"event": "sent", "seconds": time.monotonic() - started, "cpu_s": cpu_seconds() - cpu, **self._tell()})

    async def _layers(self, command: Reply, say: Say) -> None:
        """Layer after layer becomes ready, evenly over the seconds of a prefill; nothing is computed meanwhile."""
        sender = self._open(command["run"], command["number"])
        pages = self.memory.pages[command["number"] % IN_FLIGHT]
        by_layer = sender.manifest.by_layer
        started = time.monotonic()
        for i, (layer, extents) in enumerate(by_layer.items()):
            due = started + command["seconds"] * (i + 1) / len(by_layer)
            await asyncio.sleep(max(0.0, due - time.monotonic()))  # uvloop rounds to milliseconds; errors do not add up
            for extent in extents:
                sender.ready(layer, extent.tensor, pages[layer, extent.tensor])
        ended = time.monotonic()
        await sender.seal()
        sealed = time.monotonic()
        times = sender.stats.layers
        say(
            {
                "event": "piped",
                "started_s": started,
                "prefill_end_s": ended,
                "sealed_s": sealed,
                "spilled_bytes": sender.stats.spilled_bytes,
                "layers": [
                    {
                        "layer": layer,
                        "bytes": sum(e.nbytes for e in extents),
                        "ready_s": times[layer].ready_s if layer in times else None,
                        "acked_s": times[layer].acked_s if layer in times else None,
                    }
                    for layer, extents in by_layer.items()
                ],
                **self._tell(),
            }
        )

    def _tell(self) -> Reply:
        assert self.link is not None
        return {
            "connections": len(self.link.connections),
            "congestion": congestion_of_link(self.link),
            "telemetry": describe_telemetry(self.link),
        }


if __name__ == "__main__":
    main(lambda config: ReceiverEnd(config) if config["role"] == "receiver" else SenderEnd(config))
