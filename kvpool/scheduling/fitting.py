"""Fitting a profile to measured points: what a user's own benchmark gives is noisy and has repeats."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from kvtransport.errors import ConfigError

from .profiles import Curve, Label, Profile


@dataclass(frozen=True, slots=True)
class Fit:
    """A profile made from measurements, and how well it meets them.

    ``worst`` and ``rms`` are relative errors of the prefill time against the single measurements.
    """

    profile: Profile
    form: str
    worst: float
    rms: float
    notes: tuple[str, ...]


def fit_profile(
    points: Iterable[tuple[float, float, float | None]],
    *,
    name: str,
    form: str = "piecewise",
    up_to: float | None = None,
) -> Fit:
    """Fit measured ``(tokens, prefill seconds, KVCache bytes or None)``, repeats and noise allowed.

    ``form="piecewise"`` takes the median of every length and pools neighbours that fall (isotonic regression);
    ``form="quadratic"`` fits a + b*l + c*l^2 with a, b, c >= 0, the shape attention gives, by least squares on relative
    errors. ``up_to`` (tokens) adds a point beyond the measured range for the quadratic form. The notes say where
    the result extrapolates. Raises ConfigError for fewer than two lengths or values that are not positive.
    """
    rows = [(float(t), float(s), b) for t, s, b in points]
    if any(t <= 0 or s <= 0 or not math.isfinite(t + s) for t, s, _ in rows):
        raise ConfigError("fit: tokens and seconds must be positive and finite")
    lengths = sorted({t for t, _, _ in rows})
    if len(lengths) < 2:
        raise ConfigError(f"fit: needs measurements at two lengths or more, got {len(lengths)}")
    notes = [
        f"measured from {lengths[0]:g} to {lengths[-1]:g} tokens; outside that range the nearest line is extrapolated"
    ]
    medians = [float(np.median([s for t, s, _ in rows if t == x])) for x in lengths]
    weights = [sum(1 for t, _, _ in rows if t == x) for x in lengths]
    if form == "piecewise":
        values = _isotonic(medians, weights)
        if values != medians:
            notes.append("some longer lengths measured faster than shorter ones: pooled to their weighted mean")
        curve = Curve(tuple(lengths), tuple(values))
    elif form == "quadratic":
        coefficients = _nonnegative_quadratic([(t, s) for t, s, _ in rows])
        knots = list(np.unique(np.geomspace(lengths[0], max(lengths[-1], up_to or 0.0), 33)))
        curve = Curve(tuple(knots), tuple(float(np.polyval(coefficients[::-1], k)) for k in knots))
        notes.append("T(l) = {:.4g} + {:.4g} l + {:.4g} l^2 seconds".format(*coefficients))
        if up_to is not None and up_to > lengths[-1]:
            notes.append(
                f"lengths from {lengths[-1]:g} to {up_to:g} tokens follow the fitted parabola, not a measurement"
            )
    else:
        raise ConfigError(f"fit: unknown form {form!r}; expected piecewise or quadratic")
    sizes = sorted({(t, float(b)) for t, _, b in rows if b is not None})
    kv = None
    if len({t for t, _ in sizes}) >= 2:
        xs = sorted({t for t, _ in sizes})
        kv = Curve(
            tuple(xs), tuple(_isotonic([float(np.median([b for t, b in sizes if t == x])) for x in xs], [1] * len(xs)))
        )
    elif sizes:
        notes.append("KVCache bytes were given at one length only and are ignored: at least two are needed")
    errors = np.array([curve.at(t) / s - 1 for t, s, _ in rows])
    profile = Profile(name, curve, kv, Label.MEASURED, "fitted from measurements", tuple(notes))
    return Fit(profile, form, float(np.max(np.abs(errors))), float(np.sqrt(np.mean(errors**2))), tuple(notes))


def _isotonic(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Pool adjacent violators: the nearest never-falling sequence in weighted least squares."""
    pools: list[list[float]] = []  # value, weight, count
    for value, weight in zip(values, weights, strict=True):
        pools.append([value, weight, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            v, w, n = pools.pop()
            last = pools[-1]
            last[0] = (last[0] * last[1] + v * w) / (last[1] + w)
            last[1] += w
            last[2] += n
    return [v for v, _, n in pools for _ in range(int(n))]


def _nonnegative_quadratic(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Non-negative (a, b, c) least squares on relative errors: with three unknowns every subset is tried."""
    x = np.array([p[0] for p in points])
    y = np.array([p[1] for p in points])
    design = np.stack([np.ones_like(x), x, x * x], axis=1) / y[:, None]
    scale = np.abs(design).max(axis=0)
    best: tuple[float, tuple[float, float, float]] | None = None
    for mask in range(1, 8):
        use = [i for i in range(3) if mask >> i & 1]
        if len(use) > len(points):
            continue
        solved, *_ = np.linalg.lstsq(design[:, use] / scale[use], np.ones_like(y), rcond=None)
        full = np.zeros(3)
        full[use] = solved / scale[use]
        if (full < 0).any():
            continue
        residual = float(((design @ full - 1) ** 2).sum())
        if best is None or residual < best[0] - 1e-15:
            best = (residual, (float(full[0]), float(full[1]), float(full[2])))
    assert best is not None  # a constant alone is always feasible
    return best[1]
