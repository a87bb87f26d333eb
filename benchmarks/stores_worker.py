"""One store, started, measured and stopped: what benchmarks/stores.py runs in a process (and maybe an environment) of its own.

``python benchmarks/stores_worker.py kvpool`` prints one JSON object. Every store puts the same bytes out of one region of memory and
gets them back into another; the way each is used is the fastest its client library offers that does not need RDMA.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import mmap
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

LATENCY_CALLS = 300
LOOKUP_CALLS = 100
LOOKUP_KEYS = 512
SMALL = 4096
BATCH_BYTES = 64 << 20
"""Objects of one call, where a client takes many."""


class Memory:
    """Where objects come from and where they go: two regions of ``nbytes``, the first full of random bytes."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.source, self.target = (self._region(nbytes) for _ in range(2))
        block = os.urandom(1 << 20)
        for at in range(0, nbytes, len(block)):
            self.source[at : at + len(block)] = block[: nbytes - at]
            self.source[at : at + 8] = at.to_bytes(8, "little")
        self.clear()

    @staticmethod
    def _region(nbytes: int) -> memoryview:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        return memoryview(memory)

    def clear(self) -> None:
        zeros = bytes(1 << 20)
        for at in range(0, self.nbytes, len(zeros)):
            self.target[at : at + len(zeros)] = zeros[: self.nbytes - at]

    def same(self) -> bool:
        return all(
            self.source[at : at + (1 << 20)] == self.target[at : at + (1 << 20)]
            for at in range(0, self.nbytes, 1 << 20)
        )


class Store(Protocol):
    """One way to use one store. ``put`` and ``get`` move all objects of ``size`` bytes of the memory; ``turn`` makes keys new."""

    def put(self, size: int, turn: int) -> None: ...
    def get(self, size: int, turn: int) -> None: ...
    def put_small(self, index: int) -> None: ...
    def get_small(self, index: int) -> None: ...
    def lookup(self, size: int, turn: int) -> int:
        """How many of 512 keys are there: the first 256 objects of a turn (or as many as there are), and keys of nothing."""

    def pids(self) -> list[int]:
        """The server's processes."""


