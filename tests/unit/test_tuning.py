"""The tuning policy on a model of a path; see kvtransport/flow/tuning.py."""

from __future__ import annotations

import pytest

from kvtransport.flow.addresses import Addresses
from kvtransport.flow.pacing import Allowances, TokenBucket
from kvtransport.flow.telemetry import PathInfo
from kvtransport.flow.tuning import (
    FEW,
    MOST,
    REST_S,
    START,
    UNKNOWN,
    Choice,
    Reading,
    Readings,
    Tuning,
    chunk_for,
    congestion_for,
    connections_for,
    window_for,
)

STEP_S = 0.25
MB = 1e6


class Path:
    """``each`` bytes/s a connection until ``rate`` is full; what the policy chooses is there a step later."""

    def __init__(self, rtt_s: float, rate: float, each: float, *, loss: float = 0.0, busy: float = 1.0) -> None:
        self.rtt_s, self.rate, self.each, self.loss, self.busy = rtt_s, rate, each, loss, busy
        self.queue_s = 0.0
        self.at = 0.0

    def run(self, policy: Tuning, seconds: float) -> list[tuple[float, Choice]]:
        told = []
        count = policy.choice().connections
        for _ in range(round(seconds / STEP_S)):
            self.at += STEP_S
            goodput = min(self.rate, count * self.each) * self.busy
            rtt_s = self.rtt_s + self.queue_s
            reading = Reading(STEP_S, goodput, count, self.busy, 0.0, 0.0, rtt_s, self.rtt_s, self.loss)
            choice = policy.judge(reading)
            told.append((self.at, choice))
            count = choice.connections
        return told


def test_what_lies_unsent_is_a_fraction_of_what_a_connection_carries() -> None:
    assert Tuning(None).choice().unsent_bytes is None
    assert Tuning(50e-6).choice().unsent_bytes is None
    policy = Tuning(0.03)
    assert policy.choice().unsent_bytes == 128 << 10
    [*_, (_, choice)] = Path(0.03, 12.5e9, 800 * MB).run(policy, 20)
    assert choice.unsent_bytes == choice.chunk_bytes // 4 == 1 << 20
    assert choice.unsent_bytes / (800 * MB) > 0.001, "no connection is idle before its thread comes round again"


def test_what_a_path_begins_with() -> None:
    assert congestion_for(50e-6) == ("cubic", "reno")
    assert congestion_for(0.01) == ("bbr",)
    assert congestion_for(50e-6, loss=2e-3) == ("bbr",)
    assert congestion_for(None) == congestion_for(0.0) == ()
    assert connections_for(50e-6, 1) == FEW
    assert connections_for(50e-6, 6) == 6
    assert connections_for(0.01, 1) == START < connections_for(0.03, 1) == MOST
    assert connections_for(0.03, 1, most=3) == 3
    assert connections_for(None, 8) == UNKNOWN


def test_windows_cover_twice_the_path_and_chunks_a_hundredth_of_a_second() -> None:
    assert window_for(0.5e9, 0.03) == 64 << 20
    assert window_for(12.5e9, 0.03) == pytest.approx(2 * 12.5e9 * 0.03)
    assert window_for(1e12, 1.0) == 1 << 30
    assert window_for(1e9, None) == 64 << 20
    assert chunk_for(0.0, 8) == 512 << 10
    assert chunk_for(0.0, 2, local=True) == chunk_for(5e9, 2, local=True) == 1 << 20
    assert chunk_for(800 * MB, 8) == pytest.approx(MB, rel=0.07)
    assert chunk_for(1 * MB, 8) == 512 << 10
    assert chunk_for(100e9, 1) == 4 << 20
    assert chunk_for(123_456_789, 3) % 65536 == 0


def test_more_connections_are_kept_where_they_pay() -> None:
    path = Path(0.01, 500 * MB, 35 * MB)
    policy = Tuning(0.01)
    told = path.run(policy, 10)
    assert told[0][1].connections == START
    assert told[-1][1].connections == MOST
    assert "carry more" in told[-1][1].why


