"""Workloads: all requests of a run drawn ahead as arrays, so that the event loop only reads them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvtransport.errors import ConfigError

from ..lengths import Lengths
from ..profiles import Floats
from ..traces import Trace

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Requests:
    """Requests by arrival: seconds, prompt tokens, output tokens.

    Prefix structure is either ``session`` and ``shared`` (the first ``shared`` tokens are those of the session's
    previous prompt) or ``blocks``, ids per block of a trace; both None without any.
    """

    at: Floats
    tokens: Floats
    output: Floats
    session: Ints | None = None
    shared: Floats | None = None
    blocks: tuple[tuple[int, ...], ...] | None = None
    block_tokens: int = 0

    def __len__(self) -> int:
        return len(self.at)


def poisson(rng: np.random.Generator, rate: float, n: int) -> Floats:
    """``n`` arrival times of a Poisson process of ``rate`` per second."""
    _positive(rate)
    return np.cumsum(rng.exponential(1.0 / rate, n))


@dataclass(frozen=True, slots=True)
class Bursts:
    """A Markov-modulated Poisson process: ``factor`` times the mean rate during bursts of ``on_s`` seconds on average,
    every ``off_s`` seconds on average, and as much less in between that the mean rate holds."""

    factor: float = 2.0
    on_s: float = 60.0
    off_s: float = 240.0

    def __post_init__(self) -> None:
        if not (self.on_s > 0 and self.off_s > 0 and 1 <= self.factor <= (self.on_s + self.off_s) / self.on_s):
            raise ConfigError(
                f"bursts: on_s and off_s must be > 0 and factor from 1 to (on_s + off_s) / on_s, got {self.on_s}, "
                f"{self.off_s} and {self.factor}"
            )


def bursty(rng: np.random.Generator, rate: float, n: int, bursts: Bursts) -> Floats:
    """``n`` arrival times with mean ``rate`` per second, modulated by ``bursts``."""
    _positive(rate)
    share = bursts.on_s / (bursts.on_s + bursts.off_s)
    high = rate * bursts.factor
    low = rate * (1.0 - share * bursts.factor) / (1.0 - share)
    # Time is rescaled: unit-rate arrivals mapped back through the cumulative intensity, a broken line.
    unit = np.cumsum(rng.exponential(1.0, n))
    edges, mass = [0.0], [0.0]
    on = bool(rng.random() < share)
    while mass[-1] < unit[-1]:
        span = float(rng.exponential(bursts.on_s if on else bursts.off_s))
        edges.append(edges[-1] + span)
        mass.append(mass[-1] + span * (high if on else low))
        on = not on
    return np.interp(unit, mass, edges)


def _positive(rate: float) -> None:
    if not rate > 0:
        raise ConfigError(f"arrivals need a positive rate, got {rate}")


def independent(
    rng: np.random.Generator, at: Floats, lengths: Lengths, output_tokens: float, *, output_cv: float = 0.0
) -> Requests:
    """Requests without shared prefixes; outputs are constant, or gamma with coefficient of variation ``output_cv``."""
    return Requests(at, lengths.sample(rng, len(at)), outputs(rng, len(at), output_tokens, output_cv))


def outputs(rng: np.random.Generator, n: int, mean: float, cv: float) -> Floats:
    """Output tokens of ``n`` requests, at least 1."""
    if cv <= 0:
        return np.full(n, mean)
    shape = 1.0 / cv**2
    return np.maximum(rng.gamma(shape, mean / shape, n), 1.0)


@dataclass(frozen=True, slots=True)
class Sessions:
    """Conversations: ``turns`` prompts on average (geometric), ``think_s`` apart on average (exponential); every
    prompt is the one before plus ``growth`` of a fresh draw of the length distribution, up to ``limit`` tokens."""

    turns: float = 4.0
    think_s: float = 60.0
    growth: float = 0.25
    limit: float = 131072.0

    def __post_init__(self) -> None:
        if not (self.turns >= 1 and self.think_s > 0 and self.growth > 0 and self.limit > 1):
            raise ConfigError("sessions: turns >= 1, think_s > 0, growth > 0 and limit > 1 are needed")


def sessions(
    rng: np.random.Generator,
    rate: float,
    n: int,
    lengths: Lengths,
    output_tokens: float,
    spec: Sessions,
    *,
    output_cv: float = 0.0,
) -> Requests:
    """``n`` requests of conversations; ``rate`` counts requests, not conversations."""
    _positive(rate)
    starts = int(n / spec.turns * 1.2) + 64
    turns = rng.geometric(1.0 / spec.turns, starts)
    first = np.cumsum(rng.exponential(spec.turns / rate, starts))
    session = np.repeat(np.arange(starts), turns)
    begin = np.repeat(np.cumsum(turns) - turns, turns)
    index = np.arange(len(session))
    opening = index == begin
    think = np.where(opening, 0.0, rng.exponential(spec.think_s, len(session)))
    added = lengths.sample(rng, len(session)) * np.where(opening, 1.0, spec.growth)
    elapsed, grown = np.cumsum(think), np.cumsum(added)
    at = first[session] + elapsed - elapsed[begin]
    tokens = np.minimum(grown - grown[begin] + added[begin], spec.limit)
    shared = np.where(opening, 0.0, np.minimum(np.roll(tokens, 1), tokens - 1.0))
    # Conversations under way at the beginning are missing, so the first few think times run below the rate.
    order = np.argsort(at, kind="stable")[:n]
    return Requests(
        at[order],
        tokens[order],
        outputs(rng, len(order), output_tokens, output_cv),
        session=session[order],
        shared=shared[order],
    )


def replay(trace: Trace, rate: float, n: int) -> Requests:
    """A trace at ``rate`` requests per second, its gaps stretched alike and repeated up to ``n`` requests.

    Every repetition has block ids of its own: it is the same conversation held by someone else.
    """
    _positive(rate)
    size = len(trace)
    span = float(trace.arrivals[-1]) * size / max(size - 1, 1)
    if span <= 0:
        raise ConfigError("a trace to replay must span more than an instant")
    stretch = size / rate / span
    rounds = -(-n // size)
    highest = 1 + max((max(b) for b in trace.blocks if b), default=0)
    at = np.concatenate([trace.arrivals + r * span for r in range(rounds)])[:n] * stretch
    blocks = tuple(tuple(b + r * highest for b in ids) for r in range(rounds) for ids in trace.blocks)[:n]
    return Requests(
        at,
        np.tile(trace.input_tokens, rounds)[:n],
        np.tile(trace.output_tokens, rounds)[:n],
        blocks=blocks,
        block_tokens=trace.block_tokens,
    )
