"""What a scenario plays on: three nodes in two clusters, a Valkey and a client, each in a network namespace of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.clusterkit import valkey_program
from tests.faults.stage import Child

from .switch import Line, Switch

ROOT = Path(__file__).resolve().parents[2]
NODES = {"a1": "a", "a2": "a", "b1": "b"}
"""Node -> its cluster. Valkey and client stand beside cluster a."""
HOSTS = (*NODES, "valkey", "client")
NEAR = Line(delay_ms=0.25, rate_mbit=400)
FAR = Line(delay_ms=5, rate_mbit=200)
CUT = Line(cut=True)
PORT, VALKEY_PORT = 7777, 6379
TTL_S = 2.0
START_S = 60.0
SETTINGS = """
host = "{address}"
port = {port}
memory = "48MiB"
page_bytes = 8192
lock = false
insecure = true
name = "{node}"
node = "{node}"
cluster = "{cluster}"
join = "valkey://{directory}:{valkey_port}?name=faults"
ttl_s = {ttl_s}
keepalive_s = 0.5
dead_after_s = 2.0
reconnect_s = 1.5
grace_s = 3.0
replicas = 2
"""


class Program:
    """A server in a namespace: started, stopped and started again; what it says is kept in a file."""

    def __init__(self, argv: list[str], said: Path, ready: bytes) -> None:
        self.argv, self.said, self.ready = argv, said, ready
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Raises RuntimeError with its last words when it ends, TimeoutError when it does not get ready."""
        with self.said.open("ab") as out:
            begin = out.tell()
            self.process = await asyncio.create_subprocess_exec(
                *self.argv, cwd=ROOT, stdout=out, stderr=out, stdin=asyncio.subprocess.DEVNULL, start_new_session=True
            )
        async with asyncio.timeout(START_S):
            while self.ready not in self.said.read_bytes()[begin:]:
                if self.process.returncode is not None:
                    raise RuntimeError(f"{self.said.stem} ended: {self.last_words()}")
                await asyncio.sleep(0.05)

    def last_words(self, most: int = 800) -> str:
        return self.said.read_bytes()[-most:].decode(errors="replace") if self.said.exists() else ""

    def send(self, number: int) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(number)

    async def end(self, number: int = signal.SIGTERM, patience_s: float = 20.0) -> None:
        """Signal it and wait for its end; killed when it takes too long."""
        if self.process is None:
            return
        self.send(signal.SIGCONT)
        self.send(number)
        try:
            await asyncio.wait_for(self.process.wait(), patience_s)
        except TimeoutError:
            self.send(signal.SIGKILL)
            await self.process.wait()


class Stage:
    def __init__(self) -> None:
        self.switch = Switch(len(HOSTS))
        self.nodes: dict[str, Program] = {}
        self.valkey: Program
        self.client: Child
        self.faults = 0
        self.began = self.over = 0.0
        """When the (first) fault began, and when everything was as before."""
        self._folder = tempfile.TemporaryDirectory(prefix="kvpool-faults-")
        self._open = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Stage:
        try:
            self._open.callback(self._folder.cleanup)
            self._open.enter_context(self.switch)
            self.heal_lines()
            folder = Path(self._folder.name)
            self.valkey = self._valkey(folder)
            self._open.push_async_callback(self.valkey.end, signal.SIGKILL)
            await self.valkey.start()
            for node in NODES:
                self.nodes[node] = self._node(node, folder)
                self._open.push_async_callback(self.nodes[node].end, signal.SIGKILL)
            await asyncio.gather(*(node.start() for node in self.nodes.values()))
            self.client = await Child.start("client", self.enter("client"), "tests.cluster_faults.client")
            self._open.push_async_callback(self.client.close)
            await self.client.ask("open", url=self.url, ttl_s=TTL_S, timeout_s=30)
        except BaseException:
            await self._open.aclose()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._open.aclose()

    def _valkey(self, folder: Path) -> Program:
        argv = [*self.enter("valkey"), valkey_program(), "--port", str(VALKEY_PORT), "--bind", self.address("valkey")]
        argv += ["--protected-mode", "no", "--save", "", "--appendonly", "no", "--dir", str(folder)]
        return Program(argv, folder / "valkey.log", b"Ready to accept connections")

    def _node(self, node: str, folder: Path) -> Program:
        settings = folder / f"{node}.toml"
        settings.write_text(
            SETTINGS.format(
                node=node, cluster=NODES[node], address=self.address(node), port=PORT, ttl_s=TTL_S,
                directory=self.address("valkey"), valkey_port=VALKEY_PORT,
            )
        )  # fmt: skip
        argv = [*self.enter(node), sys.executable, "-m", "kvpool.daemon", "--config", str(settings)]
        return Program(argv, folder / f"{node}.log", b"kvpoold joined as")

    @property
    def url(self) -> str:
        return f"valkey://{self.address('valkey')}:{VALKEY_PORT}?name=faults"

    def address(self, host: str) -> str:
        return self.switch.address(HOSTS.index(host))

    def enter(self, host: str) -> tuple[str, ...]:
        return self.switch.enter(HOSTS.index(host))

    # -- links -------------------------------------------------------------------------------------

    def heal_lines(self) -> None:
        self.lines(HOSTS, HOSTS, None)

    def lines(self, here: tuple[str, ...], there: tuple[str, ...], line: Line | None, *, back: bool = True) -> None:
        """What ``here`` sends to ``there`` (``back``: and the other way) meets this ``line``; None: what is usual."""
        pairs = {(a, b) for a in here for b in there if a != b}
        if back:
            pairs |= {(b, a) for a, b in pairs}
        self.switch.set((HOSTS.index(a), HOSTS.index(b), line or usual(a, b)) for a, b in sorted(pairs))

    # -- time --------------------------------------------------------------------------------------

    def fault(self) -> None:
        """Something breaks now."""
        self.faults += 1
        self.began = self.began or time.monotonic()

    def healed(self) -> None:
        """Nothing is broken any more."""
        self.over = time.monotonic()

    # -- commands of the operator ------------------------------------------------------------------

    async def kvpool(self, *argv: str, timeout_s: float = 60.0) -> dict[str, Any]:
        """Run ``kvpool ... --json -`` beside the client. Raises RuntimeError when it fails."""
        command = [*self.enter("client"), sys.executable, "-m", "kvpool.cli", *argv, "-d", self.url, "--insecure"]
        process = await asyncio.create_subprocess_exec(
            *command, "--json", "-", cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        try:
            out, err = await asyncio.wait_for(process.communicate(), timeout_s)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            raise RuntimeError(f"kvpool {' '.join(argv)}: {err.decode()[-500:]}")
        body: dict[str, Any] = json.loads(out)
        return body

    async def copied(self, patience_s: float = 60.0) -> None:
        """Wait until no node of cluster a alone holds anything, as an operator would before going on. Raises RuntimeError."""
        pair = [node for node, cluster in NODES.items() if cluster == "a"]
        said = await self.client.ask("copied", nodes=pair, patience_s=patience_s, timeout_s=3 * patience_s)
        if said["missing"]:
            raise RuntimeError(f"after {patience_s:g} s there is no second copy of everything: {', '.join(said['missing'][:4])}")


def usual(a: str, b: str) -> Line:
    """The line from a to b when nothing is wrong."""
    return NEAR if NODES.get(a, "a") == NODES.get(b, "a") else FAR
