"""kvpool.sync: the pool for threads, embedded and through a daemon."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest

import kvpool.sync
from kvpool.keys import KeyChain
from kvpool.pool import Pool
from kvtransport.errors import DeadlineError, KVError
from kvtransport.manifest import Manifest, new_transfer_id
from tests.conftest import Cache
from tests.integration.test_daemon import daemon, port_of


@pytest.fixture(params=["embedded", "daemon"])
def pools(request):
    """Two faces of one pool: (prefill's, decode's)."""
    if request.param == "embedded":
        pool = kvpool.sync.embedded(lambda: Pool.create(64 << 20))
        yield pool, pool
        pool.close()
        return
    with daemon() as process:
        port = port_of(process)
        with kvpool.sync.connect("127.0.0.1", port) as one, kvpool.sync.connect("127.0.0.1", port) as two:
            yield one, two


def blank(ns, boundary: int) -> Cache:
    manifest = Manifest.of_layout(ns.layout, boundary, transfer=new_transfer_id(), block_tokens=ns.block_tokens)
    return Cache(manifest, blank=True)


def test_decode_thread_reads_behind_prefill_thread(pools, hybrid):
    prefill, decode = pools
    ns = prefill.namespace(hybrid, 64)
    decode.namespace(hybrid, 64)
    chain = KeyChain(ns, np.random.default_rng(1).integers(0, 1000, 700))
    request, target, seen = os.urandom(16), blank(ns, 640), []

    def consume() -> None:
        incoming = decode.get(ns, chain, boundary=640, into=target.pages, request=request)
        seen.extend(incoming.layers(timeout_s=10))
        incoming.sealed(10)

    thread = threading.Thread(target=consume)
    thread.start()
    outgoing = prefill.put(ns, chain, boundary=640, request=request)
    source = Cache(outgoing.manifest, seed=3)
    handovers = [outgoing.ready(*slot, pages) for slot, pages in source.pages.items()]
    outgoing.seal(10)
    for handover in handovers:
        handover.wait(10)
    thread.join(10)
    assert sorted(seen) == list(hybrid.layers)
    assert target.bytes() == source.bytes()
    assert prefill.match(ns, chain).length == 640
    assert prefill.explain(ns, chain).match.length == 640
    lease = prefill.lease(ns, chain, 640, 30.0)
    prefill.release(lease.id)


def test_flat_objects_stat_and_clear(pools):
    one, two = pools
    one.put_objects({b"k": b"value"})
    assert two.exists([b"k", b"l"]) == [True, False]
    assert two.get_objects([b"k", b"l"]) == [b"value", None]
    assert two.stat()["entries"]["flat"] == 1
    assert two.clear() == 1
    assert one.get_objects([b"k"]) == [None]


def test_timeouts_and_errors_reach_the_thread(pools, hybrid):
    prefill, decode = pools
    ns = prefill.namespace(hybrid, 64)
    decode.namespace(hybrid, 64)
    chain = KeyChain(ns, range(700))
    with pytest.raises(DeadlineError):
        decode.get(ns, chain, boundary=640, into=blank(ns, 640).pages, request=os.urandom(16), deadline_s=0.2)
    outgoing = prefill.put(ns, chain, boundary=640)
    wrong = outgoing.ready(99, 0, Cache(outgoing.manifest).pages[5, 0])
    with pytest.raises(KVError, match="layer 99 tensor 0"):
        wrong.wait(5)
    with pytest.raises(KVError, match=r"never handed over|missing"):
        outgoing.seal(5)
    outgoing.cancel("that was the test")
    assert prefill.match(ns, chain).length == 0
