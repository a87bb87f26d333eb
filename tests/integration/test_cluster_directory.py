"""A directory as operators run it: behind TLS, with users who may do little, and failed over by Sentinel."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvpool import certs
from kvpool.cluster.links import NodeLinks
from kvpool.cluster.members import Member
from kvpool.cluster.pool import ClusterPool, open_placement
from kvpool.cluster.valkey import CLUSTER_RIGHTS, ValkeyDirectory, open_directory, rights
from kvpool.errors import DirectoryError
from kvpool.keys import KeyChain
from kvtransport.endpoint import EndpointConfig
from kvtransport.errors import ConfigError, KVError
from tests.clusterkit import CUT, STEP, TTL_S, Node, get, put, running
from tests.conftest import no_tasks_left
from tests.integration.test_cluster import SEGMENT, tokens, use

pytestmark = pytest.mark.usefixtures("nothing_left_behind")
DOCS = Path(__file__).parents[2] / "docs" / "cluster.md"


@pytest.fixture(scope="module")
def server():
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    """One authority with the directory's certificate, and another that has nothing to do with it."""
    folder = tmp_path_factory.mktemp("pki")
    certs.make(folder / "right", [certs.Subject.node("directory=127.0.0.1,localhost")])
    certs.make(folder / "wrong", [])
    return folder


