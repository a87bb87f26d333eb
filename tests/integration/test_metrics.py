"""kvpoold's metrics, as Prometheus reads them."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvpool.client import connect
from kvpool.keys import KeyChain
from kvpool.metrics import MAX_REQUESTS, MetricsServer
from kvtransport.buffers import PageList
from kvtransport.errors import ConfigError
from tests.poolkit import LAYOUTS, STEP, content


@pytest.fixture
def daemon():
    """(port of the pool, port of the metrics)"""
    argv = [sys.executable, "-m", "kvpool.daemon", "--port", "0", "--memory", "16MiB", "--metrics-port", "0"]
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        port = int(re.search(r"listening on 127\.0\.0\.1:(\d+)", child.stdout.readline())[1])
        said = iter(child.stderr.readline, "")
        yield port, next(int(m[1]) for line in said if (m := re.search(r"http://127\.0\.0\.1:(\d+)/metrics", line)))
    finally:
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=20)
    assert child.returncode == 0


async def http(port, request=b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.split(b"\r\n")[0].decode(), body.decode()


async def scrape(port):
    """{(name, labels): value}"""
    status, body = await http(port)
    assert status == "HTTP/1.1 200 OK"
    samples = [s for family in text_string_to_metric_families(body) for s in family.samples]
    return {(s.name, *sorted(s.labels.values())): s.value for s in samples}


async def test_hits_bytes_evictions_and_latencies(daemon):
    port, metrics = daemon
    layout, tokens = LAYOUTS["hybrid"], np.arange(20 * STEP + 1)
    async with await connect("127.0.0.1", port) as pool:
        ns = await pool.namespace(layout, STEP)
        chain = KeyChain(ns, tokens)
        assert (await pool.match(ns, chain)).length == 0
        sender = await pool.put(ns, chain, boundary=16 * STEP)
        for extent in sender.manifest.extents:
            sender.ready(extent.layer, extent.tensor, PageList.of(content(extent, tokens.tolist())))
        await sender.seal()
        assert (await pool.match(ns, chain)).length == 16 * STEP
        await pool.put_objects({b"small": b"x" * 10, b"large": b"y" * 300_000})
        await pool.get_objects([b"small", b"large", b"none"])
        while (await pool.stat())["active"]:
            await asyncio.sleep(0.01)
        await pool.clear()
        assert (await pool.match(ns, chain)).length == 0
        found = await scrape(metrics)
    model = layout.model
    assert found["kvpool_memory_bytes", "total"] == 16 << 20
    assert found["kvpool_memory_bytes", "free"] == 16 << 20
    assert found["kvpool_events_total", "matches"] == 3
    assert found["kvpool_events_total", "hits"] == 1
    assert found["kvpool_misses_total", "never_stored"] == 1
    assert found["kvpool_misses_total", "evicted"] == 1
    assert found["kvpool_asked_tokens_total", f"{model}/full"] == 3 * 20 * STEP
    assert found["kvpool_reached_tokens_total", f"{model}/full"] == 16 * STEP
    assert found["kvpool_ended_total", "evicted", f"{model}/full"] == 1
    assert found["kvpool_ended_total", f"{model}/full", "never_stored"] == 2
    assert found["kvpool_wire_total", "received_moved_bytes"] > 300_000
    assert found["kvpool_call_seconds_count", "match", "ok"] == 3
    assert found["kvpool_transfer_seconds_count", "ok", "put"] == 2
    assert found["kvpool_transfer_seconds_count", "get", "ok"] == 1
    assert found["kvpool_call_seconds_sum", "match", "ok"] > 0


async def test_errors_have_names(daemon):
    port, metrics = daemon
    async with await connect("127.0.0.1", port) as pool:
        ns = await pool.namespace(LAYOUTS["dense"], STEP)
        chain = KeyChain(ns, np.arange(5 * STEP))
        with pytest.raises(Exception, match="cannot be restored"):
            await pool.get(ns, chain, boundary=STEP, into={})
        found = await scrape(metrics)
    assert found["kvpool_call_seconds_count", "MissError", "get"] == 1


async def test_what_is_no_request_for_metrics(daemon):
    _, metrics = daemon
    assert (await http(metrics, b"GET / HTTP/1.1\r\n\r\n"))[0] == "HTTP/1.1 404 Not Found"
    assert (await http(metrics, b"POST /metrics HTTP/1.1\r\n\r\n"))[0] == "HTTP/1.1 405 Method Not Allowed"
    assert await http(metrics, b"GET /metrics " + b"x" * 20_000) == ("", "")
    assert (await http(metrics))[0] == "HTTP/1.1 200 OK"


async def test_slow_readers_are_bounded():
    class Nothing:
        def text(self):
            return b""

    server = MetricsServer(Nothing())
    host, port = await server.listen("127.0.0.1", 0)
    waiting = [await asyncio.open_connection(host, port) for _ in range(MAX_REQUESTS)]
    await asyncio.sleep(0.05)
    assert (await http(port))[0] == "HTTP/1.1 503 Service Unavailable"
    with pytest.raises(ConfigError, match="cannot listen"):
        await MetricsServer(Nothing()).listen(host, port)
    await server.close()
    for reader, writer in waiting:
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()
