"""Re-solving the threshold while requests arrive: equation 7 over a sliding window of real requests.

Unlike the planner, which integrates a distribution, this works on the last few thousand requests with their own
prefix matches: the same balance of loads, as prefix sums over the sorted window. One solve is well under a millisecond.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from kvtransport.errors import ConfigError

from .profiles import Floats


@dataclass(frozen=True, slots=True)
class Resources:
    """What prefills: instances by path, and the egress bytes per second that may be planned with."""

    n_prfaas: int
    n_p: int
    egress: float


@dataclass(frozen=True, slots=True)
class Solved:
    """A threshold (tokens), the share of requests above it, and the prefill capacity there (req/s)."""

    threshold: float
    share: float
    capacity: float


class Window:
    """The last ``size`` requests: uncached length, prefill seconds on each path, bytes if offloaded."""

    def __init__(self, size: int) -> None:
        if size < 8:
            raise ConfigError(f"the router's window must hold at least 8 requests, got {size}")
        self.size = size
        self._rows = np.zeros((5, size))
        self._next = 0
        self.count = 0

    def add(self, at: float, uncached: float, local_s: float, prfaas_s: float, nbytes: float) -> None:
        """Add one request that arrived at ``at`` seconds; the oldest one falls out of a full window."""
        self._rows[:, self._next] = (at, uncached, local_s, prfaas_s, nbytes)
        self._next = (self._next + 1) % self.size
        self.count = min(self.count + 1, self.size)

    def rate(self, now: float) -> float:
        """Arrivals per second over the window; 0 while it is empty."""
        if self.count < 2:
            return 0.0
        oldest = self._rows[0, self._next if self.count == self.size else 0]
        return self.count / max(now - float(oldest), 1e-9)

    def _sums(self) -> tuple[Floats, ...]:
        rows = self._rows[1:, : self.count]
        rows = rows[:, np.argsort(rows[0])]
        n = self.count
        local = np.zeros(n + 1)
        np.cumsum(rows[1], out=local[1:])
        prfaas = np.zeros(n + 1)
        prfaas[:n] = np.cumsum(rows[2][::-1])[::-1]
        egress = np.zeros(n + 1)
        egress[:n] = np.cumsum(rows[3][::-1])[::-1]
        return rows, local / n, prfaas / n, egress / n

    def balance(self, resources: Resources) -> Solved:
        """Equation 7: the threshold with the largest prefill capacity for the requests of the window.

        Candidate k sends the k shortest to local prefill, so all loads are prefix sums.
        """
        rows, local, prfaas, egress = self._sums()
        with np.errstate(divide="ignore", invalid="ignore"):
            remote = np.minimum(
                np.where(prfaas > 0, resources.n_prfaas / prfaas, np.inf),
                np.where(egress > 0, resources.egress / egress, np.inf),
            )
            capacity = np.minimum(remote, np.where(local > 0, resources.n_p / local, np.inf))
        return self._at(rows[0], int(np.argmax(capacity)), capacity)

    def quickest(self, resources: Resources, rate: float) -> Solved:
        """The threshold with the least mean TTFT at ``rate`` arrivals per second.

        Waiting times are Sakasegawa's approximation of M/G/c per pool plus M/G/1 for the link. Towards saturation
        the answer becomes that of :meth:`balance`, and beyond it that is what is returned.
        """
        rows, local, prfaas, egress = self._sums()
        n = self.count
        k = np.arange(n + 1)
        local2 = np.concatenate([[0.0], np.cumsum(rows[1] ** 2)]) / n
        prfaas2 = np.concatenate([np.cumsum(rows[2][::-1] ** 2)[::-1], [0.0]]) / n
        egress2 = np.concatenate([np.cumsum(rows[3][::-1] ** 2)[::-1], [0.0]]) / n
        with np.errstate(divide="ignore", invalid="ignore"):
            busy_p = rate * local / max(resources.n_p, 1e-9)
            busy_h = rate * prfaas / max(resources.n_prfaas, 1e-9)
            busy_b = rate * egress / max(resources.egress, 1e-9)
            short, long = k / n, 1.0 - k / n
            wait_p = _wait(local, local2, short, busy_p, resources.n_p)
            wait_h = _wait(prfaas, prfaas2, long, busy_h, resources.n_prfaas)
            wait_b = np.where(egress > 0, rate * egress2 / max(resources.egress, 1e-9) ** 2 / 2 / (1 - busy_b), 0.0)
            mean = local + prfaas + short * wait_p + long * (wait_h + wait_b)
            usable = np.maximum(np.maximum(busy_p, busy_h), busy_b) <= 0.95
        if not usable.any():
            return self.balance(resources)
        best = int(np.argmin(np.where(usable, mean, np.inf)))
        with np.errstate(divide="ignore"):
            capacity = rate / np.maximum(np.maximum(busy_p, busy_h), busy_b)
        return self._at(rows[0], best, capacity)

    def _at(
        self,
        lengths: Floats,
        k: int,
        capacity: Floats,
    ) -> Solved:
        n = self.count
        # Equal lengths cannot be told apart by a threshold: move to the better end of the tie.
        if 0 < k < n and lengths[k - 1] == lengths[k]:
            first = int(np.searchsorted(lengths, lengths[k], side="left"))
            last = int(np.searchsorted(lengths, lengths[k], side="right"))
            k = first if capacity[first] >= capacity[last] else last
        if k == 0:
            threshold = 0.0
        elif k == n:
            threshold = math.inf
        else:
            threshold = float(lengths[k - 1] + lengths[k]) / 2
        return Solved(threshold, 1.0 - k / n, float(capacity[k]))

    def quantile(self, share: float) -> float:
        """The threshold that offloads at most ``share`` of the window's requests."""
        if self.count == 0 or share <= 0:
            return math.inf
        if share >= 1:
            return 0.0
        lengths = np.sort(self._rows[1, : self.count])
        k = min(math.ceil((1.0 - share) * self.count - 1e-9), self.count - 1)
        return float(lengths[k - 1] + lengths[k]) / 2 if k else 0.0

    def share_above(self, threshold: float) -> float:
        """The share of the window's requests longer than ``threshold``."""
        if self.count == 0:
            return 0.0
        return float(np.count_nonzero(self._rows[1, : self.count] > threshold)) / self.count