@contextlib.contextmanager
def process(*argv: str, ready: Callable[[], bool] | None = None, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(argv, **{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **options})
    try:
        deadline = time.monotonic() + 20
        while ready is not None and not ready():
            if child.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{argv[0]} does not start")
            time.sleep(0.02)
        yield child
    finally:
        child.terminate()
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def listening(port: int) -> Callable[[], bool]:
    import socket

    def ready() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
            return True
        return False

    return ready


def present(size: int, nbytes: int) -> int:
    return min(LOOKUP_KEYS // 2, nbytes // size)


# -- ours ---------------------------------------------------------------------------------------------


class Kvpool:
    """kvpoold over TCP, page lists over one buffer, objects in batches."""

    def __init__(self, memory: Memory, client: Any, loop: asyncio.AbstractEventLoop, pid: int) -> None:
        from kvtransport.buffers import PageList

        self.memory, self.client, self.loop, self._pid = memory, client, loop, pid
        self.source, self.target = PageList.of(memory.source), PageList.of(memory.target)

    @classmethod
    @contextlib.contextmanager
    def started(cls, memory: Memory) -> Iterator[Kvpool]:
        from kvpool.client import connect

        daemon = [sys.executable, "-m", "kvpool.daemon", "--port", "0", "--memory", str(3 * memory.nbytes + (64 << 20))]
        with (
            tempfile.TemporaryDirectory() as directory,
            process(*daemon, *cls.config(Path(directory)), stdout=subprocess.PIPE) as child,
        ):
            assert child.stdout is not None
            line = child.stdout.readline().decode()
            found = re.search(r"listening on 127\.0\.0\.1:(\d+)", line)
            if found is None:
                raise RuntimeError(f"kvpoold says {line!r}")
            try:
                import uvloop

                loop = uvloop.new_event_loop()
            except ImportError:
                loop = asyncio.new_event_loop()
            connections = int(os.environ.get("KVPOOL_CONNECTIONS", "4"))
            client = loop.run_until_complete(_connect(connect, int(found[1]), connections))
            try:
                cls.prepare(client, Path(directory))
                yield cls(memory, client, loop, child.pid)
            finally:
                loop.run_until_complete(client.close())
                loop.close()

    @classmethod
    def config(cls, directory: Path) -> list[str]:
        return []

    @classmethod
    def prepare(cls, client: Any, directory: Path) -> None:
        pass

    def _batches(self, size: int) -> Iterator[range]:
        count = self.memory.nbytes // size
        each = max(1, BATCH_BYTES // size)
        return (range(at, min(count, at + each)) for at in range(0, count, each))

    def put(self, size: int, turn: int) -> None:
        async def run() -> None:
            for batch in self._batches(size):
                objects = {b"%d:%d" % (size, i): self.source.slice(i * size, (i + 1) * size) for i in batch}
                await self.client.put_objects(objects)

        self.loop.run_until_complete(run())

    def get(self, size: int, turn: int) -> None:
        async def run() -> None:
            for batch in self._batches(size):
                into = [self.target.slice(i * size, (i + 1) * size) for i in batch]
                found = await self.client.get_objects_into([b"%d:%d" % (size, i) for i in batch], into)
                assert None not in found

        self.loop.run_until_complete(run())

    def put_small(self, index: int) -> None:
        self.loop.run_until_complete(self.client.put_objects({b"s%d" % index: self.source.slice(0, SMALL)}))

    def get_small(self, index: int) -> None:
        into = [self.target.slice(0, SMALL)]
        assert self.loop.run_until_complete(self.client.get_objects_into([b"s%d" % index], into)) == [SMALL]

    def lookup(self, size: int, turn: int) -> int:
        keys = [b"%d:%d" % (size, i) for i in range(present(size, self.memory.nbytes))]
        keys += [b"none:%d" % i for i in range(LOOKUP_KEYS - len(keys))]
        return sum(self.loop.run_until_complete(self.client.exists(keys)))

    def pids(self) -> list[int]:
        return [self._pid]


class KvpoolLocal(Kvpool):
    """The same, with gets out of the daemon's memory, mapped read-only."""

    @classmethod
    def config(cls, directory: Path) -> list[str]:
        (directory / "kvpoold.toml").write_text('local_socket = "pool.sock"\n')
        return ["--config", str(directory / "kvpoold.toml")]

    @classmethod
    def prepare(cls, client: Any, directory: Path) -> None:
        client.map_memory(directory / "pool.sock")


async def _connect(connect: Callable[..., Any], port: int, connections: int) -> Any:
    return await connect("127.0.0.1", port, connections=connections)


# -- the others ---------------------------------------------------------------------------------------


class Redis:
    """redis-server, redis-py with hiredis; two connections in threads, eight commands in a pipeline."""

    PORT = 17999
    CLIENTS = 2
    DEPTH = 8

    def __init__(self, memory: Memory, pid: int) -> None:
        import redis

        self.memory, self._pid = memory, pid
        self.clients = [redis.Redis(port=self.PORT, socket_read_size=1 << 20) for _ in range(self.CLIENTS)]

    @classmethod
    @contextlib.contextmanager
    def started(cls, memory: Memory) -> Iterator[Redis]:
        argv = f"redis-server --port {cls.PORT} --bind 127.0.0.1 --appendonly no --dir /tmp".split()
        with process(*argv, "--save", "", ready=listening(cls.PORT)) as child:
            yield cls(memory, child.pid)

    def _all(self, size: int, run: Callable[[Any, list[int]], None]) -> None:
        count = self.memory.nbytes // size

        def one(number: int) -> None:
            mine = list(range(number, count, self.CLIENTS))
            for at in range(0, len(mine), self.DEPTH):
                run(self.clients[number], mine[at : at + self.DEPTH])

        in_threads(one, self.CLIENTS)

    def put(self, size: int, turn: int) -> None:
        def run(client: Any, part: list[int]) -> None:
            pipe = client.pipeline(transaction=False)
            for i in part:
                pipe.set(f"{size}:{i}", self.memory.source[i * size : (i + 1) * size])
            pipe.execute()

        self._all(size, run)

    def get(self, size: int, turn: int) -> None:
        def run(client: Any, part: list[int]) -> None:
            pipe = client.pipeline(transaction=False)
            for i in part:
                pipe.get(f"{size}:{i}")
            for i, value in zip(part, pipe.execute(), strict=True):
                self.memory.target[i * size : (i + 1) * size] = value

        self._all(size, run)

    def put_small(self, index: int) -> None:
        self.clients[0].set(f"s{index}", self.memory.source[:SMALL])

    def get_small(self, index: int) -> None:
        self.memory.target[:SMALL] = self.clients[0].get(f"s{index}")

    def lookup(self, size: int, turn: int) -> int:
        # EXISTS of many keys gives their number only, which is the fastest it has; MGET or a pipeline say which.
        keys = [f"{size}:{i}" for i in range(present(size, self.memory.nbytes))]
        keys += [f"none:{i}" for i in range(LOOKUP_KEYS - len(keys))]
        pipe = self.clients[0].pipeline(transaction=False)
        for key in keys:
            pipe.exists(key)
        return sum(pipe.execute())

    def pids(self) -> list[int]:
        return [self._pid]


class Memcached:
    """memcached with two threads, pylibmc (libmemcached, binary protocol); two connections in threads."""

    PORT = 17998
    CLIENTS = 2

    def __init__(self, memory: Memory, pid: int) -> None:
        import pylibmc

        self.memory, self._pid = memory, pid
        where, how = [f"127.0.0.1:{self.PORT}"], {"tcp_nodelay": True}
        self.clients = [pylibmc.Client(where, binary=True, behaviors=how) for _ in range(self.CLIENTS)]

    @classmethod
    @contextlib.contextmanager
    def started(cls, memory: Memory) -> Iterator[Memcached]:
        room = str(3 * memory.nbytes // (1 << 20) + 256)
        argv = ["memcached", "-u", "root", "-l", "127.0.0.1", "-p", str(cls.PORT), "-m", room, "-I", "16m", "-t", "2"]
        with process(*argv, ready=listening(cls.PORT)) as child:
            yield cls(memory, child.pid)

    def put(self, size: int, turn: int) -> None:
        def one(number: int) -> None:
            for i in range(number, self.memory.nbytes // size, self.CLIENTS):
                assert self.clients[number].set(f"{size}:{i}", bytes(self.memory.source[i * size : (i + 1) * size]))

        in_threads(one, self.CLIENTS)

    def get(self, size: int, turn: int) -> None:
        def one(number: int) -> None:
            for i in range(number, self.memory.nbytes // size, self.CLIENTS):
                self.memory.target[i * size : (i + 1) * size] = self.clients[number].get(f"{size}:{i}")

        in_threads(one, self.CLIENTS)

    def put_small(self, index: int) -> None:
        self.clients[0].set(f"s{index}", bytes(self.memory.source[:SMALL]))

    def get_small(self, index: int) -> None:
        self.memory.target[:SMALL] = self.clients[0].get(f"s{index}")

    def lookup(self, size: int, turn: int) -> int:
        # It has no EXISTS: a get of many keys whose values are one byte comes nearest.
        if not getattr(self, "_marked", False):
            for i in range(LOOKUP_KEYS // 2):
                self.clients[0].set(f"e{i}", b"1")
            self._marked = True
        keys = [f"e{i}" for i in range(present(size, self.memory.nbytes))]
        keys += [f"none:{i}" for i in range(LOOKUP_KEYS - len(keys))]
        return len(self.clients[0].get_multi(keys))

    def pids(self) -> list[int]:
        return [self._pid]


class Mooncake:
    """Mooncake Store over TCP: master, a node with the memory, a client; batches out of and into registered memory."""

    MASTER = 50151

    def __init__(self, memory: Memory, store: Any, pids: list[int]) -> None:
        import ctypes

        self.memory, self.store, self._pids = memory, store, pids
        self.source, self.target = (
            ctypes.addressof(ctypes.c_char.from_buffer(region)) for region in (memory.source, memory.target)
        )
        for address in (self.source, self.target):
            if store.register_buffer(address, memory.nbytes):
                raise RuntimeError("Mooncake does not register the memory")

    @classmethod
    @contextlib.contextmanager
    def started(cls, memory: Memory) -> Iterator[Mooncake]:
        binary = str(Path(sys.executable).with_name("mooncake_master"))
        master = [binary, "-rpc_port", str(cls.MASTER), "-metrics_port", "9713", "-default_kv_lease_ttl", "5000"]
        with process(*master, ready=listening(cls.MASTER)) as first:
            node = [sys.executable, __file__, "--mooncake-node", str(6 * memory.nbytes + (256 << 20))]
            with process(*node, stdout=subprocess.PIPE) as second:
                assert second.stdout is not None
                while (line := second.stdout.readline()) and b"node is up" not in line:
                    pass
                yield cls(memory, cls.join("127.0.0.1:17814", 0), [first.pid, second.pid])

    @classmethod
    def join(cls, name: str, segment: int) -> Any:
        from mooncake.store import MooncakeDistributedStore

        store = MooncakeDistributedStore()
        if store.setup(name, "P2PHANDSHAKE", segment, 256 << 20, "tcp", "", f"127.0.0.1:{cls.MASTER}"):
            raise RuntimeError("Mooncake's setup failed")
        return store

    def _batches(self, size: int, turn: int) -> Iterator[tuple[list[str], list[int]]]:
        count = self.memory.nbytes // size
        each = max(1, BATCH_BYTES // size)
        for at in range(0, count, each):
            part = range(at, min(count, at + each))
            yield [f"{size}:{turn}:{i}" for i in part], [i * size for i in part]

    def put(self, size: int, turn: int) -> None:
        for keys, offsets in self._batches(size, turn):
            if any(self.store.batch_put_from(keys, [self.source + o for o in offsets], [size] * len(keys))):
                raise RuntimeError("Mooncake's put failed")

    def get(self, size: int, turn: int) -> None:
        for keys, offsets in self._batches(size, turn):
            got = self.store.batch_get_into(keys, [self.target + o for o in offsets], [size] * len(keys))
            if any(n != size for n in got):
                raise RuntimeError("Mooncake's get failed")

    def put_small(self, index: int) -> None:
        assert self.store.put_from(f"s{index}", self.source, SMALL) == 0

    def get_small(self, index: int) -> None:
        assert self.store.get_into(f"s{index}", self.target, SMALL) == SMALL

    def lookup(self, size: int, turn: int) -> int:
        keys = [f"{size}:{turn}:{i}" for i in range(present(size, self.memory.nbytes))]
        keys += [f"none:{i}" for i in range(LOOKUP_KEYS - len(keys))]
        return sum(1 for there in self.store.batch_is_exist(keys) if there == 1)

    def pids(self) -> list[int]:
        return self._pids


class Resp:
    """LMCache's native RESP client with four workers, against redis-server."""

    WORKERS = 4

    def __init__(self, memory: Memory, client: Any, loop: asyncio.AbstractEventLoop, pid: int) -> None:
        self.memory, self.client, self.loop, self._pid = memory, client, loop, pid

    @classmethod
    @contextlib.contextmanager
    def started(cls, memory: Memory) -> Iterator[Resp]:
        from lmcache.v1.storage_backend.resp_client import RESPClient

        argv = f"redis-server --port {Redis.PORT} --bind 127.0.0.1 --appendonly no --dir /tmp".split()
        with process(*argv, "--save", "", ready=listening(Redis.PORT)) as child:
            loop = asyncio.new_event_loop()

            async def make() -> Any:
                return RESPClient("127.0.0.1", Redis.PORT, cls.WORKERS)

            client = loop.run_until_complete(make())
            yield cls(memory, client, loop, child.pid)
            client.close()

    def _run(self, verb: Callable[..., Any], region: memoryview, size: int) -> None:
        count = self.memory.nbytes // size
        each = max(1, BATCH_BYTES // size)

        async def run() -> None:
            for at in range(0, count, each):
                part = range(at, min(count, at + each))
                await verb([f"{size}:{i}" for i in part], [region[i * size : (i + 1) * size] for i in part])

        self.loop.run_until_complete(run())

    def put(self, size: int, turn: int) -> None:
        self._run(self.client.batch_set, self.memory.source, size)

    def get(self, size: int, turn: int) -> None:
        self._run(self.client.batch_get, self.memory.target, size)

    def put_small(self, index: int) -> None:
        # Not set() and get(): the Python of 0.5.6 calls what its native part does not have.
        self.loop.run_until_complete(self.client.batch_set([f"s{index}"], [self.memory.source[:SMALL]]))

    def get_small(self, index: int) -> None:
        self.loop.run_until_complete(self.client.batch_get([f"s{index}"], [self.memory.target[:SMALL]]))

    def lookup(self, size: int, turn: int) -> int:
        keys = [f"{size}:{i}" for i in range(present(size, self.memory.nbytes))]
        keys += [f"none:{i}" for i in range(LOOKUP_KEYS - len(keys))]
        return sum(bool(x) for x in self.loop.run_until_complete(self.client.batch_exists(keys)))

    def pids(self) -> list[int]:
        return [self._pid]


STORES: dict[str, Any] = {
    "kvpool": Kvpool,
    "kvpool-local": KvpoolLocal,
    "redis": Redis,
    "memcached": Memcached,
    "mooncake": Mooncake,
    "lmcache-resp": Resp,
}


# -- measuring ----------------------------------------------------------------------------------------


def in_threads(work: Callable[[int], None], count: int) -> None:
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def cpu_of(pids: list[int]) -> float:
    """Seconds of user and system time of this process and others."""
    used = time.process_time()
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        used += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return used


def median_us(call: Callable[[int], None], count: int) -> float:
    times = []
    for i in range(count + 20):
        start = time.perf_counter()
        call(i)
        times.append(time.perf_counter() - start)
    return statistics.median(times[20:]) * 1e6


def measure(name: str, sizes: list[int], nbytes: int) -> dict[str, Any]:
    memory = Memory(nbytes)
    result: dict[str, Any] = {"store": name, "objects": {}}
    with STORES[name].started(memory) as store:
        for size in sizes:
            store.put(size, 0)
            store.get(size, 0)
            memory.clear()
            figures = {}
            for what, run, turn in (("put", store.put, 1), ("get", store.get, 1)):
                used, start = cpu_of(store.pids()), time.perf_counter()
                run(size, turn)
                seconds = time.perf_counter() - start
                figures[f"{what}_gb_s"] = memory.nbytes / seconds / 1e9
                figures[f"{what}_cpu_s_gb"] = (cpu_of(store.pids()) - used) / memory.nbytes * 1e9
            if not memory.same():
                raise RuntimeError(f"{name}: what came back is not what was put")
            result["objects"][str(size)] = figures
        size = sizes[0]
        wanted = present(size, nbytes)
        if store.lookup(size, 1) != wanted:
            raise RuntimeError(f"{name}: {store.lookup(size, 1)} of {wanted} keys were found")
        result["lookup_512_us"] = median_us(lambda _: store.lookup(size, 1), LOOKUP_CALLS) if wanted else None
        result["put_4k_us"] = median_us(store.put_small, LATENCY_CALLS)
        result["get_4k_us"] = median_us(store.get_small, LATENCY_CALLS)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", choices=STORES, nargs="?")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64 << 10, 1 << 20, 4 << 20])
    parser.add_argument("--bytes", type=int, default=128 << 20, help="moved a time")
    parser.add_argument("--mooncake-node", type=int, metavar="BYTES", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.mooncake_node:
        store = Mooncake.join("127.0.0.1:17813", args.mooncake_node)
        print("node is up", flush=True)
        threading.Event().wait()
        del store
    result = measure(args.store, args.sizes, args.bytes)
    sys.stdout.flush()
    os.write(1, b"\n" + json.dumps(result).encode() + b"\n")
    sys.stderr.flush()
    os._exit(0)  # some of the libraries' threads do not end


if __name__ == "__main__":
    main()
