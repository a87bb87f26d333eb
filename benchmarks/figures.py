"""Markdown tables of docs/performance.md from what ``benchmarks/record.sh`` saved: ``python benchmarks/figures.py [DIRECTORY]``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def load(directory: Path, pattern: str) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(directory.glob(pattern))}


def shown(spread: dict[str, Any], digits: int = 2) -> str:
    """Median (quartiles)."""
    return f"{spread['median']:.{digits}f} ({spread['q1']:.{digits}f}-{spread['q3']:.{digits}f})"


def table(headings: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(headings) + " |")
    print("|" + "---|" * len(headings))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def loopback(found: dict[str, dict[str, Any]]) -> None:
    rows = []
    for body in sorted(found.values(), key=lambda b: (not b["contiguous"], b["checksum"], b["connections"])):
        for kind, each in body["baseline"].items():
            rows.append(
                [
                    "contiguous" if body["contiguous"] else f"pages of {body['page_bytes']:,}",
                    "xxh3" if body["checksum"] else "unchecked",
                    str(body["connections"]),
                    shown(body["goodput_gbps_spread"], 1),
                    f"{kind}, {each['goodput_gbps']['median']:.1f}",
                    shown(each["goodput_ratio"], 3),
                    shown(each["cpu_ratio"]),
                ]
            )
    table(["memory", "checksums", "connections", "ours, Gbps", "C loop, Gbps", "ours / C", "CPU, ours / C"], rows)


def peers(found: dict[str, dict[str, Any]]) -> None:
    for run in (run for body in found.values() for run in body["runs"]):
        everyone = {
            "C loop": run["c"],
            "kvtransport": run["kvtransport"],
            **{p["title"]: p for p in run["peers"].values()},
        }
        rows = []
        for title, peer in everyone.items():
            p50 = "-" if peer["p50_us"] is None else f"{peer['p50_us']:.0f} us"
            for i, (op, by_block) in enumerate(peer["moves"].items() or [("-", {})]):
                over = peer.get("ours_over_it", {}).get("objects", {}) if i == 0 else {}
                cells = [
                    f"{by['gb_per_s']['median']:.2f}" + (f" ({over[block]['median']:.2f}x)" if block in over else "")
                    for block, by in by_block.items()
                ] or ["-", "-", "-"]
                at = by_block.get(str(1 << 20))
                cpu = "-" if at is None else f"{at['initiator_cpu_s_per_gb']:.2f} + {at['target_cpu_s_per_gb']:.2f}"
                rows.append([title if i == 0 else "", op, *cells, cpu, p50 if i == 0 else ""])
        print(
            f"{run['congestion']}; void: {', '.join(run['void']) or 'none'}; not there: {', '.join(run['not_installed']) or 'none'}\n"
        )
        table(["", "operation", "64 KiB", "1 MiB", "4 MiB", "CPU s/GB at 1 MiB", "4 KiB p50"], rows)


def wan(found: dict[str, dict[str, Any]]) -> None:
    rows = []
    for cell in (cell for body in found.values() for cell in body["cells"]):
        at, steady, cold = cell["conditions"], cell["steady"], cell["cold"]
        ran = steady["ours"][-1]
        first = ["-", "-", "-"]
        if cold is not None:
            first = [f"{cold['best']}: {cold['best_gbps']:.2f}", f"{cold['ours_gbps']:.2f}", f"{cold['ratio']:.2f}"]
        rows.append(
            [
                f"{at['rtt_ms']:g} ms, {at['loss_percent']:g}%",
                f"{steady['best']}: {steady['best_gbps']:.2f}",
                f"{steady['ours_gbps']:.2f} ({ran['congestion']} x{ran['connections']})",
                f"{steady['ratio']:.2f}",
                *first,
            ]
        )
    table(["RTT, loss", "best of iperf3", "ours", "ratio", "cold: best", "ours", "ratio"], rows)
    rows = []
    for change in (change for body in found.values() for change in body["changes"]):
        before, after = change["before"], change["after"]
        rows.append(
            [
                f"{before['rtt_ms']:g} ms, {before['loss_percent']:g}%",
                f"{after['rtt_ms']:g} ms, {after['loss_percent']:g}%",
                ", ".join("never" if r["recovery_s"] is None else f"{r['recovery_s']:.1f}" for r in change["rounds"]),
                ", ".join(f"{r['after_3_s_ratio']:.2f}" for r in change["rounds"]),
            ]
        )
    if rows:
        table(["from", "to", "s to 0.9, each round", "goodput after 3 s, of the best"], rows)


def others(found: dict[str, dict[str, Any]]) -> None:
    for body in found.values():
        if body["command"] == "crowd":
            print(f"{body['options']['count']} at once over one of the same bytes: {shown(body['many_over_one'], 3)}")
            print(
                f"urgent behind bulk over alone: {shown(body['urgent_ratio'])} of {body['urgent_alone_s']['median'] * 1e3:.2f} ms\n"
            )
        elif body["command"] == "pipeline":
            exposed, bound = body["exposed_s"]["median"] * 1e3, body["bound_s"]["median"] * 1e3
            within = f"{body['within_bound']} of {len(body['rounds'])} rounds within the bound"
            covers = "" if body["compute_covers_transfer"] else "; a layer travels longer than it computes"
            print(f"pipeline, {body['path']}: {exposed:.1f} ms after prefill, bound {bound:.1f} ms, {within}{covers}\n")


def main() -> None:
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results")
    for draw, pattern in (
        (loopback, "loopback-*.json"),
        (loopback, "tls-*.json"),  # against SSL_write and SSL_read
        (others, "[cp][ri]*.json"),
        (peers, "peers-*.json"),
        (wan, "wan-*.json"),
    ):
        found = load(directory, pattern)
        if found:
            draw(found)
            busy = max(body["recorded"]["load_average_before"] for body in found.values())
            print(f"Load average before these runs: at most {busy:.1f}.\n")


if __name__ == "__main__":
    main()
