"""The paper's models as data: cache geometry from public configs, and the throughput the paper measured.

A preset is a TOML file in ``kvtransport/presets/``. It holds the values of the model's public ``config.json``
under their names there, and says where they come from, so that a reader can hold one beside the other. What
the cache of each kind of layer looks like is derived here, one small pure function per cache rule.

Conventions: KV is stored in the preset's ``dtype`` (bfloat16). Recurrent state is float32 also in bfloat16
models. A short convolution of kernel width k keeps the last k - 1 inputs of each channel, which is what the
next token needs. MLA stores one latent (``kv_c``) and one rotary key (``k_pe``) per token for all heads, the
same on every tensor-parallel rank.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import TypeAlias

import msgspec

from .errors import ConfigError
from .layout import CacheGroup, CacheLayout, GroupKind, TensorSpec

Tensors: TypeAlias = tuple[TensorSpec, ...]


class _Layers(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which layers a group covers, said in the way the public config says it; exactly one field is set."""

    every: int | None = None
    """The last layer of every run of this many: indices every-1, 2*every-1, ..."""
    listed: tuple[int, ...] | None = None
    """Indices counted from 0."""
    listed_from_1: tuple[int, ...] | None = None
    """Indices counted from 1."""
    rest: bool = False
    """All layers no other group covers."""


class _Group(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="rule"):
    name: str
    layers: _Layers

    def tensors(self, dtype: str) -> Tensors:
        raise NotImplementedError

    def kind(self) -> GroupKind:
        return GroupKind.RECURRENT

    def window(self) -> int | None:
        return None


class Gqa(_Group, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="gqa"):
    """Full attention with grouped queries: K and V of every KV head, per token."""

    num_key_value_heads: int
    head_dim: int
    v_head_dim: int | None = None

    def kind(self) -> GroupKind:
        return GroupKind.FULL

    def tensors(self, dtype: str) -> Tensors:
        return gqa_tensors(self.num_key_value_heads, self.head_dim, self.v_head_dim or self.head_dim, dtype)


class Swa(_Group, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="swa"):
    """Sliding-window attention: as :class:`Gqa`, of the last ``sliding_window`` tokens only."""

    num_key_value_heads: int
    head_dim: int
    sliding_window: int
    v_head_dim: int | None = None
    window_counts_current: bool = True
    """Whether the token that attends is one of the ``sliding_window``; configs differ."""

    def kind(self) -> GroupKind:
        return GroupKind.SLIDING

    def window(self) -> int | None:
        return self.sliding_window if self.window_counts_current else self.sliding_window + 1

    def tensors(self, dtype: str) -> Tensors:
        return gqa_tensors(self.num_key_value_heads, self.head_dim, self.v_head_dim or self.head_dim, dtype)


class Mla(_Group, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="mla"):
    """Multi-head latent attention: a latent and a rotary key per token."""

    kv_lora_rank: int
    qk_rope_head_dim: int

    def kind(self) -> GroupKind:
        return GroupKind.FULL

    def tensors(self, dtype: str) -> Tensors:
        return mla_tensors(self.kv_lora_rank, self.qk_rope_head_dim, dtype)


class Kda(_Group, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="kda"):
    """Kimi Delta Attention: a square state per head and the inputs of the q, k and v convolutions."""

    num_heads: int
    head_dim: int
    short_conv_kernel_size: int

    def tensors(self, dtype: str) -> Tensors:
        return kda_tensors(self.num_heads, self.head_dim, self.short_conv_kernel_size, dtype)


class Gdn(_Group, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="gdn"):
    """Gated DeltaNet: a state per value head; fewer key heads than value heads."""

    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int

    def tensors(self, dtype: str) -> Tensors:
        return gdn_tensors(
            self.linear_num_key_heads,
            self.linear_num_value_heads,
            self.linear_key_head_dim,
            self.linear_value_head_dim,
            self.linear_conv_kernel_dim,
            dtype,
        )


