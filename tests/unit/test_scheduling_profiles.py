"""Profiles, fits, length distributions and traces."""

import gzip

import numpy as np
import pytest

from kvpool.scheduling.fitting import fit_profile
from kvpool.scheduling.lengths import Empirical, Exponential, Scaled, TruncatedLogNormal, mean, partial_expectation
from kvpool.scheduling.profiles import (
    GBPS,
    Curve,
    Label,
    cluster_egress,
    format_profile,
    load_profile,
    packaged_profiles,
    parse_profile,
    published_kv_throughput,
)
from kvpool.scheduling.traces import BlockCache, load_trace, parse_trace, uncached_lengths
from kvtransport.errors import ConfigError


def test_packaged_profiles_carry_label_and_source():
    assert packaged_profiles() == ["1t-hybrid-8xh20", "1t-hybrid-8xh200"]
    assert load_profile("1t-hybrid-8xh200").label is Label.INPUT
    h20 = load_profile("1t-hybrid-8xh20")
    assert h20.label is Label.DERIVED
    assert "derived from the results" in h20.source


def test_kv_throughput_matches_the_printed_column():
    profile = load_profile("1t-hybrid-8xh200")
    for tokens, gbps in ((1024, 3.61), (8192, 3.59), (32768, 3.19), (131072, 2.62)):
        assert profile.kv_throughput(tokens) / GBPS == pytest.approx(gbps, rel=0.015)


def test_equation_2_gives_the_papers_cluster_egress():
    rows = {r.preset: r for r in published_kv_throughput()}
    assert cluster_egress(rows["minimax-m2.5"].at(32768), 512, 8) / GBPS == pytest.approx(3800, rel=0.02)
    assert cluster_egress(rows["qwen3-235b"].at(32768), 512, 8) / GBPS == pytest.approx(2100, rel=0.02)
    with pytest.raises(ConfigError, match="gpus_per_instance > 0"):
        cluster_egress(1.0, 8, 0)


@pytest.mark.parametrize("row", published_kv_throughput(), ids=lambda r: r.preset)
def test_profiles_behind_the_throughput_table(row):
    profile = row.profile()
    assert profile.label is Label.DERIVED
    for n in row.lengths:
        assert profile.kv_throughput(n) == pytest.approx(row.at(n))


def test_curves_interpolate_extrapolate_and_invert():
    curve = Curve((10.0, 20.0, 40.0), (5.0, 6.0, 12.0))
    assert [curve.at(x) for x in (0, 10, 15, 30, 50)] == pytest.approx([4.0, 5.0, 5.5, 9.0, 15.0])
    assert curve.at_all([0, 10, 15, 30, 50]) == pytest.approx([4.0, 5.0, 5.5, 9.0, 15.0])
    for x in (0.0, 12.0, 33.0, 90.0):
        assert curve.inverse(curve.at(x)) == pytest.approx(x)
    assert curve.inverse(1.0) == -1.0
    steep = Curve((10.0, 20.0), (1.0, 9.0))
    assert steep.at(0) == 0.0  # never negative: through the origin instead
    assert steep.at(5) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ((1.0,), (1.0,), "at least two points"),
        ((1.0, 1.0), (1.0, 2.0), "ascend strictly"),
        ((1.0, 2.0), (2.0, 1.0), "never fall"),
        ((1.0, 2.0), (1.0, float("nan")), "finite"),
    ],
)
def test_bad_curves_are_refused(x, y, message):
    with pytest.raises(ConfigError, match=message):
        Curve(x, y)


def test_a_profile_round_trips_through_its_csv():
    profile = load_profile("1t-hybrid-8xh200")
    again = parse_profile(format_profile(profile), where="x")
    assert again.name == profile.name
    assert again.label is profile.label
    for x in (500, 5_000, 50_000, 500_000):
        assert again.seconds(x) == pytest.approx(profile.seconds(x))
        assert again.kv_bytes(x) == pytest.approx(profile.kv_bytes(x))
    assert profile.outside(1000)
    assert not profile.outside(2000)


