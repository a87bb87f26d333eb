"""Pictures of what the commands measured, drawn from the JSON they print. matplotlib is imported when one is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError

FORMATS = (".svg", ".png", ".pdf")
OURS, OTHERS, FAINT = "#c2410c", "#475569", "#cbd5e1"
Body = Mapping[str, Any]


def check(path: Path | None) -> None:
    """Raises ConfigError when ``path`` cannot become a picture here; call it before measuring anything."""
    if path is None:
        return
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--plot writes {', '.join(FORMATS)}, not {path.suffix or path.name!r}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"cannot write {path}: there is no directory {path.absolute().parent}")
    _matplotlib()


def save(path: Path | None, body: Body) -> None:
    """Draw ``body`` (the JSON object of a command) into ``path``; nothing for None."""
    if path is None:
        return
    drawn = figure(body)
    if drawn is None:
        raise ConfigError(f"there is no picture of 'kvbench {body.get('command')}'")
    try:
        drawn.savefig(path, bbox_inches="tight")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error


def figure(body: Body) -> Any:
    """A matplotlib figure of the JSON object of any command; None for one without a picture."""
    draw = DRAWERS.get(str(body.get("command")))
    return None if draw is None else draw(body)


def _matplotlib() -> Any:
    try:
        import matplotlib as mpl
    except ImportError:
        raise ConfigError("pictures need matplotlib: pip install 'kvtransport[bench]'") from None
    mpl.use("Agg")
    return mpl


def _axes(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    _matplotlib()
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"})
    drawn, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")
    plt.close(drawn)
    return drawn, axes


# -- wan ------------------------------------------------------------------------------------------------


def wan(body: Body) -> Any:
    """Ours beside the best of iperf3, steady and cold; below, goodput over time around each change."""
    cells, changes = body["cells"], body["changes"]
    drawn, axes = _axes(
        2 if changes else 1, max(2, len(changes)), max(8.0, 3.2 * len(changes)), 6.5 if changes else 3.5
    )
    names = [f"{c['conditions']['rtt_ms']:g} ms\n{c['conditions']['loss_percent']:g}%" for c in cells]
    for axis, kind in zip(axes[0], ("steady", "cold"), strict=False):
        there = [(n, c[kind]) for n, c in zip(names, cells, strict=True) if c[kind] is not None]
        for i, (_, each) in enumerate(there):
            for name, tried in each["iperf3"].items():
                axis.plot(
                    [i - 0.2],
                    [tried["goodput_gbps"]],
                    "_",
                    color=FAINT,
                    label="iperf3, each setting" if name and i == 0 and name == next(iter(each["iperf3"])) else None,
                )
        axis.bar(
            [i - 0.2 for i in range(len(there))],
            [e["best_gbps"] for _, e in there],
            0.38,
            color=OTHERS,
            label="best of iperf3",
            zorder=0,
        )
        axis.bar(
            [i + 0.2 for i in range(len(there))],
            [e["ours_gbps"] for _, e in there],
            0.38,
            color=OURS,
            label="ours, no flag set",
            zorder=0,
        )
        axis.set_xticks(range(len(there)), [n for n, _ in there])
        axis.set_ylabel("Gbps")
        axis.set_title("steady" if kind == "steady" else "the first 256 MiB of a fresh link")
        axis.legend(loc="lower center", fontsize=7, framealpha=0.9)
    for axis in axes[0][2:]:
        axis.axis("off")
    for axis, change in zip(axes[1] if changes else [], changes, strict=False):
        for each in change["rounds"]:
            line = each["series_gbps"]
            axis.plot([0.1 * (i + 0.5) - each["changed_at_s"] for i in range(len(line))], line, color=OURS, lw=0.8)
            axis.axhline(0.9 * each["reference_gbps"], color=OTHERS, lw=0.8, ls=":")
        axis.axvline(0, color=OTHERS, lw=0.8)
        axis.set_ylim(0)
        before, after = change["before"], change["after"]
        axis.set_title(
            f"{before['rtt_ms']:g} ms, {before['loss_percent']:g}% to {after['rtt_ms']:g} ms, {after['loss_percent']:g}%",
            fontsize=8,
        )
        axis.set_xlabel("s after the change")
    return drawn


DRAWERS: dict[str, Callable[[Body], Any]] = {"wan": wan}
