"""What a link carries: profiles, instances, time to first token, with numbers worked out by hand."""

from __future__ import annotations

import pytest

from kvtransport import presets
from kvtransport.bench import prefill
from kvtransport.bench.flow import COLD_TOKENS, Sample, goodput
from kvtransport.bench.prefill import PrefillProfile, exposed_seconds
from kvtransport.bench.send import parse_address
from kvtransport.bench.wan import Setting, WanOptions, quick, recovery, series, transitions
from kvtransport.errors import ConfigError


def test_profiles_are_straight_between_their_points_and_beyond():
    times = PrefillProfile("x", ((1000, 1.0), (2000, 2.0), (4000, 6.0)))
    assert [times.seconds(n) for n in (1000, 1500, 3000, 4000, 5000)] == [1.0, 1.5, 4.0, 6.0, 8.0]
    assert times.seconds(500) == 0.5
    assert PrefillProfile("x", ((1000, 1.0), (2000, 3.0))).seconds(1) == 0.01  # never nothing, never negative
    assert PrefillProfile("x", ((1000, 2.0),)).seconds(500) == 1.0


@pytest.mark.parametrize("points", [(), ((2, 1.0), (1, 2.0)), ((1, 0.0),), ((1, float("inf")),)])
def test_profiles_that_are_none(points):
    with pytest.raises(ConfigError, match="a prefill profile needs ascending lengths"):
        PrefillProfile("x", points)


def test_the_published_profile_gives_back_the_published_throughput():
    times = prefill.of_preset("prfaas-1t")
    layout = presets.load("prfaas-1t")
    for tokens, gbps in presets.profile("prfaas-1t"):
        assert layout.bytes_at(tokens) * 8 / 1e9 / times.seconds(tokens) == pytest.approx(gbps)
        assert prefill.demand(layout, times, tokens, 10.0, 0.0).instances == pytest.approx(10.0 / gbps)


def test_a_measured_profile(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("# name: mine\ntokens,prefill_seconds,kv_mib\n1024,0.5,1\n2048,0.9,2\n")
    times = prefill.profile("kimi-linear-48b", path)
    assert (times.source, times.points) == (str(path), ((1024.0, 0.5), (2048.0, 0.9)))
    for text, words in (("tokens\n1\n", "needs the columns"), ("tokens,prefill_seconds\n1,x\n", "needs the columns")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            prefill.from_csv(path)
    with pytest.raises(ConfigError, match="cannot read the profile"):
        prefill.from_csv(tmp_path / "none.csv")


def test_what_is_left_after_prefill():
    # Four layers of 10 bytes, 4 s of prefill: one is ready each second.
    assert exposed_seconds([10] * 4, 4.0, 100.0) == pytest.approx(0.1)  # only the last one
    assert exposed_seconds([10] * 4, 4.0, 10.0) == pytest.approx(1.0)  # just keeps up
    assert exposed_seconds([10] * 4, 4.0, 5.0) == pytest.approx(5.0)  # 1 s until the first, then 8 s of sending
    assert exposed_seconds([100, 1, 1, 1], 4.0, 50.0) == pytest.approx(0.02)


def test_the_answer():
    body = prefill.answer("kimi-linear-48b", prefill.of_preset("kimi-linear-48b"), 8.0, 0.01)
    at = {each["tokens"]: each for each in body["lengths"]}
    assert at[32_768]["instances"] == pytest.approx(8.0 / 3.87)
    assert at[32_768]["serial_ttft_s"] == pytest.approx(307_658_752 / 1e9 + 0.015)
    assert 0.015 < at[1024]["layerwise_ttft_s"] < at[1024]["serial_ttft_s"]


def samples(*points: tuple[float, float]) -> tuple[Sample, ...]:
    return tuple(Sample(at, int(gb * 1e9)) for at, gb in points)


def test_goodput_between_two_moments():
    line = samples((0, 0), (1, 1), (2, 3), (3, 3))
    assert goodput(line, 0) == pytest.approx(8.0)
    assert goodput(line, 1) == pytest.approx(8.0)
    assert goodput(line, 1, 2) == pytest.approx(16.0)
    assert goodput(line, 0.5, 1.5) == pytest.approx(12.0)
    assert goodput(line, -5, 99) == pytest.approx(8.0)
    assert goodput(line, 4) == goodput((), 0) == goodput(line[:1], 0) == 0.0
    assert series(line, 0.0, 1.0) == [8.0, 16.0, 0.0]


def test_recovery_is_the_end_of_the_first_good_window():
    # 1 Gbps until 3 s, nothing until 5 s, then 0.5 and from 6 s on 1 again.
    rates = [1] * 30 + [0] * 20 + [0.5] * 10 + [1] * 40
    points, total = [(0.0, 0.0)], 0.0
    for i, rate in enumerate(rates):
        total += rate / 8 / 10
        points.append(((i + 1) / 10, total))
    line = samples(*points)
    assert recovery(line, 3.0, 1.0) == pytest.approx(3.4, abs=0.06)  # 0.9 of a window that began a little before 6 s
    assert recovery(line, 3.0, 0.4) == pytest.approx(2.4, abs=0.11)
    assert recovery(line, 3.0, 2.0) is None
    assert recovery((), 3.0, 1.0) is None


def test_the_cold_transfer_is_256_mib():
    assert presets.load("kimi-linear-48b").bytes_at(COLD_TOKENS) == 256 << 20


def test_the_grid():
    options = WanOptions()
    assert len(transitions(options)) == 4
    assert transitions(WanOptions(rtt_ms=(10.0,), loss_percent=(0.0,))) == []
    small = quick(options)
    assert (small.rtt_ms, small.loss_percent, small.connections) == ((10.0,), (0.0, 0.1), (4, 16))
    assert Setting(4, "bbr").name == "bbr x4"
    for change, words in (
        ({"rtt_ms": ()}, "at least one"),
        ({"loss_percent": (101.0,)}, "loss_percent of 0 to 100"),
        ({"connections": (0,)}, "1 to 128"),
        ({"seconds": 0.0}, "--seconds must be"),
    ):
        with pytest.raises(ConfigError, match=words):
            WanOptions(**change).check()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", ("a", 9)),
        ("a:1", ("a", 1)),
        ("10.0.0.1:80", ("10.0.0.1", 80)),
        ("::1", ("::1", 9)),
        ("[::1]:80", ("::1", 80)),
        ("[::1]", ("::1", 9)),
    ],
)
def test_addresses(text, expected):
    assert parse_address(text, 9) == expected


@pytest.mark.parametrize("text", [":80", "a:b"])
def test_addresses_that_are_none(text):
    with pytest.raises(ConfigError, match="HOST or HOST:PORT"):
        parse_address(text, 9)
