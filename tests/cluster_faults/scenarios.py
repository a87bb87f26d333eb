"""What goes wrong in a cluster, one after the other."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from .stage import CUT, HOSTS, NODES, VALKEY_PORT, Line, Stage

DOWN_S = 7.0
"""How long a fault lasts: longer than the TTL, and than it takes to give a connection up."""
SLOW = Line(delay_ms=100, rate_mbit=4)


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    play: Callable[[Stage], Awaitable[None]]
    """Does it, says when it begins (``stage.fault()``, each) and when all is as before (``stage.healed()``)."""
    quick: bool = False
    """Part of the short run."""
    lossless: bool = False
    """What was stored is still there and can be reached all the time: no request may miss."""
    litters: bool = False
    """What it leaves in the nodes' memory would push out what others need."""


def others(*hosts: str) -> tuple[str, ...]:
    return tuple(h for h in HOSTS if h not in hosts)


async def kill(stage: Stage, node: str) -> None:
    """kill -9; it comes back empty, as another incarnation."""
    stage.fault()
    await stage.nodes[node].end(signal.SIGKILL)
    await asyncio.sleep(DOWN_S)
    await stage.nodes[node].start()
    stage.healed()


async def stop_and_resume(stage: Stage) -> None:
    stage.fault()
    stage.nodes["a1"].send(signal.SIGSTOP)
    await asyncio.sleep(DOWN_S)
    stage.nodes["a1"].send(signal.SIGCONT)
    stage.healed()


async def restart(stage: Stage) -> None:
    stage.fault()
    await stage.nodes["a2"].end(signal.SIGTERM)
    await stage.nodes["a2"].start()
    stage.healed()


async def cut(stage: Stage, hosts: tuple[str, ...], *, back: bool = True, into: bool = False) -> None:
    """No packet between ``hosts`` and the others; without ``back`` only those of ``hosts`` (``into``: to them) are lost."""
    stage.fault()
    rest = others(*hosts)
    stage.lines(*((rest, hosts) if into else (hosts, rest)), CUT, back=back)
    await asyncio.sleep(DOWN_S)
    stage.heal_lines()
    stage.healed()


async def flushall(stage: Stage) -> None:
    stage.fault()
    await stage.client.ask("flushall", host=stage.address("valkey"), port=VALKEY_PORT)
    stage.healed()


async def valkey_killed(stage: Stage) -> None:
    stage.fault()
    await stage.valkey.end(signal.SIGKILL)
    await asyncio.sleep(DOWN_S)
    await stage.valkey.start()
    stage.healed()


async def slow_link(stage: Stage) -> None:
    stage.fault()
    stage.lines(("a1",), others("a1"), SLOW)
    await asyncio.sleep(DOWN_S)
    stage.heal_lines()
    stage.healed()


async def starved(stage: Stage) -> None:
    """A node gets a tenth of the time."""
    stage.fault()
    for _ in range(int(DOWN_S / 0.2)):
        stage.nodes["a1"].send(signal.SIGSTOP)
        await asyncio.sleep(0.18)
        stage.nodes["a1"].send(signal.SIGCONT)
        await asyncio.sleep(0.02)
    stage.healed()


async def full(stage: Stage) -> None:
    """A node has no byte left, and nothing that it could evict: everything is leased."""
    stage.fault()
    await stage.client.ask("fill", host=stage.address("a1"), port=7777, timeout_s=60)
    await asyncio.sleep(DOWN_S)
    await stage.client.ask("unfill", timeout_s=60)
    stage.healed()


async def drain(stage: Stage) -> None:
    """``kvpool drain`` of a node while it is read; it is stopped, and started again empty."""
    stage.fault()
    await stage.kvpool("drain", "a2", "--deadline", "30")
    await stage.nodes["a2"].end(signal.SIGTERM)
    await stage.nodes["a2"].start()
    stage.healed()


async def rolling_restart(stage: Stage) -> None:
    """Every node and Valkey, one after the other, each when the one before has its copies again."""
    for node in NODES:
        stage.fault()
        await stage.nodes[node].end(signal.SIGTERM)
        await stage.nodes[node].start()
        await stage.copied()
    stage.fault()
    await stage.valkey.end(signal.SIGTERM)
    await stage.valkey.start()
    stage.healed()


SCENARIOS = (
    Scenario("kill -9 of a node", lambda s: kill(s, "a1"), quick=True, lossless=True),
    Scenario("kill -9 of a cluster's only node", lambda s: kill(s, "b1")),
    Scenario("SIGSTOP and resume", stop_and_resume, quick=True, lossless=True),
    Scenario("restart", restart, lossless=True),
    Scenario("partition of a node", lambda s: cut(s, ("a1",)), lossless=True),
    Scenario("partition of Valkey", lambda s: cut(s, ("valkey",)), lossless=True),
    Scenario("partition of a cluster", lambda s: cut(s, ("b1",))),
    Scenario("one-way partition: a node is not heard", lambda s: cut(s, ("a1",), back=False), quick=True, lossless=True),
    Scenario("one-way partition: a node hears nothing", lambda s: cut(s, ("a1",), back=False, into=True), lossless=True),
    Scenario("FLUSHALL", flushall, quick=True),
    Scenario("Valkey killed and back", valkey_killed, quick=True, lossless=True),
    Scenario("slow node: its links", slow_link, lossless=True),
    Scenario("slow node: its processor", starved, lossless=True),
    Scenario("full node", full, lossless=True, litters=True),
    Scenario("drain under load", drain, lossless=True),
    Scenario("rolling restart of everything", rolling_restart),
)
