"""How fast prefill makes KVCache, and what that asks of a link: instances carried, time to first token added.

The profiles are the published KV throughputs of the presets (arXiv 2604.15039: Phi_kv(l) = S_kv(l) / T_prefill(l) of one
8-GPU instance), or a measured CSV with the columns ``tokens`` and ``prefill_seconds``.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from .. import presets
from ..errors import ConfigError
from ..layout import CacheLayout

GB = 1e9
K = 1_024
LENGTHS = (1 * K, 8 * K, 32 * K, 128 * K)
SEAL_RTT = 1.5
"""Round trips between the last byte sent and the confirmed seal: half for the byte, one for seal and answer."""


@dataclass(frozen=True, slots=True)
class PrefillProfile:
    """Points of (tokens, seconds), ascending; straight lines between them, the outer ones continue."""

    source: str
    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        ascending = all(a[0] < b[0] for a, b in pairwise(self.points))
        if not self.points or not ascending or any(n <= 0 or s <= 0 or not math.isfinite(s) for n, s in self.points):
            raise ConfigError(f"{self.source}: a prefill profile needs ascending lengths and positive seconds")

    def seconds(self, tokens: int) -> float:
        """T_prefill of one instance for a prompt of ``tokens``, seconds; never below a hundredth of the first point."""
        if len(self.points) == 1:
            return self.points[0][1] * tokens / self.points[0][0]
        pairs = list(pairwise(self.points))
        (x0, y0), (x1, y1) = next((p for p in pairs if tokens <= p[1][0]), pairs[-1])
        return max(self.points[0][1] / 100, y0 + (y1 - y0) * (tokens - x0) / (x1 - x0))


def of_preset(name: str) -> PrefillProfile:
    """The published profile of preset ``name``: its geometry's bytes over the paper's KV throughput."""
    spec, layout = presets.preset(name), presets.load(name)
    points = tuple((float(n), layout.bytes_at(n) * 8 / (gbps * GB)) for n, gbps in presets.profile(name))
    return PrefillProfile(f"{spec.published.source}; seconds = bytes of its geometry / throughput", points)


def from_csv(path: Path) -> PrefillProfile:
    """A measured profile. Raises ConfigError, naming the file, for anything else. Lines that begin with # are skipped."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        rows = [(float(r["tokens"]), float(r["prefill_seconds"])) for r in csv.DictReader(lines)]
    except OSError as error:
        raise ConfigError(f"cannot read the profile {path}: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is not a prefill profile: it needs the columns tokens and prefill_seconds ({error})"
        ) from error
    return PrefillProfile(str(path), tuple(rows))


def profile(preset: str, path: Path | None) -> PrefillProfile:
    return of_preset(preset) if path is None else from_csv(path)


@dataclass(frozen=True, slots=True)
class Demand:
    """What one prefill instance asks of a link at one length, and what a link of that goodput answers."""

    tokens: int
    nbytes: int
    prefill_seconds: float
    kv_gbps: float
    """What one instance puts out, prefilling without a pause."""
    instances: float
    """How many of them the link carries; below 1 it carries less than one."""
    serial_ttft_s: float
    """Added to the time to first token when the cache is sent after prefill."""
    layerwise_ttft_s: float
    """The same when each layer leaves while the next is computed: the last layer, or what the link lags behind."""


def demand(layout: CacheLayout, times: PrefillProfile, tokens: int, goodput_gbps: float, rtt_s: float) -> Demand:
    """Hold one length against a link. Layers are taken to compute for equally long."""
    nbytes = layout.bytes_at(tokens)
    seconds = times.seconds(tokens)
    sizes = layer_bytes(layout, tokens)
    rate = goodput_gbps * GB / 8
    return Demand(
        tokens=tokens,
        nbytes=nbytes,
        prefill_seconds=seconds,
        kv_gbps=nbytes * 8 / GB / seconds,
        instances=goodput_gbps / (nbytes * 8 / GB / seconds),
        serial_ttft_s=nbytes / rate + SEAL_RTT * rtt_s,
        layerwise_ttft_s=exposed_seconds(sizes, seconds, rate) + SEAL_RTT * rtt_s,
    )


def layer_bytes(layout: CacheLayout, tokens: int) -> list[int]:
    """Bytes of every layer that caches anything, in order."""
    sizes: dict[int, int] = dict.fromkeys(layout.layers, 0)
    for extent in layout.extents(tokens):
        sizes[extent.layer] += extent.nbytes
    return list(sizes.values())


def exposed_seconds(sizes: Sequence[int], prefill_seconds: float, bytes_per_s: float) -> float:
    """How long after prefill the last byte leaves when layer i is ready at (i + 1) / n of it and sent in order."""
    free = 0.0
    for i, nbytes in enumerate(sizes):
        free = max(free, prefill_seconds * (i + 1) / len(sizes)) + nbytes / bytes_per_s
    return free - prefill_seconds


def answer(preset: str, times: PrefillProfile, goodput_gbps: float, rtt_s: float) -> dict[str, Any]:
    """How many prefill instances of ``preset`` a link of this goodput carries, and how much TTFT the transfer adds."""
    layout = presets.load(preset)
    return {
        "preset": preset,
        "profile": times.source,
        "goodput_gbps": goodput_gbps,
        "rtt_s": rtt_s,
        "lengths": [asdict(demand(layout, times, n, goodput_gbps, rtt_s)) for n in LENGTHS],
    }
