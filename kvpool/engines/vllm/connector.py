"""The class that vLLM loads. Nothing is decided here: it hands vLLM's calls to the scheduler's and the worker's side.

Needs vLLM; every other module of this package but :mod:`.stats` works without it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvtransport.errors import ConfigError
from kvtransport.sync import loop_thread

from . import compat
from .config import ConnectorConfig, read_config
from .reading import geometry_of, place_of, rules_of, storage_of
from .scheduler import SchedulerSide
from .stats import ConnectorStats, PromMetrics
from .steps import Step
from .worker import WorkerSide

logger = logging.getLogger("vllm.kvtransport")


@dataclass
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """From the scheduler to every worker, each step."""

    step: Step = field(default_factory=Step)


class KvTransportConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """vLLM makes two: one in the scheduler, one in every worker.

    Raises ConfigError, ParallelismError or LayoutError from the constructor and from :meth:`register_kv_caches`: an engine that cannot
    transfer does not start.
    """

    _cache_hit_source = CacheHitSource.P2P

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        compat.require(compat.differences(type(self), (KVConnectorBase_V1, SupportsHMA)), vllm.__version__)
        transfer = vllm_config.kv_transfer_config
        self._config = read_config(transfer.kv_connector_extra_config)
        producer, consumer = bool(transfer.is_kv_producer), bool(transfer.is_kv_consumer)
        if self._config.full_cudagraphs and producer:
            raise ConfigError(
                "kv_connector_extra_config: full_cudagraphs is for kv_role kv_consumer alone: in a whole captured step no layer could leave"
            )
        if self._config.listens(producer=producer, consumer=consumer):
            self._config.require_port()
        self._caches = kv_cache_config
        self._engine = vllm_config
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._metadata: StepMetadata | None = None
        if role is KVConnectorRole.SCHEDULER:
            place_of(vllm_config)
            self._scheduler = SchedulerSide(
                self._config, rules_of(kv_cache_config), producer=producer, consumer=consumer
            )
            _say_what_to_know(transfer, vllm_config, self._config, consumer=consumer)
        else:
            place = place_of(vllm_config, get_tensor_model_parallel_rank())
            self._place = place
            self._worker = WorkerSide(self._config, loop_thread(), producer=producer, consumer=consumer, place=place)

    # -- the scheduler's side ------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        self._scheduling.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._scheduling.matched_tokens(request, num_computed_tokens)

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        # Every byte of these groups' blocks comes from the other engine: vLLM need not zero them first.
        return tuple(self._caches.transfer_group_ids)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._scheduling.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        state = scheduler_output.kv_connector_block_state
        step = self._scheduling.step(
            scheduler_output.num_scheduled_tokens,
            state.get_block_ids,
            scheduler_output.preempted_req_ids or (),
        )
        return StepMetadata(step)

    def update_connector_output(self, connector_output: Any) -> None:
        self._scheduling.received(connector_output.finished_recving or ())

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self._scheduling.finished(request, request.status.name)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._scheduling.finished(request, request.status.name)

    # -- the worker's side ---------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        geometry = geometry_of(
            self._engine, self._caches, kv_caches, self._config, self._place, version=vllm.__version__
        )
        self._working.register(geometry, storage_of(kv_caches))
        logger.info("%s", geometry.describe())
        if (address := self._working.listening) is not None:
            logger.info("kvtransport listens on %s:%d", *address)

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        self._working.preempted(kv_connector_metadata.step)

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        super().bind_connector_metadata(connector_metadata)
        self._metadata = connector_metadata
        self._working.begin(connector_metadata.step)

    def clear_connector_metadata(self) -> None:
        super().clear_connector_metadata()
        self._metadata = None

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._metadata is not None:
            self._working.start_receives(self._metadata.step)

    def wait_for_layer_load(self, layer_name: str) -> None:
        return  # loads are asynchronous: a request is scheduled when all of its cache is there

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        self._working.layer_computed(layer_name)

    def wait_for_save(self) -> None:
        if self._metadata is not None:
            self._working.computed()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        sent, received, failed = self._working.results(finished_req_ids)
        return KVConnectorTransferResults(finished_sending=sent, finished_recving=received, failed_recving=failed)

    def get_kv_connector_stats(self) -> ConnectorStats | None:
        interval = None if self._worker is None else self._worker.statistics()
        return None if interval is None else ConnectorStats(data=interval)

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()

    # -- the class's --------------------------------------------------------------------------

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        # Layers leave from hooks between captured pieces.
        return not read_config(extra_config).full_cudagraphs

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        # A block of a layer is then one run of bytes: one copy on a device, one piece on the wire.
        return None if vllm_config.model_config is None or vllm_config.model_config.use_mla else "LBHNC"

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> ConnectorStats:
        return ConnectorStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PromMetrics:
        return PromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @property
    def _scheduling(self) -> SchedulerSide:
        assert self._scheduler is not None, "this connector is a worker's"
        return self._scheduler

    @property
    def _working(self) -> WorkerSide:
        assert self._worker is not None, "this connector is the scheduler's"
        return self._worker


def _say_what_to_know(transfer: Any, vllm_config: Any, config: ConnectorConfig, *, consumer: bool) -> None:
    if consumer and transfer.kv_load_failure_policy != "recompute":
        logger.warning(
            "kv_load_failure_policy is %r: a request whose cache does not come ends with an error; 'recompute' computes its prompt here",
            transfer.kv_load_failure_policy,
        )
    if getattr(vllm_config, "speculative_config", None) is not None:
        logger.warning("speculative decoding has not been tested with KvTransportConnector (docs/engines.md)")
    names: Mapping[str, bool] = {
        "debug_drop_state": config.debug_drop_state,
        "debug_hashes": config.debug_hashes,
    }
    for name, on in names.items():
        if on:
            logger.warning("%s is on: this engine is for tests", name)
