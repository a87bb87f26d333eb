"""Profiles: prefill seconds and KVCache bytes by length, the two curves everything here is computed from.

A profile is a data file, never code: the tables of arXiv 2604.15039 ship under ``data/profiles``, a measured
one is any CSV with a ``tokens`` column. Between the points the curves are straight lines; beyond them the
nearest line goes on, and :meth:`Profile.outside` says how much of a request rests on that.
"""

from __future__ import annotations

import csv
import io
import math
from bisect import bisect_right
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvtransport import presets
from kvtransport.errors import ConfigError

Floats = npt.NDArray[np.float64]
MIB = float(1 << 20)
GBPS = 1e9 / 8
"""Bytes per second in one Gbps (1e9 payload bits per second)."""

PACKAGED = resources.files(__package__) / "data" / "profiles"


class Label(StrEnum):
    """How far a figure can be trusted as evidence."""

    INPUT = "input"
    """Given: printed by the source or set by the user."""
    DERIVED = "derived"
    """Computed backwards from a printed result: agreement with that result is a consistency check."""
    PREDICTION = "prediction"
    """Computed from inputs only."""
    MEASURED = "measured"
    """Measured by the user."""


@dataclass(frozen=True)
class Curve:
    """A continuous, piecewise linear function of length.

    ``x`` ascends strictly, ``y`` never falls. Outside ``x`` the outer lines continue; where the first one
    would go below zero, the curve goes to the origin instead.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y) or len(self.x) < 2:
            raise ConfigError(f"a curve needs at least two points of (length, value), got {len(self.x)}")
        if any(b <= a for a, b in zip(self.x, self.x[1:], strict=False)) or self.x[0] < 0:
            raise ConfigError(f"the lengths of a curve must ascend strictly from 0 on, got {self.x}")
        if (
            any(b < a for a, b in zip(self.y, self.y[1:], strict=False))
            or self.y[0] < 0
            or not math.isfinite(self.y[-1])
        ):
            raise ConfigError(
                f"the values of a curve must be finite and never fall with length, got {self.y}; fit noisy points"
            )

    @cached_property
    def lines(self) -> tuple[tuple[float, float, float], ...]:
        """(first length, intercept, slope) of every piece; the first begins at 0, the last never ends."""
        xs, ys = list(self.x), list(self.y)
        slope = (ys[1] - ys[0]) / (xs[1] - xs[0])
        if ys[0] - slope * xs[0] < 0 < xs[0]:
            xs.insert(0, 0.0)
            ys.insert(0, 0.0)
        pieces = []
        for i in range(len(xs) - 1):
            slope = (ys[i + 1] - ys[i]) / (xs[i + 1] - xs[i])
            pieces.append((xs[i] if i else 0.0, ys[i] - slope * xs[i], slope))
        return tuple(pieces)

    @cached_property
    def _starts(self) -> list[float]:
        return [line[0] for line in self.lines]

    def at(self, length: float) -> float:
        """The value at one length (tokens, >= 0)."""
        lines = self.lines
        _, intercept, slope = lines[max(bisect_right(self._starts, length) - 1, 0)]
        return intercept + slope * length

    def at_all(self, lengths: npt.ArrayLike) -> Floats:
        """The values at an array of lengths."""
        x = np.asarray(lengths, dtype=np.float64)
        table = np.asarray(self.lines)
        piece = np.maximum(np.searchsorted(table[:, 0], x, side="right") - 1, 0)
        return np.asarray(table[piece, 1] + table[piece, 2] * x)

    def inverse(self, value: float) -> float:
        """The longest length whose value is at most ``value``: -1 where there is none, inf where all are."""
        for index in reversed(range(len(self.lines))):
            start, intercept, slope = self.lines[index]
            if intercept + slope * start <= value:
                if slope > 0:
                    end = self.lines[index + 1][0] if index + 1 < len(self.lines) else math.inf
                    return min((value - intercept) / slope, end)
                return math.inf if index + 1 == len(self.lines) else self.lines[index + 1][0]
        return -1.0

    def scaled(self, factor: float) -> Curve:
        """This curve with every value multiplied by ``factor`` (> 0)."""
        return Curve(self.x, tuple(v * factor for v in self.y))


@dataclass(frozen=True)
class Profile:
    """What one instance needs for a prefill of l tokens: ``prefill`` seconds and ``kv`` bytes.

    ``kv`` is None for a profile that only measured time; the planner then takes it from the other cluster's
    profile, as both run one model.
    """

    name: str
    prefill: Curve
    kv: Curve | None = None
    label: Label = Label.INPUT
    source: str = ""
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if self.prefill.y[0] <= 0 < self.prefill.x[0]:
            raise ConfigError(f"profile {self.name!r}: prefill seconds must be positive, got {self.prefill.y[0]}")

    @property
    def measured(self) -> tuple[float, float]:
        """Shortest and longest length (tokens) with a point of its own."""
        return self.prefill.x[0], self.prefill.x[-1]

    def outside(self, length: float) -> bool:
        """True where this profile extrapolates."""
        low, high = self.measured
        return not low <= length <= high

    def seconds(self, length: float) -> float:
        """T_prefill(l)."""
        return self.prefill.at(length)

    def kv_bytes(self, length: float) -> float:
        """S_kv(l). Raises ConfigError for a profile without sizes."""
        return self.sizes.at(length)

    @property
    def sizes(self) -> Curve:
        if self.kv is None:
            raise ConfigError(f"profile {self.name!r} has no KVCache sizes: add a kv_bytes, kv_mib or kv_gbps column")
        return self.kv

    def kv_throughput(self, length: float) -> float:
        """Phi_kv(l) = S_kv(l) / T_prefill(l), bytes per second (equation 1)."""
        return self.kv_bytes(length) / self.seconds(length)

    def with_kv(self, kv: Curve) -> Profile:
        return replace(self, kv=kv)

    def scaled(self, *, seconds: float = 1.0, kv: float = 1.0) -> Profile:
        """A faster or slower instance, a larger or smaller cache."""
        return replace(self, prefill=self.prefill.scaled(seconds), kv=None if self.kv is None else self.kv.scaled(kv))


# -- files --------------------------------------------------------------------------------------------


def packaged_profiles() -> list[str]:
    """Names that :func:`load_profile` knows without a file."""
    return sorted(p.name[:-4] for p in PACKAGED.iterdir() if p.name.endswith(".csv"))


def load_profile(name: str, *, relative_to: Path | None = None) -> Profile:
    """A profile by packaged name or by the path of a CSV file (relative to ``relative_to``).

    Raises ConfigError when there is neither, or when the file is no profile.
    """
    if name in packaged_profiles():
        return parse_profile((PACKAGED / f"{name}.csv").read_text(encoding="utf-8"), where=name)
    path = (relative_to or Path()) / name
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"no profile {name!r}: not packaged ({', '.join(packaged_profiles())}), "
            f"and no readable file {path} ({error})"
        ) from error
    return parse_profile(text, where=str(path))


def split_header(text: str) -> tuple[dict[str, str], str]:
    """``# key: value`` lines at the top of a data file, and the rest of it."""
    head: dict[str, str] = {}
    lines = text.splitlines()
    for index, line in enumerate(lines):
        if not line.startswith("#"):
            return head, "\n".join(lines[index:])
        key, _, value = line[1:].partition(":")
        head[key.strip().lower()] = value.strip()
    return head, ""


