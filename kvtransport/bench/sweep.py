"""``kvbench sweep``: goodput over connections, chunk size and page size, every combination in turns."""

from __future__ import annotations

import contextlib
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from .. import presets
from ..errors import ConfigError
from . import prefill
from .baseline import CALLS, Baseline
from .emulator import Conditions
from .flow import Flow, FlowOptions, OnceRun
from .loopback import MAX_CHUNK, MAX_CONNECTIONS
from .path import Path, opened
from .pipeline import render_answer
from .progress import Steps
from .summary import paired_ratio, spread

CONTIGUOUS = 0
"""The page size that means one piece per tensor."""


@dataclass(frozen=True, slots=True)
class SweepOptions:
    """The grid. Bytes; a page size of 0 is contiguous memory. ``conditions`` None: loopback."""

    preset: str = "kimi-linear-48b"
    tokens: int = 32_768
    connections: tuple[int, ...] = (1, 2, 4, 8)
    chunk_bytes: tuple[int, ...] = (256 << 10, 1 << 20, 4 << 20)
    page_bytes: tuple[int, ...] = (CONTIGUOUS, 18 << 10)
    congestion: str | None = None
    checksum: bool = True
    repeat: int = 7
    conditions: Conditions | None = None
    baseline: bool = True

    def check(self) -> None:
        """Raises ConfigError naming the first option that makes no sense."""
        presets.preset(self.preset)
        for name, values, low, high in (
            ("--connections", self.connections, 1, MAX_CONNECTIONS),
            ("--chunks", self.chunk_bytes, 4096, MAX_CHUNK),
            ("--pages", [p for p in self.page_bytes if p], 64, 1 << 30),
            ("--tokens", [self.tokens], 1, 1 << 24),
            ("--repeat", [self.repeat], 1, 1_000),
        ):
            for value in values:
                if not low <= value <= high:
                    raise ConfigError(f"{name} must be {low} to {high}, got {value}")


Point = tuple[int, int, int]
"""Connections, chunk bytes, page bytes."""


def _flow(options: SweepOptions, page: int, path: Path) -> Flow:
    made = FlowOptions(
        preset=options.preset,
        tokens=options.tokens,
        congestion=options.congestion,
        page_bytes=page or None,
        contiguous=page == CONTIGUOUS,
        checksum=options.checksum,
    )
    return Flow(made, host=path.host, prefixes=path.prefixes)


def run(options: SweepOptions, out: Console) -> dict[str, Any]:
    """Measure every combination ``repeat`` times, round after round through all of them."""
    options.check()
    points = [(n, c, p) for p in options.page_bytes for n in options.connections for c in options.chunk_bytes]
    ours: dict[Point, list[OnceRun]] = {point: [] for point in points}
    plain: dict[int, list[float]] = {n: [] for n in options.connections}
    nbytes = presets.load(options.preset).bytes_at(options.tokens)
    total = options.repeat * (len(points) + (len(plain) if options.baseline else 0)) + 1
    with Steps(total, "sweep") as steps, contextlib.ExitStack() as stack:
        steps.step("starting the processes")
        path = stack.enter_context(opened(options.conditions))
        flows = {page: stack.enter_context(_flow(options, page, path)) for page in options.page_bytes}
        for i in range(options.repeat):
            for n in options.connections:
                if options.baseline:
                    steps.step(f"round {i + 1} of {options.repeat}: C loop, {n} connections")
                    plain[n].append(_c_round(options, nbytes, n, path))
                for point in (p for p in points if p[0] == n):
                    steps.step(f"round {i + 1} of {options.repeat}: {_words(point)}")
                    ours[point].append(flows[point[2]].once(connections=n, chunk_bytes=point[1], warm=1))
    cells = [_cell(point, runs, plain[point[0]]) for point, runs in ours.items()]
    best = max(cells, key=lambda c: float(c["goodput_gbps"]["median"]))
    rtt = 0.0 if options.conditions is None else options.conditions.rtt_ms / 1e3
    times = prefill.of_preset(options.preset)
    body = {
        "preset": options.preset,
        "tokens": options.tokens,
        "bytes": nbytes,
        "path": str(path),
        "conditions": None if options.conditions is None else asdict(options.conditions),
        "checksum": options.checksum,
        "congestion": next(iter(ours.values()))[-1].congestion,
        "repeat": options.repeat,
        "cells": cells,
        "best": {k: best[k] for k in ("connections", "chunk_bytes", "page_bytes")},
        "answer": prefill.answer(options.preset, times, best["goodput_gbps"]["median"], rtt),
    }
    render(out, body)
    return body


def _c_round(options: SweepOptions, nbytes: int, connections: int, path: Path) -> float:
    """The C loop's goodput on fresh connections, at the better receive piece, after one round that does not count."""
    with Baseline(
        nbytes,
        connections=connections,
        copies=2,
        congestion=options.congestion,
        host=path.host,
        prefixes=path.prefixes,
    ) as loop:
        loop.round(CALLS[0])
        return max(loop.round(call).goodput_gbps for call in CALLS)


def _cell(point: Point, runs: list[OnceRun], plain: list[float]) -> dict[str, Any]:
    reached = [r.goodput_gbps for r in runs]
    return {
        "connections": point[0],
        "chunk_bytes": point[1],
        "page_bytes": point[2],
        "goodput_gbps": spread(reached),
        "sender_cpu_s_per_gb": statistics.median(r.sender_cpu_s_per_gb for r in runs),
        "receiver_cpu_s_per_gb": statistics.median(r.receiver_cpu_s_per_gb for r in runs),
        "ratio_to_c": paired_ratio(reached, plain) if plain else None,
        "c_gbps": spread(plain) if plain else None,
        "rounds": [asdict(r) for r in runs],
    }


def _words(point: Point) -> str:
    pages = "contiguous" if point[2] == CONTIGUOUS else f"pages of {point[2]:,}"
    return f"{point[0]} connections, chunks of {point[1] >> 10} KiB, {pages}"


def render(out: Console, body: dict[str, Any]) -> None:
    """The same for people."""
    table = Table(title=f"{body['preset']}, {body['tokens']:,} tokens, {body['path']}, {body['congestion']}")
    for heading in ("connections", "chunk", "pages", "Gbps (quartiles)", "CPU s/GB", "ours / C"):
        table.add_column(heading, justify="right")
    for cell in body["cells"]:
        gbps, ratio = cell["goodput_gbps"], cell["ratio_to_c"]
        best = all(cell[k] == v for k, v in body["best"].items())
        table.add_row(
            str(cell["connections"]),
            f"{cell['chunk_bytes'] >> 10} KiB",
            "contiguous" if cell["page_bytes"] == CONTIGUOUS else f"{cell['page_bytes']:,}",
            f"{gbps['median']:.2f} ({gbps['q1']:.2f}-{gbps['q3']:.2f})",
            f"{cell['sender_cpu_s_per_gb']:.2f} + {cell['receiver_cpu_s_per_gb']:.2f}",
            "-" if ratio is None else f"{ratio['median']:.2f}",
            style="bold" if best else None,
        )
    out.print(table)
    render_answer(out, body["answer"])
