"""Telemetry, the window solver, the router and the rebalancer."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest

from kvpool.scheduling.config import load_case
from kvpool.scheduling.decode import DecodeForecast
from kvpool.scheduling.ledger import PoolLedger
from kvpool.scheduling.model import Means
from kvpool.scheduling.planner import plan_split
from kvpool.scheduling.profiles import GBPS
from kvpool.scheduling.rebalancer import Phase, Rebalancer, RebalancerConfig, Role, StageSample
from kvpool.scheduling.router import Path, Reason, Request, Router, RouterConfig, static_router_config
from kvpool.scheduling.telemetry import LinkMonitor, LinkSample, LinkSampler, MonitorConfig, SamplerConfig
from kvpool.scheduling.window import ControllerConfig, Resources, ThresholdController, Window
from kvtransport.errors import ConfigError

SYSTEM = replace(load_case("paper").system, means=Means.EXPECTED)
PD, PRFAAS = SYSTEM.pd.profile, SYSTEM.prfaas.profile


@dataclass
class Counters:
    sent_bytes: int = 0
    unsent_bytes: int = 0
    spilled_bytes: int = 0
    rtt_s: float | None = 0.01


def sample(at, *, capacity=100 * GBPS, goodput=0.0, queued=0.0, spilled=0.0, inflation=1.0, loss=0.0):
    return LinkSample(at, goodput, capacity, queued, spilled, 0.01, inflation, loss)


def make_router(**changes):
    arguments = {"n_p": 3, "n_prfaas": 4, "egress": 100 * GBPS, "threshold": 19_400.0}
    config = changes.pop("config", static_router_config())
    return Router(config, pd=PD, prfaas=PRFAAS, **(arguments | changes))


# -- telemetry ----------------------------------------------------------------------------------------


def test_the_sampler_reads_the_fields_of_a_links_telemetry():
    from kvtransport.link import LinkTelemetry

    fields = set(LinkTelemetry.__dataclass_fields__)
    assert {"sent_bytes", "unsent_bytes", "spilled_bytes", "rtt_s"} <= fields


def test_goodput_is_a_difference_and_the_first_reading_gives_none():
    sampler = LinkSampler(SamplerConfig(nominal=1e9))
    assert sampler.sample(0.0, Counters()) is None
    first = sampler.sample(2.0, Counters(sent_bytes=10**9))
    assert first.goodput == pytest.approx(5e8)
    assert first.capacity == pytest.approx(1e9)
    assert sampler.sample(2.0, Counters(sent_bytes=10**9)) is None
    assert sampler.sample(3.0, Counters(sent_bytes=5)).goodput == 0.0  # the link was made again


def test_capacity_falls_at_once_under_a_backlog_and_climbs_back_by_probing():
    sampler = LinkSampler(SamplerConfig(nominal=1e9, probe=0.1))
    sampler.sample(0.0, Counters(0, 200_000_000))
    slow = sampler.sample(1.0, Counters(300_000_000, 400_000_000))
    assert slow.capacity == pytest.approx(3e8)
    capacities = [sampler.sample(1.0 + i, Counters(300_000_000)).capacity for i in range(1, 9)]
    assert capacities[0] == pytest.approx(4e8)
    assert capacities == sorted(capacities)
    assert capacities[-1] == pytest.approx(1e9)


def test_an_idle_link_says_nothing_about_its_capacity():
    sampler = LinkSampler(SamplerConfig(nominal=1e9))
    sampler.sample(0.0, Counters())
    assert sampler.sample(1.0, Counters(1000)).capacity == pytest.approx(1e9)


def test_a_grown_round_trip_with_data_waiting_means_saturated():
    sampler = LinkSampler(SamplerConfig(nominal=1e9))
    sampler.sample(0.0, Counters(rtt_s=0.01))
    found = sampler.sample(1.0, Counters(400_000_000, 1000, rtt_s=0.05))
    assert found.inflation == pytest.approx(5.0)
    assert found.capacity == pytest.approx(4e8)
    later = sampler.sample(120.0, Counters(400_000_000, 0, rtt_s=0.05))
    assert later.inflation == pytest.approx(1.0)  # the window has forgotten the old minimum: a new route


@pytest.mark.parametrize(
    ("change", "sign"),
    [
        ({"goodput": 95 * GBPS}, "utilisation"),
        ({"queued": 100 * GBPS * 1.5}, "backlog"),
        ({"spilled": 100 * GBPS * 1.5}, "backlog"),
        ({"inflation": 4.0}, "inflation"),
        ({"loss": 0.03}, "loss"),
    ],
)
def test_each_sign_of_scarcity_counts(change, sign):
    monitor = LinkMonitor(MonitorConfig())
    assert monitor.observe(sample(0.0, **change))
    assert monitor.scarce
    assert monitor.sign == sign


def test_scarcity_has_hysteresis():
    monitor = LinkMonitor(MonitorConfig(calm_s=3.0))
    monitor.observe(sample(0.0, goodput=95 * GBPS))
    assert not monitor.observe(sample(1.0, goodput=75 * GBPS))  # between leave and enter: stays
    assert monitor.scarce
    changes = [monitor.observe(sample(t, goodput=10 * GBPS)) for t in (2.0, 3.0, 4.0)]
    assert changes == [False, False, False]
    monitor.observe(sample(4.5, goodput=75 * GBPS))  # restarts the calm
    assert [monitor.observe(sample(t)) for t in (5.0, 7.0, 8.0)] == [False, False, True]
    assert not monitor.scarce


def test_lasting_capacity_hardly_moves_in_a_dip():
    monitor = LinkMonitor(MonitorConfig(lasting_s=600))
    for t in range(60):
        monitor.observe(sample(float(t), capacity=1e9))
    for t in range(60, 120):
        monitor.observe(sample(float(t), capacity=5e8))
    assert 9e8 < monitor.lasting_capacity < 1e9


@pytest.mark.parametrize(
    "make",
    [
        lambda: SamplerConfig(nominal=0.0),
        lambda: MonitorConfig(enter=0.5, leave=0.6),
        lambda: MonitorConfig(loss=0.0),
        lambda: ControllerConfig(objective="fastest"),
        lambda: ControllerConfig(max_step=0.0),
        lambda: ControllerConfig(minimum=1),
        lambda: Window(2),
        lambda: RouterConfig(max_ttft_s=0),
        lambda: RouterConfig(local_only=True, prfaas_only=True),
        lambda: RouterConfig(override=-1.0),
        lambda: RebalancerConfig(min_d=0),
        lambda: RebalancerConfig(cool=0.95, hot=0.9),
        lambda: PoolLedger(-1),
        lambda: make_router(threshold=float("nan")),
    ],
)
def test_bad_settings_are_refused(make):
    with pytest.raises(ConfigError):
        make()


# -- window -------------------------------------------------------------------------------------------


def fill(window, n=None, rate=2.5, seed=0):
    lengths = SYSTEM.workload.lengths.sample(np.random.default_rng(seed), n or window.size)
    for i, x in enumerate(lengths):
        window.add(i / rate, x, PD.seconds(x), PRFAAS.seconds(x), PRFAAS.kv_bytes(x))
    return lengths


def test_the_window_solves_what_the_planner_plans():
    window = Window(60_000)
    fill(window)
    for n_p in (1, 3, 6):
        planned = plan_split(SYSTEM, n_p)
        solved = window.balance(Resources(4, n_p, 100 * GBPS))
        assert solved.threshold == pytest.approx(planned.threshold, rel=0.02)
        assert solved.share == pytest.approx(planned.offload_share, abs=0.01)
        assert solved.capacity == pytest.approx(min(v for b, v in planned.limits.items() if b != "pd_decode"), rel=0.02)


def test_the_window_solution_beats_every_other_threshold():
    window = Window(512)
    lengths = fill(window)
    resources = Resources(4, 3, 9 * GBPS)
    solved = window.balance(resources)

    def capacity(t):
        long, short = lengths[lengths > t], lengths[lengths <= t]
        n = len(lengths)
        loads = [
            (resources.n_prfaas, PRFAAS.prefill.at_all(long).sum()),
            (resources.egress, PRFAAS.sizes.at_all(long).sum()),
            (resources.n_p, PD.prefill.at_all(short).sum()),
        ]
        return min(r * n / load for r, load in loads if load > 0)

    assert solved.capacity == pytest.approx(capacity(solved.threshold))
    assert all(capacity(t) <= solved.capacity * (1 + 1e-9) for t in [0.0, *lengths])


def test_less_bandwidth_offloads_less():
    window = Window(2048)
    fill(window)
    shares = [window.balance(Resources(4, 3, b * GBPS)).share for b in (100, 9, 6, 3)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1] + 0.2


def test_the_quickest_threshold_offloads_more_when_idle_and_balances_when_full():
    window = Window(4096)
    fill(window)
    resources = Resources(4, 3, 100 * GBPS)
    balanced = window.balance(resources)
    shares = [window.quickest(resources, rate).share for rate in (0.3, 1.0, 2.0, 3.0)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.95
    assert shares[-1] == pytest.approx(balanced.share, abs=0.02)
    assert window.quickest(resources, 50.0) == balanced


def test_equal_lengths_cannot_be_split():
    window = Window(64)
    for i in range(64):
        window.add(float(i), 1000.0, 1.0, 0.5, 1e6)
    solved = window.balance(Resources(1, 1, 1e12))
    assert solved.threshold in (0.0, math.inf)
    assert solved.share in (0.0, 1.0)
    assert window.share_above(solved.threshold) == solved.share


def test_the_window_slides():
    window = Window(8)
    for i in range(8):
        window.add(float(i), 10.0, 1.0, 1.0, 1.0)
    for i in range(8, 16):
        window.add(float(i), 1000.0, 1.0, 1.0, 1.0)
    assert window.share_above(500.0) == 1.0
    assert window.rate(16.0) == pytest.approx(1.0)
    assert window.quantile(0.0) == math.inf
    assert window.quantile(1.0) == 0.0


def controller(**changes):
    made = ThresholdController(ControllerConfig(**({"objective": "balance"} | changes)), initial=19_400.0)
    fill(made.window)
    return made


def test_less_offloading_is_immediate_more_comes_in_steps():
    made = controller(max_step=0.1)
    full, narrow = Resources(4, 3, 100 * GBPS), Resources(4, 3, 2 * GBPS)
    assert made.solve(0.0, narrow)
    low = made.window.share_above(made.threshold)
    assert low < 0.2
    shares = []
    for i in range(1, 8):
        made.solve(float(i), full)
        shares.append(made.window.share_above(made.threshold))
    steps = np.diff([low, *shares])
    assert (steps <= 0.1 + 1e-3).all()
    assert shares[-1] == pytest.approx(made.target.share, abs=made.config.deadband)


def test_a_small_change_is_ignored():
    made = controller(deadband=0.05)
    made.threshold = made.window.balance(Resources(4, 3, 100 * GBPS)).threshold * 1.02
    before = made.threshold
    assert not made.solve(0.0, Resources(4, 3, 100 * GBPS))
    assert made.threshold == before


def test_missing_paths_fix_the_threshold():
    made = controller()
    assert made.solve(0.0, Resources(0, 3, 1e9))
    assert made.threshold == math.inf
    made.solve(1.0, Resources(4, 0, 1e9))
    assert made.threshold == 0.0
    made.solve(2.0, Resources(4, 3, 0.0))
    assert made.threshold == math.inf


def test_a_backlog_is_planned_away():
    made = controller(utilisation=0.9, drain_s=10.0)
    assert made.usable_egress(1e9, 0.0) == pytest.approx(9e8)
    assert made.usable_egress(1e9, 4e9) == pytest.approx(5e8)
    assert made.usable_egress(1e9, 1e12) == 0.0


# -- ledger -------------------------------------------------------------------------------------------


def test_the_ledger_replays_first_come_first_served():
    pool = PoolLedger(2)
    assert [pool.assign(0.0, s) for s in (3.0, 1.0, 1.0, 5.0)] == [0.0, 0.0, 1.0, 2.0]
    assert pool.wait(1.0) == pytest.approx(2.0)
    assert pool.backlog(1.0) == pytest.approx(2.0 + 6.0)
    pool.correct(1.0, 0.0)
    assert pool.wait(1.0) == 0.0
    pool.resize(1.0, 3)
    assert pool.instances == 3
    pool.resize(1.0, 0)
    assert pool.wait(1.0) == math.inf


def test_what_waits_is_shared_out_again_when_a_pool_changes():
    pool = PoolLedger(3)
    for seconds in (4.0, 5.0, 6.0, 10.0, 10.0):  # three run, two wait
        pool.assign(0.0, seconds)
    pool.resize(1.0, 1)  # those that end at 4 and 5 leave then; both that wait follow the one that ends at 6
    assert pool.wait(1.0) == pytest.approx(25.0)
    assert pool.backlog(1.0) == pytest.approx(25.0)
    pool.resize(1.0, 3)  # the two new ones take what waits at once, and are done before the next one could begin
    assert pool.wait(1.0) == pytest.approx(5.0)
    pool.correct(2.0, 6.0)
    assert pool.wait(2.0) == pytest.approx(6.0)


# -- decode forecast ------------------------------------------------------------------------------------


def test_decode_is_forecast_from_what_is_still_being_prefilled():
    decode = DecodeForecast(10.0)
    assert decode.wait(0.0) == 0.0
    decode.report(0.0, present=0, places=2, finished=0)
    for ready in (1.0, 2.0, 3.0):
        decode.expect(ready)
    # 1-11 and 2-12 fill both places, the one of 3 waits until 11; one of 4 would wait until 12, one of 1.5 has a place.
    assert decode.wait(4.0) == pytest.approx(8.0)
    assert decode.wait(1.5) == 0.0
    assert decode.wait(30.0) == 0.0


def test_a_report_corrects_the_forecast():
    decode = DecodeForecast(10.0)
    decode.report(0.0, present=0, places=2, finished=0)
    decode.expect(1.0)
    decode.report(5.0, present=4, places=2, finished=0)  # three more than was known: two of them queue
    assert decode.wait(5.0) > 5.0
    decode.report(5.0, present=0, places=2, finished=0)
    assert decode.wait(5.0) == 0.0
    decode.report(5.0, present=0, places=0, finished=0)
    assert decode.wait(5.0) == math.inf
    decode.expect(6.0)
    decode.report(7.0, present=1, places=2, finished=0)
    assert decode.wait(7.0) == 0.0


def test_the_stay_in_decode_is_measured():
    decode = DecodeForecast(10.0)
    for second in range(300):  # a full house of 100 that ends 5 a second stays 20 s
        decode.report(float(second), present=100, places=100, finished=5 * second)
    assert decode.hold_s == pytest.approx(20.0, rel=0.02)
    for make in (lambda: DecodeForecast(0.0), lambda: decode.report(0.0, present=-1, places=1, finished=0)):
        with pytest.raises(ConfigError):
            make()


# -- router: the paper's rules ------------------------------------------------------------------------


def test_without_prefixes_the_length_decides():
    router = make_router()
    assert router.route(0.0, Request(19_400)).path is Path.LOCAL
    long = router.route(100.0, Request(19_401))
    assert long.path is Path.PRFAAS
    assert long.uncached == 19_401
    assert long.transfer_bytes == pytest.approx(PRFAAS.kv_bytes(19_401))
    assert Reason.LONG in long.reasons


def scarce_router(**changes):
    router = make_router(**changes)
    router.on_link(sample(0.0, goodput=99 * GBPS))
    assert router.monitor.scarce
    return router


def test_scarce_bandwidth_judges_each_cache_on_its_own():
    router = scarce_router()
    # l_total - l_pd <= t: local, whatever PrfaaS holds
    near = router.route(1.0, Request(60_000, match_pd=45_000, match_prfaas=59_000))
    assert (near.path, near.uncached, near.pull_bytes) == (Path.LOCAL, 15_000, 0.0)
    # else PrfaaS, with what it has cached
    far = router.route(100.0, Request(60_000, match_pd=1_000, match_prfaas=50_000))
    assert (far.path, far.uncached, far.pull_bytes) == (Path.PRFAAS, 10_000, 0.0)
    assert far.compared == 59_000
    assert Reason.SCARCE in far.reasons


def test_plentiful_bandwidth_counts_the_better_cache_and_pulls_it():
    router = make_router()
    here = router.route(0.0, Request(60_000, match_pd=1_000, match_prfaas=50_000))
    assert (here.path, here.uncached, here.compared) == (Path.LOCAL, 10_000, 10_000)
    assert here.pull_bytes > 0
    assert Reason.PULL in here.reasons
    there = router.route(100.0, Request(90_000, match_pd=60_000))
    assert (there.path, there.uncached) == (Path.PRFAAS, 30_000)
    assert there.pull_bytes == pytest.approx(PRFAAS.kv_bytes(60_000))
    # what the PD cluster already has does not travel back
    assert there.transfer_bytes < PRFAAS.kv_bytes(90_000) - PRFAAS.kv_bytes(60_000) + PRFAAS.kv_bytes(0) + 1


def test_a_pull_that_takes_longer_than_computing_is_not_made():
    router = make_router(egress=0.5 * GBPS)
    found = router.route(0.0, Request(20_000, match_pd=0, match_prfaas=2_000))
    assert found.path is Path.LOCAL
    assert found.pull_bytes == 0.0
    assert found.uncached == 20_000
    assert Reason.PULL_TOO_SLOW in found.reasons


def test_impossible_matches_are_refused():
    router = make_router()
    for request in (Request(10, match_pd=10), Request(10, match_prfaas=11), Request(0), Request(10, match_pd=-1)):
        with pytest.raises(ConfigError, match="a match is from 0 to below"):
            router.route(0.0, request)


# -- router: load, admission, degradation -------------------------------------------------------------


def test_a_busy_path_is_left_for_a_clearly_faster_one():
    router = make_router(config=replace(static_router_config(), queue_aware=True))
    decisions = [router.route(0.0, Request(60_000)) for _ in range(40)]
    assert decisions[0].path is Path.PRFAAS
    moved = [d for d in decisions if d.path is Path.LOCAL and Reason.PRFAAS_FULL not in d.reasons]
    assert moved
    assert all(Reason.PRFAAS_BUSY in d.reasons for d in moved)
    assert all(d.local_ttft_s < d.prfaas_ttft_s for d in moved)
    static = make_router()
    assert all(static.route(0.0, Request(60_000)).path is not Path.LOCAL for _ in range(30))


def test_requests_are_shed_when_every_path_is_full_and_told_when_to_come_back():
    router = make_router(config=RouterConfig(max_ttft_s=10.0))
    decisions = [router.route(0.0, Request(30_000)) for _ in range(200)]
    assert decisions[-1].path is Path.SHED
    assert {Reason.LOCAL_FULL, Reason.PRFAAS_FULL} <= set(decisions[-1].reasons)
    assert 0 < decisions[-1].retry_after_s < 10
    assert all(d.ttft_s <= 10.0 for d in decisions if d.path is not Path.SHED)
    assert router.route(60.0, Request(30_000)).path is not Path.SHED
    assert "retry in" in decisions[-1].explain()


def test_a_full_decode_stage_sheds():
    router = make_router()
    router.on_decode(0.0, present=140, places=100, finished=0)  # 40 of them queued: 10 s
    found = router.route(0.0, Request(1000))
    assert found.path is Path.SHED
    assert Reason.DECODE_FULL in found.reasons
    assert found.retry_after_s > 1
    router.on_decode(0.0, present=90, places=100, finished=0)
    assert router.route(0.0, Request(1000)).path is Path.LOCAL


def test_a_burst_in_prefill_sheds_before_it_reaches_decode():
    router = make_router(n_p=50, n_prfaas=50)
    router.on_decode(0.0, present=0, places=100, finished=0)
    decisions = [router.route(0.0, Request(10_000)) for _ in range(150)]
    taken = [d for d in decisions if d.path is not Path.SHED]
    assert len(taken) == 100  # a hundred fit into decode together, the next would wait for a whole stay
    assert Reason.DECODE_FULL in decisions[-1].reasons
    assert decisions[-1].retry_after_s > 1


def test_a_link_far_behind_closes_the_path_until_half_is_gone():
    router = make_router(config=replace(static_router_config(), max_link_backlog_s=4.0))
    capacity = 100 * GBPS
    router.on_link(sample(0.0, queued=5.0 * capacity))
    behind = router.route(0.0, Request(60_000))
    assert behind.path is Path.LOCAL
    assert Reason.LINK_FULL in behind.reasons
    router.on_link(sample(1.0, queued=3.0 * capacity))
    assert router.route(1.0, Request(60_000)).path is Path.LOCAL
    router.on_link(sample(2.0, queued=1.9 * capacity))
    assert router.route(2.0, Request(60_000)).path is Path.PRFAAS


def test_decisions_between_readings_see_each_others_bytes():
    router = make_router(egress=4 * GBPS, threshold=0.0)
    alone = PRFAAS.seconds(8_000)
    predicted = [router.route(0.0, Request(8_000)).ttft_s for _ in range(4)]
    assert predicted[0] == pytest.approx(alone)
    assert predicted[3] == pytest.approx(4 * PRFAAS.kv_bytes(8_000) / (4 * GBPS))  # four instances, one link
    assert router.route(1000.0, Request(8_000)).ttft_s == pytest.approx(alone)


def test_a_reading_of_a_slower_link_stretches_what_is_on_its_way():
    router = make_router(egress=4 * GBPS, threshold=0.0)
    for _ in range(4):
        router.route(0.0, Request(8_000))
    before = router.route(0.0, Request(8_000)).ttft_s
    router.on_link(sample(0.0, capacity=1 * GBPS))
    assert router.route(0.0, Request(8_000)).prfaas_ttft_s > 3 * before


def drive(router, seconds, *, capacity, start, rate=2.4, seed=0, queued=0.0):
    """Route a Poisson stream with a reading every second; the offloaded share of each second's requests."""
    rng = np.random.default_rng(seed)
    shares = []
    for second in range(seconds):
        now = start + second
        router.on_link(sample(now, capacity=capacity, goodput=min(10 * GBPS, capacity), queued=queued))
        decisions = [
            router.route(now + (i + 0.5) / 40, Request(x))
            for i, x in enumerate(SYSTEM.workload.lengths.sample(rng, int(rate * 16)))
        ]
        for path in (Path.LOCAL, Path.PRFAAS):
            router.on_pool(path, now + 0.99, 0.0)  # the test is about the link: pools never fill
        shares.append(sum(d.path is Path.PRFAAS for d in decisions) / len(decisions))
    return shares