def _wait(
    load: Floats,
    load2: Floats,
    share: Floats,
    busy: Floats,
    servers: int,
) -> Floats:
    """Mean waiting time of one pool (Sakasegawa 1977): seconds; 0 where nobody uses it."""
    if servers == 0:
        return np.where(load > 0, np.inf, 0.0)
    mean = load / share
    variability = load2 / share / mean**2  # 1 + squared coefficient of variation
    wait = mean / servers * busy ** (math.sqrt(2 * (servers + 1)) - 1) / (1 - busy) * variability / 2
    return np.asarray(np.where(load > 0, wait, 0.0))


@dataclass(frozen=True, slots=True)
class ControllerConfig:
    """How the threshold moves.

    ``interval_s``: between solves while nothing happens. ``deadband``: changes of the offloaded share below this are
    ignored. ``max_step``: the share grows by at most this per solve, so that a path that became attractive fills
    gradually; it shrinks at once. ``utilisation``: part of the measured egress that is planned with.
    ``drain_s``: backlog on the link is meant to be gone in this time. ``minimum``: requests before the first solve.
    """

    window: int = 2048
    interval_s: float = 5.0
    deadband: float = 0.02
    max_step: float = 0.10
    utilisation: float = 0.9
    drain_s: float = 10.0
    minimum: int = 64
    objective: str = "quickest"

    def __post_init__(self) -> None:
        if self.objective not in ("quickest", "balance"):
            raise ConfigError(f"threshold objective must be quickest or balance, got {self.objective!r}")
        if not (0 <= self.deadband < 1 and 0 < self.max_step <= 1 and 0 < self.utilisation <= 1):
            raise ConfigError("threshold controller: deadband in [0, 1), max_step and utilisation in (0, 1]")
        if not (self.interval_s > 0 and self.drain_s > 0 and self.minimum >= 8):
            raise ConfigError("threshold controller: interval_s and drain_s must be > 0, minimum at least 8")


class ThresholdController:
    """Owns t: solves over the window, moves in bounded steps towards more offloading, at once towards less."""

    def __init__(self, config: ControllerConfig, *, initial: float) -> None:
        self.config = config
        self.window = Window(config.window)
        self.threshold = initial
        self.target: Solved | None = None
        self._solved_at: float | None = None

    def due(self, now: float) -> bool:
        """True when the interval since the last solve has passed."""
        return self._solved_at is None or now - self._solved_at >= self.config.interval_s

    def usable_egress(self, capacity: float, backlog_bytes: float) -> float:
        """Bytes per second to plan with: the measured capacity less what clears the backlog."""
        return max(capacity * self.config.utilisation - backlog_bytes / self.config.drain_s, 0.0)

    def solve(self, now: float, resources: Resources) -> bool:
        """Re-solve and move; True when the threshold changed."""
        self._solved_at = now
        config, window = self.config, self.window
        if resources.n_prfaas == 0 or resources.egress <= 0:
            return self._move(math.inf)
        if resources.n_p == 0:
            return self._move(0.0)
        if window.count < config.minimum:
            return False
        if config.objective == "balance":
            target = window.balance(resources)
        else:
            target = window.quickest(resources, window.rate(now))
        self.target = target
        share = window.share_above(self.threshold)
        if abs(target.share - share) < config.deadband:
            return False
        if target.share > share + config.max_step:
            return self._move(window.quantile(share + config.max_step))
        return self._move(target.threshold)

    def _move(self, threshold: float) -> bool:
        changed, self.threshold = threshold != self.threshold, threshold
        return changed