def test_more_connections_are_given_back_where_they_do_not_and_rarely_tried_again() -> None:
    path = Path(0.01, 500 * MB, 100 * MB)
    policy = Tuning(0.01)
    told = path.run(policy, 200)
    counts = [choice.connections for _, choice in told]
    assert counts[-1] == START
    assert max(counts) == MOST
    trials = [at for (at, choice), before in zip(told[1:], counts, strict=False) if choice.connections > before]
    assert len(trials) <= 5, trials
    assert trials[1] - trials[0] >= REST_S
    assert trials[2] - trials[1] >= 2 * REST_S
    assert sum(n > START for n in counts) * STEP_S < 12


def test_a_path_on_which_a_queue_stands_is_full_and_gets_no_more() -> None:
    path = Path(0.01, 500 * MB, 35 * MB)
    path.queue_s = 0.01
    policy = Tuning(0.01)
    assert {choice.connections for _, choice in path.run(policy, 60)} == {START}


def test_goodput_that_falls_asks_for_fresh_connections_within_two_seconds() -> None:
    path = Path(0.01, 500 * MB, 100 * MB)
    policy = Tuning(0.01)
    path.run(policy, 10)
    path.rate = 330 * MB  # as when BBR believes in a third of the round trip
    path.rtt_s = 0.03
    changed = path.at
    told = path.run(policy, 5)
    fresh = [at - changed for at, choice in told if choice.fresh]
    assert len(fresh) == 1, "once, and not again while the path stays as it is"
    assert fresh[0] <= 1.5
    assert path.run(policy, 20)[-1][1].connections in (START, MOST)


def test_a_sender_without_work_tells_nothing() -> None:
    for busy in (0.0, 0.1, 0.5):
        policy = Tuning(0.01)
        told = Path(0.01, 500 * MB, 35 * MB, busy=busy).run(policy, 30)
        assert {choice.connections for _, choice in told} == {START}
        assert not any(choice.fresh for _, choice in told)


def test_a_local_path_stays_as_it_is_unless_it_loses() -> None:
    path = Path(50e-6, 5e9, 1e9)
    policy = Tuning(50e-6)
    assert {choice.connections for _, choice in path.run(policy, 20)} == {FEW}
    path.rtt_s = 0.003  # its own queue
    assert {choice.congestion for _, choice in path.run(policy, 20)} == {("cubic", "reno")}
    path.rtt_s, path.loss = 50e-6, 2e-4
    assert {choice.connections for _, choice in path.run(policy, 20)} == {FEW}
    path.loss = 2e-3
    told = path.run(policy, 10)
    assert told[-1][1].congestion == ("bbr",)
    assert START in {choice.connections for _, choice in told}
    path.loss = 0.0
    assert path.run(policy, 12)[-1][1].congestion == ("cubic", "reno")
    assert policy.choice().connections == FEW


def test_a_path_that_gets_long_is_found_out() -> None:
    path = Path(50e-6, 5e9, 1e9)
    policy = Tuning(50e-6)
    path.run(policy, 5)
    path.rtt_s = 0.02
    told = path.run(policy, 12)
    assert told[-1][1].congestion == ("bbr",)
    assert told[-1][1].connections >= START


def test_a_number_that_was_asked_for_is_not_touched() -> None:
    policy = Tuning(0.01, fixed_connections=3)
    told = Path(0.01, 500 * MB, 35 * MB).run(policy, 30)
    assert {choice.connections for _, choice in told} == {3}


def test_no_more_than_the_peer_takes() -> None:
    policy = Tuning(0.01)
    policy.limit(5)
    assert {choice.connections for _, choice in Path(0.01, 500 * MB, 35 * MB).run(policy, 30)} == {5}


def _info(sent: int, resent: int, busy_s: float, rtt_s: float = 0.01) -> PathInfo:
    return PathInfo(rtt_s, rtt_s, 0.0, False, 0, 0, sent, resent, busy_s, busy_s / 4, busy_s / 8)


