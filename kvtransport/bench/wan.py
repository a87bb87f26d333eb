"""``kvbench wan``: an emulated wide-area link, ours without a flag against the best that iperf3 finds on it."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..errors import ConfigError
from . import iperf
from .emulator import Conditions, EmulatedLink
from .flow import COLD_TOKENS, Flow, FlowOptions, FlowRun, Sample, goodput
from .iperf import Setting
from .progress import Steps
from .summary import spread

COLD_BYTES = 256 << 20
SKIP_S = 1.0
"""Of every run the first second does not count: slow start is measured by the cold transfers."""
HOPELESS = 0.25
"""Settings below this share of the best after one look are not looked at again, nor tried cold."""
WINDOW_S = 0.5
"""Goodput after a change is judged over windows of this length."""
BEFORE_S = 3.0
AFTER_S = 8.0
RECOVERED = 0.9


@dataclass(frozen=True, slots=True)
class WanOptions:
    """The grid and how thoroughly it is measured. Milliseconds, percent, Mbit/s, seconds."""

    rtt_ms: tuple[float, ...] = (10.0, 30.0)
    loss_percent: tuple[float, ...] = (0.0, 0.01, 0.1)
    rate_mbit: float = 4_000.0
    queue_ms: float = 20.0
    connections: tuple[int, ...] = (1, 4, 8, 16)
    congestion: tuple[str, ...] = ("cubic", "bbr")
    seconds: float = 5.0
    repeat: int = 3
    finals: int = 5
    cold: bool = True
    changes: bool = True
    seed: int = 1

    def check(self) -> None:
        """Raises ConfigError for a grid that makes no sense, or when iperf3 is missing."""
        for rtt in self.rtt_ms:
            for loss in self.loss_percent:
                self.conditions(rtt, loss).check()
        if not (self.rtt_ms and self.loss_percent and self.connections and self.congestion):
            raise ConfigError(
                "the grid needs at least one round-trip time, loss, connection count and congestion control"
            )
        if not all(1 <= n <= 128 for n in self.connections):
            raise ConfigError(f"iperf3 runs 1 to 128 connections, got {self.connections}")
        for name, value, low, high in (
            ("--seconds", self.seconds, 1.0, 600.0),
            ("--repeat", self.repeat, 1, 100),
            ("--finals", self.finals, 1, 100),
        ):
            if not low <= value <= high:
                raise ConfigError(f"{name} must be {low:g} to {high:g}, got {value:g}")
        iperf.check()

    def conditions(self, rtt_ms: float, loss_percent: float) -> Conditions:
        return Conditions(rtt_ms, self.rate_mbit, loss_percent, self.queue_ms)


def quick(options: WanOptions) -> WanOptions:
    """The same idea in two minutes: the corners of the grid, fewer settings, one look each."""
    return WanOptions(
        rtt_ms=options.rtt_ms[:1],
        loss_percent=tuple(dict.fromkeys((options.loss_percent[0], options.loss_percent[-1]))),
        rate_mbit=options.rate_mbit,
        queue_ms=options.queue_ms,
        connections=tuple(n for n in options.connections if n in (4, 16)) or options.connections[:1],
        congestion=options.congestion,
        seconds=min(options.seconds, 3.0),
        repeat=1,
        finals=2,
        cold=options.cold,
        changes=options.changes,
        seed=options.seed,
    )


def available_congestion() -> tuple[str, ...]:
    """Congestion controls this kernel has; empty where it does not say."""
    path = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")
    return tuple(path.read_text(encoding="ascii").split()) if path.exists() else ()


class Cell:
    """One point of the grid: a link of its own, fresh for it."""

    def __init__(self, options: WanOptions, conditions: Conditions, link: EmulatedLink, steps: Steps) -> None:
        self.options = options
        self.conditions = conditions
        self.link = link
        self.steps = steps
        for side in (0, 1):
            # What one run learnt of the path must not help or hinder the next.
            _sysctl(link, side, "net/ipv4/tcp_no_metrics_save", "1")

    def iperf(self, setting: Setting, what: str, **length: Any) -> dict[str, Any]:
        self.steps.step(f"{self.conditions}: iperf3 {setting.name}, {what}")
        return iperf.run(setting, self.link.hosts[1], server=self.link.enter(1), client=self.link.enter(0), **length)

    def flow(self) -> Flow:
        return Flow(
            FlowOptions(tokens=COLD_TOKENS),
            host=self.link.hosts[1],
            prefixes=(self.link.enter(1), self.link.enter(0)),
        )

    def steady(self, settings: Iterable[Setting], screened: dict[str, Any] | None) -> dict[str, Any]:
        """Every setting of iperf3 (or what ``screened`` says of them), then the two best again in turns with ours."""
        length = {"seconds": self.options.seconds, "omit_s": SKIP_S}
        tried: dict[Setting, list[dict[str, Any]]] = {setting: [] for setting in settings}
        if screened is not None:
            tried = {s: screened["steady"]["iperf3"][s.name]["rounds"] for s in tried}
        for i in range(self.options.repeat if screened is None else 0):
            best_yet = max((_median(rounds) for rounds in tried.values() if rounds), default=0.0)
            for setting, rounds in tried.items():
                if i == 0 or _median(rounds) >= HOPELESS * best_yet:
                    rounds.append(self.iperf(setting, "all settings", **length))
        ranked = sorted(tried, key=lambda s: -_median(tried[s]))
        finals: dict[Setting, list[dict[str, Any]]] = {setting: [] for setting in ranked[:2]}
        ours: list[FlowRun] = []
        with self.flow() as flow:
            for _ in range(self.options.finals):
                for setting, rounds in finals.items():
                    rounds.append(self.iperf(setting, "the best again", **length))
                self.steps.step(f"{self.conditions}: ours")
                ours.append(flow.run(SKIP_S + self.options.seconds))
        best = max(finals, key=lambda s: _median(finals[s]))
        reached = [run.goodput_gbps(SKIP_S) for run in ours]
        return {
            "iperf3": {s.name: {"goodput_gbps": _median(r), "rounds": r} for s, r in tried.items()},
            "finals": {s.name: {"goodput_gbps": _median(r), "rounds": r} for s, r in finals.items()},
            "best": best.name,
            "best_gbps": _median(finals[best]),
            "ours_gbps": statistics.median(reached),
            "ratio": statistics.median(reached) / _median(finals[best]),
            "ours": [_describe(run) for run in ours],
        }

    def cold(
        self, steady: dict[str, Any], settings: Iterable[Setting], screened: dict[str, Any] | None
    ) -> dict[str, Any]:
        """The first 256 MiB of fresh connections: iperf3's settings that have a chance, the best in turns with ours."""
        reached = {name: each["goodput_gbps"] for name, each in steady["iperf3"].items()}
        likely = [s for s in settings if reached[s.name] >= HOPELESS * max(reached.values())]
        tried: dict[Setting, list[dict[str, Any]]] = {s: [] for s in likely}
        if screened is not None and screened["cold"] is not None:
            tried = {s: screened["cold"]["iperf3"][s.name]["rounds"] for s in likely}
            screened_repeat = 0
        else:
            screened_repeat = min(2, self.options.repeat)
        for _ in range(screened_repeat):
            for setting, rounds in tried.items():
                rounds.append(self.iperf(setting, "cold", nbytes=COLD_BYTES))
        best = max(tried, key=lambda s: _median(tried[s]))
        finals, ours = [], []
        with self.flow() as flow:
            for _ in range(self.options.finals):
                finals.append(self.iperf(best, "cold, the best again", nbytes=COLD_BYTES))
                self.steps.step(f"{self.conditions}: ours, cold")
                ours.append(flow.once())
        mine = statistics.median(run.goodput_gbps for run in ours)
        return {
            "bytes": COLD_BYTES,
            "iperf3": {s.name: {"goodput_gbps": _median(r), "rounds": r} for s, r in tried.items()},
            "best": best.name,
            "best_gbps": _median(finals),
            "best_rounds": finals,
            "ours_gbps": mine,
            "ratio": mine / _median(finals),
            "ours": [asdict(run) for run in ours],
        }


