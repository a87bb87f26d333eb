"""The meter of a link's path, with readings made up; and the kernel's, of a real socket."""

from __future__ import annotations

import socket
import sys

import pytest

from kvtransport import Endpoint, EndpointConfig
from kvtransport.flow.telemetry import PathInfo, PathMeter
from kvtransport.io import tcp_info


def info(**changes):
    fields = {
        "rtt_s": 0.01, "min_rtt_s": 0.01, "delivery_rate": 0.0, "app_limited": True, "window_bytes": 0,
        "notsent_bytes": 0, "sent_bytes": 0, "resent_bytes": 0, "busy_s": 0.0, "receiver_limited_s": 0.0,
        "buffer_limited_s": 0.0,
    }  # fmt: skip
    return PathInfo(**{**fields, **changes})


def test_goodput_is_that_of_the_window():
    meter = PathMeter(0.0, window_s=2.0)
    for second in range(1, 5):
        got = meter.sample(second, second * 1000, [], 0)
        assert got.goodput == pytest.approx(1000)
    got = meter.sample(5.0, 4000, [], 0)
    assert got.goodput < 1000
    assert meter.sample(9.0, 4000, [], 0).goodput == 0


def test_availability_is_the_best_of_the_window_over_all_connections():
    meter = PathMeter(0.0, window_s=2.0)
    assert meter.sample(1.0, 10, [(1, info(delivery_rate=70.0)), (2, info(delivery_rate=30.0))], 0).available == 100.0
    assert meter.sample(2.0, 20, [(1, info(delivery_rate=5.0))], 0).available == 100.0
    for second in (3.0, 4.0, 5.0):
        got = meter.sample(second, 20, [(1, info(delivery_rate=5.0))], 0)
    assert got.available == 5.0


def test_round_trips_and_loss_outlive_their_connection():
    meter = PathMeter(0.0)
    meter.sample(1.0, 0, [(1, info(rtt_s=0.02, min_rtt_s=0.02, sent_bytes=900, resent_bytes=90))], 0)
    got = meter.sample(2.0, 0, [(2, info(rtt_s=0.08, min_rtt_s=0.05, sent_bytes=100))], 0)
    assert (got.rtt_s, got.min_rtt_s, got.rtt_inflation) == (0.08, 0.02, pytest.approx(4.0))
    assert got.loss == pytest.approx(0.09)
    assert meter.sample(3.0, 0, [], 0).rtt_s is None


def test_time_is_the_senders_the_receivers_or_the_networks():
    meter = PathMeter(0.0)
    meter.sample(1.0, 0, [(1, info())], 0)
    got = meter.sample(3.0, 0, [(1, info(busy_s=1.5, receiver_limited_s=0.5))], 0)
    assert got.limited_by_receiver_s == pytest.approx(0.5)
    assert got.limited_by_network_s == pytest.approx(1.0)
    assert got.limited_by_sender_s == pytest.approx(1.5)  # the first second, and half of the two


@pytest.mark.skipif(sys.platform != "linux", reason="TCP_INFO is Linux's")
def test_the_kernels_figures_are_read_from_the_right_places():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as one:
        other, _ = server.accept()
        with other:
            one.sendall(bytes(100_000))
            left = 100_000
            while left:
                left -= len(other.recv(left))
            got = tcp_info.parse(one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, tcp_info.BYTES))
            assert got is not None
            assert got.sent_bytes == 100_000
            assert got.resent_bytes == got.notsent_bytes == 0
            assert 0 < got.min_rtt_s <= got.rtt_s < 1
            assert got.delivery_rate > 0
            assert got.window_bytes >= 10 * 500
            assert 0 <= got.receiver_limited_s <= got.busy_s < 5
    assert tcp_info.parse(bytes(104)) is None


async def test_a_links_telemetry():
    async with Endpoint(EndpointConfig()) as there, Endpoint(EndpointConfig()) as here:

        async def echo(link, args):
            return {}

        there.handlers["echo"] = echo
        link = await here.connect(*await there.listen(), connections=2)
        for _ in range(5):
            await link.call("echo", {"x": b"y" * 100_000})
        told = link.telemetry()
        assert told.connections == 2
        assert told.sent_bytes > 500_000
        assert told.goodput > 0
        assert told.available >= told.goodput
        assert told.loss == 0
        if sys.platform == "linux":
            assert told.rtt_s is not None
            assert told.min_rtt_s is not None
            assert told.rtt_inflation >= 1
        total = told.limited_by_sender_s + told.limited_by_receiver_s + told.limited_by_network_s
        assert 0 <= total < 5
