"""A soak of kvpoold: full load with churn, leases, aborted puts, frozen and killed clients; every byte that is read is checked.

    python -m tests.soak --minutes 30 --json soak.json

A daemon, and clients in processes of their own that never rest. Every so often one of them is killed (and replaced) or stopped for some
seconds. Bytes are a function of the keys they are stored under, so that whoever reads can check them. Afterwards nothing may be
left open, no byte may be taken, and the daemon's memory must not have grown: exit status 1 otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from kvpool.client import PoolClient, connect
from kvpool.errors import MissError, PrefixMissingError
from kvpool.keys import KeyChain, Namespace
from kvtransport.buffers import PageList
from kvtransport.errors import KVError
from kvtransport.layout import CacheGroup, CacheLayout, Extent, GroupKind, TensorSpec
from kvtransport.manifest import Manifest

STEP = 64
FULL = CacheGroup("full", GroupKind.FULL, (0, 2), (TensorSpec("kv", "int8", (1024,)),))
WINDOW = CacheGroup("window", GroupKind.SLIDING, (1,), (TensorSpec("kv", "int8", (512,)),), window=256)
LINEAR = CacheGroup("linear", GroupKind.RECURRENT, (3,), (TensorSpec("state", "int8", (262_144,)),))
LAYOUT = CacheLayout("soak", (FULL, WINDOW, LINEAR))
FAMILIES = 40
"""Conversations that clients go on with, all of them the same ones."""
LONGEST = 64 * STEP
FLAT_KEYS = 300
GROWTH = 1.05
"""The daemon's memory may be so much more in the last quarter than in the second."""


