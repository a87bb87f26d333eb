"""``kvbench crowd``: what many transfers at once cost, and how long an urgent one waits behind bulk."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from ..errors import ConfigError
from .crew import Crew, Process
from .emulator import Conditions
from .environment import child_environment
from .path import Path, opened
from .progress import Steps
from .summary import paired_ratio, spread

GB = 1e9
START_S = 120.0
ANSWER_S = 300.0
AFTER_S = 0.05
"""When the urgent transfer is opened: the bulk before it fills every queue by then."""
BULK = 4


@dataclass(frozen=True, slots=True)
class CrowdOptions:
    """Bytes and counts. The bulk is ``total_bytes``, alone, in ``count`` transfers at once, and before the urgent one."""

    count: int = 64
    total_bytes: int = 1 << 30
    urgent_bytes: int = 4 << 20
    connections: int | None = None
    congestion: str | None = None
    repeat: int = 9
    conditions: Conditions | None = None

    def check(self) -> None:
        """Raises ConfigError naming the first option that makes no sense."""
        for name, value, low, high in (
            ("--count", self.count, 2, 1_024),
            ("--total-bytes", self.total_bytes, 1 << 20, 16 << 30),
            ("--urgent-bytes", self.urgent_bytes, 1, 1 << 30),
            ("--repeat", self.repeat, 1, 1_000),
        ):
            if not low <= value <= high:
                raise ConfigError(f"{name} must be {low} to {high}, got {value}")


class Crowd:
    """A receiver and a sender process; use as a context manager."""

    def __init__(self, options: CrowdOptions, path: Path) -> None:
        self._options = options
        self._path = path
        self._crew = Crew()
        self.facts: dict[str, Any] = {}
        self._receiver: Process
        self._sender: Process

    def __enter__(self) -> Crowd:
        config = {
            "region": self._options.total_bytes + self._options.urgent_bytes,
            "host": self._path.host,
            "insecure": self._path.conditions is not None,
            "connections": self._options.connections,
            "congestion": self._options.congestion,
        }
        try:
            self._receiver = self._start(0, {**config, "role": "receiver"})
            port = self._crew.wait(self._receiver, "started", START_S)["port"]
            self._sender = self._start(1, {**config, "role": "sender", "port": port})
            self.facts = self._crew.wait(self._sender, "started", START_S)
        except BaseException:
            self._crew.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._crew.close()

    def _start(self, side: int, config: dict[str, Any]) -> Process:
        argv = [*self._path.prefixes[side], sys.executable, "-m", "kvtransport.bench.crowd_worker"]
        worker = self._crew.start(config["role"], argv, child_environment())
        worker.say(config)
        return worker

    def round(self, sizes: Sequence[int], *, urgent: bool = False) -> dict[str, Any]:
        """Send transfers of these sizes; ``urgent``: the last one later and first. Returns what the sender measured."""
        transfers, at = [], 0
        for nbytes in sizes:
            transfers.append((os.urandom(16).hex(), at, nbytes))
            at += nbytes
        command = {"transfers": transfers, "urgent": urgent, "after_s": AFTER_S if len(sizes) > 1 else 0.0}
        self._receiver.say(command)
        self._crew.wait(self._receiver, "expecting", ANSWER_S)
        self._sender.say(command)
        sent = self._crew.wait(self._sender, "sent", ANSWER_S)
        received = self._crew.wait(self._receiver, "received", ANSWER_S)
        gb = sum(sizes) / GB
        return {
            "seconds": sent["seconds"],
            "goodput_gbps": gb * 8 / sent["seconds"],
            "sender_cpu_s_per_gb": sent["cpu_s"] / gb,
            "receiver_cpu_s_per_gb": received["cpu_s"] / gb,
            "urgent_s": sent["urgent_s"],
            "behind_bulk": sent["behind_bulk"],
        }


def run(options: CrowdOptions, out: Console) -> dict[str, Any]:
    """One transfer, many at once, an urgent one alone and behind bulk, in turns."""
    options.check()
    share = options.total_bytes // options.count
    kinds: dict[str, tuple[list[int], bool]] = {
        "one": ([share * options.count], False),
        "many": ([share] * options.count, False),
        "urgent_alone": ([options.urgent_bytes], True),
        "urgent_behind_bulk": ([options.total_bytes // BULK] * BULK + [options.urgent_bytes], True),
    }
    rounds: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    with Steps(len(kinds) * (options.repeat + 1) + 1, "crowd") as steps:
        steps.step("starting two processes")
        with opened(options.conditions) as path, Crowd(options, path) as crowd:
            for i in range(-1, options.repeat):  # the first one warms up
                for kind, (sizes, urgent) in kinds.items():
                    steps.step(f"{'warming up' if i < 0 else f'round {i + 1}'}: {kind.replace('_', ' ')}")
                    measured = crowd.round(sizes, urgent=urgent)
                    if i >= 0:
                        rounds[kind].append(measured)
            facts, where = crowd.facts, str(path)
    goodput = {kind: [r["goodput_gbps"] for r in rounds[kind]] for kind in ("one", "many")}
    alone = [r["urgent_s"] for r in rounds["urgent_alone"]]
    behind = [r["urgent_s"] for r in rounds["urgent_behind_bulk"]]
    body = {
        "options": asdict(options),
        "path": where,
        "connections": facts["connections"],
        "congestion": facts["congestion"],
        "one_gbps": spread(goodput["one"]),
        "many_gbps": spread(goodput["many"]),
        "many_over_one": paired_ratio(goodput["many"], goodput["one"]),
        "urgent_alone_s": spread(alone),
        "urgent_behind_bulk_s": spread(behind),
        "urgent_ratio": paired_ratio(behind, alone),
        "always_behind_bulk": all(r["behind_bulk"] for r in rounds["urgent_behind_bulk"]),
        "rounds": rounds,
    }
    render(out, body)
    return body


def render(out: Console, body: dict[str, Any]) -> None:
    """The same for people."""
    options = body["options"]
    table = Table(title=f"{body['path']}, {body['connections']} connections, {body['congestion']}")
    for heading in ("", "median", "quartiles", "ratio"):
        table.add_column(heading, justify="left" if not heading else "right")
    one, many, ratio = body["one_gbps"], body["many_gbps"], body["many_over_one"]
    table.add_row("one transfer", f"{one['median']:.2f} Gbps", f"{one['q1']:.2f}-{one['q3']:.2f}", "")
    table.add_row(
        f"{options['count']} at once",
        f"{many['median']:.2f} Gbps",
        f"{many['q1']:.2f}-{many['q3']:.2f}",
        f"{ratio['median']:.3f}",
    )
    alone, behind, slower = body["urgent_alone_s"], body["urgent_behind_bulk_s"], body["urgent_ratio"]
    size = f"{options['urgent_bytes'] / (1 << 20):g} MiB, urgent"
    for name, each, shown in (
        (f"{size}, alone", alone, ""),
        (f"{size}, behind bulk", behind, f"{slower['median']:.2f}"),
    ):
        table.add_row(name, f"{each['median'] * 1e3:.2f} ms", f"{each['q1'] * 1e3:.2f}-{each['q3'] * 1e3:.2f}", shown)
    out.print(table)
    if not body["always_behind_bulk"]:
        out.print("in some rounds the bulk was over before the urgent transfer was: send more (--total-bytes)")
