"""The installed vLLM's connector interface is the one the connector was written for; what changed is named."""

from __future__ import annotations

import inspect

import vllm
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, SupportsHMA
from vllm.v1.request import Request

from kvpool.engines.vllm import KvTransportConnector, compat
from kvpool.engines.vllm.reading import _REFUSED, SPECS

from .report import Report

BASES = (KVConnectorBase_V1, SupportsHMA)


def test_vllm_is_what_the_connector_was_written_for(report: Report) -> None:
    found = [
        *compat.missing(),
        *compat.missing_of_request(Request),
        *compat.differences(KvTransportConnector, BASES),
        *(f"{name} is new in vLLM: does the connector have to answer it?" for name in compat.new_hooks(BASES)),
    ]
    assert not found, "\n".join(found)
    abstract = {name for base in BASES for name in base.__abstractmethods__}
    report.row(
        f"interface of vLLM {vllm.__version__}",
        f"{len(abstract)} abstract methods, {len(compat.HOOKS)} members of the base classes: none is new, gone or called otherwise",
    )


def test_the_version_that_documents_name_is_installed() -> None:
    assert vllm.__version__.split("+")[0] == compat.TESTED


def test_specs_that_are_read_or_refused_by_name_exist() -> None:
    import vllm.v1.kv_cache_interface as interface

    assert not [name for name in (*SPECS, *_REFUSED) if not inspect.isclass(getattr(interface, name, None))]


def test_vllm_loads_it_by_name_and_knows_that_it_serves_hybrids() -> None:
    from vllm.config import KVTransferConfig

    config = KVTransferConfig(
        kv_connector="KvTransportConnector", kv_connector_module_path="kvpool.engines.vllm", kv_role="kv_producer"
    )
    assert KVConnectorFactory.get_connector_class(config) is KvTransportConnector
    assert KVConnectorFactory.supports_hma_config(config)
    assert KvTransportConnector.requires_piecewise_for_cudagraph({})
    assert not KvTransportConnector.requires_piecewise_for_cudagraph({"full_cudagraphs": True})


def test_statistics_pass_through_vllms_own_classes() -> None:
    stats = KvTransportConnector.build_kv_connector_stats()
    assert stats.is_empty()
    other = KvTransportConnector.build_kv_connector_stats(
        {**stats.to_dict(), "sent_transfers": 2, "wait_seconds": [0.5]}
    )
    total = stats.aggregate(other).aggregate(other)
    assert total.reduce()["sent"] == 4
    assert total.reduce()["wait p50 ms"] == 500.0


def test_prometheus_exports_every_counter_and_duration() -> None:
    from types import SimpleNamespace

    from prometheus_client import REGISTRY, Counter, Gauge, Histogram

    config = SimpleNamespace(kv_transfer_config=None)
    exported = KvTransportConnector.build_prom_metrics(
        config, {Gauge: Gauge, Counter: Counter, Histogram: Histogram}, ["engine"], {0: ["0"]}
    )
    exported.observe({"sent_bytes": 7, "wait_seconds": [0.5, 1.5]})
    assert REGISTRY.get_sample_value("vllm:kvtransport_sent_bytes_total", {"engine": "0"}) == 7
    assert REGISTRY.get_sample_value("vllm:kvtransport_wait_seconds_sum", {"engine": "0"}) == 2.0
