"""Links that choose and change their connections, over loopback TCP; see kvtransport/tuner.py."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from kvtransport import tuner as tuner_module
from kvtransport.connection import AnyConnection
from kvtransport.endpoint import Endpoint, EndpointConfig
from kvtransport.errors import ConfigError, ConnectError, LimitError
from kvtransport.flow.tuning import FEW
from kvtransport.io import tcp
from kvtransport.io.tcp import TcpOptions
from kvtransport.link import Link
from kvtransport.manifest import Manifest, new_transfer_id
from kvtransport.receiver import Expectation
from tests.conftest import Cache

CONFIG = EndpointConfig(reconnect_s=2.0)


@pytest.fixture(params=[None, 0], ids=["engine", "twin"])
def config(request) -> EndpointConfig:
    return replace(CONFIG, io_threads=request.param)


@contextlib.asynccontextmanager
async def ends(config: EndpointConfig, **options: object) -> AsyncIterator[tuple[Endpoint, Endpoint, Link]]:
    """(who listens, who dialled, the latter's link)"""
    async with Endpoint(config) as there, Endpoint(config) as here:
        address = await there.listen()
        yield there, here, await here.connect(*address, **options)  # type: ignore[arg-type]


def manifest(nbytes: int) -> Manifest:
    return Manifest.of_objects([nbytes], transfer=new_transfer_id())


async def send(link: Link, to: Endpoint, nbytes: int = 4 << 20, *, tenant: str = "") -> None:
    """One transfer over ``link``, verified."""
    flat = manifest(nbytes)
    source, target = Cache(flat, seed=nbytes), Cache(flat, blank=True)
    receiver = to.expect(flat.transfer, Expectation(grant=lambda _: target.pages, deadline_s=20.0))
    sender = link.open(flat, deadline_s=20.0, tenant=tenant)
    for (layer, tensor), pages in source.pages.items():
        sender.ready(layer, tensor, pages)
    await sender.seal()
    await receiver.sealed()
    for slot, pages in source.pages.items():
        assert pages.tobytes() == target.pages[slot].tobytes()


async def until(condition, seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def have(link: Link, count: int, *, fresh: bool = False) -> None:
    link.tuner._have(replace(link.tuner.choice, connections=count), fresh=fresh)


async def test_without_a_number_a_local_link_has_few_connections_and_no_bbr(config):
    async with ends(config) as (there, here, link):
        await send(link, there)
        told = link.telemetry()
        assert told.connections == max(FEW, here.io_threads)
        assert told.congestion in ("cubic", "reno")
        assert told.congestion_refused == ()
        assert told.tuning == "start"


async def test_more_are_dialled_and_too_many_are_parked_and_used_again(config):
    async with ends(config) as (there, _, link):
        [peer] = there.links
        have(link, 5)
        await until(lambda: len(link.connections) == len(peer.connections) == 5)
        await send(link, there)
        have(link, 2)
        assert link.telemetry().connections == 2
        assert link.telemetry().parked == 3
        parked = [c for c in link.connections if c.parked]
        await asyncio.sleep(0.05)
        before = [c.sent_bytes for c in parked]
        await send(link, there)
        assert [c.sent_bytes for c in parked] == before
        have(link, 4)
        assert link.telemetry().parked == 1
        assert len(link.connections) == 5, "nobody dialled for what was parked"
        await send(link, there)


async def test_retired_connections_go_without_a_reset_and_nothing_is_sent_again(config, monkeypatch):
    monkeypatch.setattr(tuner_module, "PARKED_S", 0.1)
    monkeypatch.setattr(tuner_module, "EVERY_S", 0.02)
    async with ends(config) as (there, here, link):
        [peer] = there.links
        lost: list[str] = []
        for side in (link, peer):
            was = side.lost
            side.lost = lambda c, e, was=was: (lost.append(str(e)), was(c, e))  # type: ignore[method-assign]

        async def slow(link: Link, args: dict) -> dict:
            await asyncio.sleep(0.3)
            return {"is": args["is"]}

        here.handlers["slow"] = there.handlers["slow"] = slow
        have(link, 6)
        await until(lambda: len(link.connections) == len(peer.connections) == 6)
        link.tuner._policy._wanted = 2
        link.tuner._policy._fixed = 2  # the policy says two from now on
        calls = [asyncio.create_task(side.call("slow", {"is": i})) for side in (link, peer) for i in range(12)]
        total = 0
        while len(link.connections) > 2:
            await send(link, there, 2 << 20)
            await send(peer, here, 2 << 20)
            total += 1
            assert total < 500
        assert [c.result()["is"] for c in await _all(calls)] == [*range(12), *range(12)]
        await until(lambda: len(peer.connections) == 2)
        assert not any("reset" in words for words in lost), lost
        await asyncio.sleep(0.3)
        assert len(link.connections) == len(peer.connections) == 2, "they are not dialled again"
        await send(link, there)
        have(link, 5)
        await until(lambda: len(peer.connections) == 5)
        await send(link, there)


async def _all(tasks: list[asyncio.Task]) -> list[asyncio.Task]:
    await asyncio.wait(tasks)
    return tasks


async def test_fresh_connections_take_the_place_of_those_that_remember_another_path(config):
    async with ends(config) as (there, _, link):
        old = list(link.connections)
        have(link, len(old), fresh=True)
        await until(lambda: len(link.connections) == 2 * len(old) and link.tuner._dialling is None)
        assert all(c.parked for c in old)
        assert link.telemetry().connections == len(old)
        await send(link, there)


async def test_the_side_that_did_not_dial_asks_for_more(config):
    async with ends(config) as (there, here, link):
        [peer] = there.links
        have(peer, 6)
        await until(lambda: len(link.connections) == len(peer.connections) == 6)
        await send(peer, here)
        with pytest.raises(LimitError):
            await peer.call("link.connections", {"connections": 0})
        with pytest.raises(LimitError):
            await peer.call("link.connections", {"connections": "many"})


async def test_a_number_that_was_asked_for_stays(config):
    async with ends(config, connections=3) as (there, _, link):
        [peer] = there.links
        have(link, 8)
        have(peer, 8)
        await send(link, there)
        await asyncio.sleep(0.1)
        assert len(link.connections) == 3
        assert link.telemetry().parked == 0


async def test_a_peer_that_takes_few_connections_gets_few(config):
    async with Endpoint(replace(config, max_connections_per_link=3)) as there, Endpoint(config) as here:
        link = await here.connect(*await there.listen())
        have(link, 8)
        await until(lambda: link.tuner._dialling is None)
        assert 1 <= len(link.connections) <= 3
        await send(link, there)
        await link.close()


async def test_a_lost_connection_is_not_missed_while_parked_ones_are_there(config):
    async with ends(config) as (there, _, link):
        have(link, 4)
        await until(lambda: len(link.connections) == 4)
        have(link, 1)
        [active] = [c for c in link.connections if not c.parked]
        active.fail(ConnectError("cut by the test"), abort=True)
        await send(link, there)


async def test_a_lost_connection_is_dialled_once_and_nothing_is_left_when_a_link_closes(config, monkeypatch):
    monkeypatch.setattr(tuner_module, "EVERY_S", 0.01)
    async with ends(config) as (there, _, link):
        [peer] = there.links
        link.tuner._policy._wanted = link.tuner._policy._fixed = 4
        while len(link.connections) < 4:
            await send(link, there)
        indices = {c.index for c in link.connections}
        for _ in range(3):
            link.connections[-1].fail(ConnectError("cut by the test"), abort=True)
            async with asyncio.timeout(10):
                while {c.index for c in link.connections} != indices or len(peer.connections) != 4:
                    await send(link, there, 1 << 20)
        assert len(link.connections) == 4
        have(link, 12)
        await asyncio.sleep(0)
        await link.close()
        assert not link.tuner.tasks


async def test_bbr_that_is_not_allowed_is_said_once(config, monkeypatch, caplog):
    monkeypatch.setattr(tcp, "_refused", set())
    asked: list[bytes] = []

    def refuse(level: int, option: int, value: bytes) -> None:
        asked.append(value)
        raise PermissionError(1, "Operation not permitted")

    for _ in range(3):
        assert tcp.set_congestion(refuse, ("bbr",)) is None
    assert asked == [b"bbr"]
    assert [r.getMessage().split()[0] for r in caplog.records] == ["bbr"]
    assert "sysctl -w net.ipv4.tcp_allowed_congestion_control" in caplog.text
    async with ends(config) as (_, _, link):
        link.tuner.choice = replace(link.tuner.choice, congestion=("bbr",))
        assert link.telemetry().congestion_refused == ("bbr",)


async def test_congestion_control_follows_the_path_unless_it_was_asked_for(config):
    async with ends(config) as (_, _, link):
        link.tuner._choose(("reno",))
        assert link.telemetry().congestion == "reno"
    async with ends(replace(config, tcp=TcpOptions(congestion="reno"))) as (_, _, link):
        link.tuner._choose(("bbr",))
        assert link.telemetry().congestion == "reno"


async def test_what_may_lie_unsent_in_sockets_follows_the_path(config, monkeypatch):
    """A local path is left as the system has it; of the others each connection keeps little, those that join later too."""
    async with ends(config, connections=2) as (there, _, link):
        assert link.tuner.choice.unsent_bytes is None
        assert {unsent(c) for c in link.connections} == {0}
        link.tuner._bound(128 << 10)
        assert {unsent(c) for c in link.connections} == {128 << 10}
        await send(link, there, 8 << 20)
        link.tuner._bound(None)
        assert {unsent(c) for c in link.connections} == {0}
    monkeypatch.setattr("kvtransport.flow.tuning.SHORT_RTT_S", 0.0)
    async with ends(config, connections=2) as (there, _, link):
        assert {unsent(c) for c in link.connections} == {link.tuner.choice.unsent_bytes} == {128 << 10}
        await send(link, there, 8 << 20)


# -- caps --------------------------------------------------------------------------------------


async def test_a_capped_link_keeps_to_its_rate_however_many_connections_it_has(config):
    rate = 40e6
    async with ends(replace(config, link_bytes_per_s=rate), connections=4) as (there, _, link):
        assert link.telemetry().capped_at == rate
        await send(link, there, 8 << 20)  # what a bucket saves up is gone
        started = time.monotonic()
        await send(link, there, 40_000_000)
        took = time.monotonic() - started
        assert took > 0.95, "a busy machine may make it later, nothing makes it sooner"
        assert {pace(c) for c in link.connections} == {int(rate / 4)}
        link.cap(None)
        assert {pace(c) for c in link.connections} == {(1 << 64) - 1}
    with pytest.raises(ConfigError):
        link.cap(0)


async def test_a_tenants_transfers_share_what_it_may_send_and_others_go_on(config):
    rate = 40e6
    capped = replace(config, tenant_bytes_per_s={"slow": rate})
    async with Endpoint(config) as there, Endpoint(capped) as here:
        link = await here.connect(*await there.listen())
        started = time.monotonic()
        first = asyncio.create_task(send(link, there, 14_000_000, tenant="slow"))
        second = asyncio.create_task(send(link, there, 26_000_000, tenant="slow"))
        await send(link, there, 4_000_000, tenant="fast")
        assert not first.done()
        assert not second.done()
        await first
        early = time.monotonic() - started
        await second
        took = time.monotonic() - started
        assert took > 0.95, "a busy machine may make it later, nothing makes it sooner"
        assert early > 0.6, "half each while both send"
        assert not here.pacer._of
        here.cap_tenant("slow", None)
        await send(link, there, 8 << 20, tenant="slow")
        with pytest.raises(ConfigError):
            here.cap_tenant("slow", 0)
        here.cap_tenant("slow", 1000)
        task = asyncio.create_task(send(link, there, 8 << 20, tenant="slow"))
        await asyncio.sleep(0.1)
        assert not task.done()
        here.cap_tenant("slow", None)  # who waits goes on
        await task


def socket_of(connection: AnyConnection):
    """What has getsockopt for the socket of a connection."""
    return connection.stream._sock if isinstance(connection.stream, tcp.TcpStream) else connection


def unsent(connection: AnyConnection) -> int:
    """TCP_NOTSENT_LOWAT, 0: the system's."""
    return int.from_bytes(socket_of(connection).getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 4), "little")


def pace(connection: AnyConnection) -> int:
    """Bytes a second that the system lets this connection send."""
    options = socket_of(connection)
    return int.from_bytes(options.getsockopt(socket.SOL_SOCKET, tcp.SO_MAX_PACING_RATE, 8), "little")


# -- several addresses -------------------------------------------------------------------------


async def test_connections_are_spread_over_addresses_and_a_dead_one_is_tried_again(config, monkeypatch):
    monkeypatch.setattr(tuner_module, "EVERY_S", 0.02)
    async with Endpoint(config) as there, Endpoint(config) as here:
        _, port = await there.listen("127.0.0.2")
        link = await here.connect(("127.0.0.2", "127.0.0.3"), port, connections=4, local=("127.0.0.4", "127.0.0.5"))
        [only] = link.telemetry().addresses
        assert (only.local, only.remote, only.connections) == ("127.0.0.4", "127.0.0.2", 4)
        await send(link, there)
        assert await there.listen("127.0.0.3", port) == ("127.0.0.3", port)
        addresses = link.tuner._addresses
        assert addresses is not None
        addresses._failed = {pair: (n, 0.0) for pair, (n, _) in addresses._failed.items()}  # its time has come

        def both() -> bool:
            return {(a.local, a.remote) for a in link.telemetry().addresses} == {
                ("127.0.0.4", "127.0.0.2"),
                ("127.0.0.5", "127.0.0.3"),
            }

        async with asyncio.timeout(10):
            while not both():
                await send(link, there)
        await send(link, there, 16 << 20)
        second = next(a for a in link.telemetry().addresses if a.remote == "127.0.0.3")
        assert second.sent_bytes > 0
        assert second.rtt_s is not None


async def test_the_first_address_may_be_dead_and_all_of_them_are_an_error(config):
    with socket.socket() as taken:
        taken.bind(("127.0.0.3", 0))
        async with Endpoint(config) as there, Endpoint(config) as here:
            _, port = await there.listen("127.0.0.2")
            link = await here.connect(["127.0.0.3", "127.0.0.2"], port)
            await send(link, there)
            with pytest.raises(ConnectError, match="cannot connect"):
                await here.connect(["127.0.0.3"], taken.getsockname()[1])
            with pytest.raises(ConfigError, match="at least one address"):
                await here.connect([], port)
            with pytest.raises(ConnectError, match=r"Cannot assign requested address"):
                await here.connect("127.0.0.2", port, local=["192.0.2.1"])
