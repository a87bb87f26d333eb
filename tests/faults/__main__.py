"""Faults with real sockets and processes, in network namespaces: a table, and JSON. Needs root.

python -m tests.faults                       every scenario, in both directions, with and without a cancel
python -m tests.faults --runs 5 --only black
python -m tests.faults --aborts 10000        only the aborted transfers
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kvtransport.bench.emulator import why_not

from .aborts import aborted_transfers
from .addresses import SCENARIOS as ADDRESSES
from .addresses import play_address
from .bits import FLIPS, play_flip
from .party import DEAD_AFTER_S, RECONNECT_S
from .scenarios import SCENARIOS, Scenario
from .stage import DEADLINE_S, Stage, error_of

CANCEL_S = 2.0
"""A cancel may take this long."""
SLACK_S = 5.0
"""For a busy machine."""


@dataclass(slots=True)
class Row:
    """What the runs of one scenario came to. Recovery, seconds: from the end of the fault to the next byte in place;
    where nothing can recover, from the fault to the error on the side that waits longest; for a cancel, how long it took.
    """

    scenario: str
    runs: int = 0
    wrong_bytes: int = 0
    hangs: int = 0
    failed: int = 0
    worst_recovery_s: float = 0.0
    outcomes: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def outcome(self, text: str) -> None:
        self.outcomes[text] = self.outcomes.get(text, 0) + 1

    def problem(self, text: str) -> None:
        self.failed += 1
        self.problems.append(text)


async def play(scenario: Scenario, row: Row, run: int, cancel: bool) -> None:
    pull = run % 2 == 1
    async with Stage(relay=scenario.relay, pull=pull, seed=run) as stage:
        await stage.begin()
        await stage.midway()
        playing = asyncio.create_task(_as_coroutine(scenario, stage))
        row.runs += 1
        if cancel:
            await _cancel(scenario, stage, row, run)
        await playing
        bound = DEADLINE_S + SLACK_S if not scenario.ends else DEAD_AFTER_S + RECONNECT_S + SLACK_S
        waited = [stage.sent, stage.got]
        if scenario.name == "consumer frozen for good":
            waited = [stage.sent]
        _, late = await asyncio.wait(waited, timeout=bound)
        if late:
            row.hangs += len(late)
            row.problem(f"run {run}: no outcome in {bound:g} s")
            return
        if not cancel:
            await _judge(scenario, stage, row, run)
        elif all(future.done() and not future.result().get("error") for future in waited):
            row.problem(f"run {run}: the transfer was over before it was cancelled; this run shows nothing")
        if scenario.rejoin:
            await _rejoin(stage, row, run)


async def _as_coroutine(scenario: Scenario, stage: Stage) -> None:
    await scenario.play(stage)


async def _judge(scenario: Scenario, stage: Stage, row: Row, run: int) -> None:
    sent = stage.sent.result()
    got = stage.got.result() if stage.got.done() else {"error": {"code": "killed", "message": "frozen"}, "at": 0.0}
    codes = [(said.get("error") or {}).get("code", "sealed") for said in (sent, got)]
    row.outcome("/".join(codes))
    if stage.began and got["at"] and got["at"] < stage.began:
        row.problem(f"run {run}: the transfer was over before the fault began; this run shows nothing")
    if not scenario.ends:
        if codes != ["sealed", "sealed"]:
            row.problem(f"run {run}: {error_of(sent)!r} and {error_of(got)!r}")
            return
        row.wrong_bytes += got["wrong_bytes"]
        if stage.over:
            progress = await stage.consumer.ask("progress", after=stage.over)
            row.wrong_bytes += progress["wrong_ranges"]
            first = progress["first"] if progress["first"] is not None else stage.over
            row.worst_recovery_s = max(row.worst_recovery_s, first - stage.over)
        return
    for code, said in zip(codes, (sent, got), strict=True):
        if code not in scenario.ends and not (code == "killed" and said["at"] == 0.0):
            row.problem(f"run {run}: ended with {code}: {(said.get('error') or {}).get('message')}")
    row.worst_recovery_s = max(row.worst_recovery_s, max(sent["at"], got["at"]) - stage.began)


async def _cancel(scenario: Scenario, stage: Stage, row: Row, run: int) -> None:
    """One side changes its mind in the middle of the fault; its memory is its own as soon as cancel returns."""
    await asyncio.sleep(0.05 + 0.1 * (run % 3))
    side = "producer" if run // 2 % 2 else "consumer"
    if side == scenario.frozen:
        side = "producer" if side == "consumer" else "consumer"
    child = getattr(stage, side)
    if scenario.rejoin and child is not stage.dialler:
        child, side = stage.dialler, "consumer" if stage.pull else "producer"
    said = await asyncio.wait_for(child.begin("cancel", watch_s=1.0), 30)
    if "took_s" not in said:
        row.outcome(f"{side}: {said['error']['code']}")
        if said["error"]["code"] != "killed":
            row.problem(f"run {run}: cancel failed: {said['error']}")
        return
    row.outcome(f"{side} cancelled")
    row.worst_recovery_s = max(row.worst_recovery_s, said["took_s"])
    if said["touched"]:
        row.wrong_bytes += said["touched"]
        row.problem(f"run {run}: {said['touched']} bytes were touched after cancel returned")
    if said["took_s"] > CANCEL_S:
        row.hangs += 1
        row.problem(f"run {run}: cancel took {said['took_s']:.1f} s")


async def _rejoin(stage: Stage, row: Row, run: int) -> None:
    """The one that lives on goes on with the one that is new."""
    await stage.dial()
    await stage.begin()
    sent, got = await asyncio.wait_for(asyncio.gather(stage.sent, stage.got), DEADLINE_S + SLACK_S)
    if error_of(sent) or error_of(got):
        row.problem(f"run {run}: no transfer after the rejoin: {error_of(sent)!r} and {error_of(got)!r}")
    else:
        row.wrong_bytes += got["wrong_bytes"]


async def everything(runs: int, only: str, at_once: int, aborts: int, cancels: bool) -> list[Row]:
    rows: list[Row] = []
    gate = asyncio.Semaphore(at_once)

    async def guarded(row: Row, run: int, one: Callable[[], Awaitable[None]]) -> None:
        async with gate:
            begun = time.monotonic()
            try:
                await one()
            except Exception as error:  # noqa: BLE001  one broken run must not hide the others
                row.problem(f"run {run}: {type(error).__name__}: {error}")
            print(f"{row.scenario}, run {run}: {time.monotonic() - begun:.1f} s", file=sys.stderr, flush=True)

    async with asyncio.TaskGroup() as group:
        for cancel in (False, True) if cancels else (False,):
            for scenario in SCENARIOS:
                name = scenario.name + (", cancel" if cancel else "")
                if only not in name:
                    continue
                row = Row(name)
                rows.append(row)
                for run in range(runs):
                    one = lambda s=scenario, r=row, n=run, c=cancel: play(s, r, n, c)  # noqa: E731
                    group.create_task(guarded(row, run, one))
        for flip in FLIPS:
            if only in flip.name:
                row = Row(flip.name)
                rows.append(row)
                for run in range(runs):
                    one = lambda f=flip, r=row, n=run: play_flip(f, r, n)  # noqa: E731
                    group.create_task(guarded(row, run, one))
        for name in ADDRESSES:
            if only in name:
                row = Row(name)
                rows.append(row)
                for run in range(runs):
                    one = lambda a=name, r=row, n=run: play_address(a, r, n)  # noqa: E731
                    group.create_task(guarded(row, run, one))
    if aborts and only in "aborted transfers":
        row = Row(f"{aborts} aborted transfers")
        rows.append(row)
        await guarded(row, 0, lambda: aborted_transfers(row, aborts))
    return rows


def show(rows: list[Row]) -> None:
    table = Table("scenario", "runs", "wrong bytes", "hangs", "worst recovery, s", "outcomes")
    for row in rows:
        style = "red" if row.failed or row.hangs or row.wrong_bytes else None
        said = ", ".join(f"{n} {key}" for key, n in sorted(row.outcomes.items()))
        recovery = f"{row.worst_recovery_s:.2f}"
        table.add_row(row.scenario, str(row.runs), str(row.wrong_bytes), str(row.hangs), recovery, said, style=style)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for row in rows:
        for problem in row.problems:
            console.print(f"{row.scenario}: {problem}", style="red", markup=False)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--runs", type=int, default=2, help="of each scenario; odd ones go against the direction of the dial"
    )
    parser.add_argument("--only", default="", help="scenarios with this in their name")
    parser.add_argument("--at-once", type=int, default=6, help="scenarios played at the same time")
    parser.add_argument("--aborts", type=int, default=10_000, help="aborted transfers (0: none)")
    parser.add_argument("--no-cancels", action="store_true", help="without the second half")
    parser.add_argument("--json", type=Path, help="write the table to this file")
    args = parser.parse_args()
    if (reason := why_not()) is not None:
        print(f"make test-faults makes packets vanish in network namespaces: {reason}", file=sys.stderr)
        return 2
    begun = time.monotonic()
    rows = asyncio.run(everything(args.runs, args.only, args.at_once, args.aborts, not args.no_cancels))
    show(rows)
    took_s = time.monotonic() - begun
    print(f"{sum(r.runs for r in rows)} runs in {took_s:.0f} s")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"took_s": took_s, "rows": [asdict(r) for r in rows]}, indent=1) + "\n")
    return 1 if any(r.failed or r.hangs or r.wrong_bytes for r in rows) or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
