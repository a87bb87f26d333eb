"""An emulated link between two network namespaces (csrc/emulator.c): delay, rate, drop-tail queue and loss.

For kernels without netem, and without a trace: the namespaces have no names, and they and their devices are gone
when the emulator and whatever runs inside them are, however that comes about.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, ClassVar, Self

from ..errors import ConfigError
from .compiled import SOURCES, program
from .crew import Crew, Process

START_S = 60.0
ANSWER_S = 30.0
TUN = Path("/dev/net/tun")
HOSTS = ("10.78.0.1", "10.78.0.2")
"""Addresses of the two sides."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """A link's properties, the same in both directions.

    ``rtt_ms``: round trip, half of it each way. ``rate_mbit``: 1e6 bits a second on the wire, Ethernet framing
    included (1,448 of 1,538 bytes are payload); 0: no limit. ``loss_percent``: of segments, at random, independently.
    ``queue_ms``: the drop-tail queue before the rate limit, in milliseconds of the rate.
    """

    rtt_ms: float = 0.0
    rate_mbit: float = 0.0
    loss_percent: float = 0.0
    queue_ms: float = 20.0

    def check(self) -> None:
        """Raises ConfigError for what no link can be."""
        for name, value, high in (
            ("rtt_ms", self.rtt_ms, 10_000.0),
            ("rate_mbit", self.rate_mbit, 1e6),
            ("loss_percent", self.loss_percent, 100.0),
            ("queue_ms", self.queue_ms, 10_000.0),
        ):
            if not 0 <= value <= high:
                raise ConfigError(f"an emulated link needs {name} of 0 to {high:g}, got {value:g}")

    def words(self) -> str:
        return f"{self.rtt_ms / 2:.6f} {self.rate_mbit:.6f} {self.loss_percent:.9f} {self.queue_ms:.6f}"

    def __str__(self) -> str:
        rate = f"{self.rate_mbit / 1e3:g} Gbps" if self.rate_mbit else "no rate limit"
        return f"{self.rtt_ms:g} ms, {self.loss_percent:g}% loss, {rate}"


def why_not() -> str | None:
    """What keeps this process from emulating a link, and what to do; None when nothing does."""
    if not TUN.exists():
        return f"{TUN} is missing: load the module with 'modprobe tun', or in a container pass --device /dev/net/tun"
    if os.geteuid() != 0:
        return "network namespaces and TUN devices need root: run it with sudo, or as root of a container with CAP_NET_ADMIN and CAP_SYS_ADMIN"
    return None


class Carrier:
    """Network namespaces, and a program (``csrc/namespaces.h``) that carries packets between them; use as a context manager.

    ``enter(side)`` is the prefix of a command that shall run in namespace ``side``. A process started that way is killed when the
    one that started it ends; the namespaces have no names and are gone when nothing runs in them. Raises ConfigError where it
    cannot be (see :func:`why_not`).
    """

    title: ClassVar[str]
    """What messages call it."""
    name: ClassVar[str]
    """Of the program; its source lies in ``folder``."""
    folder: ClassVar[Traversable] = SOURCES

    def __init__(self) -> None:
        self._crew = Crew()
        self._process: Process
        self._program = ""

    def arguments(self) -> Sequence[str]:
        """What the program is started with."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        reason = why_not()
        if reason is not None:
            raise ConfigError(f"cannot make network namespaces: {reason}")
        self._program = str(program(self.name, headers=("namespaces.h",), folder=self.folder))
        self._process = self._crew.start(self.title, [self._program, *self.arguments()])
        try:
            self._crew.wait(self._process, "ready", START_S)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def enter(self, side: int) -> tuple[str, ...]:
        return (self._program, "enter", str(self.pid), str(side))

    def say(self, command: str) -> None:
        """A line to the program."""
        self._process.say(command)

    def answer(self, event: str) -> dict[str, Any]:
        """Its next answer, which must be this one."""
        return self._crew.wait(self._process, event, ANSWER_S)

    def close(self) -> None:
        """End the program; the namespaces end with what runs in them. Idempotent."""
        self._crew.close()


class EmulatedLink(Carrier):
    """Two namespaces and the link between them."""

    title = "link emulator"
    name = "emulator"
    hosts = HOSTS

    def __init__(self, conditions: Conditions, *, seed: int = 1) -> None:
        conditions.check()
        super().__init__()
        self.conditions = conditions
        self._seed = seed

    def arguments(self) -> Sequence[str]:
        return ["link", *self.conditions.words().split(), str(self._seed)]

    def change(self, conditions: Conditions) -> None:
        """From now on the link is like this; what is on its way arrives as it would have."""
        conditions.check()
        self.say("set " + conditions.words())
        self.answer("changed")
        self.conditions = conditions

    def stats(self) -> list[dict[str, Any]]:
        """Per direction (from side 0, from side 1): packets, segments, lost, dropped, wire_bytes, longest_queue_s, held_bytes."""
        self.say("stats")
        directions: list[dict[str, Any]] = self.answer("stats")["directions"]
        return directions
