"""Clients that read the pool's memory where it is: the same bytes, no others', and a miss when they change under the reader."""

from __future__ import annotations

import asyncio
import mmap
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time

import numpy as np
import pytest

from kvpool.arena import PageArena
from kvpool.client import connect
from kvpool.core import PoolCore
from kvpool.errors import MissError, PoolError
from kvpool.keys import KeyChain
from kvpool.local import LocalMemory, LocalServer, Located
from kvpool.server import PoolServer
from kvtransport.buffers import Arena, PageList
from kvtransport.endpoint import Endpoint, EndpointConfig
from kvtransport.errors import ArenaError, ConfigError, ConnectError, KVBufferError, ProtocolError, RefusedError
from tests.poolkit import LAYOUTS, STEP, content

PAGE = 4096


class Served:
    """A pool of 1 MiB in this process, and what it lends."""

    async def start(self, path, *, only="default"):
        self.path = path
        memory = Arena(1 << 20, lock="off", cuda="off", huge="off")
        self.core = PoolCore(PageArena(memory, PAGE, share=True), clock=time.monotonic)
        self.endpoint = Endpoint(EndpointConfig())
        self.server = PoolServer(self.endpoint, self.core)
        self.server.only_tenant = only
        self.local = LocalServer(path, memory, self.core.arena)
        self.local.listen()
        self.port = (await self.endpoint.listen("127.0.0.1", 0))[1]
        self.clients = []

    async def client(self, *, mapped=True):
        client = await connect("127.0.0.1", self.port, connections=1)
        self.clients.append(client)
        if mapped:
            await asyncio.get_running_loop().run_in_executor(None, client.map_memory, self.path)
        return client

    async def stop(self):
        for client in self.clients:
            await client.close()
        await self.local.close()
        await self.server.close()
        await self.endpoint.close()
        self.core.arena.close()


@pytest.fixture
async def served(tmp_path):
    served = Served()
    await served.start(tmp_path / "pool.sock")
    yield served
    await served.stop()


async def mapped(path):
    """In a thread: the pool that answers runs in this one."""
    return await asyncio.get_running_loop().run_in_executor(None, LocalMemory, path)


async def store(client, ns, tokens, boundary):
    sender = await client.put(ns, KeyChain(ns, tokens), boundary=boundary)
    for extent in sender.manifest.extents:
        sender.ready(extent.layer, extent.tensor, PageList.of(content(extent, tokens)))
    await sender.seal()


async def test_objects_and_prefixes_are_what_the_socket_gives(served):
    client, plain = await served.client(), await served.client(mapped=False)
    objects = {b"%d" % i: np.random.default_rng(i).bytes(i * 9_001) for i in range(6)}
    await plain.put_objects(objects)
    keys = [*objects, b"none"]
    assert await client.get_objects(keys) == await plain.get_objects(keys) == [*objects.values(), None]
    into = [bytearray(50_000) for _ in keys]
    assert await client.get_objects_into(keys, into) == [*map(len, objects.values()), None]
    assert [bytes(b[: len(v)]) for b, v in zip(into, objects.values(), strict=False)] == list(objects.values())
    with pytest.raises(KVBufferError):
        await client.get_objects_into([b"5"], [bytearray(10)])

    layout, tokens = LAYOUTS["everything"], list(range(9 * STEP))
    ns = await client.namespace(layout, STEP)
    await store(client, ns, tokens, 8 * STEP + 5)
    chain = KeyChain(ns, tokens)
    for boundary, start in ((8 * STEP + 5, 0), (8 * STEP + 5, 3 * STEP)):
        extents = layout.extents(boundary, start=start, align=STEP)
        into = {(e.layer, e.tensor): PageList.of(bytearray(e.nbytes)) for e in extents}
        assert await client.read_local(ns, chain, boundary=boundary, start=start, into=into)
        assert all(into[e.layer, e.tensor].tobytes() == content(e, tokens) for e in extents)
    with pytest.raises(MissError):
        await client.read_local(ns, chain, boundary=2 * STEP, into=into)
    with pytest.raises(PoolError, match="map_memory"):
        await plain.read_local(ns, chain, boundary=STEP, into={})
    assert (await client.stat())["active"] == 0


