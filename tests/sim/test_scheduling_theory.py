"""The simulator against queueing theory, and against the closed throughput model."""

import math
from dataclasses import replace

import numpy as np
import pytest

from kvpool.scheduling.lengths import Exponential, TruncatedLogNormal, mean
from kvpool.scheduling.model import operate
from kvpool.scheduling.profiles import Curve, Profile
from kvpool.scheduling.router import RouterConfig, static_router_config
from kvpool.scheduling.sim.arrivals import independent, poisson
from kvpool.scheduling.sim.engine import Setup, Simulation, World
from kvpool.scheduling.sim.scenarios import Policy, build_scenario, load_scenario, simulate
from kvpool.scheduling.sim.theory import batch_means, erlang_c, mg1_wait, mmc_wait, student_t
from kvtransport.errors import ConfigError

SECONDS_PER_TOKEN = 1e-5
PATIENT = RouterConfig(max_ttft_s=1e12, max_decode_wait_s=1e12, max_link_backlog_s=1e12)


def prefill_waits(rate, lengths, servers, n, seed):
    """Waiting times of a pool whose service time is exactly proportional to the prompt."""
    profile = Profile("line", Curve((0.0, 1e6), (0.0, 1e6 * SECONDS_PER_TOKEN)), Curve((0.0, 1e6), (1.0, 1.0)))
    world = World(profile, profile, 0, 0.0, 1000, 1e-6, 1.0, tick_s=1000.0)
    setup = Setup(replace(static_router_config(PATIENT), local_only=True), servers, 4, math.inf)
    rng = np.random.default_rng(seed)
    requests = independent(rng, poisson(rng, rate, n), lengths, 1.0)
    return Simulation(world, setup, requests).run().wait[n // 10 :]


@pytest.mark.parametrize(("servers", "busy"), [(1, 0.6), (3, 0.8), (8, 0.85)])
def test_waiting_times_of_mmc(servers, busy):
    rate = busy * servers
    found, half = batch_means(prefill_waits(rate, Exponential(1 / SECONDS_PER_TOKEN), servers, 60_000, seed=servers))
    expected = mmc_wait(rate, 1.0, servers)
    assert half < 0.35 * expected  # the interval says something
    assert abs(found - expected) <= half


def test_waiting_times_of_mg1():
    lengths = TruncatedLogNormal(9.9, 1.0, 128, 131072)
    service = mean(lengths) * SECONDS_PER_TOKEN
    draws = lengths.sample(np.random.default_rng(0), 1_000_000) * SECONDS_PER_TOKEN
    rate = 0.7 / service
    found, half = batch_means(prefill_waits(rate, lengths, 1, 60_000, seed=4))
    expected = mg1_wait(rate, service, float((draws**2).mean()))
    assert half < 0.25 * expected
    assert abs(found - expected) <= half


def test_waiting_times_of_the_decode_stage():
    """Exponential outputs at a constant step make M/M/c over all places; what waits shows in TTFT less KV ready."""
    profile = Profile("line", Curve((0.0, 1e6), (0.0, 1e-6)), Curve((0.0, 1e6), (1.0, 1.0)))
    places, instances, step = 3, 2, 0.01
    world = World(profile, profile, 0, 0.0, places, step, 100.0, tick_s=1000.0)
    setup = Setup(replace(static_router_config(PATIENT), local_only=True), 50, instances, math.inf)
    rng = np.random.default_rng(11)
    n, service = 60_000, 1.0
    rate = 0.85 * places * instances / service
    requests = independent(rng, poisson(rng, rate, n), Exponential(1000.0), 1.0)
    requests = replace(requests, output=rng.exponential(service / step, n))
    recorder = Simulation(world, setup, requests).run()
    waits = (np.array(recorder.ttft) - np.array(recorder.ready))[n // 10 :]
    found, half = batch_means(waits.tolist())
    expected = mmc_wait(rate, service, places * instances)
    assert half < 0.4 * expected
    assert abs(found - expected) <= half


def test_closed_forms():
    assert erlang_c(1, 0.7) == pytest.approx(0.7)  # M/M/1: waits when busy
    assert erlang_c(2, 1.0) == pytest.approx(1 / 3)
    assert mmc_wait(0.5, 1.0, 1) == pytest.approx(1.0)
    assert mg1_wait(0.5, 1.0, 2.0) == pytest.approx(mmc_wait(0.5, 1.0, 1))  # exponential: E[S^2] = 2
    assert mg1_wait(0.5, 1.0, 1.0) == pytest.approx(0.5)  # constant service waits half as long
    for freedom, quantile in ((1, 12.706), (4, 2.776), (9, 2.262), (29, 2.045)):
        assert student_t(freedom) == pytest.approx(quantile, rel=0.006)
    assert student_t(29, 2.5758293) == pytest.approx(2.756, rel=0.001)
    for call in (lambda: erlang_c(2, 2.0), lambda: mg1_wait(1.0, 1.0, 1.0), lambda: batch_means([1.0] * 5)):
        with pytest.raises(ConfigError):
            call()


# -- against the closed model -------------------------------------------------------------------------


def flat_scenario(**changes):
    """The case study with what the closed model knows: constant outputs, constant decode steps."""
    spec = load_scenario("steady").spec
    return build_scenario(
        "flat",
        type(spec)(
            **(
                {"title": "t", "case": "paper", "arrivals": spec.arrivals, "output_cv": 0.0, "decode_floor": 1.0}
                | changes
            )
        ),
    )


@pytest.mark.parametrize("policy", [Policy.HOMOGENEOUS, Policy.NAIVE, Policy.STATIC])
def test_saturated_throughput_is_the_models(policy):
    scenario = flat_scenario()
    recorder, setup = simulate(
        scenario, policy, load=1.6, requests=8_000, seed=3, router=replace(PATIENT, max_ttft_s=1e9)
    )
    system = scenario.homogeneous if policy is Policy.HOMOGENEOUS else scenario.system
    planned = operate(system, setup.threshold, setup.n_p, setup.n_d)
    served = recorder.summary(slo_tpot=1.0, slo_ttft=1e9)
    assert served["shed_share"] == 0.0
    # prefill ends at the model's rate while the backlog lasts; the last bound of the model is decode
    ends = np.sort(np.array(recorder.ready) + recorder.requests.at)
    middle = ends[len(ends) // 10 : len(ends) // 2]
    rate = (len(middle) - 1) / (middle[-1] - middle[0])
    prefill = min(v for bound, v in planned.limits.items() if bound != "pd_decode")
    assert rate == pytest.approx(min(prefill, 1.6 * scenario.reference.lambda_max), rel=0.05)


def test_an_idle_system_has_the_models_latency_share_and_egress():
    scenario = flat_scenario()
    recorder, setup = simulate(scenario, Policy.STATIC, load=0.02, requests=8_000, seed=5)
    planned = operate(scenario.system, setup.threshold, setup.n_p, setup.n_d)
    found = recorder.summary(slo_tpot=1.0, slo_ttft=1e9)
    assert found["offload_share"] == pytest.approx(planned.offload_share, abs=0.02)
    # layer-wise transfer: only the last layer and half a round trip come on top of prefill
    extra = planned.offload_share * (scenario.spec.rtt_s / 2)
    assert found["ttft_s"]["mean"] == pytest.approx(planned.ttft_mean + extra, rel=0.02)
    assert found["ttft_s"]["p90"] == pytest.approx(planned.ttft_p90, rel=0.04)
    expected = found["offered_per_s"] * planned.egress / planned.lambda_max
    assert found["egress_gbps"] * 1e9 / 8 == pytest.approx(expected, rel=0.03)


def test_a_link_that_is_too_narrow_bounds_the_offloaded_rate():
    scenario = flat_scenario(egress_gbps=5.0)
    recorder, _ = simulate(scenario, Policy.NAIVE, load=1.5, requests=4_000, seed=6, router=PATIENT)
    found = recorder.summary(slo_tpot=1.0, slo_ttft=1e9)
    assert found["utilisation"]["link"] > 0.99
    planned = operate(scenario.system, 0.0, 0, 8)
    assert found["egress_gbps"] == pytest.approx(5.0, rel=0.01)
    ends = np.sort(np.array(recorder.ready) + recorder.requests.at)
    middle = ends[400:2000]
    assert (len(middle) - 1) / (middle[-1] - middle[0]) == pytest.approx(planned.limits["prfaas_link"], rel=0.05)