def parse_profile(text: str, *, where: str) -> Profile:
    """Read ``tokens,prefill_seconds[,kv_bytes|kv_mib|kv_gbps]`` with a ``# key: value`` header.

    ``kv_gbps`` is Phi_kv, turned into bytes by multiplying with the seconds; a file without
    ``prefill_seconds`` but with ``kv_bytes`` (or ``kv_mib``) *and* ``kv_gbps`` gets its seconds from them.
    """
    head, body = split_header(text)
    rows = list(csv.DictReader(io.StringIO(body)))
    if not rows:
        raise ConfigError(f"profile {where}: no rows; expected a header line like tokens,prefill_seconds,kv_bytes")

    def column(name: str) -> list[float] | None:
        if name not in rows[0]:
            return None
        try:
            values = [float(row[name]) for row in rows]
        except (TypeError, ValueError) as error:
            raise ConfigError(f"profile {where}: column {name} must hold numbers ({error})") from error
        return values

    tokens, seconds, gbps = column("tokens"), column("prefill_seconds"), column("kv_gbps")
    mib = column("kv_mib")
    kv = column("kv_bytes") or (None if mib is None else [v * MIB for v in mib])
    if tokens is None:
        raise ConfigError(f"profile {where}: no column tokens, found {', '.join(map(str, rows[0]))}")
    if seconds is None and kv is not None and gbps is not None:
        seconds = [b / (g * GBPS) for b, g in zip(kv, gbps, strict=True)]
    if seconds is None:
        raise ConfigError(f"profile {where}: no column prefill_seconds, and not both of KVCache size and kv_gbps")
    if kv is None and gbps is not None:
        kv = [s * g * GBPS for s, g in zip(seconds, gbps, strict=True)]
    try:
        return Profile(
            name=head.get("name", where),
            prefill=Curve(tuple(tokens), tuple(seconds)),
            kv=None if kv is None else Curve(tuple(tokens), tuple(kv)),
            label=Label(head.get("label", "measured")),
            source=head.get("source", ""),
        )
    except ValueError as error:
        raise ConfigError(f"profile {where}: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"profile {where}: {error}") from error


def format_profile(profile: Profile) -> str:
    """The CSV text that :func:`parse_profile` reads back."""
    lines = [f"# name: {profile.name}", f"# label: {profile.label}"]
    if profile.source:
        lines.append(f"# source: {profile.source}")
    lines.append("tokens,prefill_seconds" + (",kv_bytes" if profile.kv is not None else ""))
    for x, y in zip(profile.prefill.x, profile.prefill.y, strict=True):
        lines.append(f"{x:g},{y:.9g}" + (f",{profile.kv.at(x):.0f}" if profile.kv is not None else ""))
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class KvThroughput:
    """One row of the published Phi_kv table: bytes per second of one instance by length."""

    model: str
    preset: str
    kind: str
    lengths: tuple[int, ...]
    bytes_per_s: tuple[float, ...]

    def at(self, length: float) -> float:
        """Phi_kv at ``length``, linear between the table's lengths, constant outside (Phi may fall with length)."""
        return float(np.interp(length, self.lengths, self.bytes_per_s))

    def profile(self) -> Profile:
        """The profile behind this row: S_kv from the model's geometry, T_prefill = S_kv / Phi_kv, hence derived."""
        layout = presets.load(self.preset)
        sizes = [float(layout.bytes_at(n)) for n in self.lengths]
        seconds = [b / phi for b, phi in zip(sizes, self.bytes_per_s, strict=True)]
        return Profile(
            f"{self.model} on one instance of 8xH200",
            Curve(tuple(map(float, self.lengths)), tuple(seconds)),
            Curve(tuple(map(float, self.lengths)), tuple(sizes)),
            Label.DERIVED,
            "T_prefill = S_kv / Phi_kv, from the model's public geometry and the table of KV throughput of arXiv 2604.15039",
        )


def published_kv_throughput() -> tuple[KvThroughput, ...]:
    """The paper's table of KV throughput over models (``data/kv_throughput.csv``)."""
    text = (resources.files(__package__) / "data" / "kv_throughput.csv").read_text(encoding="utf-8")
    _, body = split_header(text)
    out = []
    for row in csv.DictReader(io.StringIO(body)):
        cells = [
            (int(k[len("kv_gbps_") : -1]) * 1024, float(v) * GBPS) for k, v in row.items() if k.startswith("kv_gbps_")
        ]
        out.append(
            KvThroughput(
                row["model"], row["preset"], row["kind"], tuple(c[0] for c in cells), tuple(c[1] for c in cells)
            )
        )
    return tuple(out)


def cluster_egress(phi: float, gpus: int, gpus_per_instance: int) -> float:
    """Bytes per second that ``gpus`` accelerators put out at Phi_kv ``phi`` per instance (equation 2)."""
    if gpus_per_instance <= 0 or gpus < 0:
        raise ConfigError(f"egress needs gpus >= 0 and gpus_per_instance > 0, got {gpus} and {gpus_per_instance}")
    return gpus / gpus_per_instance * phi