def test_a_degraded_link_moves_traffic_within_one_interval_and_back_without_a_herd():
    config = RouterConfig(controller=ControllerConfig(objective="balance", interval_s=1.0, max_step=0.1, minimum=64))
    router = make_router(config=replace(config, queue_aware=False))
    before = drive(router, 60, capacity=100 * GBPS, start=0.0)
    steady = float(np.mean(before[-20:]))
    assert steady > 0.4
    # the very first interval with the bad reading already routes by it
    during = drive(router, 20, capacity=1.0 * GBPS, start=60.0, queued=3 * GBPS)
    assert during[0] < steady - 0.25
    assert float(np.mean(during)) < steady - 0.25
    low = float(np.mean(during[-5:]))
    after = drive(router, 40, capacity=100 * GBPS, start=80.0)
    target = [router.controller.window.share_above(router.threshold)]
    assert after[0] < low + 0.1 + 0.25  # one step plus the noise of 38 requests
    assert float(np.mean(after[-10:])) > steady - 0.15
    assert target[0] == pytest.approx(router.controller.target.share, abs=0.12)


def test_the_share_never_grows_by_more_than_a_step_per_interval():
    config = RouterConfig(controller=ControllerConfig(objective="balance", interval_s=1.0, max_step=0.05))
    router = make_router(config=config, threshold=math.inf)
    window = router.controller.window
    fill(window)
    shares = []
    for second in range(30):
        router.on_link(sample(float(second)))
        shares.append(window.share_above(router.threshold))
    assert max(np.diff([0.0, *shares])) <= 0.05 + 1e-3
    assert shares[-1] > 0.4


