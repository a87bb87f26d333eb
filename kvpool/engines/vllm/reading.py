"""vLLM's own descriptions of its caches, read into ours: the rules of its groups, the geometry and memory of its tensors.

Works on the objects as they are, by the names of their classes and attributes, and imports nothing of vLLM: :mod:`.compat` checks
that the names are there. What cannot be transferred is refused here, by name, before an engine serves anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvtransport.errors import ConfigError, LayoutError, ParallelismError
from kvtransport.layout import DTYPE_BYTES, GroupKind

from .config import ConnectorConfig
from .geometry import Geometry, LayerCache, attention_tensors, state_tensors
from .groups import GroupRule
from .pages import page_shape
from .worker import Place

_KINDS: Mapping[str, GroupKind] = {
    "MambaSpec": GroupKind.RECURRENT,
    "SlidingWindowSpec": GroupKind.SLIDING,
    "FullAttentionSpec": GroupKind.FULL,
}
_REFUSED: Mapping[str, str] = {
    "ChunkedLocalAttentionSpec": "chunked local attention; with --disable-hybrid-kv-cache-manager it is cached as full attention",
    "CrossAttentionSpec": "cross attention",
    "EncoderOnlyAttentionSpec": "encoder attention",
    "CircularBufferSpec": "a ring buffer of uncompressed keys",
    "HiddenStateCacheSpec": "hidden states",
    "RSWASpec": "reference sliding windows",
    "SinkFullAttentionSpec": "attention sinks kept apart",
}

SPECS: tuple[str, ...] = (*_KINDS, "UniformTypeKVCacheSpecs")
"""Classes of vllm.v1.kv_cache_interface that this module knows how to read."""


def place_of(vllm_config: Any, tp_rank: int = 0) -> Place:
    """Which worker of which engine this is. Raises ParallelismError for parallelism that cannot be paired one to one."""
    parallel = vllm_config.parallel_config
    for name in ("pipeline_parallel_size", "prefill_context_parallel_size", "decode_context_parallel_size"):
        if (size := getattr(parallel, name, 1)) > 1:
            raise ParallelismError(
                f"{name} is {size}; only tensor parallelism (the same on both sides, rank r with rank r) and data parallelism are supported"
            )
    return Place(tp_rank, parallel.tensor_parallel_size, parallel.data_parallel_index)


def rules_of(kv_cache_config: Any) -> tuple[GroupRule, ...]:
    """One rule per cache group of the engine. Raises LayoutError naming a kind of cache that cannot be transferred."""
    return tuple(_rule(group) for group in kv_cache_config.kv_cache_groups)


def geometry_of(
    vllm_config: Any,
    kv_cache_config: Any,
    kv_caches: Mapping[str, Any],
    config: ConnectorConfig,
    place: Place,
    *,
    version: str,
) -> Geometry:
    """The geometry of the tensors that vLLM registered. Raises LayoutError naming the layer that does not fit.

    ``version``: vLLM's; sides with different ones refuse each other, since the inside of a page is vLLM's business.
    """
    rules = rules_of(kv_cache_config)
    backends = _backends(vllm_config, kv_caches)
    layers = []
    for number, group in enumerate(kv_cache_config.kv_cache_groups):
        if not rules[number].transfers:
            continue
        for name in group.layer_names:
            if name not in kv_caches:
                raise LayoutError(f"vLLM registered no cache tensor for layer {name}")
            try:
                layers.append(_layer(name, number, group, rules[number], kv_caches[name], kv_cache_config.num_blocks))
            except LayoutError as error:
                raise LayoutError(f"layer {name}: {error.message}") from error
    model = config.model_id or _last_component(vllm_config.model_config.model)
    identity = {
        "vLLM": version,
        "attention backends": ", ".join(sorted(set(backends.values()))) or "none",
        "kv cache dtype": str(vllm_config.cache_config.cache_dtype),
    }
    return Geometry(
        model, config.revision, layers, rules, tp_size=place.tp_size, tp_rank=place.tp_rank, identity=identity
    )


def storage_of(kv_caches: Mapping[str, Any]) -> Any:
    """The one piece of memory that all cache tensors are views of, as a flat uint8 tensor. Raises LayoutError when there are several."""
    import torch

    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in kv_caches.values()}
    if len(storages) != 1:
        raise LayoutError(f"the engine's caches lie in {len(storages)} pieces of memory; one is expected")
    (storage,) = storages.values()
    device = next(iter(kv_caches.values())).device
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


# -- groups ----------------------------------------------------------------------------------


def _specs(spec: Any) -> Iterator[Any]:
    """The spec of each layer that a group's spec stands for."""
    inner = getattr(spec, "kv_cache_specs", None)
    yield from inner.values() if inner is not None else (spec,)


