"""Namespaces and key chains."""

import hashlib
import struct
from dataclasses import replace

import numpy as np
import pytest

from kvpool.errors import KeyChainError
from kvpool.keys import MAX_CHAIN_TOKENS, KeyChain, Namespace
from kvpool.messages import chain_steps, chain_to_wire
from kvpool.steps import run
from kvtransport.errors import ProtocolError
from tests.poolkit import LAYOUTS, STEP

LAYOUT = LAYOUTS["hybrid"]


@pytest.fixture
def ns():
    return Namespace("tenant", LAYOUT, STEP)


def _u32(tokens):
    return struct.pack(f"<{len(tokens)}I", *tokens)


def test_hashes_are_the_documented_ones(ns):
    tokens = list(range(40))
    chain = KeyChain(ns, tokens, extra=b"lora")
    root = hashlib.sha256(b"kvt1" + LAYOUT.fingerprint(STEP)).digest()
    first = hashlib.sha256(root + _u32(tokens[:16]) + b"lora").digest()
    second = hashlib.sha256(first + _u32(tokens[16:32])).digest()
    assert chain.blocks == [first, second]
    assert chain.tokens == 40
    assert chain.key_at(16) == first
    assert chain.key_at(32) == second
    assert (
        chain.key_at(35) == hashlib.sha256(b"kvt1-tail" + second + struct.pack("<I", 3) + _u32(tokens[32:35])).digest()
    )
    assert (
        chain.key_at(2) == hashlib.sha256(b"kvt1-tail" + root + struct.pack("<I", 2) + _u32([0, 1]) + b"lora").digest()
    )


@pytest.mark.parametrize("cut", [0, 1, 15, 16, 17, 47, 48, 100])
def test_extending_gives_the_same_chain(ns, cut):
    tokens = np.random.default_rng(1).integers(0, 1 << 32, 100, dtype=np.uint64)
    whole = KeyChain(ns, tokens)
    grown = KeyChain(ns, tokens[:cut])
    grown.extend(tokens[cut:].tolist())
    assert grown.blocks == whole.blocks
    assert [grown.key_at(p) for p in range(1, 101)] == [whole.key_at(p) for p in range(1, 101)]


def test_extending_hashes_new_blocks_only(ns, monkeypatch):
    chain = KeyChain(ns, range(1600))
    hashed = []
    real = hashlib.sha256
    monkeypatch.setattr("kvpool.keys.hashlib.sha256", lambda data=b"": hashed.append(1) or real(data))
    chain.extend(range(40))
    assert len(hashed) == 2


def test_everything_separates_keys(ns):
    tokens = list(range(32))
    other = LAYOUTS["everything"]
    variants = [
        KeyChain(ns, tokens),
        KeyChain(ns, tokens, extra=b"x"),
        KeyChain(Namespace("tenant", LAYOUT, STEP, b"salt"), tokens),
        KeyChain(Namespace("tenant", LAYOUT, 17), tokens),
        KeyChain(Namespace("tenant", other, STEP), tokens),
        KeyChain(ns, [1, *tokens[1:]]),
    ]
    assert len({v.blocks[0] for v in variants}) == len(variants)
    assert len({v.key_at(5) for v in variants}) == len(variants)


def test_namespace_ids_separate_tenants_and_ranks(ns):
    assert ns.id == Namespace("tenant", LAYOUT, STEP).id
    others = [
        Namespace("other", LAYOUT, STEP),
        Namespace("tenant", LAYOUT, STEP, b"s"),
        Namespace("tenant", LAYOUT, 32),
    ]
    assert len({n.id for n in [ns, *others]}) == 4
    two = [Namespace("tenant", replace(LAYOUT, tp_size=2, tp_rank=r), STEP) for r in (0, 1)]
    assert two[0].fingerprint == two[1].fingerprint
    assert two[0].id != two[1].id


def test_a_chain_of_engine_hashes(ns):
    hashes = [bytes([i]) * (i + 1) for i in range(3)]
    chain = KeyChain.of_hashes(ns, hashes, 50)
    assert chain.blocks == hashes
    assert chain.tokens == 50
    assert chain.key_at(32) == hashes[1]
    with pytest.raises(KeyChainError, match="no keys there"):
        chain.key_at(33)
    with pytest.raises(KeyChainError, match="cannot be extended"):
        chain.extend([1])