def _median(rounds: list[dict[str, Any]]) -> float:
    return float(statistics.median(r["goodput_gbps"] for r in rounds))


def _describe(run: FlowRun) -> dict[str, Any]:
    return {
        "goodput_gbps": run.goodput_gbps(SKIP_S),
        "connections": run.connections,
        "congestion": run.congestion,
        "sender_cpu_s_per_gb": run.sender_cpu_s_per_gb,
        "receiver_cpu_s_per_gb": run.receiver_cpu_s_per_gb,
        "telemetry": run.telemetry,
        "series_gbps": series(run.samples, run.started_s),
    }


def series(samples: tuple[Sample, ...], started_s: float, step_s: float = 0.1) -> list[float]:
    """Mean goodput (Gbps) of every ``step_s`` from the start on."""
    if not samples:
        return []
    count = int((samples[-1].at_s - started_s) / step_s)
    return [round(goodput(samples, started_s + i * step_s, started_s + (i + 1) * step_s), 4) for i in range(count)]


def recovery(samples: tuple[Sample, ...], changed_s: float, reference_gbps: float) -> float | None:
    """Seconds from the change until a window reaches 0.9 of ``reference_gbps``; None: never.

    The end of the first such window counts: 0.5 s is the least this can say.
    """
    if not samples:
        return None
    at = changed_s
    while at + WINDOW_S <= samples[-1].at_s:
        if goodput(samples, at, at + WINDOW_S) >= RECOVERED * reference_gbps:
            return at + WINDOW_S - changed_s
        at += WINDOW_S / 10
    return None