def test_csv_columns():
    by_phi = parse_profile("tokens,prefill_seconds,kv_gbps\n1000,1,8\n2000,2,8\n", where="x")
    assert by_phi.kv_bytes(2000) == pytest.approx(2e9)
    both = parse_profile("tokens,kv_bytes,kv_gbps\n1000,1e9,8\n2000,4e9,8\n", where="x")
    assert both.seconds(2000) == pytest.approx(4.0)
    assert both.label is Label.MEASURED


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows"),
        ("length,prefill_seconds\n1,2\n2,3\n", "no column tokens"),
        ("tokens\n1\n2\n", "no column prefill_seconds"),
        ("tokens,prefill_seconds\n1,x\n2,3\n", "must hold numbers"),
        ("# label: guess\ntokens,prefill_seconds\n1,1\n2,3\n", "guess"),
        ("tokens,prefill_seconds\n10,0\n20,3\n", "must be positive"),
        ("tokens,prefill_seconds\n20,1\n10,3\n", "ascend strictly"),
    ],
)
def test_bad_profiles_say_what_is_wrong(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_profile(text, where="file.csv")


def test_sizes_are_asked_for_by_name():
    with pytest.raises(ConfigError, match="kv_bytes, kv_mib or kv_gbps"):
        load_profile("1t-hybrid-8xh20").kv_bytes(1000)


# -- fitting ------------------------------------------------------------------------------------------


def test_a_quadratic_fit_finds_the_law_through_noise():
    rng = np.random.default_rng(3)
    tokens = np.repeat([1e3, 4e3, 16e3, 64e3], 8)
    truth = 0.2 + 4e-5 * tokens + 5e-10 * tokens**2
    seconds = truth * (1 + 0.01 * rng.standard_normal(len(tokens)))
    fit = fit_profile(
        [(t, s, None) for t, s in zip(tokens, seconds, strict=True)], name="m", form="quadratic", up_to=128e3
    )
    assert fit.rms < 0.02
    for x in (2e3, 30e3, 120e3):
        assert fit.profile.seconds(x) == pytest.approx(0.2 + 4e-5 * x + 5e-10 * x * x, rel=0.03)
    assert any("follow the fitted parabola" in n for n in fit.notes)


def test_a_piecewise_fit_takes_medians_and_pools_falling_neighbours():
    points = [(1e3, 1.0, 10.0), (1e3, 1.2, 10.0), (1e3, 9.0, 10.0), (2e3, 1.1, 20.0), (4e3, 3.0, 40.0)]
    fit = fit_profile(points, name="m")
    assert fit.profile.seconds(1e3) == fit.profile.seconds(2e3) == pytest.approx((1.2 * 3 + 1.1) / 4)
    assert fit.profile.kv_bytes(3e3) == pytest.approx(30.0)
    assert any("pooled" in n for n in fit.notes)
    assert any("measured from 1000 to 4000 tokens" in n and "extrapolated" in n for n in fit.notes)
    assert fit.worst == pytest.approx(1 - (1.2 * 3 + 1.1) / 4 / 9.0)


@pytest.mark.parametrize(
    ("points", "form", "message"),
    [
        ([(1e3, 1.0, None)], "piecewise", "two lengths or more"),
        ([(1e3, -1.0, None), (2e3, 1.0, None)], "piecewise", "positive and finite"),
        ([(1e3, 1.0, None), (2e3, 1.0, None)], "spline", "unknown form"),
    ],
)
def test_bad_fits_are_refused(points, form, message):
    with pytest.raises(ConfigError, match=message):
        fit_profile(points, name="m", form=form)


# -- distributions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lengths",
    [
        TruncatedLogNormal(9.9, 1.0, 128, 131072),
        Exponential(5000.0),
        Scaled(TruncatedLogNormal(9.9, 1.0, 128, 131072), 0.6),
        Empirical(np.arange(1, 4000, 7)),
    ],
    ids=lambda x: type(x).__name__,
)
def test_distributions_agree_with_their_own_samples(lengths):
    sample = lengths.sample(np.random.default_rng(5), 300_000)
    assert len(sample) == 300_000
    assert sample.min() >= lengths.support[0]
    assert sample.max() <= lengths.support[1]
    assert mean(lengths) == pytest.approx(sample.mean(), rel=0.01)
    curve = Curve((1000.0, 3000.0, 20_000.0), (1.0, 2.0, 30.0))
    for q in (0.1, 0.5, 0.93):
        x = lengths.quantile(q)
        assert lengths.cdf(x) == pytest.approx(q, abs=0.002)
        assert (sample <= x).mean() == pytest.approx(q, abs=0.004)
        assert lengths.partial_mean(x) == pytest.approx(np.where(sample <= x, sample, 0).mean(), rel=0.02)
        expected = np.where(sample <= x, curve.at_all(sample), 0).mean()
        assert partial_expectation(curve, lengths, x) == pytest.approx(expected, rel=0.02)
    assert lengths.cdf(lengths.support[1]) == pytest.approx(1.0)
    assert lengths.cdf(lengths.support[0] - 1) == 0.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: TruncatedLogNormal(9.9, 0.0, 1, 2),
        lambda: TruncatedLogNormal(9.9, 1.0, 5, 5),
        lambda: Empirical([]),
        lambda: Empirical([float("nan")]),
        lambda: Exponential(0.0),
        lambda: Scaled(Exponential(1.0), 0.0),
    ],
)
def test_bad_distributions_are_refused(make):
    with pytest.raises(ConfigError):
        make()


