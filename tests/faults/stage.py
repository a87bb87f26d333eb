"""What a scenario plays on: two processes in two network namespaces, the link between them, perhaps a relay."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from kvtransport.bench.emulator import Conditions, EmulatedLink
from kvtransport.errors import KVError, error_from_dict

ROOT = Path(__file__).resolve().parents[2]
PORT, RELAY_PORT = 7000, 7001
FINE = Conditions(rtt_ms=2, rate_mbit=60)
CUT_OFF = Conditions(rtt_ms=2, rate_mbit=60, loss_percent=100)
"""Every packet vanishes, in both directions, and nobody is told."""
SIZES = [3 << 20, 1 << 20, 6 << 20, 4096, 4 << 20, 0, 2 << 20]
DEADLINE_S = 25.0
ANSWER_S = 10.0

PROGRAM = """
import fcntl, socket, struct, sys
def request(address):
    return struct.pack("16sHH4s8x", b"emu0", socket.AF_INET, 0, socket.inet_aton(address))
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    fcntl.ioctl(s, 0x8916, request(sys.argv[1]))        # SIOCSIFADDR
    fcntl.ioctl(s, 0x891C, request("255.255.255.0"))    # SIOCSIFNETMASK
"""


class Child:
    """A process that answers JSON lines."""

    def __init__(self, process: asyncio.subprocess.Process, name: str) -> None:
        self.process = process
        self.name = name
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.expecting = asyncio.Event()
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._next = 0
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, name: str, prefix: tuple[str, ...], *argv: str) -> Child:
        process = await asyncio.create_subprocess_exec(
            *prefix, sys.executable, "-m", *argv, cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            limit=1 << 22,
        )  # fmt: skip
        child = cls(process, name)
        try:
            await asyncio.wait_for(child.ready, 60)
        except BaseException:
            await child.close()
            raise
        return child

    async def _read(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            said = json.loads(line)
            event = said.get("event")
            if event == "ready":
                if not self.ready.done():  # whoever waited may have been cancelled
                    self.ready.set_result(None)
            elif event == "expecting":
                self.expecting.set()
            elif (future := self._answers.pop(said.get("id"), None)) is not None and not future.done():
                future.set_result(said)
        for future in self._answers.values():
            if not future.done():
                future.set_result(
                    {"error": {"code": "killed", "message": f"{self.name} is dead"}, "at": time.monotonic()}
                )

    def begin(self, do: str, **args: Any) -> asyncio.Future[dict[str, Any]]:
        """Send a command; the future is its answer, an error as ``error``."""
        self._next += 1
        future = self._answers[self._next] = asyncio.get_running_loop().create_future()
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps({"id": self._next, "do": do, **args}).encode() + b"\n")
        return future

    async def ask(self, do: str, *, timeout_s: float = ANSWER_S, **args: Any) -> dict[str, Any]:
        """Raises the error that the process answers with."""
        said = await asyncio.wait_for(self.begin(do, **args), timeout_s)
        if "error" in said and said["error"] is not None and do != "ended":
            raise error_from_dict(said["error"], prefix=f"{self.name}: ")
        return said

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    async def close(self) -> None:
        self.signal(signal.SIGCONT)
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            await asyncio.wait_for(self.process.wait(), 5)
        except TimeoutError:
            self.kill()
            await self.process.wait()
        await self._reading


class Stage:
    """The acceptor is on side 1, the dialler on side 0; either may be the consumer."""

    def __init__(self, *, relay: bool, pull: bool, follow: bool = False, seed: int = 0) -> None:
        self.link = EmulatedLink(FINE, seed=seed + 1)
        self.with_relay = relay
        self.pull = pull
        self.follow = follow
        self.seed = seed
        self.children: list[Child] = []
        self.relay: Child | None = None
        self.began = self.over = 0.0
        """When the fault began, and when everything was as before."""
        self.sent: asyncio.Future[dict[str, Any]]
        self.got: asyncio.Future[dict[str, Any]]

    async def __aenter__(self) -> Stage:
        await asyncio.to_thread(self.link.__enter__)
        try:
            starting: list[Coroutine[Any, Any, Child]] = [self.party(0), self.party(1)]
            self.dialler, self.acceptor = await asyncio.gather(*starting)
            await self.acceptor.ask("listen", host=self.link.hosts[1], port=PORT)
            if self.with_relay:
                argv = ["tests.faults.relay", self.link.hosts[1], str(RELAY_PORT), self.link.hosts[1], str(PORT)]
                self.relay = await Child.start("relay", self.link.enter(1), *argv, *(["follow"] if self.follow else []))
                self.children.append(self.relay)
            await self.dial()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.gather(*(child.close() for child in self.children))
        await asyncio.to_thread(self.link.close)

    async def party(self, side: int) -> Child:
        name = ("dialler", "acceptor")[side]
        child = await Child.start(name, self.link.enter(side), "tests.faults.party", name)
        self.children.append(child)
        return child

    async def dial(self) -> None:
        port = RELAY_PORT if self.with_relay else PORT
        await self.dialler.ask("dial", host=self.link.hosts[1], port=port, timeout_s=20)

    @property
    def producer(self) -> Child:
        return self.acceptor if self.pull else self.dialler

    @property
    def consumer(self) -> Child:
        return self.dialler if self.pull else self.acceptor

    # -- a transfer --------------------------------------------------------------------------------

    async def begin(self) -> None:
        transfer = os.urandom(16).hex()
        what = {"transfer": transfer, "seed": self.seed, "sizes": SIZES, "deadline_s": DEADLINE_S}
        self.consumer.expecting.clear()
        self.got = self.consumer.begin("consume", **what)
        await asyncio.wait_for(self.consumer.expecting.wait(), ANSWER_S)
        self.sent = self.producer.begin("produce", **what)

    async def midway(self, part: float = 0.3) -> None:
        await self.consumer.ask("until", nbytes=int(sum(SIZES) * part), timeout_s=30)

    def fault(self) -> None:
        self.began = time.monotonic()

    def healed(self) -> None:
        self.over = time.monotonic()

    def change(self, conditions: Conditions) -> None:
        self.link.change(conditions)

    async def new_address(self) -> None:
        """The dialler's side has another address from now on, and the old one no longer."""
        argv = [*self.link.enter(0), sys.executable, "-c", PROGRAM, "10.78.0.3"]
        process = await asyncio.create_subprocess_exec(*argv)
        assert await process.wait() == 0

    async def restart(self, child: Child) -> Child:
        """The process is dead; another one takes its place and, if it accepted, its port."""
        await child.process.wait()
        side = 0 if child is self.dialler else 1
        new = await self.party(side)
        if side:
            self.acceptor = new
            await new.ask("listen", host=self.link.hosts[1], port=PORT)
        else:
            self.dialler = new
        return new


def error_of(said: dict[str, Any]) -> KVError | None:
    return error_from_dict(said["error"]) if said.get("error") else None