def _sysctl(link: EmulatedLink, side: int, name: str, value: str) -> None:
    write = [*link.enter(side), "sh", "-c", f"echo {value} > /proc/sys/{name}"]
    done = subprocess.run(write, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"cannot set {name} in the emulated namespace: {done.stderr.strip()}")


def transitions(options: WanOptions) -> list[tuple[Conditions, Conditions]]:
    """Changes worth showing: the round trip longer and shorter, loss coming and going."""
    low, high = min(options.rtt_ms), max(options.rtt_ms)
    clean, lossy = min(options.loss_percent), max(options.loss_percent)
    made = []
    if low != high:
        made += [
            (options.conditions(low, clean), options.conditions(high, clean)),
            (options.conditions(high, clean), options.conditions(low, clean)),
        ]
    if clean != lossy:
        made += [
            (options.conditions(low, clean), options.conditions(low, lossy)),
            (options.conditions(low, lossy), options.conditions(low, clean)),
        ]
    return made


def _changes(options: WanOptions, known: dict[Conditions, float], steps: Steps) -> list[dict[str, Any]]:
    """``known``: the best tool's steady goodput by conditions, where this run measured it."""
    out = []
    for before, after in transitions(options):
        rounds = []
        for _ in range(options.repeat):
            steps.step(f"{before} becomes {after.rtt_ms:g} ms, {after.loss_percent:g}% loss")
            with EmulatedLink(before, seed=options.seed) as link:
                cell = Cell(options, before, link, steps)
                changed = 0.0

                def during(started: float, link: EmulatedLink = link, after: Conditions = after) -> None:
                    nonlocal changed
                    time.sleep(max(0.0, started + BEFORE_S - time.monotonic()))
                    link.change(after)
                    changed = time.monotonic()

                with cell.flow() as flow:
                    run = flow.run(BEFORE_S + AFTER_S, during)
            own = goodput(run.samples, changed + AFTER_S / 2)
            reference = known.get(after, own)
            rounds.append(
                {
                    "recovery_s": recovery(run.samples, changed, reference),
                    "reference_gbps": reference,
                    "own_steady_gbps": own,
                    "after_3_s_ratio": goodput(run.samples, changed + 3.0) / reference if reference else 0.0,
                    "changed_at_s": changed - run.started_s,
                    "connections": run.connections,
                    "congestion": run.congestion,
                    "series_gbps": series(run.samples, run.started_s),
                }
            )
        seconds = [r["recovery_s"] for r in rounds]
        worst = None if any(s is None for s in seconds) else max(s for s in seconds if s is not None)
        out.append(
            {
                "before": asdict(before),
                "after": asdict(after),
                "reference": "the best of iperf3" if after in known else "its own last four seconds",
                "slowest_recovery_s": worst,
                "rounds": rounds,
            }
        )
    return out


