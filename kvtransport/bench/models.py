"""``kvbench models``: how large the paper's caches are, and what its throughput figures imply.

Sizes come from the presets' geometry, throughputs from the paper's table; prefill seconds are their quotient,
T = S_kv / Phi. The paper's three headline ratios are computed again from both, and where a ratio does not come
out it says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .. import presets
from ..layout import CacheLayout, GroupKind

K = 1_024
LENGTHS = (1 * K, 8 * K, 32 * K, 128 * K)
MIB = 1 << 20
GBIT = 1e9
TOLERANCE = 0.05
"""A published ratio, printed with two digits or one, comes out when the computed one is this near."""
GQA_HEADS, GQA_DIM = 8, 128
"""The grouped-query attention that MLA is held against: the usual one, and that of Ring's predecessor Ling-1T."""


@dataclass(frozen=True, slots=True)
class SizeRow:
    """One model at one length. ``published_*`` is None where the paper prints nothing."""

    tokens: int
    bytes: int
    kv_throughput_gbps: float
    """Published."""
    prefill_seconds: float
    """Implied: bytes * 8 / throughput."""
    published_bytes: int | None
    published_prefill_seconds: float | None


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One model: ``state_bytes`` is recurrent, ``window_bytes`` that of full sliding windows; neither grows."""

    preset: str
    title: str
    attention: str
    source: str
    state_bytes: int
    window_bytes: int
    bytes_per_token: int
    """Growth per token, from full attention alone."""
    group_bytes_32k: dict[str, int]
    sizes: tuple[SizeRow, ...]


@dataclass(frozen=True, slots=True)
class Ratio:
    """One of the paper's ratios beside ours.

    ``from_geometry`` needs the presets only; ``from_table`` divides two entries of the paper's throughput table,
    where the ratio is one of throughputs. ``comes_out`` says whether the one that measures the same thing as
    ``published`` is within 5% of it. ``parts`` are the factors that ``why`` speaks of.
    """

    name: str
    published: float
    from_geometry: float
    from_table: float | None
    comes_out: bool
    parts: dict[str, float]
    why: str


def model_row(name: str, lengths: Sequence[int] = LENGTHS) -> ModelRow:
    """Sizes of preset ``name``; raises ConfigError when it is unknown.

    Every length needs a published throughput; the lengths of the paper's table have one.
    """
    spec, layout = presets.preset(name), presets.load(name)
    phi = dict(spec.published.kv_throughput_gbps)
    mib, seconds = dict(spec.published.kvcache_mib), dict(spec.published.prefill_seconds)
    rows = []
    for tokens in lengths:
        size = layout.bytes_at(tokens)
        rows.append(
            SizeRow(
                tokens,
                size,
                phi[tokens],
                size * 8 / (phi[tokens] * GBIT),
                round(mib[tokens] * MIB) if tokens in mib else None,
                seconds.get(tokens),
            )
        )
    by_kind = {kind: [g for g in layout.groups if g.kind is kind] for kind in GroupKind}
    return ModelRow(
        preset=name,
        title=spec.title,
        attention=spec.attention,
        source=spec.source,
        state_bytes=sum(g.unit_bytes for g in by_kind[GroupKind.RECURRENT]),
        window_bytes=sum(g.unit_bytes * ((g.window or 1) - 1) for g in by_kind[GroupKind.SLIDING]),
        bytes_per_token=_growth(layout),
        group_bytes_32k=layout.group_bytes(32 * K),
        sizes=tuple(rows),
    )


def ratios() -> list[Ratio]:
    """The paper's 13x, 4x and 36x at 32K tokens, each computed again."""
    return [
        _throughput_ratio("MiMo-V2-Flash below MiniMax-M2.5", 13, "minimax-m2.5", "mimo-v2-flash"),
        _throughput_ratio("Qwen3.5-397B below Qwen3-235B", 4, "qwen3-235b", "qwen3.5-397b"),
        _ring_ratio(),
    ]


def report() -> dict[str, Any]:
    """Everything ``kvbench models --json`` prints."""
    return {
        "units": {"size": "bytes", "throughput": "1e9 bits per second", "K": K},
        "published": "arXiv 2604.15039 v2",
        "models": [asdict(model_row(name)) for name in presets.names()],
        "ratios": [asdict(ratio) for ratio in ratios()],
    }


def _growth(layout: CacheLayout) -> int:
    return sum(g.unit_bytes for g in layout.groups if g.kind is GroupKind.FULL)


def _near(computed: float, published: float) -> bool:
    return abs(computed / published - 1) <= TOLERANCE


def _throughput_ratio(name: str, published: float, dense: str, hybrid: str) -> Ratio:
    """A ratio of KV throughputs: bytes (ours, from geometry) times prefill time (implied by both)."""
    at = 32 * K
    phi_dense, phi_hybrid = dict(presets.profile(dense))[at], dict(presets.profile(hybrid))[at]
    size_dense, size_hybrid = presets.load(dense).bytes_at(at), presets.load(hybrid).bytes_at(at)
    by_bytes, by_table = size_dense / size_hybrid, phi_dense / phi_hybrid
    by_time = by_table / by_bytes
    slower = "longer" if by_time > 1 else "shorter"
    return Ratio(
        name=f"{name}, KV throughput at 32K",
        published=published,
        from_geometry=by_bytes,
        from_table=by_table,
        comes_out=_near(by_table, published),
        parts={"cache_bytes": by_bytes, "prefill_time": by_time},
        why=(
            f"It is a ratio of throughputs S/T, not of sizes. Geometry gives {by_bytes:.1f}x fewer bytes; the other "
            f"factor, {by_time:.2f}x, is prefill time: the table implies that the hybrid model's is {slower} than the "
            "dense one's. Together they are the table's ratio."
        ),
    )


