"""A client of the cluster under test: reads and writes without a pause, checks every byte, and keeps a diary of its requests.

``python -m tests.cluster_faults.client`` takes commands, JSON lines with an ``id``, and answers each with its id; ends with its input. A
request looks up a prompt, reads what is there and checks it, and stores what was missing. Bytes follow from the keys they are stored
under, so that nothing has to be remembered to know what is right. Times are those of CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable
from typing import Any, TypeVar

import numpy as np

from kvpool.client import PoolClient, connect
from kvpool.cluster.locate import Cut
from kvpool.cluster.pool import ClusterPool, connect_cluster
from kvpool.cluster.segments import units_of
from kvpool.errors import MissError, PoolFullError
from kvpool.keys import KeyChain, Namespace
from kvpool.match import match
from kvtransport.buffers import PageList
from kvtransport.endpoint import EndpointConfig
from kvtransport.errors import KVError
from kvtransport.flow.spilling import SpillPolicy
from kvtransport.layout import CacheGroup, CacheLayout, Extent, GroupKind, TensorSpec
from kvtransport.manifest import Manifest, new_transfer_id

STEP = 16
SEGMENT = 64 * STEP
LAYOUT = CacheLayout(
    "cluster faults",
    (
        CacheGroup("full", GroupKind.FULL, (0, 1), (TensorSpec("kv", "int8", (256,)),)),
        CacheGroup("linear", GroupKind.RECURRENT, (2,), (TensorSpec("state", "int8", (16_384,)),)),
    ),
)
LENGTH = 2 * SEGMENT + 16 * STEP
"""Tokens of a prompt: three segments, 1.2 MB."""
POINTS = (SEGMENT, 2 * SEGMENT)
"""Where states are stored besides the end."""
PROMPTS = 10
WORKERS = 3
PAUSE_S = 0.02
DEADLINE_S = 6.0
"""Of a get and of a put."""
ANSWER_S = 1.0
LOOKUP_S = 3 * ANSWER_S + 3.0
"""A lookup asks the directory, and the nodes when it does not answer: no longer than this, a dial included."""
SLACK_S = 4.0
"""For a busy machine, before a request counts as one that hangs."""
GIVE_UP_S = 60.0
T = TypeVar("T")


def prompt(which: int) -> list[int]:
    return np.random.default_rng(which).integers(0, 150_000, LENGTH + 1).tolist()


def content(extent: Extent, chain: KeyChain) -> bytes:
    """Each block and state is its key, over and over, and says of which layer."""
    out = []
    for span in extent.spans:
        if span.tokens == 0:
            out.append(_tile(chain.key_at(span.first), b"state%d" % extent.layer, extent.unit))
        else:
            blocks = chain.blocks[span.first // STEP : span.stop // STEP]
            out += [_tile(key, b"block%d" % extent.layer, extent.unit * STEP) for key in blocks]
    return b"".join(out)


def _tile(key: bytes, mark: bytes, nbytes: int) -> bytes:
    unit = hashlib.sha256(key + mark).digest()
    return (unit * (nbytes // len(unit) + 1))[:nbytes]


class Abandoned(Exception):
    """After a minute nobody waits for it any more. It hangs, unless this process was stopped meanwhile."""


class Stopwatch:
    """Time in which this process was stopped does not count: a thread notices it, unless the process itself was busy."""

    def __init__(self) -> None:
        self._stolen: list[tuple[float, float]] = []
        self._last = (time.monotonic(), time.process_time())
        self._lock = threading.Lock()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(0.05)
            self._tick()

    def _tick(self) -> None:
        with self._lock:
            (last, cpu), self._last = self._last, (time.monotonic(), time.process_time())
            now, used = self._last
            if now - last > 1.0 and used - cpu < (now - last) / 10:
                self._stolen.append((last, now))

    def since(self, begin: float) -> float:
        self._tick()  # who wakes first after a stop may be whoever asks
        now = time.monotonic()
        return now - begin - sum(min(b, now) - max(a, begin) for a, b in self._stolen if b > begin)


class Client:
    def __init__(self) -> None:
        self.config = EndpointConfig(
            insecure=True, keepalive_s=0.5, dead_after_s=2.0, reconnect_s=1.5, spill=SpillPolicy(budget_bytes=0)
        )
        self.pool: ClusterPool
        self.ns: Namespace
        self.chains = [KeyChain(Namespace("default", LAYOUT, STEP), prompt(i)) for i in range(PROMPTS)]
        self.watch = Stopwatch()
        self.diary: list[tuple[float, float, int, str, str]] = []
        """Of each request: when it began and ended, its prompt, "hit", "miss" or the name of an error, and more of that."""
        self.wrong_bytes = 0
        self.slowest_s = 0.0
        """The longest get, put or lookup."""
        self.hangs: list[str] = []
        self.bugs: list[str] = []
        self._workers: list[asyncio.Task[None]] = []
        self._filled: tuple[PoolClient, list[int]] | None = None

    # -- commands ----------------------------------------------------------------------------------

    async def open(self, url: str, ttl_s: float) -> dict[str, Any]:
        self.pool = await connect_cluster(url, ttl_s=ttl_s, answer_s=ANSWER_S, config=self.config)
        self.ns = await self.pool.namespace(LAYOUT, STEP)
        turns = itertools.cycle(range(PROMPTS))
        self._workers = [asyncio.create_task(self._work(turns)) for _ in range(WORKERS)]
        return {}

    async def clean(self, since: float, patience_s: float) -> dict[str, Any]:
        """Wait until every prompt was found whole by a request that began after ``since``, and none missed or failed meanwhile."""
        begin = time.monotonic()
        while self.watch.since(begin) < patience_s:
            good: set[int] = set()
            for started, _, which, outcome, _ in self.diary:
                if started >= since:
                    good = good | {which} if outcome == "hit" else set()
            if len(good) == PROMPTS:
                return {"clean": True}
            await asyncio.sleep(0.05)
        return {"clean": False, "last": [entry[2:] for entry in self.diary[-12:]]}

    async def copied(self, nodes: list[str], patience_s: float) -> dict[str, Any]:
        """Wait until every prompt could be read whole without any one of ``nodes``, as far as the directory says."""
        begin = time.monotonic()
        while True:
            missing = []
            everybody = set(self.pool.roster.members)
            for which, chain in enumerate(self.chains):
                cut = Cut(self.ns, units_of(self.ns), chain.blocks)
                cut.fill(await self.pool.directory.look(cut.keys), self.pool.roster.incarnations())
                for node in nodes:
                    left = match(cut.view(frozenset(everybody - {node})), LENGTH).length
                    if left < LENGTH:
                        missing.append(f"prompt {which} without {node}: {left} tokens")
            if not missing or self.watch.since(begin) > patience_s:
                return {"missing": missing}
            await asyncio.sleep(0.3)

    async def begin_diary(self) -> dict[str, Any]:
        self.diary, self.wrong_bytes, self.slowest_s, self.hangs, self.bugs = [], 0, 0.0, [], []
        return {}

    async def read_diary(self) -> dict[str, Any]:
        return {
            "diary": self.diary, "wrong_bytes": self.wrong_bytes, "slowest_s": self.slowest_s, "hangs": self.hangs, "bugs": self.bugs,
        }  # fmt: skip

    async def flushall(self, host: str, port: int) -> dict[str, Any]:
        with socket.create_connection((host, port), timeout=5) as connection:
            connection.sendall(b"FLUSHALL\r\n")
            return {"said": connection.recv(100).decode()}

    async def fill(self, host: str, port: int) -> dict[str, Any]:
        """Store junk on one node, and keep all of it, until the node has no place left."""
        client = await connect(host, port, connections=1, config=self.config)
        ns = await client.namespace(LAYOUT, STEP, salt=b"junk")
        held: list[int] = []
        self._filled = (client, held)
        for number in range(10_000):
            chain = KeyChain(ns, prompt(1_000 + number))
            try:
                await self._store(client, ns, chain, 0, SEGMENT)
                held.append((await client.lease(ns, chain, SEGMENT, 600.0)).id)
            except PoolFullError:
                return {"stored": number}
        raise AssertionError("the node takes junk without end")

    async def unfill(self) -> dict[str, Any]:
        assert self._filled is not None
        (client, held), self._filled = self._filled, None
        for lease in held:
            await client.release(lease)
        await client.close()
        return {}

    async def leave(self) -> dict[str, Any]:
        for task in self._workers:
            task.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        await self.pool.close()
        return {}

    # -- requests ----------------------------------------------------------------------------------

    async def _work(self, turns: itertools.cycle[int]) -> None:
        for which in turns:
            began = time.monotonic()
            try:
                missed = await self._request(which)
                outcome, more = ("miss" if missed else "hit"), missed
            except KVError as error:
                outcome, more = type(error).__name__, error.message
            except Abandoned:
                outcome = more = "abandoned"
            except asyncio.CancelledError:
                raise
            except BaseException as error:  # noqa: BLE001  a bug must reach the table
                outcome = more = "bug"
                self.bugs.append(f"{type(error).__name__}: {error}")
            self.diary.append((began, time.monotonic(), which, outcome, more))
            await asyncio.sleep(PAUSE_S)

    async def _request(self, which: int) -> str:
        """What was missing; empty when the whole prompt was there."""
        chain = self.chains[which]
        found = await self._timed("match", LOOKUP_S, self.pool.match(self.ns, chain))
        length = found.length
        try:
            if length:
                await self._timed("get", DEADLINE_S, self._read(chain, length))
            if length == LENGTH:
                return ""
            missed = f"{length} tokens found"
        except MissError as error:
            missed = f"{length} tokens found, and not read: {error.message}"
            length = 0
        await self._timed("put", DEADLINE_S, self._store(self.pool, self.ns, chain, length, LENGTH))
        return missed

    async def _timed(self, what: str, limit_s: float, work: Awaitable[T]) -> T:
        began = time.monotonic()
        try:
            async with asyncio.timeout(GIVE_UP_S):
                return await work
        except TimeoutError:
            raise Abandoned from None
        finally:
            took = self.watch.since(began)
            self.slowest_s = max(self.slowest_s, took)
            if took > limit_s + SLACK_S:
                self.hangs.append(f"a {what} took {took:.1f} s")

    async def _read(self, chain: KeyChain, length: int) -> None:
        manifest = Manifest.of_layout(LAYOUT, length, transfer=new_transfer_id(), block_tokens=STEP)
        into = {slot: PageList.of(bytearray(b"\xee" * e.nbytes)) for slot, e in manifest.by_slot.items()}
        incoming = await self.pool.get(self.ns, chain, boundary=length, into=into, deadline_s=DEADLINE_S)
        await incoming.sealed()
        for extent in manifest.extents:
            got = np.frombuffer(into[extent.layer, extent.tensor].tobytes(), np.uint8)
            self.wrong_bytes += int(np.count_nonzero(got != np.frombuffer(content(extent, chain), np.uint8)))

    @staticmethod
    async def _store(
        pool: ClusterPool | PoolClient, ns: Namespace, chain: KeyChain, start: int, boundary: int
    ) -> None:
        points = [p for p in POINTS if start < p < boundary]
        outgoing = await pool.put(
            ns, chain, boundary=boundary, start=start, checkpoints=points, deadline_s=DEADLINE_S
        )
        for extent in outgoing.manifest.extents:
            outgoing.ready(extent.layer, extent.tensor, PageList.of(content(extent, chain)))
        await outgoing.seal()

    # -- serving -----------------------------------------------------------------------------------

    async def answer(self, command: dict[str, Any]) -> None:
        number, name = command.pop("id"), command.pop("do")
        try:
            reply = await getattr(self, name)(**command)
        except KVError as error:
            say(id=number, error=error.as_dict())
        except Exception as error:  # noqa: BLE001  a bug must reach the test
            say(id=number, error={"code": "bug", "message": f"{type(error).__name__}: {error}"})
        else:
            say(id=number, **reply)


def say(**body: Any) -> None:
    sys.stdout.write(json.dumps(body) + "\n")
    sys.stdout.flush()


async def main() -> None:
    client = Client()
    loop = asyncio.get_running_loop()
    say(event="ready")
    tasks: set[asyncio.Task[None]] = set()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        task = loop.create_task(client.answer(json.loads(line)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


if __name__ == "__main__":
    import uvloop

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; whoever started us decides
    uvloop.run(main())