def _screened(body: dict[str, Any] | None, conditions: Conditions, settings: list[Setting]) -> dict[str, Any] | None:
    """The cell of an earlier report with these conditions. Raises ConfigError when it lacks a setting."""
    for cell in [] if body is None else body["cells"]:
        if Conditions(**cell["conditions"]) == conditions:
            if any(s.name not in cell["steady"]["iperf3"] for s in settings):
                raise ConfigError(f"the earlier report looked at other settings of iperf3 at {conditions}")
            return dict(cell)
    return None


def run(
    options: WanOptions,
    out: Console,
    say: Callable[[dict[str, Any]], None] | None = None,
    earlier: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure the whole grid; ``say`` gets the report so far after every cell. Needs root and iperf3.

    ``earlier``: a report whose looks at all of iperf3's settings are taken over; the best are measured again.
    """
    options.check()
    here = available_congestion()
    missing = [name for name in options.congestion if here and name not in here]
    settings = [Setting(n, c) for c in options.congestion if c not in missing for n in options.connections]
    if not settings:
        raise ConfigError(f"none of {', '.join(options.congestion)} is available here ({', '.join(here)})")
    cells: list[dict[str, Any]] = []
    body: dict[str, Any] = {
        "options": asdict(options),
        "congestion_missing": missing,
        "cells": cells,
        "changes": [],
    }
    known: dict[Conditions, float] = {}
    per_cell = options.repeat * len(settings) + 3 * options.finals
    changes = transitions(options) if options.changes else []
    total = per_cell * len(options.rtt_ms) * len(options.loss_percent) + len(changes) * options.repeat
    with Steps(total, "wan") as steps:
        for rtt in options.rtt_ms:
            for loss in options.loss_percent:
                conditions = options.conditions(rtt, loss)
                with EmulatedLink(conditions, seed=options.seed) as link:
                    cell = Cell(options, conditions, link, steps)
                    screened = _screened(earlier, conditions, settings)
                    steady = cell.steady(settings, screened)
                    cold = cell.cold(steady, settings, screened) if options.cold else None
                    passed = link.stats()
                known[conditions] = steady["best_gbps"]
                cells.append(
                    {
                        "conditions": asdict(conditions),
                        "screened_earlier": screened is not None,
                        "steady": steady,
                        "cold": cold,
                        "link": passed,
                    }
                )
                if say is not None:
                    say(body)
        if options.changes:
            body["changes"] = _changes(options, known, steps)
    render(out, body)
    return body


def render(out: Console, body: dict[str, Any]) -> None:
    """The same for people."""
    options = body["options"]
    table = Table(title=f"{options['rate_mbit'] / 1e3:g} Gbps, no flag set, against the best of iperf3 (Gbps)")
    for heading in ("RTT", "loss", "iperf3", "best", "ours", "ratio", "cold, best", "ours", "ratio"):
        table.add_column(heading, justify="right")
    for cell in body["cells"]:
        at, steady, cold = cell["conditions"], cell["steady"], cell["cold"]
        first = ("-", "-", "-")
        if cold is not None:
            first = (f"{cold['best_gbps']:.2f}", f"{cold['ours_gbps']:.2f}", f"{cold['ratio']:.2f}")
        table.add_row(
            f"{at['rtt_ms']:g} ms",
            f"{at['loss_percent']:g}%",
            steady["best"],
            f"{steady['best_gbps']:.2f}",
            f"{steady['ours_gbps']:.2f}",
            f"{steady['ratio']:.2f}",
            *first,
        )
    out.print(table)
    if body["changes"]:
        table = Table(title="0.9 again after a change")
        for heading in ("from", "to", "seconds, each round", "of Gbps"):
            table.add_column(heading, justify="right")
        for change in body["changes"]:
            before, after = change["before"], change["after"]
            rounds = change["rounds"]
            table.add_row(
                f"{before['rtt_ms']:g} ms, {before['loss_percent']:g}%",
                f"{after['rtt_ms']:g} ms, {after['loss_percent']:g}%",
                ", ".join("never" if r["recovery_s"] is None else f"{r['recovery_s']:.1f}" for r in rounds),
                f"{spread([r['reference_gbps'] for r in rounds])['median']:.2f}, {change['reference']}",
            )
        out.print(table)
    for name in body["congestion_missing"]:
        out.print(f"{name} is not available in this kernel and was left out: modprobe tcp_{name}")