async def test_what_changes_under_the_reader_is_a_miss(served):
    client = await served.client()
    await client.put_objects({b"k": b"old" * 5000})
    get = served.core.plan_get_flat("default", [b"k"], deadline=time.monotonic() + 5)
    place = Located.of(served.core.arena, get.objects[0])
    get.close()
    memory, into = await mapped(served.path), PageList.of(bytearray(15_000))
    assert memory.read(place, into)
    await client.put_objects({b"k": b"new" * 5000})  # in other pages; the old ones are free now
    assert not memory.read(place, into)
    await client.put_objects({b"l": b"xyz" * 5000})  # and now they are another object's
    assert not memory.read(place, into)

    get = served.core.plan_get_flat("default", [b"k"], deadline=time.monotonic() + 5)
    place = Located.of(served.core.arena, get.objects[0])
    get.close()

    class Interrupted:
        """Evicts while it copies: the bytes were right before and are not after."""

        def copy_from(self, source):
            into.copy_from(source)
            served.core.clear()

    assert memory.read(place, into)
    assert not memory.read(place, Interrupted())
    memory.close()
    memory.close()


async def test_nobody_writes_through_the_mapping(served):
    memory = await mapped(served.path)
    with pytest.raises((TypeError, ValueError)):
        np.frombuffer(memory._view, np.uint8)[0] = 1
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(str(served.path))
        await asyncio.sleep(0.05)
        _, fds, _, _ = socket.recv_fds(asking, 100, 2)
    try:
        for fd in fds:
            with pytest.raises(PermissionError):
                mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            with pytest.raises(PermissionError):
                os.write(fd, b"x")
    finally:
        for fd in fds:
            os.close(fd)
    memory.close()
    assert stat.S_IMODE(served.path.stat().st_mode) == 0o600


async def test_a_pool_that_lends_serves_one_tenant(tmp_path):
    served = Served()
    await served.start(tmp_path / "s", only="somebody else")
    try:
        client = await served.client(mapped=False)
        with pytest.raises(RefusedError, match="serves no other"):
            await client.exists([b"k"])
    finally:
        await served.stop()


async def test_a_pool_that_does_not_lend_says_so(served):
    client = await served.client()
    served.server.only_tenant = None
    with pytest.raises(RefusedError, match="does not lend"):
        await client.get_objects([b"k"])


async def test_places_outside_the_memory(served):
    memory, into = await mapped(served.path), PageList.of(bytearray(10))
    zero = np.zeros(1, np.int64)
    for pieces, pages in (([[1 << 30, 10]], [0]), ([[0, 10]], [1 << 20]), ([[0, 10]], [-1]), ([[-5, 10]], [0])):
        with pytest.raises(ProtocolError):
            memory.read(Located(np.array(pieces), np.array(pages, np.int32), zero), into)
    memory.close()


async def test_what_is_no_pool(tmp_path):
    with pytest.raises(ConnectError, match="nothing"):
        LocalMemory(tmp_path / "nothing")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "other"))
        listening.listen()
        waiting = asyncio.get_running_loop().run_in_executor(None, LocalMemory, tmp_path / "other")
        await asyncio.sleep(0.05)
        listening.accept()[0].close()
        with pytest.raises(ConnectError, match="does not hand out"):
            await waiting
    memory = Arena(1 << 20, lock="off", cuda="off", memfd=False)
    with pytest.raises(ConfigError, match="memfd"):
        LocalServer(tmp_path / "x", memory, PageArena(memory, PAGE, share=True))
    with pytest.raises(ArenaError):
        Arena.attach(0, 1 << 20)


def test_a_daemon_lends_and_cleans_up(tmp_path):
    (tmp_path / "c.toml").write_text('local_socket = "pool.sock"\nmemory = "4MiB"\nport = 0\n')
    path = tmp_path / "pool.sock"
    for how in (signal.SIGKILL, signal.SIGTERM):  # the second finds the first one's socket
        argv = [sys.executable, "-m", "kvpool.daemon", "--config", str(tmp_path / "c.toml")]
        child = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            port = int(re.search(r"listening on 127\.0\.0\.1:(\d+)", child.stdout.readline())[1])

            async def run(port=port):
                async with await connect("127.0.0.1", port) as client:
                    client.map_memory(path)
                    await client.put_objects({b"k": b"v" * 100_000})
                    return await client.get_objects([b"k"])

            assert asyncio.run(run()) == [b"v" * 100_000]
        finally:
            child.send_signal(how)
            child.wait(20)
    assert not path.exists()
