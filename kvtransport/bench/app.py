"""The ``kvbench`` application object and the options its commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError

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


PlotOption = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        metavar="PATH",
        help="Write a picture (.svg, .png or .pdf); needs matplotlib: pip install 'kvtransport\\[bench]'.",
    ),
]
"""``--plot`` of the commands that have something to draw; see :mod:`kvtransport.bench.plots`."""


def numbers(text: str, option: str, kind: type[float] | type[int] = float) -> tuple[float, ...]:
    """A comma-separated list of an option. Raises ConfigError naming the option."""
    try:
        found = tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(f"{option} takes numbers separated by commas, got {text!r}") from error
    if not found:
        raise ConfigError(f"{option} needs at least one number")
    return found


def integers(text: str, option: str) -> tuple[int, ...]:
    """:func:`numbers`, whole ones."""
    return tuple(int(n) for n in numbers(text, option, int))
