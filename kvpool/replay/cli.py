"""``kvpool replay``."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvpool.config import parse_size
from kvpool.eviction import DEFAULT_POLICY, POLICIES
from kvpool.scheduling.cli import fail, make_console, write_json
from kvpool.scheduling.traces import Trace, load_trace
from kvtransport import presets
from kvtransport.errors import ConfigError, KVError

from .clairvoyant import clairvoyant
from .run import Outcome, Replay, working_set_bytes
from .sweep import LAYOUTS, SHARES, blocks_in, is_exact, sweep
from .table import CLAIRVOYANT, SweepFile, claims, name_of

REPLAY_HELP = """Replay a request trace through the pool's index and eviction, without payload: what would have been hit?

TRACE is a packaged trace (mooncake-conversation, mooncake-conversation-full) or a file of JSON lines (also .gz, .xz), in Mooncake's \
format or in Qwen-Bailian's. Hit tokens are counted over input tokens.

A sweep writes its --json file after every row, and goes on with what that file has when it is given again; --again runs rows anew, \
all that --layout and --policy name.

Examples:

  kvpool replay mooncake-conversation --layout kimi-linear-48b --memory 60GB

  kvpool replay mooncake-conversation-full --layout qwen3-235b --memory unlimited --policy lru --json -

  kvpool replay trace.jsonl --layout qwen3.5-397b --memory 5% --policy all --plot out/

  kvpool replay mooncake-conversation-full --sweep --count-from 0.5 --jobs 4 --json table.json --plot out/
