"""Thousands of transfers that end badly, and nothing that is left of them. In a namespace of its own: its ports are only ours."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from kvtransport.bench.emulator import Conditions, EmulatedLink
from kvtransport.buffers import PageList
from kvtransport.endpoint import Endpoint, EndpointConfig
from kvtransport.errors import Fault, KVError, PeerLostError, RefusedError
from kvtransport.flow.spilling import SpillPolicy
from kvtransport.link import Link
from kvtransport.manifest import Manifest, new_transfer_id
from kvtransport.receiver import Expectation, Receiver
from kvtransport.sender import Sender
from kvtransport.units import Unit

from .stage import ROOT

if TYPE_CHECKING:
    from .__main__ import Row

AT_ONCE = 16
SIZES = [200_000, 50_000, 1000]
WAYS = (
    "producer cancels",
    "consumer cancels",
    "deadline",
    "refused",
    "connection cut",
    "all connections cut",
    "link closed",
)
END_S = 3.0
"""Deadline of what nothing else ends: expected from anybody, and never opened."""
TICK_S = 0.05
TIME_WAIT, LISTEN = "06", "0A"


async def aborted_transfers(row: Row, count: int) -> None:
    """In a process of its own, in a namespace of its own."""
    with EmulatedLink(Conditions()) as link:
        argv = [*link.enter(0), sys.executable, "-m", "tests.faults.aborts", str(count)]
        process = await asyncio.create_subprocess_exec(*argv, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
        out, _ = await process.communicate()
    if process.returncode:
        row.problem(f"exit status {process.returncode}")
        return
    said = json.loads(out)
    row.runs += said["transfers"]
    row.wrong_bytes += said["wrong_bytes"]
    row.hangs += said["hangs"]
    row.worst_recovery_s = said["worst_s"]
    row.outcomes = said["ways"]
    for name, value in said["left"].items():
        if value:
            row.problem(f"{name} left: {value}")
    for text in said["problems"]:
        row.problem(text)


class Aborts:
    def __init__(self) -> None:
        config = EndpointConfig(
            chunk_bytes=64 << 10, reconnect_s=5, keepalive_s=1, dead_after_s=10, spill=SpillPolicy(budget_bytes=1 << 20)
        )
        self.config = config
        self.rng = random.Random(7)
        self.ways: Counter[str] = Counter()
        self.wrong_bytes = self.hangs = 0
        self.worst_s = 0.0
        self.problems: list[str] = []
        self.gate = asyncio.Semaphore(AT_ONCE)
        self.ran_s = 0.0
        """Time in which this process ran: one that was stopped (a suspended machine, SIGSTOP) does not hang."""

    async def run(self, count: int) -> dict[str, Any]:
        async with Endpoint(self.config) as producer, Endpoint(self.config) as consumer:
            self.producer, self.consumer = producer, consumer
            ticking = asyncio.create_task(self._tick())
            self.address = await consumer.listen()
            await self._whole()
            await self._some(50)  # what is made once (threads, tables) is made now
            before = await self._held()
            begun = time.monotonic()
            await self._some(count)
            took_s = time.monotonic() - begun
            await self._whole()
            after = await self._held()
            left = {name: max(0, after[name] - before[name]) for name in after}
            time_wait = sockets(TIME_WAIT)
            ticking.cancel()
        gc.collect()
        await asyncio.sleep(0.2)
        left["tasks after the end"] = len(asyncio.all_tasks()) - 1
        left["sockets after the end"] = open_sockets()
        left["ports after the end"] = sum(sockets(s) for s in STATES if s != TIME_WAIT)
        return {
            "transfers": count, "ways": dict(self.ways), "wrong_bytes": self.wrong_bytes, "hangs": self.hangs,
            "worst_s": self.worst_s, "took_s": took_s, "left": left, "time_wait": time_wait, "problems": self.problems[:5],
        }  # fmt: skip

    async def _tick(self) -> None:
        then = time.monotonic()
        while True:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            self.ran_s += min(now - then, 10 * TICK_S)
            then = now

    async def _some(self, count: int) -> None:
        async with asyncio.TaskGroup() as group:
            for i in range(count):
                await self.gate.acquire()
                task = group.create_task(self._abort(WAYS[i % len(WAYS)]))
                task.add_done_callback(lambda _: self.gate.release())

    async def _link(self) -> Link:
        for link in self.producer.links:
            if not link.closed:
                return link
        return await self.producer.connect(*self.address, connections=2)

    async def _whole(self) -> None:
        """One link with both its connections, on both sides, and nothing under way."""
        for _ in range(500):
            link = await self._link()
            links = [*self.producer.links, *self.consumer.links]
            quiet = not self.consumer._expected and not any(e._outgoing or e._incoming for e in links)
            if len(links) == 2 and all(len(e.connections) == 2 for e in links) and quiet:
                return
            if len(links) > 2:
                await asyncio.sleep(0.02)
                for other in self.producer.links:
                    if other is not link:
                        await other.close()
            await asyncio.sleep(0.02)
        self.problems.append("the link did not become whole again")

    async def _abort(self, way: str) -> None:
        rng = self.rng
        try:
            link = await self._link()
        except KVError:
            link = await self._link()
        manifest = Manifest.of_objects(SIZES, transfer=new_transfer_id())
        sources = [np.frombuffer(rng.randbytes(n), np.uint8) for n in SIZES]
        targets = [np.zeros(n, np.uint8) for n in SIZES]
        soon = rng.random() * 0.004

        def grant(m: Manifest) -> dict[tuple[int, int], PageList]:
            if way == "refused":
                raise RefusedError("no", fault=Fault.LOCAL)
            return {(e.layer, e.tensor): PageList.of(t) for e, t in zip(m.extents, targets, strict=True)}

        # A window below its size: no transfer is over before its time has come.
        wanted = Expectation(grant=grant, deadline_s=soon + 1e-4 if way == "deadline" else END_S, window_bytes=64 << 10)
        try:
            # Of some the consumer knows by which link they must come, of others it does not.
            only = self.consumer._links.get(link.id) if rng.random() < 0.5 else None
            receiver = self.consumer.expect(
                manifest.transfer, wanted, link=None if only is None or only.closed else only
            )
            sender = link.open(manifest, deadline_s=END_S)
        except KVError:  # another one closed the link just now
            self.ways["no link"] += 1
            await self.consumer._expected[manifest.transfer][0].cancel()
            return
        units = [
            sender.ready(e.layer, e.tensor, PageList.of(s))
            for e, s in zip(manifest.extents[:-1], sources, strict=False)
        ]
        await asyncio.sleep(soon)
        begun_s = self.ran_s
        if way == "producer cancels":
            await sender.cancel()
        elif way == "consumer cancels":
            await receiver.cancel()
            for target in targets:
                target[:] = 0xEE
        elif way in ("connection cut", "all connections cut"):
            for connection in list(link.connections)[: 1 if way == "connection cut" else 2]:
                connection.fail(PeerLostError("cut by the test"), abort=True)
            await sender.cancel() if rng.random() < 0.5 else await receiver.cancel()
        elif way == "link closed":
            await link.close()
        ended = asyncio.create_task(self._ended(way, sender, receiver, units))
        while not ended.done() and self.ran_s - begun_s < END_S + 4:
            await asyncio.wait({ended}, timeout=4 * TICK_S)
        if not ended.done():
            ended.cancel()
            self.hangs += 1
            self.problems.append(f"{way}: hangs: {sender.error!r}, {receiver.error!r}")
        else:
            ended.result()
        self.worst_s = max(self.worst_s, self.ran_s - begun_s)
        self.ways[way] += 1
        if way == "consumer cancels":
            self.wrong_bytes += sum(int(np.count_nonzero(target != 0xEE)) for target in targets)

    async def _ended(self, way: str, sender: Sender, receiver: Receiver, units: list[Unit]) -> None:
        """Both sides have ended, and every source is given back."""
        for end in (sender.seal, receiver.sealed):
            try:
                await end()
                self.problems.append(f"{way}: sealed")
            except KVError as error:
                if error.code == "manifest":  # the last unit was never handed over: this is no end
                    while sender.error is None:
                        await asyncio.sleep(0.002)
        for unit in units:
            await unit.released()

    async def _held(self) -> dict[str, int]:
        await asyncio.sleep(0.3)
        gc.collect()
        links = [*self.producer.links, *self.consumer.links]
        return {
            "tasks": len(asyncio.all_tasks()),
            "sockets": open_sockets(),
            "descriptors": len(os.listdir("/proc/self/fd")),
            "ports": sum(sockets(s) for s in STATES if s != TIME_WAIT),
            "links": len(links),
            "transfers": sum(len(e._outgoing) + len(e._incoming) for e in links),
            "expected": len(self.consumer._expected),
            "waiting opens": len(self.consumer._waiting),
            "handshakes": len(self.producer._handshakes) + len(self.consumer._handshakes),
            "spilled bytes": self.producer.spill_area.used_bytes,
            "buffers": sum(isinstance(o, PageList) for o in gc.get_objects()),
        }


STATES = tuple(f"{i:02X}" for i in range(1, 12))


def sockets(state: str) -> int:
    """TCP sockets of this namespace in a state of the kernel's numbering."""
    with open("/proc/net/tcp") as lines:
        return sum(line.split()[3] == state for line in list(lines)[1:])


def open_sockets() -> int:
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
        except OSError:
            continue
    return found - OWN


OWN = 0
"""Sockets of the event loop itself."""


async def main() -> None:
    global OWN
    OWN = open_sockets()
    print(json.dumps(await Aborts().run(int(sys.argv[1]))))


if __name__ == "__main__":
    import uvloop

    uvloop.run(main())