def test_resizing_a_pool_re_solves():
    router = make_router(config=RouterConfig(controller=ControllerConfig(objective="balance", max_step=1.0)))
    fill(router.controller.window)
    router.on_resize(0.0, n_p=6)
    wide = router.threshold
    router.on_resize(1.0, n_p=1)
    assert router.threshold < wide
    router.on_resize(2.0, n_prfaas=0)
    assert router.threshold == math.inf
    gone = router.route(3.0, Request(60_000))
    assert gone.path is Path.LOCAL
    assert Reason.NO_PRFAAS in gone.reasons


def test_single_path_policies():
    local = make_router(config=replace(static_router_config(), local_only=True))
    assert local.route(0.0, Request(100_000)).path is Path.LOCAL
    remote = make_router(config=replace(static_router_config(), prfaas_only=True), n_p=0)
    found = remote.route(0.0, Request(200))
    assert found.path is Path.PRFAAS
    assert Reason.NO_LOCAL in found.reasons


def test_every_decision_explains_itself():
    router = make_router()
    for tokens in (500, 90_000):
        found = router.route(0.0, Request(tokens))
        assert found.reasons
        text = found.explain()
        assert found.path.value in text
        assert f"{tokens:,}" in text
        assert "19,400" in text
        assert "s PrfaaS" in text