class Lightning(_Group, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="lightning"):
    """Lightning attention: a square state per head, no convolution."""

    num_attention_heads: int
    head_dim: int

    def tensors(self, dtype: str) -> Tensors:
        return lightning_tensors(self.num_attention_heads, self.head_dim)


class Mamba2(_Group, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="mamba2"):
    """Mamba-2: an SSM state per head and the inputs of the convolution over x, B and C."""

    mamba_n_heads: int
    mamba_d_head: int
    mamba_d_state: int
    mamba_n_groups: int
    mamba_d_conv: int

    def tensors(self, dtype: str) -> Tensors:
        return mamba2_tensors(
            self.mamba_n_heads, self.mamba_d_head, self.mamba_d_state, self.mamba_n_groups, self.mamba_d_conv, dtype
        )


def gqa_tensors(heads: int, k_dim: int, v_dim: int, dtype: str) -> Tensors:
    """K (heads, k_dim) and V (heads, v_dim) per token, sharded by head."""
    return TensorSpec("k", dtype, (heads, k_dim), 0), TensorSpec("v", dtype, (heads, v_dim), 0)


def mla_tensors(kv_lora_rank: int, rope_dim: int, dtype: str) -> Tensors:
    """The latent and the rotary key per token. Their widths differ, and both are replicated."""
    return TensorSpec("kv_c", dtype, (kv_lora_rank,)), TensorSpec("k_pe", dtype, (rope_dim,))


def kda_tensors(heads: int, dim: int, kernel: int, dtype: str) -> Tensors:
    """State (heads, dim, dim) float32; convolution inputs of q, k, v, each (heads * dim, kernel - 1)."""
    state = TensorSpec("state", "float32", (heads, dim, dim), 0)
    return state, *(TensorSpec(f"conv_{part}", dtype, (heads * dim, kernel - 1), 0) for part in "qkv")


def gdn_tensors(k_heads: int, v_heads: int, k_dim: int, v_dim: int, kernel: int, dtype: str) -> Tensors:
    """State (v_heads, k_dim, v_dim) float32; convolution inputs of q, k (by key head) and v (by value head).

    Engines keep the three in one buffer; they are three here because a shard takes a part of each.
    """
    return (
        TensorSpec("state", "float32", (v_heads, k_dim, v_dim), 0),
        TensorSpec("conv_q", dtype, (k_heads * k_dim, kernel - 1), 0),
        TensorSpec("conv_k", dtype, (k_heads * k_dim, kernel - 1), 0),
        TensorSpec("conv_v", dtype, (v_heads * v_dim, kernel - 1), 0),
    )


def lightning_tensors(heads: int, dim: int) -> Tensors:
    """State (heads, dim, dim) float32."""
    return (TensorSpec("state", "float32", (heads, dim, dim), 0),)


def mamba2_tensors(heads: int, dim: int, d_state: int, groups: int, kernel: int, dtype: str) -> Tensors:
    """State (heads, dim, d_state) float32; convolution inputs of x, and of B and C by group.

    A single group of B and C serves all heads, so every rank keeps it whole.
    """
    axis = 0 if groups > 1 else None
    return (
        TensorSpec("state", "float32", (heads, dim, d_state), 0),
        TensorSpec("conv_x", dtype, (heads * dim, kernel - 1), 0),
        TensorSpec("conv_b", dtype, (groups * d_state, kernel - 1), axis),
        TensorSpec("conv_c", dtype, (groups * d_state, kernel - 1), axis),
    )


Group: TypeAlias = Gqa | Swa | Mla | Kda | Gdn | Lightning | Mamba2


