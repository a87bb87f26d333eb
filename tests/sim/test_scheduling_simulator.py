"""The simulator's parts, its scenarios, and the comparison of policies."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from kvpool.scheduling import cli
from kvpool.scheduling.lengths import TruncatedLogNormal
from kvpool.scheduling.rebalancer import RebalancerConfig
from kvpool.scheduling.router import RouterConfig
from kvpool.scheduling.sim.arrivals import Bursts, Sessions, bursty, outputs, poisson, replay, sessions
from kvpool.scheduling.sim.caches import SessionCache
from kvpool.scheduling.sim.compare import Estimate, compare_policies, losses, summarise
from kvpool.scheduling.sim.engine import Setup, Simulation, World
from kvpool.scheduling.sim.link import FluidLink
from kvpool.scheduling.sim.pools import DecodeInstance
from kvpool.scheduling.sim.scenarios import Policy, load_scenario, packaged_scenarios, simulate
from kvpool.scheduling.traces import load_trace
from kvtransport.errors import ConfigError

LENGTHS = TruncatedLogNormal(9.9, 1.0, 128, 131072)


def rng(seed=0):
    return np.random.default_rng(seed)


# -- arrivals -----------------------------------------------------------------------------------------


def test_poisson_arrivals():
    gaps = np.diff(poisson(rng(), 4.0, 100_000))
    assert gaps.mean() == pytest.approx(0.25, rel=0.02)
    assert gaps.std() == pytest.approx(0.25, rel=0.02)


def test_bursts_keep_the_mean_and_add_variance():
    bursts = Bursts(factor=3.0, on_s=60.0, off_s=240.0)
    at = bursty(rng(1), 2.0, 200_000, bursts)
    assert len(at) / at[-1] == pytest.approx(2.0, rel=0.05)
    counts = np.bincount((at // 30.0).astype(int))[:-1]
    assert counts.var() / counts.mean() > 5.0  # Poisson would be 1
    with pytest.raises(ConfigError, match="factor from 1"):
        Bursts(factor=10.0, on_s=60.0, off_s=60.0)


def test_outputs_have_the_mean_and_spread():
    drawn = outputs(rng(2), 100_000, 1024.0, 0.5)
    assert drawn.mean() == pytest.approx(1024, rel=0.01)
    assert drawn.std() == pytest.approx(512, rel=0.02)
    assert (outputs(rng(2), 10, 7.0, 0.0) == 7.0).all()


def test_sessions_share_their_previous_prompt():
    drawn = sessions(rng(3), 3.0, 30_000, LENGTHS, 100.0, Sessions(turns=4.0, think_s=30.0))
    assert (np.diff(drawn.at) >= 0).all()
    assert (drawn.shared < drawn.tokens).all()
    steady = drawn.at[5_000:]
    assert len(steady) / (steady[-1] - steady[0]) == pytest.approx(3.0, rel=0.05)
    assert (drawn.shared > 0).mean() == pytest.approx(0.75, abs=0.03)
    session = drawn.session[10_000]
    prompts = drawn.tokens[drawn.session == session]
    assert (np.diff(prompts) >= 0).all()
    assert drawn.shared[drawn.session == session][1:] == pytest.approx(np.minimum(prompts[:-1], prompts[1:] - 1))


def test_replay_keeps_the_prefixes_and_sets_the_rate():
    trace = load_trace("mooncake-conversation")
    drawn = replay(trace, 5.0, 4_500)
    assert len(drawn) == len(drawn.blocks) == 4_500
    assert 4_500 / drawn.at[-1] == pytest.approx(5.0, rel=0.05)
    assert (np.diff(drawn.at) >= 0).all()
    assert drawn.blocks[:2000] == trace.blocks
    assert not set(drawn.blocks[0]) & set(drawn.blocks[2000])  # a repetition is someone else's conversation
    with pytest.raises(ConfigError, match="positive rate"):
        replay(trace, 0.0, 10)


# -- link ---------------------------------------------------------------------------------------------


def play(link, until=math.inf):
    """Advance a link through its own events; (time, payload) of everything that got through."""
    done = []
    when = link.schedule()
    while when is not None and when <= until:
        done += [(when, p) for p in link.advance(when)]
        when = link.schedule()
    return done


def test_a_transfer_hides_behind_its_prefill_but_for_the_last_layer():
    link = FluidLink(1e9, 0.0)
    link.advance(0.0)
    flow = link.start(1e9, 10.0, 50, "a")
    assert link.schedule() is None  # nothing waits: it leaves as it is made
    assert link.advance(10.0) == []
    link.end_production(flow)
    assert link.waiting == pytest.approx(2e7)
    assert play(link) == [(pytest.approx(10.02, abs=1e-4), "a")]
    assert link.sent == pytest.approx(1e9, rel=1e-5)


def test_the_oldest_transfer_goes_first_and_no_capacity_is_left_idle():
    link = FluidLink(100e6, 0.0)
    link.advance(0.0)
    link.start(100e6, 0.0, 1, "first")
    link.start(200e6, 0.0, 1, "second")
    assert play(link) == [(pytest.approx(1.0, abs=1e-3), "first"), (pytest.approx(3.0, abs=1e-3), "second")]


def test_a_slow_producer_leaves_the_rest_to_the_next():
    link = FluidLink(100e6, 0.0)
    link.advance(0.0)
    slow = link.start(100e6, 10.0, 10**9, "slow")  # 10 MB/s
    link.start(90e6, 0.0, 1, "next")
    assert play(link, until=5.0) == [(pytest.approx(1.0, abs=1e-3), "next")]
    link.advance(10.0)
    link.end_production(slow)
    assert [p for _, p in play(link)] in ([], ["slow"])
    assert link.active == 0 or link.advance(10.0) == ["slow"]


def test_a_link_of_no_capacity_waits_for_some():
    link = FluidLink(0.0, 0.0)
    link.advance(0.0)
    link.start(1e6, 0.0, 1, "x")
    assert link.schedule() is None
    link.advance(7.0)
    link.capacity = 1e6
    assert play(link) == [(pytest.approx(8.0, abs=0.01), "x")]


# -- decode -------------------------------------------------------------------------------------------


def test_a_batch_slows_down_as_it_fills_and_never_past_the_full_step():
    instance = DecodeInstance(4, 0.04, 0.5)
    instance.advance(0.0)
    instance.join(0, 100.0, "a")
    assert instance.next_end() == pytest.approx(100 * 0.04 * (0.5 + 0.5 / 4))
    instance.advance(1.0)
    for i, name in enumerate("bcd", 1):
        instance.join(i, 100.0, name)
    first = instance.next_end()
    assert first == pytest.approx(1.0 + (100 - 1.0 / 0.025) * 0.04)
    instance.advance(first)
    assert instance.pop_due() == ["a"]
    assert instance.taken_time == pytest.approx(1.0 + 4 * (first - 1.0))


def test_rounding_never_leaves_a_batch_unfinished():
    instance = DecodeInstance(2, 1e-7, 1.0, now=1e7)
    instance.advance(1e7)
    instance.join(0, 3.0, "x")
    instance.advance(instance.next_end())
    assert instance.pop_due() == ["x"]


# -- caches -------------------------------------------------------------------------------------------


def test_a_session_cache_finds_the_last_prompt_and_forgets_the_oldest():
    cache = SessionCache(1000.0, 100, session=[7, 7, 8, 7, 9], shared=[0.0, 300.0, 0.0, 250.0, 0.0])
    assert cache.match(0, 300.0) == 0.0
    cache.insert(0, 300.0)
    assert cache.match(1, 500.0) == 300.0  # the state at the end of the stored prompt
    assert cache.match(1, 300.0) == 299.0
    assert cache.match(3, 500.0) == 200.0  # diverges inside: the last kept state before that
    cache.insert(2, 600.0)
    cache.insert(1, 500.0)
    assert cache.match(2, 700.0) == 0.0  # session 8 was the least recently used
    assert cache.match(1, 700.0) == 300.0


# -- whole runs ---------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_run_and_policies_share_the_requests():
    scenario = load_scenario("fluctuating-link")
    runs = [simulate(scenario, Policy.FULL, load=0.9, requests=1_500, seed=4)[0] for _ in range(2)]
    assert runs[0].ttft == runs[1].ttft
    assert runs[0].path == runs[1].path
    other = simulate(scenario, Policy.STATIC, load=0.9, requests=1_500, seed=4)[0]
    assert (other.requests.tokens == runs[0].requests.tokens).all()
    different = simulate(scenario, Policy.FULL, load=0.9, requests=1_500, seed=5)[0]
    assert different.ttft != runs[0].ttft


@pytest.mark.parametrize("name", packaged_scenarios())
@pytest.mark.parametrize("policy", list(Policy))
def test_every_request_is_served_or_shed_in_every_scenario(name, policy):
    scenario = load_scenario(name)
    recorder, _ = simulate(scenario, policy, load=1.0, requests=1_000, seed=1)
    served = np.frombuffer(bytes(recorder.path), dtype=np.uint8) != 2
    ttft, done, wait = np.array(recorder.ttft), np.array(recorder.done), np.array(recorder.wait)
    assert np.isfinite(ttft[served]).all()
    assert np.isfinite(done[served]).all()
    assert np.isnan(done[~served]).all()
    assert (wait[served] >= 0).all()
    assert (ttft[served] > wait[served]).all()
    assert (done[served] >= recorder.requests.at[served] + ttft[served]).all()
    found = summarise(scenario, recorder)
    assert all(0 <= v <= 1 + 1e-9 for v in found["utilisation"].values())
    assert found["tpot_s"]["p99"] <= scenario.system.pd.step * 1.001  # a batch never breaks the SLO
    json.dumps(found)


def test_prefixes_are_found_and_pulled():
    scenario = load_scenario("skewed-caches")
    recorder, _ = simulate(scenario, Policy.FULL, load=0.5, requests=4_000, seed=1)
    assert summarise(scenario, recorder)["hit_rate"] > 0.5
    no_cache = replace(scenario, spec=replace_spec(scenario.spec, caches=None))
    cold, _ = simulate(no_cache, Policy.FULL, load=0.5, requests=4_000, seed=1)
    assert summarise(scenario, cold)["hit_rate"] == 0.0


def replace_spec(spec, **changes):
    import msgspec

    return msgspec.structs.replace(spec, **changes)


def test_the_rebalancer_converts_when_outputs_grow():
    scenario = load_scenario("shift")
    kept, _ = simulate(scenario, Policy.FULL, load=0.9, requests=8_000, seed=2, rebalance=False)
    moved, setup = simulate(scenario, Policy.FULL, load=0.9, requests=8_000, seed=2)
    before, after = summarise(scenario, kept), summarise(scenario, moved)
    assert before["conversions"] == []
    assert after["conversions"]
    assert all("decode has been the bottleneck" in c["reason"] for c in after["conversions"])
    assert after["n_p"] < setup.n_p
    assert after["shed_share"] < before["shed_share"] * 0.8


def test_the_rebalancer_gives_instances_back_to_prefill():
    scenario = load_scenario("steady")
    best = scenario.reference
    system = scenario.system
    world = World(
        system.pd.profile, system.prfaas.profile, 4, system.prfaas.egress, 20, system.pd.step, 1024.0, convert_s=20.0
    )
    drawn = simulate(scenario, Policy.STATIC, load=1.0, requests=12_000, seed=3)[0].requests
    config = RouterConfig()
    wrong = Setup(config, 1, 7, best.threshold, RebalancerConfig(sustain_s=30.0, dwell_s=60.0))
    recorder = Simulation(world, wrong, drawn).run()
    assert [r for _, r in recorder.conversions]
    assert all("prefill has been" in r for _, r in recorder.conversions)
    assert recorder.end.n_p >= 2
    stuck = Simulation(world, replace(wrong, rebalancer=None), drawn).run()
    late = slice(8_000, None)
    assert np.nanmean(recorder.ttft[late]) < np.nanmean(stuck.ttft[late])


def test_full_prfaas_beats_the_simpler_policies_where_it_should():
    scenario = load_scenario("steady")
    rows = compare_policies(scenario, list(Policy), [0.9], [1, 2], requests=4_000)
    ttft = {r.policy: r.estimates["ttft_mean_s"].mean for r in rows}
    goodput = {r.policy: r.estimates["goodput_per_s"].mean for r in rows}
    assert ttft[Policy.FULL] < ttft[Policy.STATIC] < ttft[Policy.NAIVE]
    assert goodput[Policy.FULL] > 1.2 * goodput[Policy.HOMOGENEOUS]
    assert losses(rows, Policy.FULL) == ()


def test_a_link_loss_hurts_full_prfaas_less_than_a_fixed_threshold():
    scenario = load_scenario("link-loss")
    rows = compare_policies(scenario, [Policy.STATIC, Policy.FULL], [0.9], [1, 2], requests=4_000)
    p90 = {r.policy: r.estimates["ttft_p90_s"].mean for r in rows}
    assert p90[Policy.FULL] < 0.8 * p90[Policy.STATIC]


def test_losses_are_found_and_paired():
    scenario = load_scenario("steady")
    rows = compare_policies(scenario, [Policy.STATIC, Policy.NAIVE], [0.8], [1, 2, 3], requests=2_000)
    found = losses(rows, Policy.NAIVE)
    assert {(x.other, x.metric) for x in found} >= {(Policy.STATIC, "ttft_mean_s")}
    assert losses(rows, Policy.STATIC) == ()
    estimate = Estimate.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert estimate.mean == 3.0
    assert estimate.half == pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=0.005)
    assert Estimate.of([1.0]).half is None
    with pytest.raises(ConfigError, match="at least one policy"):
        compare_policies(scenario, [], [0.8], [1], requests=100)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title = 1", "title|Expected"),
        ('title = "x"\ncase = "nope"\narrivals = { kind = "poisson" }', "no case 'nope'"),
        ('title = "x"\ncase = "paper"\narrivals = { kind = "poisson" }\ncolour = 1', "colour"),
        (
            'title = "x"\ncase = "paper"\narrivals = { kind = "poisson" }\ncaches = { pd_tokens = 1, prfaas_tokens = 1 }',
            "nothing else shares prefixes",
        ),
        (
            'title = "x"\ncase = "paper"\narrivals = { kind = "trace", name = "mooncake-conversation" }\nsessions = {}',
            "brings its own prefixes",
        ),
    ],
)
def test_wrong_scenarios_are_refused(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_scenario(str(path))


def test_wrong_runs_are_refused():
    scenario = load_scenario("steady")
    with pytest.raises(ConfigError, match="load is relative"):
        simulate(scenario, Policy.FULL, load=0.0, requests=100, seed=1)
    with pytest.raises(ConfigError, match="no scenario 'nope': packaged are bursts"):
        load_scenario("nope")
    with pytest.raises(ConfigError, match="decode_floor"):
        World(scenario.system.pd.profile, scenario.system.pd.profile, 0, 0.0, 1, 1.0, 1.0, decode_floor=0.0)


# -- command line -------------------------------------------------------------------------------------


def app():
    instance = typer.Typer()
    cli.register(instance)
    return instance


def test_simulate_writes_json_and_pictures(tmp_path):
    arguments = ["simulate", "--scenario", "bursts", "--policy", "static-threshold,full-prfaas", "--load", "0.6,0.8"]
    arguments += ["--requests", "600", "--seeds", "2", "--json", "-", "--plots", str(tmp_path)]
    result = CliRunner().invoke(app(), arguments)
    assert result.exit_code == 0, result.output
    body = json.loads(result.stdout)
    assert [(r["policy"], r["load"]) for r in body["results"]] == [
        ("static-threshold", 0.6),
        ("full-prfaas", 0.6),
        ("static-threshold", 0.8),
        ("full-prfaas", 0.8),
    ]
    first = body["results"][0]
    assert first["estimates"]["ttft_mean_s"]["half_width_95"] > 0
    assert {"ttft_s", "tpot_s", "utilisation", "queues_mean", "hit_rate"} <= set(first["runs"][0])
    assert "full-prfaas" in result.stderr
    names = {p.name for p in tmp_path.iterdir()}
    assert {"distributions.png", "distributions.svg", "policies.png", "time-full-prfaas.svg"} <= names


def test_simulate_explains_wrong_use():
    run = CliRunner().invoke
    for arguments, message in (
        (["--policy", "clever"], "no policy 'clever'"),
        (["--load", "much"], "--load takes numbers"),
        (["--scenario", "nope"], "packaged are"),
    ):
        result = run(app(), ["simulate", *arguments])
        assert result.exit_code == 2
        assert message in result.output
    text = run(app(), ["simulate", "--help"]).output
    assert "kvpool simulate --scenario link-loss" in text
