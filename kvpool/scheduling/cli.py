"""``kvpool plan`` and ``kvpool simulate``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from kvtransport.errors import ConfigError, KVError

from . import report
from .config import load_case, load_case_file
from .planner import purchases, sensitivity
from .sim import report as sim_report
from .sim.compare import compare_policies
from .sim.metrics import Recorder
from .sim.scenarios import Policy, load_scenario

PLAN_HELP = """Plan a PrfaaS deployment: threshold, instances by role, capacity, what binds and what more would buy.

Examples:

  kvpool plan --case paper                    the case study of arXiv 2604.15039 beside its published figures

  kvpool plan --case paper --json -           the same as one JSON object on standard output

  kvpool plan --config my.toml --plots out/   your own clusters, link, model and workload, with pictures
"""

Json = Annotated[
    str | None, typer.Option("--json", metavar="PATH", help="Write one JSON object; '-' is standard output.")
]
Plots = Annotated[Path | None, typer.Option("--plots", metavar="FOLDER", help="Write pictures (PNG and SVG) there.")]


def make_console(json_path: str | None) -> Console:
    """Pretty output goes to standard error when JSON takes standard output."""
    console = Console(stderr=json_path == "-", highlight=False)
    if not console.is_terminal:
        console.width = 120  # a file or a pipe has no width of its own
    return console


def write_json(body: dict[str, Any], json_path: str) -> None:
    """One JSON object, sorted as built; infinities become null."""
    text = json.dumps(_finite(body), indent=2, allow_nan=False) + "\n"
    if json_path == "-":
        sys.stdout.write(text)
    else:
        Path(json_path).write_text(text, encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    return value


def fail(error: Exception) -> typer.Exit:
    """Print an error for a person and end with status 2."""
    Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    return typer.Exit(2)


def plan_command(
    case: Annotated[str | None, typer.Option(help="A packaged case; 'paper' is the published case study.")] = None,
    config: Annotated[Path | None, typer.Option(help="A plan file (TOML); every key is in docs/scheduling.md.")] = None,
    json_path: Json = None,
    plots: Plots = None,
) -> None:
    try:
        if (case is None) == (config is None):
            raise typer.BadParameter("give exactly one of --case and --config")
        loaded = load_case(case) if case is not None else load_case_file(config or Path())
        console = make_console(json_path)
        comparison = report.compare(loaded)
        rows, bought = sensitivity(loaded.system), purchases(loaded.system)
        report.print_comparison(console, loaded, comparison)
        report.print_splits(console, comparison.plan)
        report.print_sensitivity(console, comparison.plan, rows, bought)
        if plots is not None:
            from .plots import plan_pictures

            for path in plan_pictures(loaded.system, comparison.plan, plots, title=loaded.title):
                console.print(f"wrote {path}")
        if json_path is not None:
            write_json(report.as_json(loaded, comparison, rows, bought), json_path)
    except (KVError, OSError) as error:
        raise fail(error) from error


SIMULATE_HELP = """Play a scenario under one policy, or all of them, on the planned clusters.

Examples:

  kvpool simulate --scenario steady --policy full-prfaas --load 0.9

  kvpool simulate --scenario link-loss --policy all --load 0.5,0.9,1.1 --seeds 5 --json table.json

  kvpool simulate --scenario bursts --policy all --load 0.9 --plots out/

Policies: homogeneous-pd, naive-heterogeneous, static-threshold, full-prfaas, all. Load is relative to the
capacity planned for full PrfaaS. The same seed plays the same requests to every policy.
"""


def _numbers(text: str, what: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{what} takes numbers separated by commas, got {text!r}") from error


def _policies(text: str) -> list[Policy]:
    if text == "all":
        return list(Policy)
    try:
        return [Policy(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"no policy {text!r}; there are {', '.join(Policy)} and all") from error


def simulate_command(
    scenario: Annotated[str, typer.Option(help="A packaged scenario or a TOML file.")] = "steady",
    policy: Annotated[str, typer.Option(help="One policy, several with commas, or all.")] = "full-prfaas",
    load: Annotated[str, typer.Option(help="Load over planned capacity; several with commas.")] = "0.9",
    requests: Annotated[int, typer.Option(help="Requests per run.", min=100)] = 20_000,
    seed: Annotated[int, typer.Option(help="First seed.", min=0)] = 1,
    seeds: Annotated[int, typer.Option(help="Runs per policy and load, each with its own seed.", min=1)] = 1,
    rebalance: Annotated[bool, typer.Option(help="Let full PrfaaS convert instances between roles.")] = True,
    json_path: Json = None,
    plots: Plots = None,
) -> None:
    try:
        loaded = load_scenario(scenario)
        console = make_console(json_path)
        kept: dict[Policy, Recorder] = {}

        def keep(which: Policy, at_load: float, at_seed: int, recorder: Recorder) -> None:
            if plots is not None:
                kept[which] = recorder

        loads, policies = _numbers(load, "--load"), _policies(policy)
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(f"simulating {scenario}", total=1.0)
            rows = compare_policies(
                loaded,
                policies,
                loads,
                range(seed, seed + seeds),
                requests=requests,
                progress=lambda part: bar.update(task, completed=part),
                keep=keep,
                rebalance=rebalance,
            )
        sim_report.print_rows(console, loaded, rows, requests=requests, seeds=seeds)
        if plots is not None:
            from .sim.pictures import run_pictures, table_picture

            title = f"{scenario}: {loaded.spec.title}"
            written = run_pictures(kept, plots, title=f"{title} (load {loads[-1]:g})")
            if len(loads) > 1:
                written += table_picture(rows, plots, name="policies", title=title)
            for path in written:
                console.print(f"wrote {path}")
        if json_path is not None:
            write_json(sim_report.as_json(loaded, rows, requests=requests, first_seed=seed, seeds=seeds), json_path)
    except (KVError, OSError) as error:
        raise fail(error) from error


def register(app: typer.Typer) -> None:
    """Add the scheduling commands to ``app``."""
    app.command("plan", help=PLAN_HELP)(plan_command)
    app.command("simulate", help=SIMULATE_HELP)(simulate_command)
