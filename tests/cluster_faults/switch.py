"""Hosts in network namespaces, and the links between them (switch.c): each direction can be delayed, slowed and cut by itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtransport.bench.emulator import Carrier


@dataclass(frozen=True, slots=True)
class Line:
    """One direction between two hosts: milliseconds on the way, 1e6 bits a second (0: no limit), and whether nothing passes at all."""

    delay_ms: float = 0.0
    rate_mbit: float = 0.0
    cut: bool = False


class Switch(Carrier):
    """``hosts`` namespaces, and between each two of them a link for each direction."""

    title = name = "switch"
    folder = Path(__file__).parent

    def __init__(self, hosts: int) -> None:
        super().__init__()
        self.hosts = hosts

    def arguments(self) -> Sequence[str]:
        return ["run", str(self.hosts)]

    def address(self, host: int) -> str:
        return f"10.78.0.{host + 1}"

    def set(self, lines: Iterable[tuple[int, int, Line]]) -> None:
        """(from, to, what that direction is from now on)."""
        count = 0
        for here, there, line in lines:
            self.say(f"set {here} {there} {line.delay_ms:.6f} {line.rate_mbit:.6f} {int(line.cut)}")
            count += 1
        for _ in range(count):
            self.answer("changed")

    def stats(self) -> list[dict[str, Any]]:
        """What each host sent: packets, wire_bytes, dropped."""
        self.say("stats")
        hosts: list[dict[str, Any]] = self.answer("stats")["hosts"]
        return hosts
