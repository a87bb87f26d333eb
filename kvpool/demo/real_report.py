"""What ``kvpool demo --real`` found: one JSON object, a table for people, and the verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from .real_flipper import Flip

if TYPE_CHECKING:
    from .real import RealOptions

INTO_POOL, OUT_OF_POOL = "prefill to pool", "pool to decode"
"""The wires of the demo that can be made to damage what they carry."""

Told = Mapping[str, Any]
"""An event of a process of :mod:`kvpool.demo.real_roles`."""


@dataclass
class Outcome:
    """Everything the processes told, per request."""

    options: RealOptions
    architecture: str
    fingerprint: str
    groups: list[str]
    lengths: list[int]
    """Tokens of the prompts."""
    flips: Mapping[str, list[Flip]]
    requests: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, prefilled: Told, received: Told, generated: Told, computed: Told) -> None:
        """Judge the next request."""
        number = len(self.requests) + 1
        expected_hit = self.options.prefix if number > 1 else 0
        row = _request(self.lengths[number - 1], prefilled, received, generated, computed)
        self.requests.append({"request": number, **row})
        if not row["bitwise_equal"]:
            where = row["first_difference"]
            at = "the prefill's logits" if where == 0 else f"the logits of decode step {where}"
            self.problems.append(f"request {number}: {at} differ from the run without transfer")
        if row["prefix_hit_tokens"] != expected_hit:
            self.problems.append(
                f"request {number}: resumed at {row['prefix_hit_tokens']} tokens, the pool should have offered {expected_hit}"
            )


def _request(length: int, prefilled: Told, received: Told, generated: Told, computed: Told) -> dict[str, Any]:
    ours = [prefilled["logits_sha256"], *generated["logits_sha256"]]
    theirs = computed["logits_sha256"]
    differences = [step for step, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    hit, began_s = prefilled["matched"], prefilled["started_s"]
    fetched = prefilled["fetched"]

    def since(moment_s: float | None) -> float | None:
        return None if moment_s is None else round(moment_s - began_s, 6)

    layers = [
        {
            "layer": int(layer),
            "ready_s": since(prefilled["layers"].get(layer, {}).get("ready_s")),
            **{name: since(times[name]) for name in ("first_byte_s", "applied_s", "consumed_s")},
        }
        for layer, times in received["layers"].items()
    ]
    return {
        "tokens": length,
        "prefix_hit_tokens": hit,
        "computed_tokens": length - hit,
        "bitwise_equal": not differences,
        "first_difference": differences[0] if differences else None,
        "generated": generated["tokens"],
        "reference_generated": computed["tokens"],
        "logits_sha256": ours,
        "reference_logits_sha256": theirs,
        "bytes_by_group": {
            "sent": prefilled["bytes_by_group"],
            "prefix_fetched": fetched["bytes_by_group"] if fetched else {},
            "received": received["bytes_by_group"],
        },
        # The pool acknowledges a chunk once its checksum held; a put is sealed when every chunk is acknowledged.
        "checksums_verified": {
            "pool": prefilled["chunks"],
            "prefill": fetched["checksums_verified"] if fetched else 0,
            "decode": received["checksums_verified"],
        },
        "corrupt_chunks": received["corrupt_chunks"],
        "resent_bytes": prefilled["resent_bytes"],
        "zeroed": received["zeroed"],
        "prefill_cuts": prefilled["cuts"],
        "compute_s": round(prefilled["computed_s"] - prefilled["computing_s"], 6),
        "sealed_after_compute_s": round(received["sealed_s"] - prefilled["computed_s"], 6),
        "decode_s": round(generated["decode_s"], 6),
        "layers": layers,
    }


def report(outcome: Outcome, seconds: float) -> dict[str, Any]:
    """The JSON object. Sizes in bytes; times in seconds, those of layers since the request began."""
    options, rows = outcome.options, outcome.requests
    flips = [{"wire": wire, **asdict(flip)} for wire, found in outcome.flips.items() for flip in found]
    caught = {
        INTO_POOL: sum(row["resent_bytes"] > 0 for row in rows),
        OUT_OF_POOL: sum(row["corrupt_chunks"] for row in rows),
    }
    problems = list(outcome.problems)
    for wire, found in outcome.flips.items():
        if not found:
            problems.append(f"nothing was damaged from {wire}: the test of checksums did not take place")
        elif caught[wire] < 1:
            problems.append(f"{len(found)} bytes were changed from {wire} and no checksum noticed")
    received = Counter(dict.fromkeys(outcome.groups, 0))
    for row in rows:
        received.update(row["bytes_by_group"]["received"])
    return {
        "demo": "real",
        "model": options.model,
        "architecture": outcome.architecture,
        "fingerprint": outcome.fingerprint,
        "tokens": options.tokens,
        "prefix_tokens": options.prefix,
        "steps": options.steps,
        "seed": options.seed,
        "connections": options.connections,
        "corrupt": options.corrupt,
        "ok": not problems,
        "bitwise_equal": all(row["bitwise_equal"] for row in rows),
        "problems": problems,
        "prefix_hit_tokens": sum(row["prefix_hit_tokens"] for row in rows),
        "tokens_generated": sum(len(row["generated"]) - 1 for row in rows),
        "bytes_by_group": dict(received),
        "checksums_verified": sum(sum(row["checksums_verified"].values()) for row in rows),
        "flips": flips,
        "seconds": round(seconds, 3),
        "requests": rows,
    }


def render(out: Console, body: Mapping[str, Any]) -> None:
    """Print the report for a person."""
    requests = body["requests"]
    table = Table(title=f"{body['model']} ({body['architecture']}) through the pool", title_justify="left")
    table.add_column("")
    for row in requests:
        table.add_column(f"request {row['request']}", justify="right")

    def line(name: str, *cells: object) -> None:
        table.add_row(name, *map(str, cells))

    line("prompt, tokens", *(f"{row['tokens']:,}" for row in requests))
    line("prefix found in the pool, tokens", *(f"{row['prefix_hit_tokens']:,}" for row in requests))
    line("prefilled, tokens", *(f"{row['computed_tokens']:,}" for row in requests))
    for kind, title in (("sent", INTO_POOL), ("prefix_fetched", "pool to prefill"), ("received", OUT_OF_POOL)):
        for group in body["bytes_by_group"]:
            sizes = [row["bytes_by_group"][kind].get(group, 0) for row in requests]
            line(f"{title}, bytes: {group}", *(f"{size:,}" for size in sizes))
    line("checksums verified", *(sum(row["checksums_verified"].values()) for row in requests))
    line("computing, seconds", *(f"{row['compute_s']:.3f}" for row in requests))
    line("decode had all of it, seconds later", *(f"{row['sealed_after_compute_s']:.3f}" for row in requests))
    line("tokens generated", *(len(row["generated"]) - 1 for row in requests))
    line("logits against no transfer", *(_verdict(row) for row in requests))
    out.print(table)

    layers = Table(title="Layers, milliseconds since the request began", title_justify="left")
    for name in ("request", "layer", "ready at prefill", "first byte at decode", "verified", "restored"):
        layers.add_column(name, justify="right")
    for row in requests:
        for times in row["layers"]:
            moments = (times[name] for name in ("ready_s", "first_byte_s", "applied_s", "consumed_s"))
            cells = ("-" if moment is None else f"{1e3 * moment:.1f}" for moment in moments)
            layers.add_row(str(row["request"]), str(times["layer"]), *cells)
    out.print(layers)
    for flip in body["flips"]:
        out.print(
            f"changed on the wire, {flip['wire']}: layer {flip['layer']} tensor {flip['tensor']}, byte "
            f"{flip['offset'] + flip['at']}: caught by its checksum" + (", sent again" if body["ok"] else "")
        )
    for problem in body["problems"]:
        out.print(f"[bold red]not right:[/] {problem}", highlight=False)
    verdict = "[green]bitwise equal[/]" if body["bitwise_equal"] else "[bold red]not equal[/]"
    out.print(f"{body['tokens_generated']} decode steps: {verdict} to runs without transfer; {body['seconds']:.1f} s")


def _verdict(row: Mapping[str, Any]) -> str:
    if row["bitwise_equal"]:
        return "bitwise equal"
    return "differ at prefill" if row["first_difference"] == 0 else f"differ from step {row['first_difference']}"
