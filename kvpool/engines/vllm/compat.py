"""Is the installed vLLM the one this connector was written for? Its connector interface is experimental and changes.

Compared are the names that the connector imports and reads, and its methods with those of vLLM's base classes: a method that vLLM
calls with other arguments, a new abstract one, one that vLLM does not have any more. Each difference is one line that names it.
:func:`require` runs when an engine starts, and a test runs :func:`differences` and :func:`new_hooks` against the installed version.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

from kvtransport.errors import ConfigError

TESTED = "0.32.0"
"""The version of vLLM that the engine tests run."""

_V1 = "vllm.distributed.kv_transfer.kv_connector.v1"

READ: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    f"{_V1}.base": {
        "KVConnectorBase_V1": (),
        "KVConnectorMetadata": (),
        "KVConnectorRole": ("SCHEDULER", "WORKER"),
        "KVConnectorTransferResults": ("finished_sending", "finished_recving", "failed_recving"),
        "SupportsHMA": (),
    },
    f"{_V1}.metrics": {
        "KVConnectorStats": ("data", "reset", "aggregate", "reduce", "is_empty"),
        "KVConnectorPromMetrics": ("observe",),
    },
    "vllm.v1.metrics.utils": {"create_metric_per_engine": ()},
    "vllm.v1.metrics.cache_hit_source": {"CacheHitSource": ("P2P",)},
    "vllm.v1.core.sched.output": {
        "SchedulerOutput": ("num_scheduled_tokens", "preempted_req_ids", "kv_connector_block_state"),
        "KVConnectorBlockState": ("get_block_ids",),
    },
    "vllm.v1.core.kv_cache_manager": {"KVCacheBlocks": ("get_block_ids",)},
    "vllm.v1.outputs": {"KVConnectorOutput": ("finished_recving",)},
    "vllm.v1.kv_cache_interface": {
        "KVCacheConfig": ("num_blocks", "kv_cache_groups", "transfer_group_ids"),
        "KVCacheGroupSpec": ("layer_names", "kv_cache_spec", "enable_kv_transfer"),
        "FullAttentionSpec": ("block_size",),
        "SlidingWindowSpec": ("block_size", "sliding_window"),
        "MambaSpec": ("block_size", "shapes", "dtypes", "num_speculative_blocks", "mamba_cache_mode"),
        "UniformTypeKVCacheSpecs": ("kv_cache_specs",),
    },
    "vllm.config.kv_transfer": {
        "KVTransferConfig": ("kv_connector_extra_config", "is_kv_producer", "is_kv_consumer", "kv_load_failure_policy")
    },
    "vllm.config.parallel": {
        "ParallelConfig": (
            "tensor_parallel_size",
            "data_parallel_index",
            "pipeline_parallel_size",
            "prefill_context_parallel_size",
            "decode_context_parallel_size",
        )
    },
    "vllm.distributed.parallel_state": {"get_tensor_model_parallel_rank": ()},
}
"""Module -> name -> attributes: everything of vLLM that the connector imports or reads by name."""

REQUEST: tuple[str, ...] = (
    "request_id",
    "num_prompt_tokens",
    "num_computed_tokens",
    "max_tokens",
    "prompt_token_ids",
    "prompt_embeds",
    "prompt_is_token_ids",
    "_all_token_ids",
    "kv_transfer_params",
    "status",
)
"""Attributes of vllm.v1.request.Request, which are set in its constructor."""

HOOKS: frozenset[str] = frozenset(
    {
        "bind_connector_metadata",
        "bind_gpu_block_pool",
        "bind_kv_cache_manager",
        "build_connector_meta",
        "build_connector_worker_meta",
        "build_kv_connector_stats",
        "build_prom_metrics",
        "clear_connector_metadata",
        "finish_forward",
        "get_block_ids_with_load_errors",
        "get_external_cache_hit_sources",
        "get_finished",
        "get_finished_count",
        "get_handshake_metadata",
        "get_kv_connector_kv_cache_events",
        "get_kv_connector_stats",
        "get_loaded_kv_cache_group_ids",
        "get_mem_pool_context",
        "get_num_new_matched_tokens",
        "get_required_kvcache_layout",
        "get_transfer_results",
        "handle_preemptions",
        "has_connector_metadata",
        "has_pending_block_frees",
        "has_pending_push_work",
        "on_new_request",
        "register_finished_partial_tail",
        "register_kv_caches",
        "request_finished",
        "request_finished_all_groups",
        "requires_kv_delivery",
        "requires_piecewise_for_cudagraph",
        "reset_cache",
        "reset_capture_state",
        "role",
        "save_kv_layer",
        "set_host_xfer_buffer_ops",
        "set_xfer_handshake_metadata",
        "set_xfer_handshake_metadata_pp_aware",
        "shutdown",
        "start_load_kv",
        "supports_divergent_local_hybrid_hits",
        "take_events",
        "update_connector_output",
        "update_state_after_alloc",
        "wait_for_layer_load",
        "wait_for_save",
    }
)
"""Public members of the base classes that were looked at: one that is not here is new, and may matter."""


def missing(load: Callable[[str], ModuleType] = importlib.import_module) -> list[str]:
    """Names of vLLM that are not there any more."""
    found = []
    for path, names in READ.items():
        try:
            module = load(path)
        except ImportError as error:
            found.append(f"{path} cannot be imported: {error}")
            continue
        for name, attributes in names.items():
            thing = getattr(module, name, None)
            if thing is None:
                found.append(f"{path} has no {name}")
                continue
            has = _members(thing)
            found += [f"{path}.{name} has no {attribute}" for attribute in attributes if attribute not in has]
    return found


def missing_of_request(request: type) -> list[str]:
    """Attributes that ``request``'s constructor does not set."""
    source = inspect.getsource(request.__init__)  # type: ignore[misc]
    name = f"{request.__module__}.{request.__qualname__}"
    return [f"{name} sets no {attribute}" for attribute in REQUEST if f"self.{attribute}" not in source]


