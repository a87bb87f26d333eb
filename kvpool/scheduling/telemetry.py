"""Measured scarcity: from the counters of a link to "how much can it carry, and is it getting tight".

:class:`LinkSampler` turns successive readings of ``link.telemetry()`` into samples, :class:`LinkMonitor` turns
samples into one pressure figure with hysteresis. Both are pure: time comes in with the reading.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from kvtransport.errors import ConfigError


class LinkCounters(Protocol):
    """What is read from ``kvtransport.link.Link.telemetry()``."""

    @property
    def sent_bytes(self) -> int:
        """Payload bytes sent since the link was made."""
        ...

    @property
    def unsent_bytes(self) -> int:
        """Bytes waiting to be sent or acknowledged."""
        ...

    @property
    def spilled_bytes(self) -> int:
        """Bytes the producer had to set aside because the link took no more."""
        ...

    @property
    def rtt_s(self) -> float | None: ...


@dataclass(frozen=True, slots=True)
class LinkSample:
    """One interval of a link. Rates in bytes per second.

    ``capacity`` is the estimate of what the link can carry now, ``inflation`` the round trip over the smallest
    one seen lately, ``loss`` the share of segments sent again.
    """

    at: float
    goodput: float
    capacity: float
    queued_bytes: float
    spilled_bytes: float
    rtt: float | None = None
    inflation: float = 1.0
    loss: float = 0.0

    @property
    def backlog_s(self) -> float:
        """Seconds the link needs to empty what waits."""
        waiting = self.queued_bytes + self.spilled_bytes
        if waiting <= 0:
            return 0.0
        return waiting / self.capacity if self.capacity > 0 else float("inf")


@dataclass(frozen=True, slots=True)
class SamplerConfig:
    """``nominal``: bytes per second the link is rented for, and the most the estimate ever says.

    A link counts as *saturated* in an interval when at least ``busy_s`` seconds of data waited at both its
    ends or the round trip grew by ``busy_inflation``; only then does its goodput say what it can carry. Otherwise the
    estimate climbs back by ``probe`` of nominal a second, so that a recovered link is found by use.
    """

    nominal: float
    busy_s: float = 0.05
    busy_inflation: float = 2.0
    probe: float = 0.05
    rtt_window_s: float = 60.0

    def __post_init__(self) -> None:
        if not self.nominal > 0 or not 0 < self.probe <= 1:
            raise ConfigError(
                f"link sampler: nominal must be > 0 and probe in (0, 1], got {self.nominal} and {self.probe}"
            )


class LinkSampler:
    """Successive readings of one link's counters in, :class:`LinkSample` out."""

    def __init__(self, config: SamplerConfig) -> None:
        self._config = config
        self._last: tuple[float, int, float] | None = None  # at, sent, waiting
        self._capacity = config.nominal
        self._rtts: deque[tuple[float, float]] = deque()

    def sample(self, at: float, counters: LinkCounters, *, loss: float = 0.0) -> LinkSample | None:
        """The interval since the last reading; None for the first, or when no time has passed.

        ``loss`` is the retransmitted share of the interval where the caller knows it (TCP_INFO).
        """
        waiting = float(counters.unsent_bytes + counters.spilled_bytes)
        last, config = self._last, self._config
        if last is not None and at <= last[0]:
            return None
        inflation = self._inflation(at, counters.rtt_s)
        self._last = (at, counters.sent_bytes, waiting)
        if last is None:
            return None
        # A link that was made again counts from zero: the interval is lost, not negative.
        goodput = max(counters.sent_bytes - last[1], 0) / (at - last[0])
        enough = config.busy_s * self._capacity
        saturated = min(waiting, last[2]) >= enough or (inflation >= config.busy_inflation and waiting > 0)
        if saturated:
            self._capacity = min(max(goodput, config.nominal * 1e-3), config.nominal)
        else:
            risen = max(self._capacity + config.probe * config.nominal * (at - last[0]), goodput)
            self._capacity = min(risen, config.nominal)
        return LinkSample(
            at=at,
            goodput=goodput,
            capacity=self._capacity,
            queued_bytes=float(counters.unsent_bytes),
            spilled_bytes=float(counters.spilled_bytes),
            rtt=counters.rtt_s,
            inflation=inflation,
            loss=loss,
        )

    def _inflation(self, at: float, rtt: float | None) -> float:
        if rtt is None or rtt <= 0:
            return 1.0
        rtts = self._rtts
        while rtts and rtts[-1][1] >= rtt:
            rtts.pop()
        rtts.append((at, rtt))
        while rtts[0][0] < at - self._config.rtt_window_s:
            rtts.popleft()
        return rtt / rtts[0][1]


@dataclass(frozen=True, slots=True)
class MonitorConfig:
    """Where each sign of scarcity counts as "at its limit" (pressure 1), and the hysteresis.

    Scarce at pressure ``enter`` at once, plentiful again after ``calm_s`` seconds below ``leave``. ``lasting_s`` is the
    time over which capacity is averaged for decisions that take minutes themselves.
    """

    utilisation: float = 0.9
    backlog_s: float = 1.0
    inflation: float = 3.0
    loss: float = 0.02
    enter: float = 1.0
    leave: float = 0.7
    calm_s: float = 3.0
    lasting_s: float = 600.0

    def __post_init__(self) -> None:
        if not 0 < self.leave < self.enter or not 0 < self.utilisation <= 1:
            raise ConfigError("link monitor: needs 0 < leave < enter and a utilisation limit in (0, 1]")
        if not (
            self.backlog_s > 0 and self.inflation > 1 and self.loss > 0 and self.calm_s >= 0 and self.lasting_s > 0
        ):
            raise ConfigError("link monitor: backlog_s, loss and lasting_s must be > 0, inflation > 1, calm_s >= 0")


class LinkMonitor:
    """Holds the last sample and whether bandwidth is scarce."""

    def __init__(self, config: MonitorConfig) -> None:
        self._config = config
        self._calm_since: float | None = None
        self.scarce = False
        self.pressure = 0.0
        self.sign = "none yet"
        """Which measurement the pressure comes from."""
        self.sample: LinkSample | None = None
        self.lasting_capacity: float | None = None
        """Capacity averaged over ``lasting_s``, bytes per second; None before the first sample."""

    def observe(self, sample: LinkSample) -> bool:
        """Take one sample; True when scarcity began or ended with it."""
        config = self._config
        signs = {
            "utilisation": sample.goodput / sample.capacity / config.utilisation
            if sample.capacity > 0
            else float("inf"),
            "backlog": sample.backlog_s / config.backlog_s,
            "inflation": (sample.inflation - 1.0) / (config.inflation - 1.0),
            "loss": sample.loss / config.loss,
        }
        self.sign, self.pressure = max(signs.items(), key=lambda item: item[1])
        before, self.sample = self.sample, sample
        if before is None or self.lasting_capacity is None:
            self.lasting_capacity = sample.capacity
        else:
            weight = 1.0 - math.exp(-max(sample.at - before.at, 0.0) / config.lasting_s)
            self.lasting_capacity += (sample.capacity - self.lasting_capacity) * weight
        if self.pressure >= config.enter:
            self._calm_since = None
            changed, self.scarce = not self.scarce, True
            return changed
        if self.pressure >= config.leave or not self.scarce:
            self._calm_since = None
            return False
        if self._calm_since is None:
            self._calm_since = sample.at
        if sample.at - self._calm_since >= config.calm_s:
            self.scarce = False
            return True
        return False
