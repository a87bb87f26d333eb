"""One end of ``kvbench loopback``: a process that does what one JSON object per line on its standard input says.

Run as ``python -m kvtransport.bench.loopback_worker``. The first line is the configuration; the process ends
when its input does, so nothing is left when whoever started it dies, however it dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from .. import presets
from ..endpoint import Endpoint, EndpointConfig
from ..errors import KVError
from ..io.tcp import TcpOptions, TcpStream
from ..link import Link
from ..manifest import Manifest
from ..receiver import Expectation
from .loopback_memory import CacheMemory, copies, page_sizes

PROGRESS_S = 0.1
Reply = dict[str, Any]


def cpu_seconds() -> float:
    """User and system time of this process, all its threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


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
        self.endpoint = Endpoint(EndpointConfig(name=f"kvbench-{role}", chunk_bytes=config["chunk_bytes"], tcp=options))

    def manifest(self, transfer: bytes) -> Manifest:
        return Manifest.of_layout(self.layout, self.config["tokens"], transfer=transfer)

    async def close(self) -> None:
        await self.endpoint.close()
        self.memory.close()


class ReceiverEnd(Worker):
    """The consumer: expects a transfer, says how far it is, verifies what arrived."""

    async def start(self, say: Callable[[Reply], None]) -> None:
        host, port = await self.endpoint.listen()
        say({"event": "started", "host": host, "port": port, "copies": self.count})

    async def round(self, command: Reply, say: Callable[[Reply], None]) -> None:
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

    async def _tell(self, moved: Callable[[], int], say: Callable[[Reply], None]) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            say({"event": "progress", "bytes": moved()})


class SenderEnd(Worker):
    """The producer: dials, and sends one whole cache a round, all of it ready at once."""

    link: Link

    async def start(self, say: Callable[[Reply], None]) -> None:
        self.memory.fill_random()
        self._digests = [self.memory.digests(copy) for copy in range(self.count)]
        self.link = await self.endpoint.connect(
            self.config["host"], self.config["port"], connections=self.config["connections"]
        )
        say({"event": "started", "congestion": self._congestion()})

    def _congestion(self) -> str:
        streams = (c.stream for c in self.link.connections)
        return "+".join(sorted({s.congestion() for s in streams if isinstance(s, TcpStream)}))

    async def round(self, command: Reply, say: Callable[[Reply], None]) -> None:
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


async def _lines() -> AsyncGenerator[Reply, None]:
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
    try:
        while line := await reader.readline():
            yield json.loads(line)
    finally:
        transport.close()


async def serve(out: Callable[[Reply], None]) -> None:
    """Follow the commands of standard input to its end; an error of ours is said and ends the process."""
    async with contextlib.aclosing(_lines()) as lines:
        config = await anext(lines, None)
        if config is None:
            return
        worker: ReceiverEnd | SenderEnd | None = None
        # Watched from the start: whoever started this process may die while it works.
        commands: asyncio.Queue[Reply | None] = asyncio.Queue()

        async def read() -> None:
            async for command in lines:
                commands.put_nowait(command)
            commands.put_nowait(None)

        async def work() -> None:
            nonlocal worker
            worker = ReceiverEnd(config) if config["role"] == "receiver" else SenderEnd(config)
            await worker.start(out)
            while (command := await commands.get()) is not None:
                await worker.round(command, out)

        reading, working = asyncio.ensure_future(read()), asyncio.ensure_future(work())
        try:
            await asyncio.wait((reading, working), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
        except KVError as error:
            out({"event": "error", "error": error.as_dict()})
        finally:
            for task in (reading, working):
                task.cancel()
            await asyncio.wait((reading, working))
            if worker is not None:
                await worker.close()


def main() -> None:
    # Ctrl-C reaches the whole process group; the one who started us decides, and its end of our input tells us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Nothing else may write between our lines.
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def say(reply: Reply) -> None:
        # A broken pipe: nobody is there to hear it, and the end of our input ends us.
        with contextlib.suppress(BrokenPipeError):
            pipe.write(json.dumps(reply) + "\n")

    _run(serve(say))


def _run(work: Coroutine[Any, Any, None]) -> None:
    try:
        import uvloop
    except ImportError:
        asyncio.run(work)
    else:
        uvloop.run(work)


if __name__ == "__main__":
    main()
