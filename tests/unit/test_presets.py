"""Presets: the geometry the public configs give, the fit to the paper, and bad preset files."""

from __future__ import annotations

import pytest

from kvtransport import presets
from kvtransport.errors import ConfigError, ParallelismError
from kvtransport.layout import GroupKind

MIB = 1 << 20
K = 1_024

# name -> (layers per group, bytes per token of full attention, bytes of recurrent state), worked out by hand.
EXPECTED = {
    "kimi-linear-48b": ({"mla": 7, "kda": 20}, 7 * 576 * 2, 20 * (32 * 128 * 128 * 4 + 3 * 4096 * 3 * 2)),
    "mimo-v2-flash": ({"full": 9, "swa": 39}, 9 * 4 * (192 + 128) * 2, 0),
    "minimax-m2.5": ({"full": 62}, 62 * 8 * 256 * 2, 0),
    "prfaas-1t": ({"mla": 15, "kda": 42}, 15 * 576 * 2, 42 * (64 * 128 * 128 * 4 + 3 * 8192 * 3 * 2)),
    "qwen3-235b": ({"full": 94}, 94 * 4 * 256 * 2, 0),
    "qwen3.5-397b": ({"full": 15, "gdn": 45}, 15 * 2 * 512 * 2, 45 * (64 * 128 * 128 * 4 + 12_288 * 3 * 2)),
    "ring-2.5-1t": ({"mla": 10, "lightning": 70}, 10 * 576 * 2, 70 * 64 * 128 * 128 * 4),
}

GOOD = """
title = "t"
model = "m"
source = "s"
dtype = "bfloat16"
num_hidden_layers = 4
attention = "a"
[[groups]]
name = "full"
rule = "gqa"
layers = { every = 2 }
num_key_value_heads = 2
head_dim = 8
[[groups]]
name = "lin"
rule = "mamba2"
layers = { rest = true }
mamba_n_heads = 4
mamba_d_head = 8
mamba_d_state = 16
mamba_n_groups = 1
mamba_d_conv = 4
[published]
source = "s"
kv_throughput_gbps = [[1024, 1.0]]
"""