def test_readings_are_differences() -> None:
    readings = Readings(10.0)
    assert readings.take(10.0, 0, [("a", _info(0, 0, 0.0))]) is None
    assert readings.take(10.5, 500, [("a", _info(1000, 10, 0.5)), ("b", _info(0, 0, 0.0))]) == Reading(
        0.5, 1000.0, 2, 1.0, 0.25, 0.125, 0.01, 0.01, 0.01
    )
    after = readings.take(11.0, 500, [("b", _info(0, 0, 0.0))])
    assert after is not None
    assert (after.goodput, after.loss, after.busy) == (0, 0, 0)
    assert readings.take(11.5, 500, []) is None


# -- addresses ---------------------------------------------------------------------------------


def test_connections_are_spread_over_rails() -> None:
    addresses = Addresses(["r0", "r1"], ["l0", "l1"])
    assert addresses.pairs == (("l0", "r0"), ("l1", "r1"))
    for index in range(6):
        pair = addresses.pick(0.0)
        assert pair is not None
        addresses.use(index, pair)
    assert [addresses.count(pair) for pair in addresses.pairs] == [3, 3]
    assert Addresses(["r0", "r1"], ["l0"]).pairs == (("l0", "r0"), ("l0", "r1"))
    assert Addresses(["r0"]).pairs == ((None, "r0"),)


def test_a_dead_address_is_left_out_and_tried_again_later_each_time() -> None:
    addresses = Addresses(["r0", "r1"])
    bad = addresses.pairs[0]
    waits = []
    now = 0.0
    for _ in range(7):
        addresses.failed(bad, now)
        assert addresses.dead(now) == (bad,)
        assert addresses.pick(now) == addresses.pairs[1]
        start = now
        while addresses.dead(now):
            now += 0.5
        waits.append(now - start)
    assert waits == [1, 2, 4, 8, 16, 30, 30]
    addresses.use(0, addresses.pairs[1])
    addresses.use(1, addresses.pairs[1])
    assert addresses.idle(now)
    assert addresses.fullest() == (0, 1)
    addresses.works(bad)
    addresses.use(2, bad)
    assert not addresses.idle(now)
    addresses.left(2)
    assert addresses.idle(now)


def test_with_every_address_dead_the_one_that_is_due_first_is_tried() -> None:
    addresses = Addresses(["r0", "r1"])
    addresses.failed(addresses.pairs[0], 0.0)
    addresses.failed(addresses.pairs[0], 0.0)
    addresses.failed(addresses.pairs[1], 0.0)
    assert addresses.pick(0.5) == addresses.pairs[1]
    assert addresses.pick(0.5, [addresses.pairs[1]]) == addresses.pairs[0]
    assert addresses.pick(0.5, addresses.pairs) is None


# -- rates -------------------------------------------------------------------------------------


def test_a_bucket_lets_through_its_rate_and_saves_up_little() -> None:
    bucket = TokenBucket(1000.0, 5.0, burst_s=0.1)
    taken = 0
    for i in range(1, 1001):
        n = bucket.available(5.0 + i * 0.01)
        bucket.take(n)
        taken += n
    assert taken == pytest.approx(10_000, rel=0.01)
    assert bucket.available(100.0) == 100, "what nobody took for long is not saved up"
    bucket.take(1100)
    assert bucket.available(100.5) == 0
    assert bucket.available(101.05) == pytest.approx(50, abs=1)
    bucket.set_rate(10.0, 101.05)
    assert bucket.available(101.05) == 1, "the burst is of the new rate"


def test_allowances_are_equal_but_for_those_that_do_not_use_them() -> None:
    shares: Allowances[str] = Allowances(TokenBucket(300.0, 0.0, burst_s=10.0), most_unused=100)
    for key in "abc":
        shares.join(key)
    sent = dict.fromkeys("abc", 0)
    for i in range(1, 11):
        shares.divide(float(i), sent.items())
        sent["a"], sent["b"] = shares.allowed["a"], shares.allowed["b"]
    assert sent["a"] + sent["b"] + shares.allowed["c"] <= 3000
    assert sent["a"] == pytest.approx(sent["b"], rel=0.05)
    assert shares.allowed["c"] <= 150, "it sends nothing, and gets nothing more"
    assert sent["a"] + sent["b"] >= 2650
    shares.leave("c", 0)
    assert shares.bucket.available(10.0) > 0, "what it did not use goes back"
