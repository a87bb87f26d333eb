"""Cache geometry of a transformers model: which bytes of its ``DynamicCache`` layers make up a layout.

Part of :mod:`kvpool.engines.transformers`, which has the public names and says what the bytes look like.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kvtransport.errors import ConfigError, LayoutError
from kvtransport.layout import CacheGroup, CacheLayout, GroupKind, TensorSpec

if TYPE_CHECKING:
    import torch

GRID = 64
"""Tokens: chunk ends, checkpoints and resume positions are multiples of it: prefill split there is exact."""

# The stock cache classes, by the rule their attention part is cached by. A class that is not named here may
# keep anything (compressed entries, index tables): it is refused by name rather than restored in part.
_ATTENTION: Mapping[str, GroupKind | None] = {
    "DynamicLayer": GroupKind.FULL,
    "DynamicIndexedLayer": GroupKind.FULL,
    "DynamicSlidingWindowLayer": GroupKind.SLIDING,
    "LinearAttentionLayer": None,
    "LinearAttentionAndFullAttentionLayer": GroupKind.FULL,
    "LinearAttentionAndSlidingWindowAttentionLayer": GroupKind.SLIDING,
    "DummyLayer": None,
}
STATES = {"conv": "conv_states", "recurrent": "recurrent_states"}


def require(module: str) -> Any:
    """Import ``torch`` or ``transformers``; raises ConfigError naming the extra where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"the transformers adapter needs {module}, which cannot be imported ({error}): "
            "pip install 'kvtransport[engines]'"
        ) from error


def layout_of(
    model_or_config: Any, *, block_tokens: int = GRID, name: str | None = None, revision: str | None = None
) -> CacheLayout:
    """The cache layout of a causal language model, or of a config (then probed without weights, in ``config.dtype``).

    ``name`` defaults to the model type. ``revision`` identifies the weights: by default the hub's commit, else
    :func:`weights_digest` (which reads every weight once), else, for a config, a digest of the config: give
    both sides the same. ``block_tokens`` must fit :data:`GRID`, or no checkpoint would lie on a block boundary.

    Raises LayoutError for unfitting blocks and for models whose cache this adapter cannot carry whole: cache layers
    that are not transformers' stock ones, a cache of the model's own, state kept in the modules.
    """
    if block_tokens < 1 or (GRID % block_tokens and block_tokens % GRID):
        raise LayoutError(
            f"blocks of {block_tokens} tokens: must divide {GRID} or be a multiple of it, where states are exact"
        )
    torch = require("torch")
    if isinstance(model_or_config, torch.nn.Module):
        model, config = model_or_config, model_or_config.config
        fallback = weights_digest
    else:
        config = model_or_config
        auto = require("transformers").AutoModelForCausalLM
        with torch.device("meta"):
            model = auto.from_config(config, dtype=config.dtype or torch.float32).eval()
        fallback = _config_digest
    if revision is None:
        revision = getattr(config, "_commit_hash", None) or fallback(model)
    text = config.get_text_config(decoder=True)
    heads = int(getattr(text, "num_key_value_heads", None) or 1)
    cache = new_cache(model)
    with torch.no_grad():
        ids = torch.zeros((1, 2), dtype=torch.long, device=device_of(model))
        try:
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise LayoutError(f"{type(model).__name__} does not run with a DynamicCache: {error}") from error
    # Layers with the same rule, window and tensors form a group; the order is by rule, then by first layer.
    members: dict[tuple[GroupKind, int | None, tuple[TensorSpec, ...]], list[int]] = {}
    for index, layer in enumerate(cache.layers):
        found = list(_layer_groups(index, layer, heads))
        if not found and type(layer).__name__ != "DummyLayer":
            raise LayoutError(
                f"layer {index} of {type(model).__name__} kept nothing in its cache: it has a state "
                "elsewhere (in the module, as RecurrentGemma does), which cannot be transferred"
            )
        for key in found:
            members.setdefault(key, []).append(index)
    order = list(GroupKind)
    keys = sorted(members, key=lambda key: (order.index(key[0]), members[key][0]))
    count = {kind: sum(key[0] is kind for key in keys) for kind in order}
    seen = dict.fromkeys(order, 0)
    groups = []
    for kind, window, specs in keys:
        label = str(kind) if count[kind] == 1 else f"{kind}.{seen[kind]}"
        seen[kind] += 1
        groups.append(CacheGroup(label, kind, tuple(members[kind, window, specs]), specs, window))
    return CacheLayout(name or text.model_type, tuple(groups), revision, source=f"probe of {type(model).__name__}")


def weights_digest(model: Any) -> str:
    """Hex SHA-256 over names, dtypes, shapes and bytes of all weights and persistent buffers."""
    torch = require("torch")
    digest = hashlib.sha256(model.config.model_type.encode())
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"\0{key}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _config_digest(model: Any) -> str:
    return "config-" + hashlib.sha256(model.config.to_json_string(use_diff=False).encode()).hexdigest()


def _layer_groups(
    index: int, layer: Any, kv_heads: int
) -> Iterator[tuple[GroupKind, int | None, tuple[TensorSpec, ...]]]:
    """The (rule, window, tensors) one initialised cache layer contributes: none, one or two."""
    if type(layer).__name__ not in _ATTENTION:
        raise LayoutError(
            f"layer {index} keeps its cache in a {type(layer).__name__}, which the transformers adapter cannot "
            f"transfer; it knows {', '.join(_ATTENTION)}"
        )
    kind = _ATTENTION[type(layer).__name__]
    if kind is not None and layer.keys is not None and layer.is_initialized:
        if getattr(layer, "indexer_position_ids", None) is not None:
            raise LayoutError(f"layer {index} keeps indexer positions, which the adapter cannot transfer yet")
        specs = []
        for name, tensor in token_tensors(layer).items():
            # The head axis is sharded by tensor parallelism unless there is one head for all (an MLA latent).
            shared = tensor.dim() == 3 or tensor.shape[1] != kv_heads or kv_heads == 1
            specs.append(TensorSpec(name, _dtype_name(tensor), _token_shape(tensor), None if shared else 0))
        yield kind, (int(layer.sliding_window) if kind is GroupKind.SLIDING else None), tuple(specs)
    states = state_tensors(layer)
    if states:
        yield (
            GroupKind.RECURRENT,
            None,
            tuple(TensorSpec(name, _dtype_name(t), tuple(t.shape[1:])) for name, t in states.items()),
        )


def token_tensors(layer: Any) -> dict[str, torch.Tensor]:
    """The per-token tensors of a layer: [1, heads, tokens, dim], or [1, tokens, dim] for an indexer's keys."""
    found = {"keys": layer.keys, "values": layer.values}
    if getattr(layer, "indexer_keys", None) is not None:
        found["indexer_keys"] = layer.indexer_keys
    return found


def _token_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return (int(tensor.shape[1]), int(tensor.shape[3])) if tensor.dim() == 4 else (int(tensor.shape[2]),)


def state_tensors(layer: Any) -> dict[str, torch.Tensor]:
    """The initialised states of a layer, named ``conv.<i>`` and ``recurrent.<i>``."""
    found = {}
    for index in range(getattr(layer, "number_of_states", 0)):
        for kind, attribute in STATES.items():
            if getattr(layer, f"is_{attribute}_initialized")[index]:
                found[f"{kind}.{index}"] = getattr(layer, attribute)[index]
    return found


def new_cache(model: Any) -> Any:
    return require("transformers").DynamicCache(config=model.config)


def device_of(*modules: Any) -> Any:
    """The device of the first module that has weights."""
    return next(parameter.device for module in modules for parameter in module.parameters())


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