class Published(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the paper prints about a model; pairs are (tokens, value)."""

    source: str
    kv_throughput_gbps: tuple[tuple[int, float], ...]
    """KV throughput S_kv / T_prefill of one 8-GPU prefill instance, 1e9 bits per second."""
    kvcache_mib: tuple[tuple[int, float], ...] = ()
    """Cache size in MiB (2^20 bytes)."""
    prefill_seconds: tuple[tuple[int, float], ...] = ()


class Preset(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One preset file, validated."""

    title: str
    model: str
    """The public repository of the weights; ``layout.model``."""
    source: str
    """Where each value can be checked."""
    dtype: str
    num_hidden_layers: int
    attention: str
    """The layer pattern in words, such as "KDA:MLA 3:1"."""
    groups: tuple[Group, ...]
    published: Published


def names() -> list[str]:
    """All presets, sorted."""
    files = (resources.files(__package__) / "presets").iterdir()
    return sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml"))


@cache
def preset(name: str) -> Preset:
    """The preset file ``name``. Raises ConfigError when there is none, or when it is malformed."""
    known = names()
    if name not in known:
        raise ConfigError(f"there is no preset {name!r}; known presets: {', '.join(known)}")
    text = (resources.files(__package__) / "presets" / f"{name}.toml").read_text(encoding="utf-8")
    return parse(text, where=f"preset {name!r}")


def parse(text: str, *, where: str = "preset") -> Preset:
    """A preset from TOML. Raises ConfigError, naming the field, for anything malformed."""
    try:
        return msgspec.convert(tomllib.loads(text), Preset)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"{where} is not valid: {error}") from error


def layout_of(spec: Preset, *, tp_size: int = 1, tp_rank: int = 0) -> CacheLayout:
    """The layout of a preset as rank ``tp_rank`` of ``tp_size`` holds it.

    Raises ConfigError when the layer pattern leaves a layer out or covers one twice, ParallelismError when a
    sharded tensor does not divide by ``tp_size``.
    """
    covered = _cover(spec)
    groups = tuple(
        CacheGroup(g.name, g.kind(), covered[g.name], g.tensors(spec.dtype), g.window()) for g in spec.groups
    )
    return CacheLayout(spec.model, groups, tp_size=tp_size, tp_rank=tp_rank, source=spec.source)


def load(name: str, *, tp_size: int = 1, tp_rank: int = 0) -> CacheLayout:
    """The layout of preset ``name``; raises ConfigError when it is unknown. See :func:`layout_of`."""
    return layout_of(preset(name), tp_size=tp_size, tp_rank=tp_rank)


def profile(name: str) -> list[tuple[int, float]]:
    """The paper's KV throughput of a model: (tokens, Gbps) in ascending order; K is 1,024 tokens."""
    return list(preset(name).published.kv_throughput_gbps)


def _cover(spec: Preset) -> dict[str, tuple[int, ...]]:
    every_layer = range(spec.num_hidden_layers)
    covered: dict[str, tuple[int, ...]] = {}
    seen: set[int] = set()
    for group in sorted(spec.groups, key=lambda g: g.layers.rest):
        rule = group.layers
        given = [rule.every is not None, rule.listed is not None, rule.listed_from_1 is not None, rule.rest]
        if sum(given) != 1:
            raise ConfigError(f"{spec.model}, group {group.name!r}: say its layers in exactly one way")
        if rule.every is not None:
            if rule.every < 1:
                raise ConfigError(f"{spec.model}, group {group.name!r}: every {rule.every} layers means nothing")
            layers = tuple(i for i in every_layer if (i + 1) % rule.every == 0)
        elif rule.listed is not None:
            layers = rule.listed
        elif rule.listed_from_1 is not None:
            layers = tuple(i - 1 for i in rule.listed_from_1)
        else:
            layers = tuple(i for i in every_layer if i not in seen)
        twice = seen.intersection(layers)
        if twice:
            raise ConfigError(f"{spec.model}, group {group.name!r}: layers {sorted(twice)} are in another group too")
        seen.update(layers)
        covered[group.name] = layers
    if seen != set(every_layer):
        wrong = sorted(seen.symmetric_difference(every_layer))
        count = spec.num_hidden_layers
        raise ConfigError(f"{spec.model}: {count} layers, but layers {wrong} are left out or do not exist")
    return covered
