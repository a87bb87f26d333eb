"""A cluster of processes: kvpoold joins a real directory, dies, freezes, restarts; kvpool.connect and kvpool cluster look at it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

import kvpool
from kvpool import KeyChain
from kvpool.cluster.members import State
from kvpool.errors import MissError
from kvtransport import presets
from kvtransport.buffers import PageList
from kvtransport.errors import ConfigError, KVError
from tests.clusterkit import CUT, STEP, Server, free_port, get, put, running
from tests.conftest import no_tasks_left
from tests.integration.test_cluster import SEGMENT, tokens

pytestmark = pytest.mark.usefixtures("nothing_left_behind")
TTL_S = 1.0


class Daemon:
    """A kvpoold that has joined."""

    def __init__(self, server: Server | None, node: str, *, port: int = 0, cluster: str = "east", options=()) -> None:
        self.node, self.cluster = node, cluster
        command = [sys.executable, "-m", "kvpool.daemon", "--port", str(port), "--memory", "32MiB", "--node", node]
        command += ["--cluster", cluster, *options]
        if server is not None:
            command += ["--join", f"valkey://127.0.0.1:{server.port}?name=processes"]
        config = os.path.join(server.folder, "kvpoold.toml") if server is not None else None
        if config is not None:
            with open(config, "w") as file:
                file.write(f"ttl_s = {TTL_S}\nkeepalive_s = 0.2\ndead_after_s = 1.0\npage_bytes = 4096\nlock = false\n")
            command += ["--config", config]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            self._await_lines(server)
        except BaseException:
            self.end(signal.SIGKILL)
            raise

    def _await_lines(self, server: Server | None) -> None:
        line = self.process.stdout.readline()
        found = re.match(r"kvpoold listening on (\S+):(\d+),", line)
        assert found is not None, line + self.process.stderr.read()
        self.port = int(found[2])
        self.address = f"{found[1]}:{found[2]}"
        if server is not None:
            assert f"joined as {self.node} of cluster {self.cluster}" in self.process.stdout.readline()

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.send(signal.SIGCONT)
            self.send(number)
        self.process.communicate(timeout=20)
        return self.process.returncode


@pytest.fixture
def world():
    with running() as server:
        daemons = {}
        try:
            for node, cluster in (("n1", "east"), ("n2", "east"), ("n3", "west")):
                daemons[node] = Daemon(server, node, cluster=cluster)
            yield server, daemons
        finally:
            for daemon in daemons.values():
                daemon.end()


def connect(server, **options):
    options.setdefault("ttl_s", TTL_S)
    return kvpool.connect(f"valkey://127.0.0.1:{server.port}?name=processes", **options)


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvpool.cli", *arguments], capture_output=True, text=True, timeout=300, check=False
    )


async def until(what, seconds: float) -> float:
    """Wait until ``what()`` is true; the seconds it took."""
    begin = time.monotonic()
    async with asyncio.timeout(seconds):
        while not what():
            await asyncio.sleep(0.02)
    return time.monotonic() - begin


async def stored_again(pool, ns, prompt, boundary: int) -> None:
    """Put and read back, retrying what may be retried."""
    async with asyncio.timeout(15):
        while True:
            try:
                await put(pool, ns, prompt, boundary, deadline_s=3)
                await asyncio.sleep(0.15)
                await get(pool, ns, prompt, boundary, deadline_s=3)
                return
            except KVError as error:
                if not (error.retryable or isinstance(error, MissError)):
                    raise
            await asyncio.sleep(0.05)


async def test_daemons_join_serve_and_leave(world):
    server, daemons = world
    async with await connect(server) as pool:
        assert set(pool.roster.members) == {"n1", "n2", "n3"}
        ns = await pool.namespace(CUT, STEP)
        prompt = tokens(SEGMENT * 4)
        await put(pool, ns, prompt, SEGMENT * 3 + 64)
        await asyncio.sleep(0.2)
        await get(pool, ns, prompt, SEGMENT * 3 + 64)
        body = json.loads(
            cli("cluster", "status", "-d", f"valkey://127.0.0.1:{server.port}?name=processes", "--json", "-").stdout
        )
        assert [(n["cluster"], n["node"], n["state"], n["answers"]) for n in body["nodes"]] == [
            ("east", "n1", "up", True),
            ("east", "n2", "up", True),
            ("west", "n3", "up", True),
        ]
        assert sum(n["segments"] for n in body["nodes"]) == 5
        assert all(n["unannounced"] == 0 for n in body["nodes"])
        assert not body["frozen"]
        assert daemons["n3"].end() == 0  # leaves by itself, at once
        taken = await until(lambda: set(pool.roster.members) == {"n1", "n2"}, 5)
        assert taken < TTL_S  # one round of asking, not the TTL
        table = cli("cluster", "status", "-d", daemons["n1"].address + "," + daemons["n2"].address)
        assert table.returncode == 0, table.stderr
        assert "n1" in table.stdout
        assert "32.0 MiB" in table.stdout
    # The same nodes, without a directory.
    async with await kvpool.connect([daemons["n1"].address, daemons["n2"].address]) as pool:
        ns = await pool.namespace(CUT, STEP)
        await put(pool, ns, prompt, SEGMENT * 2 + 64)
        await get(pool, ns, prompt, SEGMENT * 2 + 64)
    await no_tasks_left()


async def test_drain_by_command(world):
    server, daemons = world
    url = f"valkey://127.0.0.1:{server.port}?name=processes"
    async with await connect(server, cluster="east") as pool:
        ns = await pool.namespace(CUT, STEP)
        prompts = [tokens(SEGMENT * 2, seed) for seed in range(5)]
        for prompt in prompts:
            await put(pool, ns, prompt, SEGMENT + 64)
        loop = asyncio.get_running_loop()
        done = await loop.run_in_executor(None, cli, "drain", "n1", "-d", url, "--deadline", "20", "--json", "-")
        assert done.returncode == 0, done.stderr
        body = json.loads(done.stdout)
        assert body["finished"]
        assert body["chains"] > 0
        assert (body["failed"], body["left"]) == (0, 0)
        assert "n1 is drained and has left" in done.stderr
        await until(lambda: "n1" not in pool.roster.members, 3)
        assert daemons["n1"].end() == 0
        for prompt in prompts:
            await get(pool, ns, prompt, SEGMENT + 64)
    nobody = await loop.run_in_executor(None, cli, "drain", "n9", "-d", url)
    assert nobody.returncode == 2
    assert "there are n2, n3" in nobody.stderr
    await no_tasks_left()


async def test_a_drain_that_is_taken_back_or_loses_its_node_ends_the_command(world):
    server, daemons = world
    url = f"valkey://127.0.0.1:{server.port}?name=processes"
    node = "n1"
    loop = asyncio.get_running_loop()
    async with await connect(server, placement="local", local=node) as pool:
        ns = await pool.namespace(presets.load("qwen3-235b"), 16)
        for seed in range(3):
            outgoing = await pool.put(ns, KeyChain(ns, tokens(50, seed)), boundary=48)
            for extent in outgoing.manifest.extents:
                outgoing.ready(extent.layer, extent.tensor, PageList.of(bytearray(extent.nbytes)))
            await outgoing.seal()
        # After the first of its 9 MB at 125 KB/s: far longer than this test.
        slow = ["drain", node, "-d", url, "--gbps", "0.001", "--deadline", "600", "--json", "-"]
        waiting = loop.run_in_executor(None, cli, *slow)
        await until(lambda: pool.roster.members[node].state is State.DRAINING, 60)
        status = await loop.run_in_executor(None, cli, "cluster", "status", "-d", url)
        assert "draining" in status.stdout
        taken_back = await loop.run_in_executor(None, cli, "drain", node, "-d", url, "--stop")
        assert taken_back.returncode == 0, taken_back.stderr
        ended = await waiting
        assert ended.returncode == 1, ended.stderr
        assert not json.loads(ended.stdout)["finished"]
        assert f"{node} takes new data again: its drain was ended by --stop" in " ".join(ended.stderr.split())
        await until(lambda: pool.roster.members[node].state is State.UP, 60)
        waiting = loop.run_in_executor(None, cli, *slow)
        await until(lambda: pool.roster.members[node].state is State.DRAINING, 60)
        daemons[node].end(signal.SIGKILL)
        ended = await waiting
        assert ended.returncode == 2, (ended.stdout, ended.stderr)
        assert "error: " in ended.stderr
        assert "Traceback" not in ended.stderr
    await no_tasks_left()


async def test_pull_by_command(world, tmp_path):
    server, _ = world
    url = f"valkey://127.0.0.1:{server.port}?name=processes"
    prompt = tokens(50)
    (tmp_path / "prompt.json").write_text(json.dumps(prompt))
    asked = ["cluster", "pull", "-d", url, "--model", "qwen3-235b", "--block-tokens", "16"]
    asked += ["--tokens", str(tmp_path / "prompt.json")]
    loop = asyncio.get_running_loop()
    async with await connect(server, cluster="east") as pool:
        ns = await pool.namespace(presets.load("qwen3-235b"), 16)
        outgoing = await pool.put(ns, KeyChain(ns, prompt), boundary=48)
        for extent in outgoing.manifest.extents:
            outgoing.ready(extent.layer, extent.tensor, PageList.of(bytearray(extent.nbytes)))
        await outgoing.seal()
        async with asyncio.timeout(20):
            while (await pool.match(ns, KeyChain(ns, prompt))).length != 48:
                await asyncio.sleep(0.02)
        total = outgoing.manifest.total_bytes
        slow = await loop.run_in_executor(None, cli, *asked, "--into", "west", "--gbps", "0.001", "--deadline", "1")
        assert slow.returncode == 1, slow.stderr
        assert "0 of 48 tokens" in slow.stdout
        assert "the deadline came first" in " ".join(slow.stdout.split())
        done = await loop.run_in_executor(None, cli, *asked, "--into", "west", "--from", "east", "--json", "-")
        assert done.returncode == 0, done.stderr
        body = json.loads(done.stdout)
        assert body.pop("seconds") > 0
        assert body == {
            "cluster": "west",
            "sources": ["east"],
            "before": 0,
            "wanted": 48,
            "reached": 48,
            "parts": 1,
            "done": 1,
            "moved_bytes": total,
            "refused": 0,
            "finished": True,
            "note": "",
        }
        assert "west can restore 48 tokens now (0 before)" in done.stderr
        async with asyncio.timeout(20):
            while 48 not in (await pool.match_across_clusters(ns, KeyChain(ns, prompt)))["west"]:
                await asyncio.sleep(0.02)
    again = await loop.run_in_executor(None, cli, *asked, "--into", "west")
    assert "west has it already: 48 tokens" in again.stdout
    wrong = await loop.run_in_executor(None, cli, *asked, "--into", "south")
    assert wrong.returncode == 2
    assert "there is no cluster 'south'; there are east, west" in wrong.stderr
    await no_tasks_left()


async def test_kill_and_restart(world):
    server, daemons = world
    async with await connect(server) as pool:
        ns = await pool.namespace(CUT, STEP)
        prompts = [tokens(SEGMENT * 2, seed) for seed in range(4)]
        for prompt in prompts:
            await put(pool, ns, prompt, SEGMENT + 64)
        before = pool.roster.members["n1"].incarnation
        daemons["n1"].end(signal.SIGKILL)
        assert await until(lambda: "n1" not in pool.roster.members, 10) < TTL_S * 2
        for prompt in prompts:
            await stored_again(pool, ns, prompt, SEGMENT + 64)
        daemons["n1"] = Daemon(server, "n1", port=daemons["n1"].port)
        assert await until(lambda: "n1" in pool.roster.members, 10) < TTL_S
        assert pool.roster.members["n1"].incarnation != before
        for prompt in prompts:
            await stored_again(pool, ns, prompt, SEGMENT + 64)
    await no_tasks_left()


async def test_a_frozen_node_is_gone_and_comes_back_with_what_it_has(world):
    server, daemons = world
    async with await connect(server) as pool:
        ns = await pool.namespace(CUT, STEP)
        prompts = [tokens(SEGMENT * 2, seed) for seed in range(6)]
        for prompt in prompts:
            await put(pool, ns, prompt, SEGMENT + 64)
        await asyncio.sleep(0.2)
        daemons["n2"].send(signal.SIGSTOP)
        assert await until(lambda: "n2" not in pool.roster.members, 10) < TTL_S * 2
        begin = time.monotonic()
        hits = 0
        for prompt in prompts:
            try:
                await get(pool, ns, prompt, SEGMENT + 64, deadline_s=3)
                hits += 1
            except KVError:
                continue
        assert time.monotonic() - begin < 6 * 3
        daemons["n2"].send(signal.SIGCONT)
        await until(lambda: "n2" in pool.roster.members, 5)
        async with asyncio.timeout(15):
            for prompt in prompts:
                while True:
                    try:
                        await get(pool, ns, prompt, SEGMENT + 64, deadline_s=3)
                        break
                    except KVError:
                        await asyncio.sleep(0.1)
    await no_tasks_left()


def test_a_daemon_that_cannot_join_says_why_and_ends():
    with running() as server:
        directory = f"valkey://127.0.0.1:{server.port}"
        cases = [
            (["--join", "http://nowhere"], "is no directory"),
            (["--join", f"valkey://127.0.0.1:{free_port()}"], "cannot be asked"),
            (["--join", directory, "--advertise", "127.0.0.1:1"], "does not reach this node"),
            (["--join", directory, "--host", "0.0.0.0", "--insecure"], "set advertise"),
        ]
        for options, message in cases:
            done = subprocess.run(
                [sys.executable, "-m", "kvpool.daemon", "--port", "0", "--memory", "8MiB", *options],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == 2, done
            assert message in done.stderr
            assert "Traceback" not in done.stderr


async def test_connect_explains_wrong_use():
    with pytest.raises(ConfigError, match="needs a port"):
        await kvpool.connect("127.0.0.1")
    with pytest.raises(ConfigError, match="one host"):
        await kvpool.connect(["127.0.0.1"], 7777)
    assert cli("cluster", "status", "-d", ",").returncode == 2
