"""What goes wrong, one after the other. Each is played in both directions, and with a cancel in the middle of it."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from .party import DEAD_AFTER_S
from .stage import CUT_OFF, FINE, Stage

SHORT_S = 0.6
LONG_S = DEAD_AFTER_S + 1.5
"""Long enough for the connections to be given up."""


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    play: Callable[[Stage], Awaitable[None]]
    relay: bool = False
    ends: tuple[str, ...] = ()
    """Codes of the errors it must end with; none: the transfer must be sealed."""
    frozen: str = ""
    """The party that cannot be asked anything meanwhile: "producer", "consumer"."""
    rejoin: bool = False
    """Afterwards the acceptor is another process: a new link must work."""


async def freeze(stage: Stage, who: str, seconds: float) -> None:
    child = getattr(stage, who)
    stage.fault()
    child.signal(signal.SIGSTOP)
    await asyncio.sleep(seconds)
    child.signal(signal.SIGCONT)
    stage.healed()


async def freeze_for_good(stage: Stage) -> None:
    stage.fault()
    stage.consumer.signal(signal.SIGSTOP)


async def black_hole(stage: Stage, seconds: float) -> None:
    stage.fault()
    stage.change(CUT_OFF)
    await asyncio.sleep(seconds)
    stage.change(FINE)
    stage.healed()


async def black_hole_for_good(stage: Stage) -> None:
    stage.fault()
    stage.change(CUT_OFF)


async def half_open(stage: Stage) -> None:
    """The acceptor's host dies and comes back without a packet saying so; the dialler's connections seem to stand."""
    stage.fault()
    stage.change(CUT_OFF)
    stage.acceptor.kill()
    await stage.acceptor.process.wait()
    await asyncio.sleep(0.3)
    stage.change(FINE)
    await stage.restart(stage.acceptor)


async def restart(stage: Stage) -> None:
    stage.fault()
    stage.acceptor.kill()
    await stage.restart(stage.acceptor)


async def slow_reader(stage: Stage) -> None:
    """The consumer gets a tenth of the time."""
    stage.fault()
    for _ in range(12):
        stage.consumer.signal(signal.SIGSTOP)
        await asyncio.sleep(0.18)
        stage.consumer.signal(signal.SIGCONT)
        await asyncio.sleep(0.02)
    stage.healed()


async def reset(stage: Stage, *, one: bool) -> None:
    assert stage.relay is not None
    stage.fault()
    await stage.relay.ask("reset", one=one)
    stage.healed()


async def reset_again_and_again(stage: Stage) -> None:
    assert stage.relay is not None
    stage.fault()
    for _ in range(5):
        await stage.relay.ask("reset")
        await asyncio.sleep(random.random() * 0.3)
    stage.healed()


async def address_change(stage: Stage) -> None:
    await stage.new_address()
    stage.fault()
    stage.healed()


async def reordering(stage: Stage) -> None:
    """What different connections carry arrives in any order."""
    assert stage.relay is not None
    stage.fault()
    await stage.relay.ask("delay", seconds=0.05)
    await asyncio.sleep(1.0)
    await stage.relay.ask("delay", seconds=0.0)
    stage.healed()


async def lossy(stage: Stage) -> None:
    stage.fault()
    stage.change(type(FINE)(rtt_ms=10, rate_mbit=60, loss_percent=2))
    await asyncio.sleep(1.0)
    stage.change(FINE)
    stage.healed()


FROZEN = ("peer_frozen", "peer_lost", "deadline")
GONE = ("peer_lost", "incarnation", "killed")

SCENARIOS = (
    Scenario("no fault", lambda s: asyncio.sleep(0)),
    Scenario("consumer frozen, shortly", lambda s: freeze(s, "consumer", SHORT_S), frozen="consumer"),
    Scenario("consumer frozen, given up", lambda s: freeze(s, "consumer", LONG_S), frozen="consumer"),
    Scenario("producer frozen, given up", lambda s: freeze(s, "producer", LONG_S), frozen="producer"),
    Scenario("consumer frozen for good", freeze_for_good, ends=FROZEN, frozen="consumer"),
    Scenario("black hole, shortly", lambda s: black_hole(s, SHORT_S)),
    Scenario("black hole, given up", lambda s: black_hole(s, LONG_S)),
    Scenario("black hole for good", black_hole_for_good, ends=FROZEN),
    Scenario("half-open: host dies unheard", half_open, ends=GONE, rejoin=True),
    Scenario("slow reader", slow_reader, frozen="consumer"),
    Scenario("one connection reset", lambda s: reset(s, one=True), relay=True),
    Scenario("all connections reset", lambda s: reset(s, one=False), relay=True),
    Scenario("all reset, five times", reset_again_and_again, relay=True),
    Scenario("address change", address_change),
    Scenario("reordering between connections", reordering, relay=True),
    Scenario("2% loss", lossy),
    Scenario("peer restart", restart, ends=GONE, rejoin=True),
)
