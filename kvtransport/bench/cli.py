"""``kvbench``: the command, and where its subcommands are registered."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..errors import KVError
from . import models as models_command
from .output import console, write_json

app = typer.Typer(
    name="kvbench",
    help="Benchmarks of kvtransport: what there is to move, and how fast it moves.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="PATH", help="Write one JSON object to PATH; '-' is standard output."),
]
"""``--json`` of every subcommand; see :mod:`kvtransport.bench.output`."""


@app.callback()
def _root() -> None:
    # With a callback Typer keeps subcommands even while there is only one.
    pass


@app.command(
    "models",
    epilog="Examples:  [bold]kvbench models[/]   |   [bold]kvbench models --json -[/]   |   "
    "[bold]kvbench models --json models.json[/]",
)
def models(json_to: JsonOption = None) -> None:
    """Cache sizes of the paper's models at 1K, 8K, 32K and 128K tokens, from their public geometry.

    Beside them the prefill time the paper's KV throughput implies, and the paper's ratios (13x, 4x, 36x)
    computed again: published, computed, and why where they differ. K is 1,024 tokens.
    """
    models_command.render(console(json_to))
    write_json(json_to, models_command.report())


def main() -> None:
    """Entry point of ``kvbench``: an error of ours is one line on standard error and exit code 2."""
    try:
        app()
    except KVError as error:
        print(f"kvbench: {error.code} error: {error.message}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
