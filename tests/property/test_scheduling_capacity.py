"""More of anything never lowers the planned capacity."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.scheduling.lengths import Empirical, Scaled, TruncatedLogNormal
from kvpool.scheduling.model import Means, PdCluster, PrfaasCluster, System, Workload
from kvpool.scheduling.planner import plan
from kvpool.scheduling.profiles import GBPS, Curve, Profile
from kvpool.scheduling.traces import load_trace, uncached_lengths

SLACK = 1e-6


@st.composite
def curves(draw, low, high):
    xs = sorted(draw(st.sets(st.integers(500, 150_000), min_size=2, max_size=5)))
    steps = draw(st.lists(st.floats(0.0, 1.0), min_size=len(xs), max_size=len(xs)))
    y, ys = draw(st.floats(low, high)), []
    for step in steps:
        y += step * high
        ys.append(y)
    return Curve(tuple(map(float, xs)), tuple(ys))


@st.composite
def systems(draw):
    lengths = draw(
        st.one_of(
            st.builds(TruncatedLogNormal, st.floats(7, 11), st.floats(0.2, 1.5), st.just(64), st.just(131072)),
            st.lists(st.integers(1, 150_000), min_size=1, max_size=40).map(Empirical),
        )
    )
    pd = Profile("pd", draw(curves(0.05, 5.0)))
    remote = Profile("prfaas", draw(curves(0.02, 3.0)), draw(curves(1e6, 3e9)))
    return System(
        PdCluster(draw(st.integers(2, 9)), pd, draw(st.integers(1, 60)), draw(st.floats(0.005, 0.1))),
        Workload(lengths, draw(st.floats(1, 3000))),
        PrfaasCluster(draw(st.integers(0, 6)), remote, draw(st.floats(0.01, 400)) * GBPS),
        Means.EXPECTED,
    )


def capacity(system):
    return plan(system).best.lambda_max


@settings(max_examples=40, deadline=None)
@given(systems(), st.floats(1.0, 10.0))
def test_more_bandwidth_never_lowers_capacity(system, factor):
    more = replace(system, prfaas=replace(system.prfaas, egress=system.prfaas.egress * factor))
    assert capacity(more) >= capacity(system) * (1 - SLACK)


@settings(max_examples=40, deadline=None)
@given(systems(), st.integers(0, 3), st.integers(0, 3))
def test_more_nodes_never_lower_capacity(system, remote, local):
    more = replace(
        system,
        pd=replace(system.pd, instances=system.pd.instances + local),
        prfaas=replace(system.prfaas, instances=system.prfaas.instances + remote),
    )
    assert capacity(more) >= capacity(system) * (1 - SLACK)


@settings(max_examples=40, deadline=None)
@given(systems(), st.floats(0.01, 1.0))
def test_a_larger_cached_part_never_lowers_capacity(system, kept):
    cached = replace(system, workload=replace(system.workload, lengths=Scaled(system.workload.lengths, kept)))
    assert capacity(cached) >= capacity(system) * (1 - SLACK)


@settings(max_examples=15, deadline=None)
@given(systems(), st.sampled_from([0, 1_000, 4_000, 16_000]), st.sampled_from([2, 10, 1000]))
def test_a_larger_prefix_cache_never_lowers_capacity(system, blocks, factor):
    trace = load_trace("mooncake-conversation")
    small, large = uncached_lengths(trace, blocks), uncached_lengths(trace, max(blocks, 500) * factor)
    assert (large <= small).all()

    def planned(lengths):
        return capacity(replace(system, workload=replace(system.workload, lengths=Empirical(lengths))))

    assert planned(large) >= planned(small) * (1 - SLACK)


@settings(max_examples=25, deadline=None)
@given(systems())
def test_prfaas_never_lowers_the_capacity_of_the_pd_cluster_alone(system):
    assert capacity(system) >= capacity(replace(system, prfaas=None)) * (1 - SLACK)


@settings(max_examples=40, deadline=None)
@given(systems())
def test_a_plan_is_consistent(system):
    best = plan(system).best
    assert best.lambda_max == pytest.approx(min(best.limits.values()))
    assert 0 <= best.offload_share <= 1
    assert best.n_p + best.n_d == system.pd.instances
    assert best.egress <= system.prfaas.egress * (1 + 1e-6)
    assert best.binds
    assert best.ttft_mean >= 0
