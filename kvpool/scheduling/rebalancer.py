"""The long timescale: converting PD instances between prefill and decode.

Two things must agree before an instance changes its role: what the stages show (queues and utilisation, sustained)
and what the model says of the new split (equation 8 over the router's window of recent requests). Then one instance is
drained, converted, and the next change waits for the dwell time. Pure: time comes in with the samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

from kvtransport.errors import ConfigError


class Role(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


class Phase(StrEnum):
    """Of the rebalancer: one conversion at a time."""

    WATCHING = "watching"
    DRAINING = "draining"
    CONVERTING = "converting"


@dataclass(frozen=True, slots=True)
class StageSample:
    """One look at the stages. Utilisations are 0 to 1 over the time since the last sample; waits in seconds.

    ``prefill_utilisation`` is that of the less busy prefill path (the router evens them out), ``decode_utilisation`` the part of batch places taken.
    """

    at: float
    n_p: int
    n_d: int
    prefill_utilisation: float
    prefill_wait_s: float
    decode_utilisation: float
    decode_wait_s: float


@dataclass(frozen=True, slots=True)
class RebalancerConfig:
    """When a conversion is worth it.

    ``sustain_s``: how long the stages must show the same bottleneck. ``dwell_s``: from the end of one conversion to
    the start of the next. ``gain``: relative gain predicted for the best split in that direction. A stage is hot at
    ``hot`` utilisation or ``wait_s`` of queue; the other one must be below ``cool`` to give an instance away. Decode
    is only ever planned with ``decode_fill`` of its places. ``min_p`` and ``min_d`` are floors.
    """

    min_p: int = 0
    min_d: int = 1
    sustain_s: float = 60.0
    dwell_s: float = 120.0
    gain: float = 0.10
    hot: float = 0.92
    cool: float = 0.85
    wait_s: float = 5.0
    decode_fill: float = 0.9

    def __post_init__(self) -> None:
        if self.min_p < 0 or self.min_d < 1:
            raise ConfigError(f"rebalancer floors: min_p >= 0 and min_d >= 1, got {self.min_p} and {self.min_d}")
        if self.sustain_s < 0 or self.dwell_s < 0 or self.gain < 0 or not 0 < self.cool <= self.hot <= 1:
            raise ConfigError("rebalancer: times and gain must be >= 0, and 0 < cool <= hot <= 1")


@dataclass(frozen=True, slots=True)
class Conversion:
    """Drain one instance of role ``source``, then start it as ``target``."""

    source: Role
    target: Role
    now_rate: float
    then_rate: float
    reason: str


Capacity = Callable[[int, int], tuple[float, float]]
"""(n_p, n_d) -> requests per second that split can prefill, and decode (equations 3 to 5); (0, 0): not known yet."""


class Rebalancer:
    """Watches the stages; says when one instance should change its role."""

    def __init__(self, config: RebalancerConfig) -> None:
        self.config = config
        self.phase = Phase.WATCHING
        self._since: tuple[Role, float] | None = None  # the role that is short, since when
        self._not_before = float("-inf")
        self._smooth: tuple[float, float, float] | None = None  # at, prefill and decode utilisation

    def observe(self, sample: StageSample, capacity: Capacity) -> Conversion | None:
        """One sample; a Conversion when it is time for one (the phase is DRAINING then).

        ``capacity`` is asked only when the stages have shown a bottleneck for long enough.
        """
        sample = self._smoothed(sample)
        short = self._bottleneck(sample)
        if short is None:
            self._since = None
            return None
        if self._since is None or self._since[0] is not short:
            self._since = (short, sample.at)
        config = self.config
        if self.phase is not Phase.WATCHING or sample.at < self._not_before:
            return None
        if sample.at - self._since[1] < config.sustain_s:
            return None
        toward = 1 if short is Role.PREFILL else -1
        source = Role.DECODE if short is Role.PREFILL else Role.PREFILL
        n_p, n_d = sample.n_p + toward, sample.n_d - toward
        if n_p < config.min_p or n_d < config.min_d:
            return None
        if short is Role.PREFILL and sample.decode_utilisation * sample.n_d > config.hot * n_d:
            return None
        now_rate = self._rate(capacity(sample.n_p, sample.n_d))
        then_rate = self._rate(capacity(n_p, n_d))
        # The gain is judged by where this direction leads, but every single step has to help.
        best, p, d = then_rate, n_p + toward, n_d - toward
        while p >= config.min_p and d >= config.min_d:
            best = max(best, self._rate(capacity(p, d)))
            p, d = p + toward, d - toward
        if now_rate <= 0 or then_rate <= now_rate or best < now_rate * (1 + config.gain):
            return None
        self.phase = Phase.DRAINING
        self._since = None
        reason = (
            f"{short.value} has been the bottleneck for {config.sustain_s:g} s "
            f"(prefill {sample.prefill_utilisation:.0%} busy, {sample.prefill_wait_s:.1f} s wait; decode "
            f"{sample.decode_utilisation:.0%}, {sample.decode_wait_s:.1f} s); "
            f"{n_p}/{n_d} should carry {then_rate:.2f} req/s instead of {now_rate:.2f}"
        )
        return Conversion(source, short, now_rate, then_rate, reason)

    def drained(self) -> None:
        """The instance has finished its work and is being converted. ConfigError outside DRAINING."""
        if self.phase is not Phase.DRAINING:
            raise ConfigError(f"drained() while {self.phase.value}: no instance was draining")
        self.phase = Phase.CONVERTING

    def converted(self, now: float) -> None:
        """The instance serves in its new role. The caller re-solves t next. ConfigError outside CONVERTING."""
        if self.phase is not Phase.CONVERTING:
            raise ConfigError(f"converted() while {self.phase.value}: no instance was converting")
        self.phase = Phase.WATCHING
        self._not_before = now + self.config.dwell_s
        self._since = self._smooth = None

    def _rate(self, capacity: tuple[float, float]) -> float:
        prefill, decode = capacity
        # A queue before prefill is lived with; batches that are always full make everybody wait.
        return min(prefill, decode * self.config.decode_fill)

    def _smoothed(self, sample: StageSample) -> StageSample:
        """Utilisations averaged over about ``sustain_s``: a second is far too short to judge a batch by."""
        before, seconds = self._smooth, self.config.sustain_s
        prefill, decode = sample.prefill_utilisation, sample.decode_utilisation
        if before is not None and seconds > 0:
            weight = 1.0 - math.exp(-max(sample.at - before[0], 0.0) / seconds)
            prefill = before[1] + (prefill - before[1]) * weight
            decode = before[2] + (decode - before[2]) * weight
        self._smooth = (sample.at, prefill, decode)
        return replace(sample, prefill_utilisation=prefill, decode_utilisation=decode)

    def _bottleneck(self, sample: StageSample) -> Role | None:
        config = self.config
        prefill_hot = sample.prefill_utilisation >= config.hot or sample.prefill_wait_s >= config.wait_s
        decode_hot = sample.decode_utilisation >= config.hot or sample.decode_wait_s >= config.wait_s
        if prefill_hot and not decode_hot and sample.decode_utilisation < config.cool:
            return Role.PREFILL
        if decode_hot and not prefill_hot and sample.prefill_utilisation < config.cool:
            return Role.DECODE
        return None
