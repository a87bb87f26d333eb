"""The router: where a request is prefilled, decided from its length, its prefix matches and measured scarcity.

The rules are those of arXiv 2604.15039, section on dual-timescale scheduling. With ``l`` the uncached part:

- bandwidth scarce: each cluster's cache is judged on its own. ``l_total - l_pd <= t`` stays local; otherwise the
  request is offloaded with whatever PrfaaS has cached;
- bandwidth plentiful: ``l_prefix = max(l_prfaas, l_pd)`` counts for both, and the better cache may be pulled across.

Around them: t follows the window of recent requests (:mod:`.window`), a predicted wait can send a request the
other way, and a request that no path can take in time is shed. The router is pure: time and readings come in with
the calls. One decision costs some ten microseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from kvtransport.errors import ConfigError

from .decode import DecodeForecast
from .ledger import PoolLedger
from .profiles import Profile
from .telemetry import LinkMonitor, LinkSample, MonitorConfig
from .window import ControllerConfig, Resources, ThresholdController


class Path(StrEnum):
    """Where a request is prefilled."""

    LOCAL = "local"
    PRFAAS = "prfaas"
    SHED = "shed"


class Reason(StrEnum):
    """Why a decision is what it is; a decision carries several."""

    SHORT = "short"
    LONG = "long"
    SCARCE = "bandwidth_scarce"
    PLENTIFUL = "bandwidth_plentiful"
    PULL = "prefix_pulled"
    PULL_TOO_SLOW = "pull_would_take_longer_than_computing"
    LOCAL_BUSY = "local_path_slower_now"
    PRFAAS_BUSY = "prfaas_path_slower_now"
    LINK_FULL = "link_full"
    LOCAL_FULL = "local_queue_full"
    PRFAAS_FULL = "prfaas_queue_full"
    DECODE_FULL = "decode_full"
    NO_LOCAL = "no_local_prefill"
    NO_PRFAAS = "no_prfaas"


@dataclass(frozen=True, slots=True)
class Request:
    """A request with its match results: tokens of prompt, and cached prefix per cluster (tokens, < ``tokens``)."""

    tokens: float
    match_pd: float = 0.0
    match_prfaas: float = 0.0


@dataclass(frozen=True, slots=True)
class Decision:
    """Where to prefill, what that takes, and why.

    ``uncached`` tokens are computed; ``pull_bytes`` of prefix come from the other cluster first; ``transfer_bytes``
    of KVCache go to the decode side afterwards. ``ttft_s`` is the predicted wait plus prefill plus transfer tail plus
    the wait for a place in decode.
    For ``Path.SHED``, ``retry_after_s`` says when to ask again.
    """

    path: Path
    uncached: float
    prefill_s: float
    wait_s: float
    ttft_s: float
    pull_bytes: float
    transfer_bytes: float
    threshold: float
    reasons: tuple[Reason, ...]
    local_ttft_s: float
    prfaas_ttft_s: float
    compared: float
    """The length that was compared with the threshold, tokens."""
    retry_after_s: float = 0.0

    def explain(self) -> str:
        """The decision in one sentence, with the figures it was made on."""
        why = ", ".join(r.value.replace("_", " ") for r in self.reasons)
        numbers = (
            f"{self.compared:,.0f} uncached tokens against t = {self.threshold:,.0f}; predicted TTFT "
            f"{self.local_ttft_s:.2f} s local, {self.prfaas_ttft_s:.2f} s PrfaaS"
        )
        if self.path is Path.SHED:
            return f"shed ({why}): {numbers}; retry in {self.retry_after_s:.1f} s"
        extra = f", pulling {self.pull_bytes / 1e6:,.0f} MB of prefix" if self.pull_bytes else ""
        return f"{self.path.value} ({why}): {numbers}{extra}"


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Limits of the router.

    ``max_ttft_s``: a path predicted slower than this, decode's queue included, takes no request. ``max_link_backlog_s``:
    the link takes none when it is this far behind, until half of it is gone. ``max_decode_wait_s``: nothing is admitted
    that would wait longer than this for a place in decode. ``override_s`` and ``override``: the path that the threshold names is left for the
    other one when that is faster by at least ``override_s`` plus ``override`` times the extra instance-seconds it
    costs. ``pull_margin``: a pull must save this times the seconds it takes. ``adaptive`` False keeps t where it is.
    """

    max_ttft_s: float = 30.0
    max_link_backlog_s: float = 5.0
    max_decode_wait_s: float = 5.0
    override_s: float = 0.25
    override: float = 4.0
    pull_margin: float = 1.2
    adaptive: bool = True
    local_only: bool = False
    prfaas_only: bool = False
    queue_aware: bool = True
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    controller: ControllerConfig = field(default_factory=ControllerConfig)

    def __post_init__(self) -> None:
        if not (self.max_ttft_s > 0 and self.max_link_backlog_s > 0 and self.max_decode_wait_s > 0):
            raise ConfigError("router: max_ttft_s, max_link_backlog_s and max_decode_wait_s must be > 0")
        if self.override_s < 0 or self.override < 0 or self.pull_margin < 0:
            raise ConfigError("router: override_s, override and pull_margin must be >= 0")
        if self.local_only and self.prfaas_only:
            raise ConfigError("router: local_only and prfaas_only exclude each other")