def test_the_same_calls_give_the_same_decisions():
    def run():
        router = make_router(config=RouterConfig())
        out = []
        for i, x in enumerate(SYSTEM.workload.lengths.sample(np.random.default_rng(9), 600)):
            if i % 50 == 0:
                router.on_link(sample(i / 3.0, goodput=(i % 7) * 15 * GBPS))
            out.append(router.route(i / 3.0 + 0.01, Request(x, match_pd=x / 3)))
        return out

    assert run() == run()


# -- rebalancer ---------------------------------------------------------------------------------------


def stage(at, *, prefill=0.5, decode=0.5, n_p=3, n_d=5, prefill_wait=0.0, decode_wait=0.0):
    return StageSample(at, n_p, n_d, prefill, prefill_wait, decode, decode_wait)


CONFIG = RebalancerConfig(sustain_s=30.0, dwell_s=100.0, gain=0.05)


def prefill_bound(n_p, n_d):
    return 1.0 + 0.5 * n_p, 5.0 * n_d


def decode_bound(n_p, n_d):
    return 5.0 * n_p, 0.6 * n_d


def feed(rebalancer, capacity, times, **changes):
    return [(t, rebalancer.observe(stage(float(t), **changes), capacity)) for t in times]


def test_a_sustained_prefill_bottleneck_takes_a_decode_instance():
    rebalancer = Rebalancer(CONFIG)
    found = [(t, c) for t, c in feed(rebalancer, prefill_bound, range(0, 60, 5), prefill=0.99) if c is not None]
    assert len(found) == 1
    at, conversion = found[0]
    assert at >= 30
    assert (conversion.source, conversion.target) == (Role.DECODE, Role.PREFILL)
    assert conversion.then_rate > conversion.now_rate
    assert "prefill has been the bottleneck" in conversion.reason
    assert rebalancer.phase is Phase.DRAINING


