"""Length distributions: what the planner integrates over and the simulator draws from.

All three queries are exact (closed form or a sum over the sample), so the planner needs no random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvtransport.errors import ConfigError

from .profiles import Curve, Floats

_NORMAL = NormalDist()


class Lengths(Protocol):
    """A distribution of prompt lengths in tokens."""

    @property
    def support(self) -> tuple[float, float]:
        """Shortest and longest possible length."""
        ...

    def cdf(self, x: float) -> float:
        """P(L <= x)."""
        ...

    def partial_mean(self, x: float) -> float:
        """E[L; L <= x], not divided by P(L <= x)."""
        ...

    def quantile(self, q: float) -> float:
        """The smallest x with P(L <= x) >= q."""
        ...

    def sample(self, rng: np.random.Generator, n: int) -> Floats:
        """``n`` independent draws."""
        ...


def mean(lengths: Lengths) -> float:
    return lengths.partial_mean(lengths.support[1])


def partial_expectation(curve: Curve, lengths: Lengths, x: float) -> float:
    """E[curve(L); L <= x], exactly: the curve is a line between its points."""
    total = 0.0
    lines = curve.lines
    below_p = below_m = 0.0
    for index, (_, intercept, slope) in enumerate(lines):
        end = min(lines[index + 1][0], x) if index + 1 < len(lines) else x
        p, m = lengths.cdf(end), lengths.partial_mean(end)
        total += intercept * (p - below_p) + slope * (m - below_m)
        below_p, below_m = p, m
        if end >= x:
            break
    return total


@dataclass(frozen=True)
class TruncatedLogNormal:
    """exp(N(mu, sigma)) conditioned on [low, high] tokens."""

    mu: float
    sigma: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not (self.sigma > 0 and 0 < self.low < self.high and math.isfinite(self.high) and math.isfinite(self.mu)):
            raise ConfigError(
                "log-normal lengths need sigma > 0 and 0 < low < high, "
                f"got sigma {self.sigma}, low {self.low}, high {self.high}"
            )
        if self._mass < 1e-9:
            raise ConfigError(
                f"log-normal lengths: [{self.low:g}, {self.high:g}] holds next to nothing of "
                f"exp(N({self.mu}, {self.sigma}))"
            )

    @property
    def support(self) -> tuple[float, float]:
        return self.low, self.high

    def _z(self, x: float) -> float:
        return (math.log(x) - self.mu) / self.sigma

    @cached_property
    def _edges(self) -> tuple[float, float, float]:
        low, high = self._z(self.low), self._z(self.high)
        return _NORMAL.cdf(low), _NORMAL.cdf(high), _NORMAL.cdf(low - self.sigma)

    @cached_property
    def _mass(self) -> float:
        return self._edges[1] - self._edges[0]

    def cdf(self, x: float) -> float:
        if x <= self.low:
            return 0.0
        if x >= self.high:
            return 1.0
        return (_NORMAL.cdf(self._z(x)) - self._edges[0]) / self._mass

    def partial_mean(self, x: float) -> float:
        if x <= self.low:
            return 0.0
        z = self._z(min(x, self.high)) - self.sigma
        return math.exp(self.mu + self.sigma**2 / 2) * (_NORMAL.cdf(z) - self._edges[2]) / self._mass

    def quantile(self, q: float) -> float:
        if q <= 0:
            return self.low
        if q >= 1:
            return self.high
        x = math.exp(self.mu + self.sigma * _NORMAL.inv_cdf(self._edges[0] + q * self._mass))
        return min(max(x, self.low), self.high)

    def sample(self, rng: np.random.Generator, n: int) -> Floats:
        out = np.empty(0)
        while len(out) < n:
            draw = np.exp(rng.normal(self.mu, self.sigma, int((n - len(out)) / self._mass * 1.05) + 16))
            out = np.concatenate([out, draw[(draw >= self.low) & (draw <= self.high)]])
        return out[:n]


class Empirical:
    """The lengths of a trace, each equally likely."""

    def __init__(self, values: Sequence[float] | npt.ArrayLike) -> None:
        array = np.sort(np.asarray(values, dtype=np.float64))
        if array.ndim != 1 or not len(array) or not np.isfinite(array).all() or array[0] < 0:
            raise ConfigError("empirical lengths need at least one finite, non-negative number")
        self.values: Floats = array
        self._sums: Floats = np.concatenate([[0.0], np.cumsum(array)])

    @property
    def support(self) -> tuple[float, float]:
        return float(self.values[0]), float(self.values[-1])

    def _rank(self, x: float) -> int:
        return int(np.searchsorted(self.values, x, side="right"))

    def cdf(self, x: float) -> float:
        return self._rank(x) / len(self.values)

    def partial_mean(self, x: float) -> float:
        return float(self._sums[self._rank(x)]) / len(self.values)

    def quantile(self, q: float) -> float:
        rank = min(max(math.ceil(q * len(self.values) - 1e-9) - 1, 0), len(self.values) - 1)
        return float(self.values[rank])

    def sample(self, rng: np.random.Generator, n: int) -> Floats:
        return rng.choice(self.values, n)


@dataclass(frozen=True)
class Exponential:
    """Memoryless lengths: with a linear profile they make an M/M/c queue, which the simulator is checked against."""

    mean: float

    def __post_init__(self) -> None:
        if not (self.mean > 0 and math.isfinite(self.mean)):
            raise ConfigError(f"exponential lengths need a positive mean, got {self.mean}")

    @property
    def support(self) -> tuple[float, float]:
        return 0.0, self.mean * 40.0  # 4e-18 of the mass lies beyond

    def cdf(self, x: float) -> float:
        return -math.expm1(-x / self.mean) if x > 0 else 0.0

    def partial_mean(self, x: float) -> float:
        return self.mean - (x + self.mean) * math.exp(-x / self.mean) if x > 0 else 0.0

    def quantile(self, q: float) -> float:
        return min(-self.mean * math.log1p(-q), self.support[1]) if q < 1 else self.support[1]

    def sample(self, rng: np.random.Generator, n: int) -> Floats:
        return rng.exponential(self.mean, n)


@dataclass(frozen=True)
class Scaled:
    """``base`` times ``factor``: the uncached part when a fraction of every prompt is cached, or a longer workload."""

    base: Lengths
    factor: float

    def __post_init__(self) -> None:
        if not (self.factor > 0 and math.isfinite(self.factor)):
            raise ConfigError(f"lengths can only be scaled by a positive factor, got {self.factor}")

    @property
    def support(self) -> tuple[float, float]:
        low, high = self.base.support
        return low * self.factor, high * self.factor

    def cdf(self, x: float) -> float:
        return self.base.cdf(x / self.factor)

    def partial_mean(self, x: float) -> float:
        return self.base.partial_mean(x / self.factor) * self.factor

    def quantile(self, q: float) -> float:
        return self.base.quantile(q) * self.factor

    def sample(self, rng: np.random.Generator, n: int) -> Floats:
        return self.base.sample(rng, n) * self.factor