@contextlib.asynccontextmanager
async def behind_tls(port: int, pki: Path) -> AsyncIterator[int]:
    """TLS in front of a server whose build has none: what redis-py talks to is TLS, whoever ends it."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pki / "right" / "directory.pem", pki / "right" / "directory.key")
    tasks: set[asyncio.Task[None]] = set()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        back, forth = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pass_on(reader, forth), pass_on(back, writer))

    listener = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_directory_behind_tls(server, pki):
    server.command("FLUSHALL")
    async with behind_tls(server.port, pki) as port:
        ca = pki / "right" / "ca.pem"
        await use(open_directory(f"valkeys://127.0.0.1:{port}?name=tls&ssl_ca_certs={ca}", timeout_s=2.0))


@pytest.mark.parametrize("authority", ["wrong", None])
async def test_another_authority_is_refused_and_told(server, pki, authority):
    async with behind_tls(server.port, pki) as port:
        ca = "" if authority is None else f"?ssl_ca_certs={pki / authority / 'ca.pem'}"
        directory = open_directory(f"valkeys://127.0.0.1:{port}{ca}", timeout_s=2.0)
        with pytest.raises(DirectoryError, match=r"not one that is trusted here .* ssl_ca_certs=PATH") as error:
            await directory.snapshot()
        assert not error.value.retryable
        await directory.close()


async def test_plain_to_tls_and_tls_to_plain_are_errors_not_hangs(server, pki):
    async with behind_tls(server.port, pki) as port:
        for url in (f"valkey://127.0.0.1:{port}", f"valkeys://127.0.0.1:{server.port}"):
            directory = open_directory(url, timeout_s=1.0)
            with pytest.raises(DirectoryError):
                async with asyncio.timeout(15):
                    await directory.snapshot()
            await directory.close()


# -- users ---------------------------------------------------------------------------------------------


def documented(user: str, password: str, pool: str) -> str:
    """The line of docs/cluster.md that makes a user."""
    (line,) = re.findall(rf"^ACL SETUSER {user} .*$", DOCS.read_text(), re.MULTILINE)
    return line.replace("PASSWORD", password).replace("POOL", pool)


@pytest.fixture
def users():
    """A server with the users that the documentation makes, and the default one switched off at the end."""
    with running() as server:
        for user in ("kvpoold", "kvclient"):
            assert "OK" in server.command(documented(user, f"{user}-secret", "mine"))
        assert "OK" in server.command("ACL SETUSER stranger on >stranger-secret ~* +ping")
        assert "OK" in server.command("ACL SETUSER default off")
        yield server


def test_the_documented_rights_are_those_that_errors_name():
    for user, writes in (("kvpoold", True), ("kvclient", False)):
        assert documented(user, "x", "mine") == f"ACL SETUSER {user} on >x {rights('mine', writes=writes)}"


def url(server, who: str, name: str = "mine") -> str:
    return f"valkey://{who}@127.0.0.1:{server.port}?name={name}"


async def test_a_user_with_the_rights_of_a_node_is_enough(users):
    await use(open_directory(url(users, "kvpoold:kvpoold-secret"), timeout_s=2.0))


async def test_a_user_of_a_valkey_cluster():
    (more,) = re.findall(r"a Valkey Cluster's users also need `([^`]*)`", DOCS.read_text())
    assert more == CLUSTER_RIGHTS
    with running("--cluster-enabled", "yes") as server:
        assert "OK" in server.command("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
        async with asyncio.timeout(10):
            while "cluster_state:ok" not in server.command("CLUSTER", "INFO"):
                await asyncio.sleep(0.05)
        where = url(server, "kvpoold:secret").replace("valkey://", "valkey+cluster://")
        for extra, lacks in (("", "no Valkey Cluster"), ("+cluster|slots", "the right to 'command'"), (more, "")):
            assert "OK" in server.command(f"{documented('kvpoold', 'secret', 'mine')} {extra}")
            directory = open_directory(where, timeout_s=2.0)
            if not lacks:
                await use(directory)
                continue
            with pytest.raises(DirectoryError, match=lacks) as told:
                await directory.snapshot()
            assert CLUSTER_RIGHTS in told.value.message
            assert not told.value.retryable
            await directory.close()


async def test_a_client_needs_less_and_gets_no_more(users):
    node = await Node("n1").start(open_directory(url(users, "kvpoold:kvpoold-secret"), timeout_s=2.0))
    reader = open_directory(url(users, "kvclient:kvclient-secret"), timeout_s=2.0)
    policy, whole = open_placement("segments", None, None)
    links = NodeLinks(EndpointConfig(), random=random.random)
    pool = ClusterPool(reader, links, placement=policy, whole_chains=whole, ttl_s=TTL_S, answer_s=2.0)
    await pool.start()
    ns = await pool.namespace(CUT, STEP)
    prompt = tokens(SEGMENT + 64)
    await put(pool, ns, prompt, SEGMENT + 32)
    await node.announced()
    await get(pool, ns, prompt, SEGMENT + 32)
    with pytest.raises(DirectoryError, match="lacks the right to 'set'"):
        await reader.beat(node.agent.member, 1.0)
    await node.stop()
    await pool.close()


@pytest.mark.parametrize(
    ("who", "name", "message"),
    [
        ("kvpoold:wrong", "mine", r"does not take this user and password .*: write user:password@"),
        ("nobody:kvpoold-secret", "mine", r"does not take this user and password"),
        (":kvpoold-secret", "mine", r"does not take this user and password"),
        (
            "stranger:stranger-secret",
            "mine",
            r"lacks the right to '[a-z]+': a node needs ACL SETUSER .*\+mget .*\+pexpire",
        ),
        ("kvpoold:kvpoold-secret", "another", r"lacks the right to these keys: .*~kvp:\{another\}:\*"),
    ],
)
async def test_who_may_not_is_told_what_is_missing(users, who, name, message):
    directory = open_directory(url(users, who, name), timeout_s=2.0)
    with pytest.raises(DirectoryError, match=message) as error:
        await directory.snapshot()
    assert not error.value.retryable
    assert "secret" not in str(error.value)
    assert "wrong@" not in str(error.value)
    # A node that wants to join says the same, and has not joined.
    node = Node("n1")
    with pytest.raises(DirectoryError, match=message):
        await node.start(directory)
    await node.stop()
    await directory.close()


async def test_a_lookup_that_is_cancelled_is_cancelled():
    """Also when the client library loses the cancellation: a timeout around a lookup cancels once, and would not be heard of again."""

    class Deaf:
        answer = asyncio.Event()

        async def get(self, key: bytes) -> bytes | None:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(30)
            await self.answer.wait()
            return None

        async def aclose(self) -> None:
            pass

    client = Deaf()
    directory = ValkeyDirectory(client)
    began = time.monotonic()
    member = Member(id="n", incarnation=bytes(16), cluster="c", addresses=("127.0.0.1:1",), capacity=0)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await directory.leave(member)
    assert time.monotonic() - began < 5
    client.answer.set()
    await directory.close()
    await no_tasks_left()


async def test_unknown_options_of_a_sentinel_are_refused():
    with pytest.raises(ConfigError, match="colour: not known with Sentinel"):
        open_directory("valkey+sentinel://127.0.0.1:1/pool?colour=red")


# -- failover ------------------------------------------------------------------------------------------


async def test_a_failover_costs_no_wrong_byte_and_ends(tmp_path):
    """The master is killed, its replica promoted: reads go on meanwhile, and then all is as before, writes too."""
    with (
        running("--repl-diskless-sync-delay", "0") as master,
        running("--replicaof", "127.0.0.1", str(master.port), "--repl-diskless-sync-delay", "0") as replica,
    ):
        async with asyncio.timeout(30):
            while "master_link_status:up" not in replica.command("INFO", "replication"):
                await asyncio.sleep(0.05)
        config = tmp_path / "sentinel.conf"
        config.write_text(
            f"sentinel monitor pool 127.0.0.1 {master.port} 1\n"
            "sentinel down-after-milliseconds pool 500\nsentinel failover-timeout pool 5000\n"
        )
        with running(sentinel=str(config)) as sentinel:
            async with asyncio.timeout(30):
                while str(replica.port) not in sentinel.command("SENTINEL", "REPLICAS", "pool"):
                    await asyncio.sleep(0.05)
            await _through_a_failover(master, replica, sentinel.port)


async def _through_a_failover(master, replica, sentinel_port: int) -> None:
    where = f"valkey+sentinel://127.0.0.1:{sentinel_port}/pool?name=failover"
    nodes = [await Node(name).start(open_directory(where, timeout_s=0.5)) for name in ("n1", "n2")]
    policy, whole = open_placement("segments", None, None)
    links = NodeLinks(EndpointConfig(), random=random.random)
    pool = ClusterPool(
        open_directory(where, timeout_s=0.5), links, placement=policy, whole_chains=whole, ttl_s=TTL_S, answer_s=0.5
    )
    await pool.start()
    ns = await pool.namespace(CUT, STEP)
    before, after = tokens(SEGMENT * 2), tokens(SEGMENT * 2, 1)
    try:
        await put(pool, ns, before, SEGMENT + 64)
        for node in nodes:
            await node.announced()
        epoch = (await pool.directory.snapshot()).epoch
        # What is not replicated when the master dies is announced again after 5 s; here all of it is.
        async with asyncio.timeout(20):
            while replica.command("GET", "kvp:{failover}:epoch") != master.command("GET", "kvp:{failover}:epoch"):
                await asyncio.sleep(0.02)
        master.kill()
        reads = errors = 0
        async with asyncio.timeout(60):  # 0.5 s to notice, an election, and a TTL
            while "role:master" not in replica.command("INFO", "replication") or pool.roster.frozen(pool._now()):
                try:
                    await get(pool, ns, before, SEGMENT + 64, deadline_s=10)  # checks every byte
                    reads += 1
                except KVError:
                    errors += 1
                await pool.refresh()
                await asyncio.sleep(0.02)
        assert reads > 0
        assert (await pool.directory.snapshot()).epoch == epoch
        async with asyncio.timeout(60):
            for prompt in (before, after):
                while True:
                    try:
                        if prompt is after:
                            await put(pool, ns, prompt, SEGMENT + 64, deadline_s=10)
                        while (await pool.match(ns, KeyChain(ns, prompt))).length != SEGMENT + 64:
                            await asyncio.sleep(0.05)
                        await get(pool, ns, prompt, SEGMENT + 64, deadline_s=10)
                        break
                    except KVError as error:
                        if not error.retryable:
                            raise
                        await asyncio.sleep(0.05)
            while len(pool.roster.members) != 2 or any(n.agent._roster.frozen(time.monotonic()) for n in nodes):
                await asyncio.sleep(0.05)
    finally:
        await pool.close()
        for node in nodes:
            await node.stop()