def test_a_sustained_decode_bottleneck_takes_a_prefill_instance():
    rebalancer = Rebalancer(CONFIG)
    found = [c for _, c in feed(rebalancer, decode_bound, range(0, 60, 5), decode=1.0, decode_wait=8.0) if c]
    assert [(c.source, c.target) for c in found] == [(Role.PREFILL, Role.DECODE)]


@pytest.mark.parametrize(
    ("changes", "capacity"),
    [
        ({"prefill": 0.5, "decode": 0.5}, prefill_bound),  # nobody is short
        ({"prefill": 0.99, "decode": 0.99}, prefill_bound),  # both are: more nodes, not other roles
        ({"prefill": 0.99, "decode": 0.88}, prefill_bound),  # decode cannot spare one
        ({"prefill": 0.99, "decode": 0.8, "n_d": 3}, prefill_bound),  # two could not carry what three do
        ({"prefill": 0.99, "n_d": 1, "n_p": 7}, prefill_bound),  # floor of decode
        ({"decode": 0.99, "n_p": 0}, decode_bound),  # floor of prefill
        ({"prefill": 0.99}, lambda n_p, n_d: (3.0, 9.0)),  # the model expects nothing from it
        ({"prefill": 0.99}, lambda n_p, n_d: (0.0, 0.0)),  # the model does not know yet
        ({"prefill": 0.99}, lambda n_p, n_d: (1.0 + n_p, 0.8 * n_d)),  # decode would become the bottleneck
    ],
)
def test_no_conversion_without_evidence_floor_and_gain(changes, capacity):
    rebalancer = Rebalancer(CONFIG)
    assert all(c is None for _, c in feed(rebalancer, capacity, range(0, 300, 5), **changes))
    assert rebalancer.phase is Phase.WATCHING