def test_names_are_the_models_of_the_paper() -> None:
    assert presets.names() == sorted(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_geometry(name: str) -> None:
    layers, per_token, state = EXPECTED[name]
    layout = presets.load(name)
    assert {g.name: len(g.layers) for g in layout.groups} == layers
    assert layout.layers == tuple(range(sum(layers.values())))
    assert sum(g.unit_bytes for g in layout.groups if g.kind is GroupKind.FULL) == per_token
    assert sum(g.unit_bytes for g in layout.groups if g.kind is GroupKind.RECURRENT) == state
    grown = layout.bytes_at(128 * K) - layout.bytes_at(32 * K)
    assert grown == per_token * 96 * K
    assert layout.source
    assert layout.source == presets.preset(name).source


def test_kimi_linear_layers_are_those_of_the_config() -> None:
    layout = presets.load("kimi-linear-48b")
    mla = layout.groups[layout.group_index("mla")]
    assert mla.layers == (3, 7, 11, 15, 19, 23, 26)
    assert [(t.name, t.shape, t.dtype, t.shard_axis) for t in mla.tensors] == [
        ("kv_c", (512,), "bfloat16", None),
        ("k_pe", (64,), "bfloat16", None),
    ]
    kda = layout.groups[layout.group_index("kda")]
    assert [(t.name, t.shape, t.dtype) for t in kda.tensors] == [
        ("state", (32, 128, 128), "float32"),
        ("conv_q", (4096, 3), "bfloat16"),
        ("conv_k", (4096, 3), "bfloat16"),
        ("conv_v", (4096, 3), "bfloat16"),
    ]


def test_mimo_window_is_128_earlier_tokens() -> None:
    layout = presets.load("mimo-v2-flash")
    swa = layout.groups[layout.group_index("swa")]
    assert swa.kind is GroupKind.SLIDING
    assert swa.tokens_needed(32 * K) == 128
    assert [t.shape for t in swa.tensors] == [(8, 192), (8, 128)]
    assert swa.bytes_at(32 * K) == 39 * 128 * 8 * 320 * 2


def test_prfaas_1t_meets_the_papers_four_sizes_within_3_percent() -> None:
    layout = presets.load("prfaas-1t")
    published = presets.preset("prfaas-1t").published.kvcache_mib
    assert [(n, mib) for n, mib in published] == [(K, 190.8), (8 * K, 308.9), (32 * K, 701.3), (128 * K, 2316.3)]
    for tokens, mib in published:
        assert layout.bytes_at(tokens) / MIB == pytest.approx(mib, rel=0.03)


def test_profiles_are_the_papers_table() -> None:
    for name in presets.names():
        assert [tokens for tokens, _ in presets.profile(name)] == [K, 8 * K, 32 * K, 128 * K]
    assert presets.profile("minimax-m2.5") == [(K, 4.94), (8 * K, 32.87), (32 * K, 59.93), (128 * K, 47.82)]
    # The paper's three numbers per length agree among themselves: size, latency and throughput of the case study.
    published = presets.preset("prfaas-1t").published
    for (_, mib), (_, seconds), (_, gbps) in zip(
        published.kvcache_mib, published.prefill_seconds, published.kv_throughput_gbps, strict=True
    ):
        assert mib * MIB * 8 / seconds / 1e9 == pytest.approx(gbps, rel=0.02)


def test_tensor_parallel_shards_heads_and_keeps_latents_whole() -> None:
    whole = presets.load("kimi-linear-48b")
    ranks = [presets.load("kimi-linear-48b", tp_size=4, tp_rank=r) for r in range(4)]
    assert all(r.group_bytes(K)["mla"] == whole.group_bytes(K)["mla"] for r in ranks)
    assert sum(r.group_bytes(K)["kda"] for r in ranks) == whole.group_bytes(K)["kda"]
    assert len({r.fingerprint() for r in ranks}) == 1
    assert ranks[0].fingerprint() != whole.fingerprint()


def test_more_ranks_than_kv_heads_is_refused_by_name() -> None:
    with pytest.raises(ParallelismError, match=r"'k'.*does not divide by tensor parallelism 8"):
        presets.load("qwen3.5-397b", tp_size=8)


@pytest.mark.parametrize("bad", ["kimi", "", "../pyproject", "kimi-linear-48b.toml"])
def test_unknown_name_lists_the_known(bad: str) -> None:
    with pytest.raises(ConfigError, match=r"no preset.*kimi-linear-48b, mimo-v2-flash"):
        presets.load(bad)
    with pytest.raises(ConfigError, match="known presets"):
        presets.profile(bad)


def test_mamba2_rule_and_layer_pattern() -> None:
    layout = presets.layout_of(presets.parse(GOOD))
    assert [g.layers for g in layout.groups] == [(1, 3), (0, 2)]
    shapes = {t.name: (t.shape, t.shard_axis) for t in layout.groups[1].tensors}
    assert shapes == {
        "state": ((4, 8, 16), 0),
        "conv_x": ((32, 3), 0),
        "conv_b": ((16, 3), None),
        "conv_c": ((16, 3), None),
    }
    grouped = presets.mamba2_tensors(8, 8, 16, 2, 4, "bfloat16")
    assert [t.shard_axis for t in grouped] == [0, 0, 0, 0]
    assert grouped[2].shape == (32, 3)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("head_dim = 8\n", "head_dim = 8\nheads = 2\n", "unknown field `heads`"),
        ("num_key_value_heads = 2\n", "", "missing required field `num_key_value_heads`"),
        ('rule = "gqa"', 'rule = "mqa"', "mqa"),
        ("num_hidden_layers = 4", 'num_hidden_layers = "4"', "num_hidden_layers"),
        ("title = ", "title ", "is not valid"),
    ],
)
def test_malformed_preset_names_the_field(old: str, new: str, says: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError, match=says):
        presets.parse(GOOD.replace(old, new))


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ("{ every = 2, rest = true }", "exactly one way"),
        ("{}", "exactly one way"),
        ("{ every = 0 }", "means nothing"),
        ("{ listed = [1, 7] }", r"layers \[7\] are left out or do not exist"),
        ("{ listed_from_1 = [0, 2] }", r"layers \[-1\] are left out or do not exist"),
    ],
)
def test_bad_layer_patterns_are_refused(layers: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        presets.layout_of(presets.parse(GOOD.replace("{ every = 2 }", layers)))


def test_layers_left_out_or_covered_twice_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"layers \[0\] are left out"):
        presets.layout_of(presets.parse(GOOD.replace("{ rest = true }", "{ listed = [2] }")))
    with pytest.raises(ConfigError, match=r"group 'lin': layers \[1\] are in another group too"):
        presets.layout_of(presets.parse(GOOD.replace("{ rest = true }", "{ listed = [0, 1, 2] }")))
