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


# -- peers ----------------------------------------------------------------------------------------------


def peers(body: Body) -> Any:
    """GB/s of everyone's best operation by block size, a row of bars per congestion control."""
    runs, blocks = body["runs"], [str(b) for b in body["options"]["blocks"]]
    drawn, axes = _axes(len(runs), len(blocks), 3.4 * len(blocks), 2.9 * len(runs))
    for row, run in zip(axes, runs, strict=True):
        everyone = {"C loop": run["c"], "kvtransport": run["kvtransport"]}
        everyone |= {n: p for n, p in run["peers"].items() if not p["latency_only"]}
        for axis, block in zip(row, blocks, strict=True):
            names, lows, middles, highs = [], [], [], []
            for name, each in everyone.items():
                tried = [by[block]["gb_per_s"] for by in each["moves"].values() if block in by]
                if tried:
                    best = max(tried, key=lambda s: float(s["median"]))
                    names.append(name)
                    middles.append(best["median"])
                    lows.append(best["median"] - best["q1"])
                    highs.append(best["q3"] - best["median"])
            colours = [OURS if n == "kvtransport" else FAINT if n == "C loop" else OTHERS for n in names]
            axis.barh(names, middles, xerr=[lows, highs], color=colours, error_kw={"lw": 0.8})
            axis.invert_yaxis()
            size = int(block)
            words = f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
            axis.set_title(f"{words}, {run['congestion']}", fontsize=9)
            axis.set_xlabel("GB/s")
    return drawn


# -- pipeline -------------------------------------------------------------------------------------------


def pipeline(body: Body) -> Any:
    """Of the median round, when every layer was ready, on its way, and in place; beside it what was left after prefill."""
    rounds = sorted(body["rounds"], key=lambda r: float(r["exposed_s"]))
    shown = rounds[len(rounds) // 2]
    drawn, axes = _axes(1, 2, 10.0, 4.2)
    axis = axes[0][0]
    before = 0.0
    for i, layer in enumerate(shown["layers"]):
        ready, applied = layer["ready_s"], layer["applied_s"]
        if ready is None:
            continue
        axis.barh(i, ready - before, left=before, color=FAINT, height=0.8, label="computed" if i == 0 else None)
        before = ready
        if applied is not None:
            axis.barh(i, applied - ready, left=ready, color=OURS, height=0.8, label="on its way" if i == 0 else None)
    axis.axvline(shown["prefill_s"], color=OTHERS, lw=0.8)
    axis.axvline(shown["sealed_s"], color=OTHERS, lw=0.8, ls=":")
    axis.invert_yaxis()
    axis.set_xlabel("s since prefill began")
    axis.set_ylabel("layer")
    axis.set_title(f"{body['preset']}, {body['tokens']:,} tokens, {body['path']}", fontsize=9)
    axis.legend(loc="lower left", fontsize=7)
    axis = axes[0][1]
    numbers = range(1, len(body["rounds"]) + 1)
    axis.plot(
        numbers, [r["exposed_s"] * 1e3 for r in body["rounds"]], "o", color=OURS, label="end of prefill to sealed"
    )
    axis.plot(
        numbers, [r["bound_s"] * 1e3 for r in body["rounds"]], "_", color=OTHERS, ms=14, label="last layer + 1.5 RTT"
    )
    axis.plot(numbers, [r["bulk_seconds"] * 1e3 for r in body["rounds"]], "x", color=FAINT, label="sent after prefill")
    axis.set_yscale("log")
    axis.set_xlabel("round")
    axis.set_ylabel("ms")
    axis.legend(fontsize=7)
    return drawn


# -- sweep ----------------------------------------------------------------------------------------------


def sweep(body: Body) -> Any:
    """Goodput over connections, a line per chunk size, a panel per page size; the C loop beside them."""
    cells = body["cells"]
    pages = list(dict.fromkeys(c["page_bytes"] for c in cells))
    drawn, axes = _axes(1, len(pages), 4.2 * len(pages), 3.4)
    shades = ("#fdba74", "#f97316", "#c2410c", "#7c2d12")
    for axis, page in zip(axes[0], pages, strict=True):
        here = [c for c in cells if c["page_bytes"] == page]
        for i, chunk in enumerate(dict.fromkeys(c["chunk_bytes"] for c in here)):
            line = [c for c in here if c["chunk_bytes"] == chunk]
            xs = [c["connections"] for c in line]
            gbps = [c["goodput_gbps"] for c in line]
            axis.plot(
                xs,
                [g["median"] for g in gbps],
                "o-",
                color=shades[i % len(shades)],
                label=f"chunks of {chunk >> 10} KiB",
                ms=3,
            )
            axis.fill_between(
                xs, [g["q1"] for g in gbps], [g["q3"] for g in gbps], color=shades[i % len(shades)], alpha=0.15
            )
        first = {c["connections"]: c["c_gbps"] for c in here if c["c_gbps"] is not None}
        if first:
            axis.plot(list(first), [s["median"] for s in first.values()], "--", color=OTHERS, label="C loop", lw=1)
        axis.set_ylim(0)
        axis.set_xlabel("connections")
        axis.set_ylabel("Gbps")
        axis.set_title("contiguous" if page == 0 else f"pages of {page:,} bytes", fontsize=9)
        axis.legend(fontsize=7)
    return drawn


# -- loopback and send ----------------------------------------------------------------------------------


def rounds(body: Body) -> Any:
    """Goodput of every round; the C loop's beside it where there was one."""
    drawn, axes = _axes(1, 1, 5.0, 3.0)
    axis = axes[0][0]
    reached = [r["goodput_gbps"] for r in body["rounds"]]
    axis.plot(range(1, len(reached) + 1), reached, "o-", color=OURS, label="kvtransport", ms=3)
    for kind, each in (body.get("baseline") or {}).items():
        best = each["rounds"][f"{kind}-{each['receive_bytes'] >> 10}KiB"]
        style = "--" if kind == "plain" else ":"
        axis.plot(
            range(1, len(best) + 1),
            [r["goodput_gbps"] for r in best],
            style,
            color=OTHERS,
            label=f"C loop, {kind}",
            lw=1,
        )
    axis.set_ylim(0)
    axis.set_xlabel("round")
    axis.set_ylabel("Gbps")
    axis.legend(fontsize=7)
    return drawn


def crowd(body: Body) -> Any:
    """Rounds of one transfer and of many; rounds of the urgent one alone and behind bulk."""
    drawn, axes = _axes(1, 2, 8.0, 3.0)
    for axis, kinds, key, scale, unit in (
        (axes[0][0], ("one", "many"), "goodput_gbps", 1.0, "Gbps"),
        (axes[0][1], ("urgent_alone", "urgent_behind_bulk"), "urgent_s", 1e3, "ms"),
    ):
        for kind, colour in zip(kinds, (OTHERS, OURS), strict=True):
            reached = [r[key] * scale for r in body["rounds"][kind]]
            axis.plot(range(1, len(reached) + 1), reached, "o-", color=colour, label=kind.replace("_", " "), ms=3)
        axis.set_ylim(0)
        axis.set_xlabel("round")
        axis.set_ylabel(unit)
        axis.legend(fontsize=7)
    return drawn


DRAWERS: dict[str, Callable[[Body], Any]] = {
    "crowd": crowd,
    "loopback": rounds,
    "peers": peers,
    "pipeline": pipeline,
    "send": rounds,
    "sweep": sweep,
    "wan": wan,
}