def test_a_burst_shorter_than_the_sustained_time_changes_nothing():
    rebalancer = Rebalancer(CONFIG)
    for start in range(0, 600, 60):
        assert all(c is None for _, c in feed(rebalancer, prefill_bound, range(start, start + 20, 5), prefill=1.0))
        assert all(c is None for _, c in feed(rebalancer, prefill_bound, range(start + 20, start + 60, 5), prefill=0.3))


def test_one_conversion_at_a_time_and_a_dwell_between():
    rebalancer = Rebalancer(CONFIG)
    feed(rebalancer, prefill_bound, range(0, 60, 5), prefill=0.99)
    assert all(c is None for _, c in feed(rebalancer, prefill_bound, range(60, 120, 5), prefill=0.99))
    with pytest.raises(ConfigError, match="no instance was converting"):
        rebalancer.converted(120.0)
    rebalancer.drained()
    with pytest.raises(ConfigError, match="no instance was draining"):
        rebalancer.drained()
    assert all(c is None for _, c in feed(rebalancer, prefill_bound, range(120, 150, 5), prefill=0.99))
    rebalancer.converted(150.0)
    found = [t for t, c in feed(rebalancer, prefill_bound, range(155, 400, 5), prefill=0.99, n_p=4, n_d=4) if c]
    assert len(found) == 1
    assert found[0] >= 250