def _rule(group: Any) -> GroupRule:
    spec = group.kv_cache_spec
    if not getattr(group, "enable_kv_transfer", True):
        return GroupRule(GroupKind.FULL, spec.block_size, transfers=False)
    rules = {_layer_rule(one) for one in _specs(spec)}
    if len(rules) != 1:
        raise LayoutError(f"a group of {len(group.layer_names)} layers is cached by several rules: {rules}")
    return rules.pop()


def _layer_rule(spec: Any) -> GroupRule:
    names = [cls.__name__ for cls in type(spec).__mro__]
    for name in names:
        if name in _REFUSED:
            raise LayoutError(f"caches of {_REFUSED[name]} ({name}) are not supported")
    kind = next((_KINDS[name] for name in names if name in _KINDS), None)
    if kind is None:
        raise LayoutError(f"caches of kind {names[0]} are not known to this version of kvtransport")
    if kind is GroupKind.RECURRENT:
        if spec.mamba_cache_mode == "all":
            raise LayoutError(
                "mamba_cache_mode 'all' keeps a state per block, and only the last one travels: use 'align' (or 'none')"
            )
        return GroupRule(kind, spec.block_size, spare_blocks=spec.num_speculative_blocks)
    return GroupRule(kind, spec.block_size, spec.sliding_window if kind is GroupKind.SLIDING else None)


# -- layers ----------------------------------------------------------------------------------


def _layer(name: str, number: int, group: Any, rule: GroupRule, tensor: Any, blocks: int) -> LayerCache:
    spec = group.kv_cache_spec
    spec = getattr(spec, "kv_cache_specs", {}).get(name, spec)
    size = tensor.element_size()
    pages = page_shape(tensor.shape, tensor.stride(), size, tensor.storage_offset() * size, blocks)
    if rule.kind is GroupKind.RECURRENT:
        tensors = state_tensors(pages, spec.shapes, [_dtype(dtype) for dtype in spec.dtypes])
    else:
        tensors = attention_tensors(pages, rule.block_tokens, _dtype(tensor.dtype))
    return LayerCache(name, number, rule, pages, tensors)


def _dtype(dtype: Any) -> str:
    """The layout's name of a torch dtype; bytes for what it has no name for."""
    name = str(dtype).removeprefix("torch.")
    return name if name in DTYPE_BYTES else "uint8"


def _backends(vllm_config: Any, kv_caches: Mapping[str, Any]) -> dict[str, str]:
    """Attention backend by layer, with the instruction set it packs pages for, where it says so (vLLM on CPUs)."""
    found = {}
    context = vllm_config.compilation_config.static_forward_context
    for name in kv_caches:
        layer = context.get(name)
        if layer is None or not hasattr(layer, "get_attn_backend"):
            continue
        isa = getattr(layer, "isa", None)
        found[name] = layer.get_attn_backend().get_name() + (f" ({isa})" if isinstance(isa, str) else "")
    return found


def _last_component(model: str) -> str:
    name = model.rstrip("/").rsplit("/", 1)[-1]
    if not name:
        raise ConfigError(f"the model {model!r} has no name: set model_id in kv_connector_extra_config")
    return name
