"""Which path a command measures: loopback, or an emulated link where the options ask for one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from .emulator import Conditions, EmulatedLink


@dataclass(frozen=True, slots=True)
class Path:
    """Where the receiver listens, what stands before both commands (receiver, sender), and what the path is."""

    host: str
    prefixes: tuple[tuple[str, ...], tuple[str, ...]]
    conditions: Conditions | None

    def __str__(self) -> str:
        return "loopback" if self.conditions is None else f"emulated: {self.conditions}"


def emulation(rtt_ms: float | None, rate_mbit: float | None, loss_percent: float | None) -> Conditions | None:
    """None when no option was given: loopback. Else the link they describe, with 4 Gbps by default."""
    if rtt_ms is None and rate_mbit is None and loss_percent is None:
        return None
    return Conditions(rtt_ms or 0.0, 4_000.0 if rate_mbit is None else rate_mbit, loss_percent or 0.0)


@contextlib.contextmanager
def opened(conditions: Conditions | None) -> Iterator[Path]:
    """The path while it is used. Raises ConfigError where a link cannot be emulated."""
    if conditions is None:
        yield Path("127.0.0.1", ((), ()), None)
        return
    with EmulatedLink(conditions) as link:
        yield Path(link.hosts[1], (link.enter(1), link.enter(0)), conditions)
