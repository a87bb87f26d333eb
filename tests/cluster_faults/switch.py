"""Hosts in network namespaces, and the links between them (switch.c): each direction can be delayed, slowed and cut by itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kvtransport.bench.compiled import program
from kvtransport.bench.crew import Crew, Process
from kvtransport.bench.emulator import why_not
from kvtransport.errors import ConfigError

START_S = 60.0
ANSWER_S = 30.0


@dataclass(frozen=True, slots=True)
class Line:
    """One direction between two hosts: milliseconds on the way, 1e6 bits a second (0: no limit), and whether nothing passes at all."""

    delay_ms: float = 0.0
    rate_mbit: float = 0.0
    cut: bool = False


class Switch:
    """``hosts`` namespaces; use as a context manager. ``enter(host)`` is the prefix of a command that shall run in one.

    A process started that way is killed when the one that started it ends; the namespaces have no names and are gone when nothing runs in
    them. Raises ConfigError where it cannot be (:func:`kvtransport.bench.emulator.why_not`).
    """

    def __init__(self, hosts: int) -> None:
        self.hosts = hosts
        self._crew = Crew()
        self._process: Process
        self._program = ""

    def __enter__(self) -> Self:
        reason = why_not()
        if reason is not None:
            raise ConfigError(f"cannot make network namespaces: {reason}")
        self._program = str(program("switch", headers=("namespaces.h",), folder=Path(__file__).parent))
        self._process = self._crew.start("switch", [self._program, "run", str(self.hosts)])
        try:
            self._crew.wait(self._process, "ready", START_S)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def address(self, host: int) -> str:
        return f"10.78.0.{host + 1}"

    def enter(self, host: int) -> tuple[str, ...]:
        return (self._program, "enter", str(self._process.pid), str(host))

    def set(self, lines: Iterable[tuple[int, int, Line]]) -> None:
        """(from, to, what that direction is from now on)."""
        count = 0
        for here, there, line in lines:
            self._process.say(f"set {here} {there} {line.delay_ms:.6f} {line.rate_mbit:.6f} {int(line.cut)}")
            count += 1
        for _ in range(count):
            self._crew.wait(self._process, "changed", ANSWER_S)

    def stats(self) -> list[dict[str, Any]]:
        """What each host sent: packets, wire_bytes, dropped."""
        self._process.say("stats")
        hosts: list[dict[str, Any]] = self._crew.wait(self._process, "stats", ANSWER_S)["hosts"]
        return hosts

    def close(self) -> None:
        """End the switch; the namespaces end with what runs in them. Idempotent."""
        self._crew.close()