def differences(connector: type, bases: Iterable[type]) -> list[str]:
    """How the methods of ``connector`` do not fit what vLLM calls; ``bases``: vLLM's classes that it derives from."""
    found = [
        f"{name} is abstract in vLLM and not implemented here"
        for name in sorted(getattr(connector, "__abstractmethods__", ()))
    ]
    theirs: dict[str, tuple[type, Any]] = {}
    for base in bases:
        for name in vars(base):
            theirs.setdefault(name, (base, inspect.getattr_static(base, name)))
    for name in sorted(vars(connector)):
        if name.startswith("_") and name != "__init__":
            continue
        if name not in theirs:
            found.append(f"{name} is not a member of vLLM's base classes any more: it is never called")
            continue
        base, member = theirs[name]
        for line in _call_differences(inspect.getattr_static(connector, name), member):
            found.append(f"{base.__name__}.{name}: {line}")
    return found


def new_hooks(bases: Iterable[type]) -> list[str]:
    """Public members of vLLM's base classes that nobody has looked at yet."""
    return sorted({name for base in bases for name in vars(base) if not name.startswith("_")} - HOOKS)


def require(found: list[str], version: str) -> None:
    """Raises ConfigError naming every difference, when there are any."""
    if found:
        raise ConfigError(
            f"KvTransportConnector was written for vLLM {TESTED} and does not fit the installed {version}: "
            + "; ".join(found)
            + f". Install vLLM {TESTED}, or a version of kvtransport that names yours in docs/engines.md"
        )


def _members(thing: Any) -> set[str]:
    """Attributes of a class, fields without a default included."""
    names = set(dir(thing))
    for cls in getattr(thing, "__mro__", ()):
        names |= set(vars(cls).get("__annotations__", ()))
    return names


def _call_differences(ours: Any, theirs: Any) -> list[str]:
    """What of a call that fits ``theirs`` does not fit ``ours``."""
    if _kind(ours) != _kind(theirs):
        return [f"is {_kind(theirs)} in vLLM, {_kind(ours)} here"]
    if _kind(ours) == "a property":
        return []
    if not callable(_function(ours)) or not callable(_function(theirs)):
        return []
    own = inspect.signature(_function(ours)).parameters
    wanted = inspect.signature(_function(theirs)).parameters
    kinds = inspect.Parameter
    takes_more = any(p.kind is kinds.VAR_KEYWORD for p in own.values())
    found = []
    for name, parameter in wanted.items():
        if parameter.kind in (kinds.VAR_KEYWORD, kinds.VAR_POSITIONAL):
            if not any(p.kind is parameter.kind for p in own.values()):
                stars = "**" if parameter.kind is kinds.VAR_KEYWORD else "*"
                found.append(f"takes {stars}{name} in vLLM, not here")
        elif name not in own and not (takes_more and parameter.kind is kinds.KEYWORD_ONLY):
            found.append(f"has a parameter {name} in vLLM, not here")
    found += [
        f"needs a parameter {name} here that vLLM does not pass"
        for name, parameter in own.items()
        if name not in wanted
        and parameter.default is kinds.empty
        and parameter.kind not in (kinds.VAR_KEYWORD, kinds.VAR_POSITIONAL)
    ]
    shared = [name for name in wanted if name in own and name not in ("self", "cls")]
    if not found and [name for name in own if name in shared] != shared:
        found.append(f"takes {', '.join(shared)} in this order in vLLM")
    return found


def _kind(member: Any) -> str:
    for cls, kind in ((property, "a property"), (classmethod, "a class method"), (staticmethod, "a static method")):
        if isinstance(member, cls):
            return kind
    return "a method"


def _function(member: Any) -> Any:
    return getattr(member, "__func__", member)
