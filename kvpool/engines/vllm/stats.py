"""The connector's statistics as vLLM wants them: aggregated over workers, logged, and exported to Prometheus.

Needs vLLM; what is counted is in :mod:`.metrics`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.metrics.utils import create_metric_per_engine

from . import metrics

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


@dataclass
class ConnectorStats(KVConnectorStats):  # type: ignore[misc]
    """An interval; ``data`` is a plain dictionary because it crosses processes."""

    def __post_init__(self) -> None:
        if not self.data:
            self.reset()

    def reset(self) -> None:
        self.data = metrics.empty()

    def aggregate(self, other: Any) -> ConnectorStats:
        metrics.add(self.data, other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        return metrics.summary(self.data)

    def is_empty(self) -> bool:
        return metrics.is_empty(self.data)


class PromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """``vllm:kvtransport_<name>`` for every counter, ``vllm:kvtransport_<name>`` histograms for every duration."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: create_metric_per_engine(
                self._counter_cls(name=f"vllm:kvtransport_{name}", documentation=says, labelnames=labelnames),
                per_engine_labelvalues,
            )
            for name, says in metrics.COUNTERS.items()
        }
        self._histograms = {
            name: create_metric_per_engine(
                self._histogram_cls(
                    name=f"vllm:kvtransport_{name}", documentation=says, buckets=_SECONDS, labelnames=labelnames
                ),
                per_engine_labelvalues,
            )
            for name, says in metrics.SAMPLES.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, children in self._counters.items():
            if value := transfer_stats_data.get(name, 0):
                children[engine_idx].inc(value)
        for name, children in self._histograms.items():
            for seconds in transfer_stats_data.get(name, ()):
                children[engine_idx].observe(seconds)
