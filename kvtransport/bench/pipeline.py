"""``kvbench pipeline``: layers leave while prefill goes on; what remains to be waited for when it ends."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .. import presets
from ..errors import ConfigError
from . import prefill
from .emulator import Conditions
from .flow import Flow, FlowOptions
from .path import opened
from .progress import Steps
from .summary import spread

GB = 1e9


@dataclass(frozen=True, slots=True)
class PipelineOptions:
    """What is prefilled and over what. ``seconds`` None: the profile's; ``conditions`` None: loopback."""

    preset: str = "kimi-linear-48b"
    tokens: int = 32_768
    seconds: float | None = None
    profile: Path | None = None
    conditions: Conditions | None = None
    connections: int | None = None
    congestion: str | None = None
    checksum: bool = True
    repeat: int = 7

    def check(self) -> None:
        """Raises ConfigError naming the first option that makes no sense."""
        presets.preset(self.preset)
        for name, value, low, high in (
            ("--tokens", self.tokens, 1, 1 << 24),
            ("--repeat", self.repeat, 1, 1_000),
            ("--seconds", self.seconds if self.seconds is not None else 1.0, 0.001, 3_600.0),
        ):
            if not low <= value <= high:
                raise ConfigError(f"{name} must be {low:g} to {high:g}, got {value:g}")


def run(options: PipelineOptions, out: Console) -> dict[str, Any]:
    """Measure; see :func:`describe` for what comes back."""
    options.check()
    times = prefill.profile(options.preset, options.profile)
    seconds = options.seconds if options.seconds is not None else times.seconds(options.tokens)
    flow_options = FlowOptions(
        preset=options.preset,
        tokens=options.tokens,
        connections=options.connections,
        congestion=options.congestion,
        checksum=options.checksum,
    )
    rounds = []
    with Steps(options.repeat + 1, "pipeline") as steps:
        steps.step("starting two processes")
        with (
            opened(options.conditions) as path,
            Flow(flow_options, host=path.host, prefixes=path.prefixes) as flow,
        ):
            for i in range(options.repeat):
                steps.step(f"round {i + 1} of {options.repeat}, a prefill of {seconds:.2f} s")
                rounds.append(flow.layers(seconds))
            where, nbytes = str(path), flow.nbytes
    rtt = options.conditions.rtt_ms / 1e3 if options.conditions is not None else None
    described = [describe(told, nbytes, seconds, rtt) for told in rounds]
    goodput = statistics.median(r["bulk_goodput_gbps"] for r in described)
    body = {
        "preset": options.preset,
        "tokens": options.tokens,
        "bytes": nbytes,
        "path": where,
        "conditions": None if options.conditions is None else asdict(options.conditions),
        "prefill_seconds": seconds,
        "profile": "--seconds" if options.seconds is not None else times.source,
        "connections": rounds[-1]["connections"],
        "congestion": rounds[-1]["congestion"],
        "checksum": options.checksum,
        "bulk_goodput_gbps": goodput,
        "compute_covers_transfer": all(r["compute_covers_transfer"] for r in described),
        "exposed_s": spread([r["exposed_s"] for r in described]),
        "bound_s": spread([r["bound_s"] for r in described]),
        "within_bound": sum(r["exposed_s"] <= r["bound_s"] for r in described),
        "hidden_share": spread([r["hidden_share"] for r in described]),
        "rounds": described,
        "answer": prefill.answer(options.preset, times, goodput, described[-1]["rtt_s"]),
    }
    render(out, body)
    return body


def describe(told: dict[str, Any], nbytes: int, prefill_seconds: float, rtt_s: float | None) -> dict[str, Any]:
    """One round. Times of ``layers`` count from the start of prefill, seconds.

    ``exposed_s`` is the end of prefill to the confirmed seal; ``bound_s`` what it may be when every layer computes for
    longer than it travels: the last layer at the goodput of the bulk transfer before it, and 1.5 round trips.
    """
    start = told["started_s"]
    rtt = told["telemetry"].get("rtt_s") if rtt_s is None else rtt_s
    rtt = 0.0 if rtt is None else rtt
    rate = nbytes / told["bulk_seconds"]
    sizes = [each["bytes"] for each in told["layers"]]
    exposed = told["sealed_s"] - told["prefill_end_s"]

    def since(moment: float | None) -> float | None:
        return None if moment is None else moment - start

    return {
        "exposed_s": exposed,
        "last_layer_s": sizes[-1] / rate,
        "rtt_s": rtt,
        "bound_s": sizes[-1] / rate + prefill.SEAL_RTT * rtt,
        "compute_covers_transfer": prefill_seconds / len(sizes) >= max(sizes) / rate,
        "bulk_seconds": told["bulk_seconds"],
        "bulk_goodput_gbps": nbytes * 8 / GB / told["bulk_seconds"],
        "hidden_share": max(0.0, 1.0 - exposed / told["bulk_seconds"]),
        "prefill_s": told["prefill_end_s"] - start,
        "sealed_s": told["sealed_s"] - start,
        "spilled_bytes": told["spilled_bytes"],
        "layers": [
            {
                "layer": each["layer"],
                "bytes": each["bytes"],
                **{k: since(each[k]) for k in ("ready_s", "first_byte_s", "applied_s", "acked_s")},
            }
            for each in told["layers"]
        ],
    }


def render(out: Console, body: dict[str, Any]) -> None:
    """The same for people."""
    exposed, bound = body["exposed_s"], body["bound_s"]
    table = Table(title=f"{body['preset']}, {body['tokens']:,} tokens, a prefill of {body['prefill_seconds']:.2f} s")
    for heading in ("round", "prefill to sealed", "bound", "last layer", "RTT", "sent in one go"):
        table.add_column(heading, justify="right")
    for i, each in enumerate(body["rounds"], 1):
        table.add_row(
            str(i),
            f"{each['exposed_s'] * 1e3:.1f} ms",
            f"{each['bound_s'] * 1e3:.1f} ms",
            f"{each['last_layer_s'] * 1e3:.1f} ms",
            f"{each['rtt_s'] * 1e3:.2f} ms",
            f"{each['bulk_seconds'] * 1e3:.0f} ms",
        )
    out.print(table)
    out.print(
        f"{body['path']}, {body['connections']} connections, {body['congestion']}; median {exposed['median'] * 1e3:.1f} ms "
        f"against a bound of {bound['median'] * 1e3:.1f} ms, {body['within_bound']} of {len(body['rounds'])} rounds within it"
    )
    if not body["compute_covers_transfer"]:
        out.print("a layer travels for longer than it computes: the bound does not apply, the link is what limits")
    render_answer(out, body["answer"])


def render_answer(out: Console, answer: dict[str, Any]) -> None:
    """How many prefill instances the link carries, and what the transfer adds to the time to first token."""
    table = Table(title=f"{answer['preset']} over {answer['goodput_gbps']:.2f} Gbps")
    for heading in (
        "tokens",
        "cache",
        "prefill",
        "one instance",
        "instances carried",
        "TTFT + layer-wise",
        "TTFT + after prefill",
    ):
        table.add_column(heading, justify="right")
    for each in answer["lengths"]:
        table.add_row(
            f"{each['tokens']:,}",
            f"{each['nbytes'] / 1e6:,.0f} MB",
            f"{each['prefill_seconds']:.2f} s",
            f"{each['kv_gbps']:.2f} Gbps",
            f"{each['instances']:.2f}",
            f"{each['layerwise_ttft_s'] * 1e3:,.1f} ms",
            f"{each['serial_ttft_s'] * 1e3:,.0f} ms",
        )
    out.print(table)