@pytest.mark.parametrize(
    ("hashes", "tokens", "message"),
    [
        ([b"a"], 50, "3 full blocks"),
        ([b"a", b"b", b"c"], 47, "2 full blocks"),
        ([b"a", b"", b"c"], 48, "1 to 64 bytes"),
        ([b"a", b"b" * 65, b"c"], 48, "1 to 64 bytes"),
        ([b"a", "b", b"c"], 48, "1 to 64 bytes"),
        ([b"a", b"b", b"a"], 48, "twice"),
        ([], -1, "0 full blocks"),
        ([], MAX_CHAIN_TOKENS * 2, "at most"),
    ],
)
def test_bad_engine_hashes(ns, hashes, tokens, message):
    with pytest.raises(KeyChainError, match=message):
        KeyChain.of_hashes(ns, hashes, tokens)


def test_token_bytes_round_trip(ns):
    chain = KeyChain(ns, range(50), extra=b"e")
    again = KeyChain.of_token_bytes(ns, chain.token_bytes, b"e")
    assert again.key_at(50) == chain.key_at(50)
    with pytest.raises(KeyChainError, match="4 bytes"):
        KeyChain.of_token_bytes(ns, b"12345")


@pytest.mark.parametrize("tokens", [[-1], [1 << 32], [1.5], ["a"], [[1]], np.zeros((2, 2), np.int64)])
def test_bad_tokens(ns, tokens):
    with pytest.raises(KeyChainError, match="tokens are"):
        KeyChain(ns, tokens)


def test_bounds(ns):
    with pytest.raises(KeyChainError, match="at most"):
        KeyChain(ns, np.zeros(MAX_CHAIN_TOKENS + 1, np.uint32))
    with pytest.raises(KeyChainError, match="extra"):
        KeyChain(ns, extra=bytes(5000))
    for bad in (0, 15, 1025):
        with pytest.raises(KeyChainError, match="16 to 1024"):
            Namespace("tenant", LAYOUT, bad)
    with pytest.raises(KeyChainError, match="tenant"):
        Namespace("", LAYOUT, STEP)
    with pytest.raises(KeyChainError, match="tenant"):
        Namespace("x" * 300, LAYOUT, STEP)
    with pytest.raises(KeyChainError, match="salt"):
        Namespace("t", LAYOUT, STEP, bytes(65))
    chain = KeyChain(ns, range(20))
    for bad in (0, -1, 21):
        with pytest.raises(KeyChainError, match="position"):
            chain.key_at(bad)


def test_an_opaque_chain_may_be_given_keys_off_the_grid():
    ns = Namespace("t", LAYOUTS["hybrid"], 16)
    real = KeyChain(ns, range(75))
    chain = KeyChain.of_hashes(ns, real.blocks, 75, {70: real.key_at(70)})
    assert chain.opaque
    assert chain.key_at(70) == real.key_at(70)
    assert (chain.names(64), chain.names(70), chain.names(71), chain.names(80)) == (True, True, False, False)
    assert (real.names(71), real.names(76), real.names(0)) == (True, False, False)
    with pytest.raises(KeyChainError):
        chain.key_at(71)
    for tails in ({64: b"k"}, {76: b"k"}, {70: b""}, {70: b"k" * 65}, {-1: b"k"}):
        with pytest.raises(KeyChainError, match="off the grid"):
            KeyChain.of_hashes(ns, real.blocks, 75, tails)
    (again,) = [run(chain_steps(ns, chain_to_wire(chain), stores=True))]
    assert again is not None
    assert (again.blocks, again.tails, again.tokens) == (chain.blocks, chain.tails, 75)
    for tails in ([70], [[70]], [["70", b"k"]], [[70, "k"]], {70: b"k"}):
        with pytest.raises(ProtocolError):
            run(chain_steps(ns, {**chain_to_wire(chain), "tails": tails}))
