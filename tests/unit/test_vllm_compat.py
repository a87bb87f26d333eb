"""What the connector says when the installed vLLM is another one than it was written for, and its statistics."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from kvpool.engines.vllm import compat, metrics
from kvtransport.errors import ConfigError
from kvtransport.transfer import LayerTimes, TransferStats


class Base:
    def same(self, request: Any, tokens: int = 0) -> None: ...

    def grew(self, request: Any, priority: int) -> None: ...

    def renamed(self, request_id: str) -> None: ...

    def reordered(self, a: int, b: int) -> None: ...

    def keywords(self, context: Any, **kwargs: Any) -> None: ...

    @classmethod
    def of_class(cls, config: Any) -> None: ...

    @property
    def is_property(self) -> bool: ...


class Connector(Base):
    __abstractmethods__ = frozenset({"must_have"})

    def same(self, request: Any, tokens: int = 0) -> None: ...

    def grew(self, request: Any) -> None: ...

    def renamed(self, request: Any) -> None: ...

    def reordered(self, b: int, a: int) -> None: ...

    def keywords(self, context: Any) -> None: ...

    def of_class(self, config: Any) -> None: ...

    def is_property(self) -> bool: ...

    def gone(self) -> None: ...

    def _own(self) -> None: ...


def test_every_difference_is_one_line_that_names_it():
    assert compat.differences(Connector, (Base,)) == [
        "must_have is abstract in vLLM and not implemented here",
        "gone is not a member of vLLM's base classes any more: it is never called",
        "Base.grew: has a parameter priority in vLLM, not here",
        "Base.is_property: is a property in vLLM, a method here",
        "Base.keywords: takes **kwargs in vLLM, not here",
        "Base.of_class: is a class method in vLLM, a method here",
        "Base.renamed: has a parameter request_id in vLLM, not here",
        "Base.renamed: needs a parameter request here that vLLM does not pass",
        "Base.reordered: takes a, b in this order in vLLM",
    ]


def test_members_that_nobody_has_looked_at_are_reported():
    assert compat.new_hooks((Base,)) == sorted(n for n in vars(Base) if not n.startswith("_"))
    known = type("Known", (), {"save_kv_layer": None, "_private": None})
    assert compat.new_hooks((known,)) == []


def test_names_that_are_gone_are_reported():
    def load(path: str) -> Any:
        if path.endswith(".outputs"):
            raise ImportError("No module named 'vllm.v1.outputs'")
        names = {name: SimpleNamespace(**dict.fromkeys(attributes)) for name, attributes in compat.READ[path].items()}
        if path.endswith("kv_cache_interface"):
            del names["MambaSpec"]
            del names["KVCacheConfig"].num_blocks
        module = ModuleType(path)
        module.__dict__.update(names)
        return module

    assert compat.missing(load) == [
        "vllm.v1.outputs cannot be imported: No module named 'vllm.v1.outputs'",
        "vllm.v1.kv_cache_interface.KVCacheConfig has no num_blocks",
        "vllm.v1.kv_cache_interface has no MambaSpec",
    ]


def test_attributes_that_a_request_does_not_set_are_reported():
    class Request:
        def __init__(self) -> None:
            self.request_id = self.num_prompt_tokens = self.num_computed_tokens = self.max_tokens = None
            self.prompt_token_ids = self.prompt_embeds = self.prompt_is_token_ids = self._all_token_ids = None
            self.kv_transfer_params = None

    assert [line.rsplit(" ", 1)[-1] for line in compat.missing_of_request(Request)] == ["status"]


def test_an_engine_that_does_not_fit_does_not_start():
    compat.require([], "1.0")
    with pytest.raises(ConfigError, match=r"does not fit the installed 1\.0: a; b\. Install vLLM") as caught:
        compat.require(["a", "b"], "1.0")
    assert compat.TESTED in caught.value.message


def test_the_package_works_without_vllm_and_says_what_is_missing():
    """In a process of its own, where importing vllm fails whether it is installed or not."""
    code = """
import sys
sys.modules["vllm"] = None
import kvpool.engines.vllm as package
try:
    package.KvTransportConnector
except ImportError as error:
    print(error)
try:
    package.Something
except AttributeError as error:
    print(error)
print(sorted(name for name in ("torch", "transformers") if name in sys.modules))
"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60).stdout
    first, second, third = said.splitlines()
    assert "needs vLLM in this Python environment" in first
    assert "docs/engines.md" in first
    assert "has no attribute 'Something'" in second
    assert third == "[]"


# -- statistics ------------------------------------------------------------------------------


def sealed(**stats: Any) -> TransferStats:
    times = {0: LayerTimes(ready_s=1.0, first_byte_s=1.1), 1: LayerTimes(ready_s=2.0, first_byte_s=2.1)}
    return TransferStats(moved_bytes=1_000, sealed_s=2.5, layers=times, **stats)


def test_an_interval_counts_and_is_taken_once():
    recorder = metrics.Recorder()
    assert recorder.take() is None
    recorder.sent(sealed(spilled_bytes=10), failed=False, cancelled=False)
    recorder.sent(TransferStats(moved_bytes=5, resent_bytes=2), failed=True, cancelled=False)
    recorder.received(sealed(corrupt_chunks=1), failed=False, cancelled=False, waited_s=3.0, resident_bytes=7)
    recorder.received(TransferStats(), failed=True, cancelled=True, waited_s=1.0)
    interval = recorder.take()
    assert {name: value for name, value in interval.items() if value} == {
        "sent_transfers": 1,
        "failed_sends": 1,
        "received_transfers": 1,
        "aborted": 1,
        "sent_bytes": 1_005,
        "received_bytes": 1_000,
        "resent_bytes": 2,
        "spilled_bytes": 10,
        "resident_bytes": 7,
        "corrupt_chunks": 1,
        "send_seconds": [1.5],
        "tail_seconds": [0.5],
        "receive_seconds": [1.4],
        "wait_seconds": [3.0],
    }
    assert recorder.take() is None


def test_intervals_add_up_and_stay_bounded():
    total = metrics.empty()
    assert metrics.is_empty(total)
    recorder = metrics.Recorder()
    for _ in range(3):
        recorder.sent(sealed(), failed=False, cancelled=False)
        metrics.add(total, recorder.take())
    assert total["sent_transfers"] == 3
    assert total["send_seconds"] == [1.5] * 3
    for _ in range(metrics.MAX_SAMPLES + 10):
        recorder.sent(sealed(), failed=False, cancelled=False)
    metrics.add(total, recorder.take())
    assert len(total["send_seconds"]) == metrics.MAX_SAMPLES
    assert metrics.summary(total)["send p50 ms"] == 1_500.0
    assert "receive p50 ms" not in metrics.summary(total)