# -- traces -------------------------------------------------------------------------------------------


def test_the_packaged_trace_is_what_it_says():
    trace = load_trace("mooncake-conversation")
    assert len(trace) == 2000
    assert trace.arrivals[0] == 0
    assert (np.diff(trace.arrivals) >= 0).all()
    assert 8_000 < trace.input_tokens.mean() < 20_000
    uncached = uncached_lengths(trace, 10**9)
    assert (uncached >= 1).all()
    assert 0.1 < 1 - uncached.sum() / trace.input_tokens.sum() < 0.6
    assert (uncached_lengths(trace, 0) == trace.input_tokens).all()


def test_traces_name_the_line_at_fault(tmp_path):
    good = '{"timestamp": 5, "input_length": 600, "output_length": 3, "hash_ids": [1, 2]}'
    trace = parse_trace(good + "\n\n" + good.replace("5,", "1,"), where="t")
    assert trace.arrivals.tolist() == pytest.approx([0.0, 0.004])
    for bad in ("{", '{"timestamp": 1}', good.replace("600", "6000"), good.replace("600", "0")):
        with pytest.raises(ConfigError, match="line 2"):
            parse_trace(good + "\n" + bad, where="t")
    with pytest.raises(ConfigError, match="no requests"):
        parse_trace("\n", where="t")
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(gzip.compress(good.encode()))
    assert len(load_trace(str(path))) == 1
    path.write_bytes(gzip.compress(good.encode())[:-9])
    with pytest.raises(ConfigError, match="not readable"):
        load_trace(str(path))


def test_a_block_cache_evicts_the_tails_first_and_never_covers_the_last_token():
    cache = BlockCache(4, 10)
    cache.insert([1, 2, 3, 4])
    assert cache.match([1, 2, 3, 4], 45.0) == 40
    assert cache.match([1, 2, 3, 4], 40.0) == 30  # the last token is always computed
    cache.insert([1, 2, 9])
    assert len(cache) == 4
    assert cache.match([1, 2, 9], 100.0) == 30
    assert cache.match([1, 2, 3, 4], 45.0) == 30  # block 4 went
    cache.insert(list(range(100, 110)))
    assert cache.match(list(range(100, 110)), 100.0) == 40  # the front of a prompt larger than the cache
    with pytest.raises(ConfigError):
        BlockCache(-1, 10)
