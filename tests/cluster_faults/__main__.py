"""Faults in a cluster of real processes, in network namespaces: a table, and JSON. Needs root.

Three kvpoold in two clusters, a Valkey, and a client that reads and writes without a pause and checks every byte; links that can be cut
(also in one direction), slowed and delayed. In every scenario: no wrong byte, no request past its deadline, and the hit rate is back in time.

python -m tests.cluster_faults                     every scenario
python -m tests.cluster_faults --quick             a few of them, as continuous integration does
python -m tests.cluster_faults --only valkey --runs 5 --json -
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kvtransport.bench.emulator import why_not

from .scenarios import SCENARIOS, Scenario
from .stage import Stage

RECOVERY_S = 20.0
"""After the end of the fault the last request that missed or failed has ended within this, or the scenario fails."""
SETTLE_S = 60.0
BEFORE_S = 1.0
"""Of load before the fault."""


@dataclass(slots=True)
class Row:
    """What the runs of one scenario came to.

    ``misses`` are requests that did not find the whole prompt, ``errors`` those that ended with an error of ours. ``outage_s``: from the
    beginning of the fault to the last of them that ended before the fault did; ``recovery_s``: from the end of the fault to the last one after it.
    """

    scenario: str
    runs: int = 0
    requests: int = 0
    faults: int = 0
    misses: int = 0
    errors: int = 0
    wrong_bytes: int = 0
    hangs: int = 0
    slowest_s: float = 0.0
    """The longest get, put or lookup."""
    outage_s: float = 0.0
    recovery_s: float = 0.0
    kinds: dict[str, int] = field(default_factory=dict)
    """Errors by name."""
    details: dict[str, int] = field(default_factory=dict)
    """What missed requests found, and what errors said."""
    problems: list[str] = field(default_factory=list)

    @property
    def bad(self) -> bool:
        return bool(self.problems or self.hangs or self.wrong_bytes or not self.runs)


async def play(stage: Stage, scenario: Scenario, row: Row, run: int) -> None:
    """One run; raises TimeoutError or RuntimeError when the cluster does not come to rest before it."""
    client = stage.client
    await stage.copied()
    settled = await clean(stage, time.monotonic())
    if not settled["clean"]:
        raise RuntimeError(f"not every prompt is found before the fault: {settled['last']}")
    await client.ask("begin_diary")
    stage.began = stage.over = 0.0
    stage.faults = 0
    await asyncio.sleep(BEFORE_S)
    await scenario.play(stage)
    after = await clean(stage, stage.over)
    said = await client.ask("read_diary")
    row.runs += 1
    row.faults += stage.faults
    row.requests += len(said["diary"])
    row.wrong_bytes += said["wrong_bytes"]
    row.hangs += len(said["hangs"])
    row.slowest_s = max(row.slowest_s, said["slowest_s"])
    row.problems += [f"run {run}: {text}" for text in (*said["hangs"], *said["bugs"])]
    if said["wrong_bytes"]:
        row.problems.append(f"run {run}: {said['wrong_bytes']} wrong bytes")
    bad = [(ended, outcome) for _, ended, _, outcome, _ in said["diary"] if outcome != "hit"]
    for _, _, _, outcome, more in said["diary"]:
        if outcome != "hit":
            row.details[more] = row.details.get(more, 0) + 1
    row.misses += sum(outcome == "miss" for _, outcome in bad)
    for _, outcome in bad:
        if outcome != "miss":
            row.errors += 1
            row.kinds[outcome] = row.kinds.get(outcome, 0) + 1
    row.outage_s = max([row.outage_s, *(ended - stage.began for ended, _ in bad if ended <= stage.over)])
    recovery = max((ended - stage.over for ended, _ in bad), default=0.0)
    row.recovery_s = max(row.recovery_s, recovery)
    if scenario.lossless and row.misses:
        row.problems.append(f"run {run}: {row.misses} requests missed, and nothing was lost")
    if not after["clean"]:
        row.problems.append(f"run {run}: {SETTLE_S:g} s later not every prompt is found: {after['last']}")
    elif recovery > RECOVERY_S:
        row.problems.append(f"run {run}: requests missed or failed until {recovery:.1f} s after the fault, {RECOVERY_S:g} s allowed")


async def clean(stage: Stage, since: float) -> dict[str, Any]:
    return await stage.client.ask("clean", since=since, patience_s=SETTLE_S, timeout_s=3 * SETTLE_S)


async def company(jobs: list[tuple[Scenario, Row, int]]) -> None:
    """Play ``jobs`` one after the other on one stage; a new one after a run that went wrong."""
    while jobs:
        try:
            async with Stage() as stage:
                while jobs:
                    scenario, row, run = jobs.pop(0)
                    begin, known = time.monotonic(), len(row.problems)
                    try:
                        await play(stage, scenario, row, run)
                    except Exception as error:  # noqa: BLE001  one broken run must not hide the others
                        row.problems.append(f"run {run}: {type(error).__name__}: {error}")
                    print(f"{scenario.name}, run {run}: {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)
                    if scenario.litters and len(row.problems) == known:
                        break
                    if len(row.problems) > known:
                        row.problems += [f"{n}: {p.last_words(400)}" for n, p in stage.nodes.items()]
                        break
        except (OSError, RuntimeError, TimeoutError) as error:
            if not jobs:
                raise
            scenario, row, run = jobs.pop(0)
            row.problems.append(f"run {run}: no stage: {type(error).__name__}: {error}")


async def everything(scenarios: list[Scenario], runs: int, at_once: int) -> list[Row]:
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: what was started ends with us
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    rows = [Row(s.name) for s in scenarios]
    jobs = [(s, row, run) for run in range(runs) for s, row in zip(scenarios, rows, strict=True)]
    async with asyncio.TaskGroup() as group:
        for _ in range(min(at_once, len(jobs))):
            group.create_task(company(jobs))
    return rows


def show(rows: list[Row], console: Console) -> None:
    table = Table("scenario", title="misses and errors are requests; seconds are the worst of all runs")
    for name in ("runs", "requests", "faults", "misses", "errors", "wrong bytes", "hangs", "slowest, s", "outage, s", "recovery, s"):
        table.add_column(name, justify="right")
    for row in rows:
        numbers = (row.runs, row.requests, row.faults, row.misses, row.errors, row.wrong_bytes, row.hangs)
        seconds = (f"{row.slowest_s:.1f}", f"{row.outage_s:.1f}", f"{row.recovery_s:.1f}")
        table.add_row(row.scenario, *(f"{n:,}" for n in numbers), *seconds, style="red" if row.bad else None)
    console.print(table)
    for row in rows:
        for problem in row.problems:
            console.print(f"{row.scenario}: {problem}", style="red", markup=False, highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.cluster_faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1, help="of each scenario")
    parser.add_argument("--only", default="", help="scenarios with this in their name (upper or lower case)")
    parser.add_argument("--quick", action="store_true", help="only the short run's")
    parser.add_argument("--at-once", type=int, default=2, help="clusters side by side, each playing its scenarios")
    parser.add_argument("--list", action="store_true", help="name the scenarios, and do nothing")
    parser.add_argument("--json", metavar="PATH", help="write the table to this file; '-' is standard output")
    args = parser.parse_args()
    scenarios = [s for s in SCENARIOS if args.only.lower() in s.name.lower() and (s.quick or not args.quick)]
    if args.list:
        print("\n".join(s.name for s in scenarios))
        return 0
    if not scenarios:
        parser.error(f"no scenario has {args.only!r} in its name; --list names them")
    if (reason := why_not()) is not None:
        print(f"make test-cluster puts processes into network namespaces: {reason}", file=sys.stderr)
        return 2
    begun = time.monotonic()
    try:
        rows = asyncio.run(everything(scenarios, args.runs, args.at_once))
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("interrupted: everything that was started has ended", file=sys.stderr)
        return 130
    to_stdout = args.json == "-"
    console = Console(stderr=to_stdout, width=None if sys.stdout.isatty() else 150)
    show(rows, console)
    took_s = time.monotonic() - begun
    console.print(f"{sum(r.runs for r in rows)} runs in {took_s:.0f} s")
    if args.json is not None:
        body = json.dumps({"took_s": took_s, "rows": [asdict(r) for r in rows]}, indent=1) + "\n"
        if to_stdout:
            print(body, end="")
        else:
            Path(args.json).parent.mkdir(parents=True, exist_ok=True)
            Path(args.json).write_text(body)
    return 1 if any(r.bad for r in rows) else 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