def _ring_ratio() -> Ratio:
    """Less KV memory per token than full GQA in every layer: MLA's share times the 7:1 pattern's."""
    ring = presets.load("ring-2.5-1t")
    mla = ring.groups[ring.group_index("mla")]
    gqa_layer = sum(t.nbytes for t in presets.gqa_tensors(GQA_HEADS, GQA_DIM, GQA_DIM, "bfloat16"))
    layers = len(ring.layers)
    by_mla, by_pattern = gqa_layer / mla.layer_bytes, layers / len(mla.layers)
    computed = by_mla * by_pattern
    all_gqa = gqa_layer * layers
    at_32k, at_128k = (all_gqa * n / ring.bytes_at(n) for n in (32 * K, 128 * K))
    return Ratio(
        name="Ring-2.5-1T KV memory below GQA in every layer, per token",
        published=36,
        from_geometry=computed,
        from_table=None,
        comes_out=_near(computed, 36),
        parts={"mla": by_mla, "pattern": by_pattern, "with_state_32k": at_32k, "with_state_128k": at_128k},
        why=(
            f"The 7:1 pattern gives {by_pattern:.0f}x as published. For MLA the paper says about 4.5x without naming "
            f"the attention it replaces: against {GQA_HEADS} KV heads of {GQA_DIM} ({gqa_layer:,} bytes a token and "
            f"layer) its {mla.layer_bytes:,} bytes are {by_mla:.2f}x less; "
            f"4.5x would need {4.5 * mla.layer_bytes:,.0f}. "
            f"Counting the recurrent states, which do not grow, the whole cache is {at_32k:.1f}x smaller at 32K and "
            f"{at_128k:.1f}x at 128K."
        ),
    )


def render(out: Console) -> None:
    """The same for people."""
    # Two tables of eight columns and notes below: everything is legible at 80 columns, where pipes and logs are.
    rows = [model_row(name) for name in presets.names()]
    sizes = Table(title="KVCache of one request, MiB", box=SIMPLE_HEAD)
    sizes.add_column("model", no_wrap=True)
    times = Table(title="Prefill time that the paper's KV throughput implies, s", box=SIMPLE_HEAD)
    times.add_column("model", no_wrap=True)
    times.add_column("attention", no_wrap=True)
    for heading in ("fixed", "KiB/token"):
        sizes.add_column(heading, justify="right", no_wrap=True)
    for tokens in LENGTHS:
        for table in (sizes, times):
            table.add_column(f"{tokens // K}K", justify="right", no_wrap=True)
    for row in rows:
        fixed = f"{(row.state_bytes + row.window_bytes) / MIB:.1f}"
        cells = [f"{size.bytes / MIB:,.1f}" for size in row.sizes]
        sizes.add_row(row.preset, fixed, f"{row.bytes_per_token / K:.2f}", *cells)
        times.add_row(row.preset, row.attention, *(f"{size.prefill_seconds:.2f}" for size in row.sizes))
    out.print(sizes)
    out.print("fixed: recurrent states and full sliding windows. Sources of the geometry: the presets' TOML files.\n")
    out.print(times)

    fit = Table(title="Sizes the paper prints", box=SIMPLE_HEAD)
    for heading in ("model", "tokens", "published MiB", "computed MiB", "off", "published s", "implied s"):
        fit.add_column(heading, justify="left" if heading == "model" else "right")
    for name, size in ((row.preset, size) for row in rows for size in row.sizes):
        if (published := size.published_bytes) is None:
            continue
        off = size.bytes / published - 1
        printed = "" if size.published_prefill_seconds is None else f"{size.published_prefill_seconds:.2f}"
        fit.add_row(
            name,
            f"{size.tokens // K}K",
            f"{published / MIB:,.1f}",
            f"{size.bytes / MIB:,.1f}",
            f"{off:+.1%}",
            printed,
            f"{size.prefill_seconds:.2f}",
        )
    out.print(fit)

    table = Table(title="The paper's ratios, computed again", box=SIMPLE_HEAD)
    table.add_column("ratio")
    for heading in ("published", "from the\npaper's table", "from\ngeometry", "comes\nout"):
        table.add_column(heading, justify="right")
    for ratio in ratios():
        verdict = "[green]yes[/]" if ratio.comes_out else "[yellow]no[/]"
        tabled = "-" if ratio.from_table is None else f"{ratio.from_table:.1f}x"
        table.add_row(ratio.name, f"{ratio.published:g}x", tabled, f"{ratio.from_geometry:.1f}x", verdict)
    out.print(table)
    for ratio in ratios():
        out.print(f"[bold]{ratio.name}[/]: {ratio.why}\n")
