"""What a benchmark may know of a link's connections: how many, which congestion control, what telemetry says."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..link import Link


def congestion_of_link(link: Link) -> str:
    """The congestion controls its sockets run, joined by ``+``; "unknown" where the system does not say."""
    found = set()
    for connection in link.connections:
        ask = getattr(connection.stream, "congestion", None)
        found.add(ask() if ask is not None else "unknown")
    return "+".join(sorted(found)) or "unknown"


def describe_telemetry(link: Link) -> dict[str, Any]:
    """``link.telemetry()`` as JSON can carry it: numbers, strings and nothing else."""
    told = link.telemetry()
    plain = {**dataclasses.asdict(told), "congestion_refused": "+".join(told.congestion_refused)}
    return {k: v for k, v in plain.items() if v is None or isinstance(v, int | float | str | bool)}