"""


def _share(text: str) -> float | None:
    """0.05 of "5%"; None of anything else. ConfigError for a share that is none."""
    if not text.endswith("%"):
        return None
    try:
        share = float(text[:-1]) / 100
    except ValueError:
        share = math.nan
    if not 0 < share < math.inf:
        raise ConfigError(f"{text!r} is not a share of the working set: write 5%")
    return share


def _policies(text: str | None) -> list[str]:
    if text is None:
        return [DEFAULT_POLICY]
    names = list(POLICIES) if text == "all" else text.split(",")
    for name in names:
        if name not in POLICIES:
            raise ConfigError(f"there is no eviction policy {name!r}: choose from {', '.join(POLICIES)} and all")
    return names


def replay_command(
    trace: Annotated[str, typer.Argument(help="A packaged trace or a file")],
    layout: Annotated[
        str | None, typer.Option(metavar="PRESET", help="Preset whose cache is kept (kvbench models lists them)")
    ] = None,
    memory: Annotated[
        str,
        typer.Option(metavar="SIZE", help="Memory of the pool: a size, a share of the working set (5%), or unlimited"),
    ] = "unlimited",
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"{', '.join(POLICIES)}, several with commas, or all \\[{DEFAULT_POLICY}]",
            show_default=False,
        ),
    ] = None,
    block_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of a block, a divisor of the trace's \\[the trace's]", min=1, show_default=False),
    ] = None,
    count_from: Annotated[
        float, typer.Option(help="Count hits from this share of the requests on", min=0.0, max=0.99)
    ] = 0.0,
    sweeping: Annotated[
        bool, typer.Option("--sweep", help="Policies x memory x layouts; --layout and --policy narrow it")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Run rows of a sweep anew that the --json file has")] = False,
    jobs: Annotated[
        int | None, typer.Option(help="Processes of a sweep \\[all cores]", min=1, show_default=False)
    ] = None,
    json_path: Annotated[
        str | None, typer.Option("--json", metavar="PATH", help="Write one JSON object; '-' is standard output.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FOLDER", help="Write pictures (PNG and SVG) there.")
    ] = None,
) -> None:
    try:
        _check(sweeping, memory, again, jobs, json_path, plot)
        loaded = load_trace(trace)
        first = int(count_from * len(loaded))
        console = make_console(json_path)
        if sweeping:
            names = layout.split(",") if layout is not None else list(LAYOUTS)
            policies = _policies(policy or "all")
            settings = {"trace": trace, "count_from": count_from, "requests_counted": len(loaded) - first}
            if block_tokens is not None:
                settings["block_tokens"] = block_tokens
            path = None if json_path in (None, "-") else Path(json_path)
            table = SweepFile(settings, path)
            _sweep(loaded, names, policies, first, jobs, block_tokens, console, table, again=again)
            if plot is not None:
                from .plots import sweep_picture

                for picture in sweep_picture(table.rows(LAYOUTS, list(POLICIES)), plot):
                    console.print(f"wrote {picture}")
            if json_path == "-":
                write_json(table.body(), json_path)
        else:
            if layout is None:
                raise ConfigError("say whose cache is kept: --layout PRESET (kvbench models lists them)")
            body = _replays(loaded, layout, memory, _policies(policy), first, block_tokens, console, plot)
            if json_path is not None:
                write_json({"trace": trace, **body}, json_path)
    except (KVError, OSError) as error:
        raise fail(error) from error


def _check(
    sweeping: bool, memory: str, again: bool, jobs: int | None, json_path: str | None, plot: Path | None
) -> None:
    """Refuse, before minutes of work, what does not go together or cannot be written. Raises ConfigError, OSError."""
    if sweeping and memory != "unlimited":
        shares = ", ".join(f"{share:.0%}" for share in SHARES)
        raise ConfigError(f"a sweep has its own memory sizes ({shares} of the working set): leave out --memory")
    if not sweeping and (again or jobs is not None):
        raise ConfigError("--again and --jobs are of a sweep: give --sweep, too")
    if json_path is not None and json_path != "-" and not Path(json_path).absolute().parent.is_dir():
        raise ConfigError(f"there is no folder for {json_path}: make it first")
    if plot is not None:
        from kvpool.scheduling.plots import load_pyplot

        load_pyplot()
        plot.mkdir(parents=True, exist_ok=True)


def _replays(
    trace: Trace,
    name: str,
    memory: str,
    policies: list[str],
    first: int,
    block_tokens: int | None,
    console: Console,
    plot: Path | None,
) -> dict[str, Any]:
    layout = presets.load(name)
    share = _share(memory)
    nbytes = None if memory == "unlimited" or share is not None else parse_size(memory)
    outcomes: list[Outcome] = []
    with Progress(console=Console(stderr=True), transient=True) as bar:
        if share is not None:
            task = bar.add_task(f"{name} working set", total=1.0)
            whole = working_set_bytes(trace, layout, block_tokens, lambda part: bar.update(task, completed=part))
            nbytes = int(share * whole)
        for policy in policies:
            task = bar.add_task(f"{name} {policy}", total=1.0)
            replay = Replay(trace, layout, memory_bytes=nbytes, policy=policy, block_tokens=block_tokens)
            outcomes.append(replay.run(first, lambda part, task=task: bar.update(task, completed=part)))  # type: ignore[misc]
    exact = is_exact(layout)
    fits = None if nbytes is None else blocks_in(layout, nbytes, trace.block_tokens)
    best = clairvoyant(trace, fits, first=first, partial=not exact, exact=exact)
    rows = [
        {
            **outcome.as_dict(),
            "layout": name,
            "clairvoyant_token_hit_rate": best.token_hit_rate,
            "clairvoyant_kind": best.kind,
        }
        for outcome in outcomes
    ]
    _print_runs(console, name, nbytes, rows, best.kind)
    if plot is not None:
        from .plots import timeline_picture

        for path in timeline_picture(outcomes, plot, name=f"replay-{name}"):
            console.print(f"wrote {path}")
    return rows[0] if len(rows) == 1 else {"layout": name, "memory_bytes": nbytes, "runs": rows}


def _print_runs(console: Console, name: str, nbytes: int | None, rows: list[dict[str, Any]], kind: str) -> None:
    size = "unlimited memory" if nbytes is None else f"{nbytes / 1e9:,.1f} GB"
    table = Table(title=f"{name}, {size}, {rows[0]['requests']:,} requests")
    for title in ("policy", "tokens hit", "blocks hit", "FLOPs saved", "evictions", "checkpoints", "peak GB by group"):
        table.add_column(title, justify="left" if title == "policy" else "right")
    for row in rows:
        table.add_row(
            row["policy"],
            f"{row['token_hit_rate']:.2%}",
            f"{row['block_hit_rate']:.2%}",
            f"{row['flops_saved_rate']:.2%}",
            f"{row['evictions']:,}",
            f"{row['checkpoints_put']:,}",
            ", ".join(f"{g} {n / 1e9:,.1f}" for g, n in row["peak_bytes"].items()),
        )
    table.add_row(f"clairvoyant ({kind})", f"{rows[0]['clairvoyant_token_hit_rate']:.2%}", *[""] * 5)
    console.print(table)


def _sweep(
    trace: Trace,
    names: list[str],
    policies: list[str],
    first: int,
    jobs: int | None,
    block_tokens: int | None,
    console: Console,
    table: SweepFile,
    *,
    again: bool,
) -> None:
    layouts = {name: presets.load(name) for name in names}
    known = {name for name in table.names if not again or name[2] == CLAIRVOYANT}
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("sweep", total=1.0)
        sweep(
            trace,
            layouts,
            policies,
            SHARES,
            first=first,
            jobs=jobs or os.cpu_count() or 1,
            add=table.add,
            known=known,
            block_tokens=block_tokens,
            progress=lambda part, what: bar.update(task, completed=part, description=what),
        )
    table.save()
    rows = table.rows(names, list(POLICIES))
    for name in names:
        _print_sweep(console, name, [r for r in rows if r["layout"] == name])


def _print_sweep(console: Console, name: str, rows: list[dict[str, Any]]) -> None:
    policies = list(dict.fromkeys(r["policy"] for r in rows))
    table = Table(title=f"{name}: input tokens hit, %; {DEFAULT_POLICY} in points over lru and behind the best other")
    for title in ("memory", *policies, "over lru", "behind best"):
        table.add_column(title, justify="right")
    rates = {name_of(r)[1:]: r["token_hit_rate"] for r in rows}
    for claim in claims(rows):
        share = claim["memory_share"]
        table.add_row(
            f"{share:.0%}",
            *(f"{100 * rates[share, p]:.2f}" if (share, p) in rates else "-" for p in policies),
            _points(claim["over_lru_points"], "+.2f"),
            _points(claim["behind_best_points"], ".2f"),
        )
    console.print(table)


def _points(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def register(app: typer.Typer) -> None:
    """Add ``replay`` to ``app``."""
    app.command("replay", help=REPLAY_HELP)(replay_command)