class Router:
    """Decides for every request; told about the link, the pools and decode between decisions.

    ``prfaas`` must have KVCache sizes. ``egress`` is the link's nominal bytes per second, ``threshold`` the initial t,
    ``decode_s`` the seconds a request is expected to stay in decode until that has been measured.
    """

    def __init__(
        self,
        config: RouterConfig,
        *,
        pd: Profile,
        prfaas: Profile,
        n_p: int,
        n_prfaas: int,
        egress: float,
        threshold: float,
        decode_s: float = 25.0,
    ) -> None:
        if not threshold >= 0:
            raise ConfigError(f"router: the initial threshold must be >= 0 tokens, got {threshold}")
        self.config = config
        self.monitor = LinkMonitor(config.monitor)
        self.controller = ThresholdController(config.controller, initial=threshold)
        self.local = PoolLedger(n_p)
        self.prfaas = PoolLedger(n_prfaas)
        self._pd_seconds: Callable[[float], float] = pd.prefill.at
        self._prfaas_seconds: Callable[[float], float] = prfaas.prefill.at
        self._bytes: Callable[[float], float] = prfaas.sizes.at
        self._state_bytes = prfaas.sizes.at(0.0)
        self._capacity = egress
        self._link_at = 0.0
        self._link_bytes = 0.0
        self._link_free = 0.0  # when the link will have sent all that has been routed over it
        self._link_closed = False
        self._decode = DecodeForecast(decode_s)
        self._rate: tuple[float, float] | None = None

    # -- what happens around ---------------------------------------------------------------------------

    @property
    def threshold(self) -> float:
        return self.controller.threshold

    @property
    def resources(self) -> Resources:
        """What the threshold is solved for right now."""
        sample = self.monitor.sample
        backlog = 0.0 if sample is None else sample.queued_bytes + sample.spilled_bytes
        egress = self.controller.usable_egress(self._capacity, backlog)
        return Resources(self.prfaas.instances, self.local.instances, egress)

    def on_link(self, sample: LinkSample) -> None:
        """A telemetry interval has passed. A link that got worse moves t within this call."""
        before, self._capacity = self._capacity, sample.capacity
        left = max(self._link_free - sample.at, 0.0) * (before / sample.capacity if sample.capacity > 0 else 1.0)
        self._link_free = sample.at + max(left, min(sample.backlog_s, 1e9))
        self._link_at, self._link_bytes = sample.at, sample.queued_bytes + sample.spilled_bytes
        changed = self.monitor.observe(sample)
        if self.config.adaptive and (changed or sample.capacity < before * 0.95 or self.controller.due(sample.at)):
            self.controller.solve(sample.at, self.resources)

    def on_pool(self, path: Path, now: float, wait_s: float) -> None:
        """A pool reports how long a request arriving ``now`` would wait for an instance."""
        (self.local if path is Path.LOCAL else self.prfaas).correct(now, wait_s)

    def on_resize(self, now: float, *, n_p: int | None = None, n_prfaas: int | None = None) -> None:
        """Roles changed: the pools have these instances from now on, and t follows."""
        if n_p is not None:
            self.local.resize(now, n_p)
        if n_prfaas is not None:
            self.prfaas.resize(now, n_prfaas)
        if self.config.adaptive:
            self.controller.solve(now, self.resources)

    def on_decode(self, now: float, *, present: int, places: int, finished: int) -> None:
        """Decode reports the requests it holds (queued ones included), its places, and how many it has finished in all."""
        self._decode.report(now, present=present, places=places, finished=finished)

    def link_backlog_s(self, now: float) -> float:
        """Seconds until the link would have sent what waited at its last reading."""
        if self._capacity <= 0:
            return math.inf
        return max(self._link_bytes / self._capacity - (now - self._link_at), 0.0)

    # -- deciding --------------------------------------------------------------------------------------

    def route(self, now: float, request: Request) -> Decision:
        """Decide for one request arriving ``now`` and account for it.

        Raises ConfigError when a match is not shorter than the prompt.
        """
        total, on_pd, on_prfaas = request.tokens, request.match_pd, request.match_prfaas
        if not 0 <= on_pd < total or not 0 <= on_prfaas < total:
            raise ConfigError(
                f"a match is from 0 to below the prompt's {total:g} tokens, got {on_pd:g} (PD) and {on_prfaas:g} (PrfaaS)"
            )
        config, scarce = self.config, self.monitor.scarce
        local, prfaas, compared, notes = self._candidates(now, total, on_pd, on_prfaas, scarce)
        if config.adaptive and self.controller.due(now):
            self.controller.solve(now, self.resources)
        threshold = self.controller.threshold
        reasons = [Reason.SCARCE if scarce else Reason.PLENTIFUL]
        wants_prfaas = compared > threshold
        if config.local_only:
            wants_prfaas = False
        elif config.prfaas_only:
            wants_prfaas = True
        else:
            reasons.append(Reason.LONG if wants_prfaas else Reason.SHORT)
        closed_local = self._closed_local(local, reasons)
        closed_prfaas = self._closed_prfaas(now, prfaas, reasons)
        full = [self._decode.latest_wait(now + c.ready_s) > config.max_decode_wait_s for c in (local, prfaas)]
        if any(full):
            reasons.append(Reason.DECODE_FULL)
            closed_local, closed_prfaas = closed_local or full[0], closed_prfaas or full[1]
        if closed_local and closed_prfaas:
            return self._shed(now, local, prfaas, compared, threshold, reasons)
        if config.adaptive:
            # Only what is served: shed requests put no load on anything.
            self.controller.window.add(now, compared, local.prefill_s, prfaas.prefill_s, prfaas.link_bytes)
        chosen, other = (prfaas, local) if wants_prfaas else (local, prfaas)
        chosen_closed, other_closed = (closed_prfaas, closed_local) if wants_prfaas else (closed_local, closed_prfaas)
        if chosen_closed:
            chosen, other = other, chosen
        elif config.queue_aware and not other_closed and self._better(other, chosen):
            chosen, other = other, chosen
            reasons.append(Reason.PRFAAS_BUSY if wants_prfaas else Reason.LOCAL_BUSY)
        return self._accept(now, chosen, local, prfaas, compared, threshold, reasons, notes)

    def _better(self, other: _Candidate, chosen: _Candidate) -> bool:
        config = self.config
        return other.ttft_s + config.override_s + config.override * self._extra(other, chosen) < chosen.ttft_s

    def _extra(self, other: _Candidate, chosen: _Candidate) -> float:
        """What the other path costs the system more, in PrfaaS instance-seconds.

        At the threshold both paths are equally good a use of their instances, which is the exchange rate between a
        local second and a PrfaaS second.
        """
        t = self.controller.threshold
        if not 0.0 < t < math.inf:
            return max(other.prefill_s - chosen.prefill_s, 0.0)
        rate = self._rate
        if rate is None or rate[0] != t:
            self._rate = rate = (t, self._prfaas_seconds(t) / self._pd_seconds(t))
        price = rate[1]
        if other.path is Path.LOCAL:
            return max(other.prefill_s * price - chosen.prefill_s, 0.0)
        return max(other.prefill_s - chosen.prefill_s * price, 0.0)

    def _candidates(
        self, now: float, total: float, on_pd: float, on_prfaas: float, scarce: bool
    ) -> tuple[_Candidate, _Candidate, float, tuple[Reason | None, Reason | None]]:
        pd_s, prfaas_s = self._pd_seconds, self._prfaas_seconds
        capacity = self._capacity
        link_free = max(self._link_free, now)
        wait_local, wait_prfaas = self.local.wait(now), self.prfaas.wait(now)
        # What the decode side already holds need not travel; the recurrent state always does.
        transfer = self._bytes(total) - (self._bytes(on_pd) - self._state_bytes if on_pd else 0.0)
        note_local: Reason | None = None
        note_prfaas: Reason | None = None
        local_uncached, local_pull, local_wait = total - on_pd, 0.0, wait_local
        remote_uncached, remote_pull, remote_wait = total - on_prfaas, 0.0, wait_prfaas
        compared = total - on_pd
        if not scarce and on_pd != on_prfaas and capacity > 0:
            compared = total - max(on_pd, on_prfaas)
            if on_prfaas > on_pd:
                pull = self._bytes(on_prfaas) - (self._bytes(on_pd) - self._state_bytes if on_pd else 0.0)
                seconds = self.link_backlog_s(now) + pull / capacity
                if pd_s(total - on_pd) - pd_s(compared) > self.config.pull_margin * seconds:
                    local_uncached, local_pull, note_local = compared, pull, Reason.PULL
                    local_wait = max(wait_local, seconds)
                else:
                    note_local = Reason.PULL_TOO_SLOW
            else:
                pull = self._bytes(on_pd) - (self._bytes(on_prfaas) - self._state_bytes if on_prfaas else 0.0)
                seconds = pull / capacity  # the other direction of the link, which carries nothing else
                if prfaas_s(total - on_prfaas) - prfaas_s(compared) > self.config.pull_margin * seconds:
                    remote_uncached, remote_pull, note_prfaas = compared, pull, Reason.PULL
                    remote_wait = max(wait_prfaas, seconds)
                else:
                    note_prfaas = Reason.PULL_TOO_SLOW
        seconds_local = pd_s(local_uncached)
        seconds_remote = prfaas_s(remote_uncached)
        # Layer-wise: the transfer runs beside the prefill, after those that began before it.
        sent = max(link_free - now, remote_wait) + transfer / capacity if capacity > 0 else math.inf
        local_ready, remote_ready = local_wait + seconds_local, max(remote_wait + seconds_remote, sent)
        local_decode, remote_decode = self._decode.wait(now + local_ready), self._decode.wait(now + remote_ready)
        local = _Candidate(
            Path.LOCAL,
            local_uncached,
            seconds_local,
            local_wait,
            local_ready,
            local_decode,
            local_pull,
            0.0,
            local_pull,
        )
        remote = _Candidate(
            Path.PRFAAS,
            remote_uncached,
            seconds_remote,
            remote_wait,
            remote_ready,
            remote_decode,
            remote_pull,
            transfer,
            transfer,
        )
        return local, remote, compared, (note_local, note_prfaas)

    def _closed_local(self, local: _Candidate, reasons: list[Reason]) -> bool:
        if self.config.prfaas_only or self.local.instances == 0:
            reasons.append(Reason.NO_LOCAL)
            return True
        if local.ttft_s > self.config.max_ttft_s:
            reasons.append(Reason.LOCAL_FULL)
            return True
        return False

    def _closed_prfaas(self, now: float, prfaas: _Candidate, reasons: list[Reason]) -> bool:
        if self.config.local_only or self.prfaas.instances == 0:
            reasons.append(Reason.NO_PRFAAS)
            return True
        limit = self.config.max_link_backlog_s
        self._link_closed = self.link_backlog_s(now) > (limit / 2 if self._link_closed else limit)
        if self._link_closed:
            reasons.append(Reason.LINK_FULL)
            return True
        if prfaas.ttft_s > self.config.max_ttft_s:
            reasons.append(Reason.PRFAAS_FULL)
            return True
        return False

    def _shed(
        self,
        now: float,
        local: _Candidate,
        prfaas: _Candidate,
        compared: float,
        threshold: float,
        reasons: list[Reason],
    ) -> Decision:
        limit = self.config.max_ttft_s
        over = [c.ttft_s - limit for c in (local, prfaas) if math.isfinite(c.ttft_s)]
        behind = self._decode.latest_wait(now) - self.config.max_decode_wait_s
        retry = max(min(over, default=limit), behind if math.isfinite(behind) else limit, 0.1)
        return Decision(
            Path.SHED,
            compared,
            0.0,
            0.0,
            math.inf,
            0.0,
            0.0,
            threshold,
            tuple(reasons),
            local.ttft_s,
            prfaas.ttft_s,
            compared,
            retry,
        )

    def _accept(
        self,
        now: float,
        chosen: _Candidate,
        local: _Candidate,
        prfaas: _Candidate,
        compared: float,
        threshold: float,
        reasons: list[Reason],
        notes: tuple[Reason | None, Reason | None],
    ) -> Decision:
        if chosen is local:
            self.local.assign(now, chosen.prefill_s)
            note = notes[0]
        else:
            self.prfaas.assign(now, chosen.prefill_s)
            note = notes[1]
        self._decode.expect(now + chosen.ready_s)
        if note is not None:
            reasons.append(note)
        if chosen.link_bytes and self._capacity > 0:
            begins = now + chosen.wait_s if chosen.transfer_bytes else now
            self._link_free = max(self._link_free, begins) + chosen.link_bytes / self._capacity
        return Decision(
            chosen.path,
            chosen.uncached,
            chosen.prefill_s,
            chosen.wait_s,
            chosen.ttft_s,
            chosen.pull_bytes,
            chosen.transfer_bytes,
            threshold,
            tuple(reasons),
            local.ttft_s,
            prfaas.ttft_s,
            compared,
        )


@dataclass(slots=True)
class _Candidate:
    """One path's prediction for one request."""

    path: Path
    uncached: float
    prefill_s: float
    wait_s: float
    ready_s: float
    decode_s: float
    pull_bytes: float
    transfer_bytes: float
    link_bytes: float

    @property
    def ttft_s(self) -> float:
        return self.ready_s + self.decode_s


def static_router_config(base: RouterConfig | None = None) -> RouterConfig:
    """The paper's threshold rule with a fixed t: no re-solving, no second look at the queues."""
    return replace(base or RouterConfig(), adaptive=False, queue_aware=False)