def conversation(family: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
    return np.random.default_rng(family).integers(0, 150_000, LONGEST + 1, dtype=np.uint32)


def content(extent: Extent, chain: KeyChain) -> bytes:
    """Bytes of whole blocks and states: each is its key, over and over, and says which tensor it is of."""
    out = []
    for span in extent.spans:
        mark = bytes([extent.layer, extent.tensor])
        if span.tokens == 0:
            out.append(tile(chain.key_at(span.first), b"state" + mark, extent.unit))
            continue
        for block in range(span.first // STEP, span.stop // STEP):
            out.append(tile(chain.blocks[block], b"block" + mark, extent.unit * STEP))
    return b"".join(out)


def tile(key: bytes, mark: bytes, nbytes: int) -> bytes:
    unit = hashlib.sha256(key + mark).digest() * 32
    return (unit * (nbytes // len(unit) + 1))[:nbytes]


def flat_content(key: bytes, version: int) -> bytes:
    """An object says its own version first."""
    size = random.Random(key + version.to_bytes(4, "little")).choice([300, 5_000, 70_000, 400_000, 1_500_000])
    return version.to_bytes(4, "little") + tile(key, b"flat%d" % version, size)


class Corrupt(Exception):
    """What was read is not what was stored."""


class Client:
    """One process's load: several coroutines over one link, and new links now and then."""

    def __init__(self, port: int, seed: int, workers: int) -> None:
        self.port, self.workers = port, workers
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()

    async def run(self) -> None:
        while True:
            try:
                pool = await connect("127.0.0.1", self.port, connections=self.random.choice([1, 2, 4]))
            except KVError as error:
                self.failed(error)
                await asyncio.sleep(0.2)
                continue
            try:
                ns = await pool.namespace(LAYOUT, STEP)
            except KVError as error:  # a machine that stood still, say
                self.failed(error)
                await pool.close()
                continue
            until = time.monotonic() + self.random.uniform(5, 20)
            tasks = [asyncio.create_task(self.work(pool, ns, until)) for _ in range(self.workers)]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                # With transfers in progress, half of the time.
                await pool.close()
            print("@" + json.dumps(self.counts), flush=True)

    async def work(self, pool: PoolClient, ns: Namespace, until: float) -> None:
        while time.monotonic() < until:
            act = self.random.random()
            try:
                if act < 0.6:
                    await self.prefix(pool, ns)
                elif act < 0.9:
                    await self.flat(pool)
                elif act < 0.95:
                    await self.abandon(pool, ns)
                else:
                    await self.request(pool, ns)
            except MissError:
                self.counts["misses"] += 1
            except KVError as error:
                self.failed(error)

    def failed(self, error: KVError) -> None:
        self.counts[type(error).__name__] += 1

    async def prefix(self, pool: PoolClient, ns: Namespace) -> None:
        """Look a prompt up, read and check what is there, store the rest."""
        tokens = conversation(self.random.randrange(FAMILIES))
        length = self.random.randrange(1, LONGEST // STEP + 1) * STEP
        chain = KeyChain(ns, tokens[: length + 1])
        found = await pool.match(ns, chain)
        if found.length:
            lease = None
            if self.random.random() < 0.3:
                lease = await pool.lease(ns, chain, found.length, self.random.uniform(0.05, 3.0))
                self.counts["leases"] += 1
            await self.read(pool, ns, chain, found.length)
            if lease is not None and self.random.random() < 0.5:
                await pool.release(lease.id)
        if found.length < length:
            with contextlib.suppress(PrefixMissingError):
                await self.store(pool, ns, chain, found.length, length)

    async def read(
        self, pool: PoolClient, ns: Namespace, chain: KeyChain, boundary: int, request: bytes | None = None
    ) -> None:
        buffers: dict[tuple[int, int], bytearray] = {}

        def into(manifest: Manifest) -> dict[tuple[int, int], PageList]:
            buffers.update({(e.layer, e.tensor): bytearray(e.nbytes) for e in manifest.extents})
            return {slot: PageList.of(buffer) for slot, buffer in buffers.items()}

        receiver = await pool.get(ns, chain, boundary=boundary, into=into, request=request, deadline_s=20)
        try:
            await receiver.sealed()
        finally:
            await receiver.cancel("done")
        for extent in receiver.manifest.extents:
            if buffers[extent.layer, extent.tensor] != content(extent, chain):
                raise Corrupt(f"layer {extent.layer} tensor {extent.tensor} of {boundary} tokens")
        self.counts["read_bytes"] += sum(map(len, buffers.values()))
        self.counts["reads"] += 1

    async def store(
        self, pool: PoolClient, ns: Namespace, chain: KeyChain, start: int, boundary: int, request: bytes | None = None
    ) -> None:
        sender = await pool.put(ns, chain, boundary=boundary, start=start, request=request, deadline_s=20)
        try:
            for extent in sender.manifest.extents:
                sender.ready(extent.layer, extent.tensor, PageList.of(content(extent, chain)))
            await sender.seal()
        except BaseException:
            await sender.cancel("gave up")
            raise
        self.counts["stored_bytes"] += sender.manifest.total_bytes
        self.counts["stores"] += 1

    async def request(self, pool: PoolClient, ns: Namespace) -> None:
        """A reader follows a writer, as decode follows prefill."""
        chain = KeyChain(ns, conversation(1_000 + self.random.randrange(1 << 30))[: 16 * STEP + 1])
        name = self.random.randbytes(16)
        writing = asyncio.create_task(self.store(pool, ns, chain, 0, 16 * STEP, name))
        try:
            await self.read(pool, ns, chain, 16 * STEP, name)
        finally:
            await asyncio.gather(writing, return_exceptions=True)
        self.counts["followed"] += 1

    async def abandon(self, pool: PoolClient, ns: Namespace) -> None:
        """A put that is never finished: cancelled, or left to its deadline."""
        chain = KeyChain(ns, conversation(5_000 + self.random.randrange(1 << 30))[: 8 * STEP + 1])
        sender = await pool.put(ns, chain, boundary=8 * STEP, deadline_s=self.random.uniform(0.05, 1.0))
        extent = sender.manifest.extents[0]
        sender.ready(extent.layer, extent.tensor, PageList.of(content(extent, chain)))
        if self.random.random() < 0.5:
            await asyncio.sleep(self.random.uniform(0, 0.05))
            await sender.cancel("abandoned")
        self.counts["abandoned"] += 1

    async def flat(self, pool: PoolClient) -> None:
        keys = [b"flat-%d" % self.random.randrange(FLAT_KEYS) for _ in range(self.random.randint(1, 8))]
        if self.random.random() < 0.4:
            await pool.put_objects({key: flat_content(key, self.random.randrange(50)) for key in set(keys)})
            self.counts["flat_puts"] += 1
            return
        for key, data in zip(keys, await pool.get_objects(keys), strict=True):
            if data is not None:
                if data != flat_content(key, int.from_bytes(data[:4], "little")):
                    raise Corrupt(f"object {key!r}")
                self.counts["read_bytes"] += len(data)
                self.counts["flat_reads"] += 1


# -- the whole ----------------------------------------------------------------------------------------


class Children:
    """Client processes: started, counted, killed, replaced."""

    def __init__(self, port: int, count: int, workers: int) -> None:
        self._port, self._workers = port, workers
        self._seed = 0
        self.counts: Counter[str] = Counter()
        self._latest: dict[int, Counter[str]] = {}
        self.failures: list[str] = []
        self.running = [self._start() for _ in range(count)]

    def _start(self) -> subprocess.Popen[str]:
        self._seed += 1
        argv = [sys.executable, "-m", "tests.soak", "--client", str(self._port)]
        argv += ["--seed", str(self._seed), "--workers", str(self._workers)]
        # A file: a pipe that nobody reads would stop a client that is meant to run.
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - read after the process has ended
        child = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT, text=True)
        self._logs = {**getattr(self, "_logs", {}), child.pid: log}
        return child

    def check(self) -> None:
        """A client that ended by itself found something wrong."""
        for i, child in enumerate(self.running):
            if child.poll() is not None:
                self._end(child, f"client ended by itself with {child.returncode}")
                self.running[i] = self._start()

    def kill_one(self, rng: random.Random) -> None:
        i = rng.randrange(len(self.running))
        self.running[i].kill()
        self.running[i].wait()
        self._end(self.running[i], None)
        self.running[i] = self._start()

    def stop(self) -> None:
        for child in self.running:
            child.send_signal(signal.SIGCONT)
            child.kill()
        for child in self.running:
            child.wait()
            self._end(child, None)
        self.running = []

    def _end(self, child: subprocess.Popen[str], problem: str | None) -> None:
        log = self._logs.pop(child.pid)
        log.seek(0)
        lines = log.read().splitlines()
        log.close()
        counted = [json.loads(line[1:]) for line in lines if line.startswith("@") and line.endswith("}")]
        self.counts.update(counted[-1] if counted else {})
        said = [line for line in lines if not line.startswith("@")]
        if problem is not None or any("Corrupt" in line for line in said):
            self.failures.append(f"{problem or 'corrupt'}: " + " | ".join(said[-4:]))


def resident(pid: int) -> int:
    """Bytes of the process that are its own: not the arena, which is shared memory."""
    fields = dict(re.findall(r"(Rss\w+):\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()))
    return int(fields["RssAnon"]) * 1024


async def soak(args: argparse.Namespace) -> dict[str, Any]:
    config = Path(tempfile.mkstemp(suffix=".toml")[1])
    config.write_text("page_bytes = 16384\n")
    argv = [sys.executable, "-m", "kvpool.daemon", "--port", "0", "--memory", args.memory, "--config", str(config)]
    daemon = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert daemon.stdout is not None
    found = re.search(r"listening on 127\.0\.0\.1:(\d+)", daemon.stdout.readline())
    if found is None:
        raise RuntimeError("kvpoold does not start")
    port = int(found[1])
    children = Children(port, args.clients, args.workers)
    rng = random.Random(args.seed)
    samples: list[dict[str, float]] = []
    events: Counter[str] = Counter()
    started = time.monotonic()
    try:
        pool = await connect("127.0.0.1", port, connections=1)
        frozen: tuple[subprocess.Popen[str], float] | None = None
        every = max(1.0, args.minutes * 60 / 300)
        next_event = 5.0
        while (now := time.monotonic() - started) < args.minutes * 60:
            await asyncio.sleep(every)
            children.check()
            if frozen is not None and now > frozen[1]:
                frozen[0].send_signal(signal.SIGCONT)
                frozen = None
            elif now > next_event:
                next_event = now + rng.uniform(3, 10)
                if rng.random() < 0.5 and frozen is None:
                    frozen = (rng.choice(children.running), now + rng.uniform(1, 20))
                    frozen[0].send_signal(signal.SIGSTOP)
                    events["frozen"] += 1
                else:
                    children.kill_one(rng)
                    events["killed"] += 1
            stat = await pool.stat()
            samples.append(
                {
                    "s": round(now, 1),
                    "own_bytes": resident(daemon.pid),
                    "used_bytes": stat["used_bytes"],
                    "files": len(os.listdir(f"/proc/{daemon.pid}/fd")),
                    "links": stat["links"],
                    "active": stat["active"],
                    "leases": stat["leases"],
                    "evictions": sum(stat["evictions"].values()),
                }
            )
            print(f"{now:7.0f} s  {samples[-1]}", file=sys.stderr, flush=True)
        children.stop()
        end = await settle(pool)
        await pool.close()
    finally:
        children.stop()
        daemon.terminate()
        code = daemon.wait(30)
        config.unlink()
    quarter = len(samples) // 4
    early = statistics.median(s["own_bytes"] for s in samples[quarter : 2 * quarter])
    late = statistics.median(s["own_bytes"] for s in samples[-quarter:])
    checks = {
        "every read verified": not children.failures and children.counts["reads"] > 0,
        "memory flat": late <= early * GROWTH,
        "nothing open": end["active"] == end["leases"] == end["requests"] == 0,
        "nothing taken": end["used_bytes"] == 0 and end["free_bytes"] == end["total_bytes"],
        "nothing left in the index": not any(end["entries"].values()),
        "daemon ends cleanly": code == 0,
    }
    return {
        "minutes": args.minutes,
        "memory": args.memory,
        "clients": args.clients,
        "checks": checks,
        "failures": children.failures,
        "own_bytes": {"second quarter": early, "last quarter": late},
        "counts": dict(children.counts),
        "events": dict(events),
        "wire": end["wire"],
        "evictions": end["evictions"],
        "samples": samples,
    }


async def settle(pool: PoolClient) -> dict[str, Any]:
    """The daemon when its clients are gone: all that is cleared once nothing is open."""
    deadline = time.monotonic() + 60
    while (await pool.stat())["active"] and time.monotonic() < deadline:
        await asyncio.sleep(0.2)
    await pool.clear()
    return await pool.stat()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--memory", default="256MiB", help="of the daemon; less than what the load wants")
    parser.add_argument("--clients", type=int, default=3, help="processes")
    parser.add_argument("--workers", type=int, default=4, help="coroutines each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", metavar="PATH", help="write the result here, - for standard output")
    parser.add_argument("--client", type=int, metavar="PORT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client is not None:
        asyncio.run(Client(args.client, args.seed, args.workers).run())
        return
    result = asyncio.run(soak(args))
    text = json.dumps(result, indent=1)
    if args.json == "-":
        print(text)
    elif args.json:
        Path(args.json).write_text(text + "\n")
    for name, good in result["checks"].items():
        print(f"{'ok  ' if good else 'FAIL'} {name}", file=sys.stderr)
    for failure in result["failures"]:
        print(f"  {failure}", file=sys.stderr)
    sys.exit(0 if all(result["checks"].values()) else 1)


if __name__ == "__main__":
    main()
