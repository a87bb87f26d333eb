"""Which advertised addresses are tried and how often, and when two addresses are of one host."""

from __future__ import annotations

import pytest

from kvtransport.address import parse_address, same_host
from kvtransport.errors import ConfigError
from kvtransport.flow.probing import AGAIN_S, REMEMBERED, Answer, ProbePolicy

ME, OTHER = b"m" * 16, b"o" * 16


@pytest.mark.parametrize(
    ("text", "parsed"),
    [("10.0.0.7:7777", ("10.0.0.7", 7777)), ("[::1]:1", ("::1", 1)), ("node1.example:65535", ("node1.example", 65_535))],
)
def test_addresses(text, parsed):
    assert parse_address(text) == parsed


@pytest.mark.parametrize("text", ["", "host", "host:", ":1", "host:0", "host:65536", "host:-1", "host:1x", "host:٣", "[]:1"])
def test_what_is_no_address_is_named(text):
    with pytest.raises(ConfigError, match="HOST:PORT"):
        parse_address(text)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("10.0.0.7", "10.0.0.7", True),
        ("10.0.0.7", "10.0.0.8", False),
        ("::1", "[0:0:0:0:0:0:0:1]", True),
        ("::ffff:10.0.0.7", "10.0.0.7", True),
        ("localhost", "127.0.0.1", True),
        ("127.0.0.2", "127.0.0.1", True),
        ("127.0.0.1", "10.0.0.7", False),
        ("node1", "10.0.0.7", False),
        ("node1", "node1", True),
        ("node1", "", False),
        ("", "", False),
    ],
)
def test_hosts_are_compared_without_a_look_up(one, other, same):
    assert same_host(one, other) is same
    assert same_host(other, one) is same


def test_an_answer_is_judged_by_who_was_expected():
    assert Answer(incarnation=ME).verdict(ME) == ""
    assert Answer(incarnation=OTHER).verdict(ME) == "another process answers there"
    assert Answer().verdict(ME) == ""  # it speaks the protocol and did not say who it is
    assert Answer("nobody listens").verdict(ME) == "nobody listens"


def test_an_answer_is_good_for_a_moment():
    policy = ProbePolicy()
    assert policy.known(0.0, "a:1") is None
    assert policy.begin(0.0)
    policy.end(1.0, "a:1", Answer("no"))
    assert policy.known(1.0 + AGAIN_S / 2, "a:1") == Answer("no")
    assert policy.known(1.0 + AGAIN_S, "a:1") is None
    assert policy.begin(2.0)
    policy.end(2.0, "a:2", None)  # given up: nothing is known
    assert policy.known(2.0, "a:2") is None


def test_tries_are_bounded_at_once_and_by_the_minute():
    policy = ProbePolicy(at_once=2, a_minute=3)
    assert [policy.begin(0.0) for _ in range(3)] == [True, True, False]
    policy.end(1.0, "a:1", Answer())
    policy.end(1.0, "a:2", Answer())
    assert [policy.begin(2.0), policy.begin(2.0)] == [True, False]
    policy.end(3.0, "a:3", Answer())
    assert not policy.begin(59.9)
    assert policy.begin(60.0)
    assert policy.active == 1


def test_what_is_remembered_is_bounded():
    policy = ProbePolicy(a_minute=10 * REMEMBERED)
    for port in range(2 * REMEMBERED):
        assert policy.begin(0.0)
        policy.end(0.0, f"a:{port}", Answer())
    assert len(policy._answers) == REMEMBERED
    assert policy.known(0.0, f"a:{2 * REMEMBERED - 1}") is not None
