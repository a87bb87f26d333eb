"""kvpoold with TLS and tokens, as it is run: 'kvpool certs', tenants apart, strangers bounded."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import stat
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

import kvpool
from kvpool.cli import app
from kvpool.config import load
from kvpool.security import RefusalReport
from kvtransport.errors import ConfigError, DeadlineError, HandshakeError, TlsError


@pytest.fixture
def cluster(tmp_path):
    """What an operator does: certificates by one command, two tokens by another."""
    made = CliRunner().invoke(
        app, ["certs", str(tmp_path), "--node", "n1=127.0.0.1", "--client", "alice=acme", "--json", "-"]
    )
    assert made.exit_code == 0, made.output
    lines = [CliRunner().invoke(app, ["token", name]).stdout for name in ("bob", "carol")]
    (tmp_path / "tokens").write_text("".join(lines))
    (tmp_path / "bob.token").write_text(lines[0])
    for name in ("tokens", "bob.token"):
        (tmp_path / name).chmod(0o600)
    (tmp_path / "kvpoold.toml").write_text(
        'port = 0\nmemory = "64MiB"\nlock = false\ntokens = "tokens"\n\n'
        '[tls]\nauthority = "ca.pem"\ncertificate = "n1.pem"\nkey = "n1.key"\n'
    )
    return tmp_path


@contextlib.contextmanager
def daemon(directory, *args):
    process = subprocess.Popen(
        [sys.executable, "-m", "kvpool.daemon", "--config", str(directory / "kvpoold.toml"), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        found = re.search(r"listening on [^ ]*:(\d+)", line)
        assert found, line + process.stderr.read()
        yield int(found[1]), process
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)


async def put_one(pool, layout) -> None:
    ns = await pool.namespace(layout, block_tokens=64)
    outgoing = await pool.put(ns, kvpool.KeyChain(ns, np.arange(200)), boundary=128)
    for extent in outgoing.manifest.extents:
        outgoing.ready(extent.layer, extent.tensor, kvpool_pages(extent.nbytes))
    await outgoing.seal()


def kvpool_pages(nbytes: int):
    from kvtransport import PageList

    return PageList.of(np.ones(nbytes, np.uint8))


async def matched(pool, layout) -> int:
    ns = await pool.namespace(layout, block_tokens=64)
    return (await pool.match(ns, kvpool.KeyChain(ns, np.arange(200)))).length


async def test_tenants_come_from_tokens_and_certificates_and_are_apart(cluster, hybrid):
    with daemon(cluster) as (port, _):
        ca = cluster / "ca.pem"
        alice = kvpool.client_config(authority=ca, certificate=cluster / "alice.pem", key=cluster / "alice.key")
        bob = kvpool.client_config(authority=ca, token=cluster / "bob.token")
        async with (
            await kvpool.connect("127.0.0.1", port, config=alice) as first,
            await kvpool.connect("127.0.0.1", port, config=bob) as second,
        ):
            await put_one(first, hybrid)
            assert await matched(first, hybrid) == 128
            assert await matched(second, hybrid) == 0
            await second.clear()
            assert await matched(first, hybrid) == 128
        nobody = kvpool.client_config(authority=ca)
        with pytest.raises(HandshakeError, match="a token or a client certificate is wanted"):
            await kvpool.connect("127.0.0.1", port, config=nobody)
        with pytest.raises(TlsError, match=r"made out to other addresses|another name"):
            await kvpool.connect(
                "127.0.0.1",
                port,
                config=kvpool.client_config(authority=ca, server_name="n2", token=cluster / "bob.token"),
            )


async def read(pool, layout, **options) -> None:
    """What :func:`put_one` stored."""
    ns = await pool.namespace(layout, block_tokens=64)

    def into(manifest):
        return {(e.layer, e.tensor): kvpool_pages(e.nbytes) for e in manifest.extents}

    receiver = await pool.get(ns, kvpool.KeyChain(ns, np.arange(200)), boundary=128, into=into, **options)
    await receiver.sealed()


async def test_what_a_tenant_reads_is_capped_for_it_alone(cluster, hybrid):
    """By the settings, here at a byte a second; whoever asks for a pace of its own does not get round it."""
    settings = cluster / "kvpoold.toml"
    settings.write_text("tenant_gbps = {acme = 8e-9}\n" + settings.read_text())
    with daemon(cluster) as (port, _):
        ca = cluster / "ca.pem"
        alice = kvpool.client_config(authority=ca, certificate=cluster / "alice.pem", key=cluster / "alice.key")
        bob = kvpool.client_config(authority=ca, token=cluster / "bob.token")
        async with (
            await kvpool.connect("127.0.0.1", port, config=alice) as capped,
            await kvpool.connect("127.0.0.1", port, config=bob) as free,
        ):
            await put_one(capped, hybrid)
            await put_one(free, hybrid)
            for options in ({}, {"bytes_per_s": 1e9}):
                with pytest.raises(DeadlineError):
                    await read(capped, hybrid, deadline_s=0.5, **options)
            await read(free, hybrid)


def test_the_admin_command_with_a_certificate_a_token_and_neither(cluster):
    with daemon(cluster) as (port, _):
        address = f"127.0.0.1:{port}"
        ca = ["--ca", str(cluster / "ca.pem")]
        own = ["--certificate", str(cluster / "alice.pem"), "--key", str(cluster / "alice.key")]
        for who in (own, ["--token", str(cluster / "bob.token")]):
            done = CliRunner().invoke(app, ["stat", "-a", address, *ca, *who, "--json", "-"])
            assert done.exit_code == 0, done.output
            assert json.loads(done.stdout)["links"] == 1
        assert isinstance(CliRunner().invoke(app, ["stat", "-a", address, *ca]).exception, HandshakeError)
        assert isinstance(CliRunner().invoke(app, ["stat", "-a", address, *own]).exception, ConfigError)


def test_certs_says_what_goes_where_and_keeps_secrets(tmp_path):
    run = CliRunner().invoke
    first = run(app, ["certs", str(tmp_path), "--node", "n1=10.0.0.1,n1.example", "--client", "a"])
    assert first.exit_code == 0, first.output
    for words in ("ca.pem", "keep it offline", "[tls]", 'certificate = "n1.pem"', "kvpool stat"):
        assert words in first.output
    for path in tmp_path.iterdir():
        mode = stat.S_IMODE(os.stat(path).st_mode)
        assert mode == (0o600 if path.suffix == ".key" else 0o644), path
    again = run(app, ["certs", str(tmp_path), "--client", "a"])
    assert "is there already: say --renew" in str(again.exception)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    renewed = run(app, ["certs", str(tmp_path), "--renew", "--json", "-"])
    body = json.loads(renewed.stdout)
    assert [(c["name"], c["kind"], c["hosts"]) for c in body["certificates"]] == [
        ("a", "client", []),
        ("n1", "node", ["n1.example", "10.0.0.1"]),
    ]
    assert body["authority"]["new"] is False
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"a.pem", "a.key", "n1.pem", "n1.key"}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--node", "n1=not a host"], "neither a host name nor an address"),
        (["--node", "../x"], "neither a host name"),
        (["--client", "a/b"], "is no name"),
        (["--client", "ca"], "the authority's own name"),
        (["--client", "a", "--client", "a"], "the same name"),
        (["--client", "a", "--days", "0"], "--days must be"),
        (["--renew"], "nothing to renew"),
    ],
)
def test_certs_refuses(tmp_path, args, says):
    done = CliRunner().invoke(app, ["certs", str(tmp_path / "new"), *args])
    assert says in str(done.exception)
    assert not (tmp_path / "new").exists()


def test_certs_without_its_authoritys_key(tmp_path):
    CliRunner().invoke(app, ["certs", str(tmp_path), "--client", "a"])
    (tmp_path / "ca.key").unlink()
    done = CliRunner().invoke(app, ["certs", str(tmp_path), "--client", "b"])
    assert "can only be made where the authority's key is" in str(done.exception)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[tls]\nauthority = 'ca.pem'\n", "missing required field `certificate`"),
        ("tenant_gbps = {acme = 0}\n", "tenant_gbps of 'acme' must be above 0"),
        ("[tls]\nauthority = 'a'\ncertificate = 'b'\nkey = 'c'\ncolour = 'd'\n", "unknown field `colour`"),
    ],
)
def test_settings_are_checked(tmp_path, text, says):
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        load(tmp_path / "x.toml", {})


def test_settings_and_options_of_tls_mix(cluster, tmp_path):
    config = load(cluster / "kvpoold.toml", {"tls_key": "other.key"})
    assert config.tls_config.certificate == cluster / "n1.pem"
    assert config.tls_config.key == os.path.abspath("other.key") or str(config.tls_config.key).endswith("/other.key")
    assert config.token_store is not None


async def test_refused_strangers_cost_few_lines(cluster):
    """A thousand of them: one line, and a sum with the next."""
    with daemon(cluster) as (port, process):
        for _ in range(40):
            writers = []
            for _ in range(25):
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.write(b"GET / HTTP/1.1\r\n\r\n\x1b[31m")
                    writers.append(writer)
            await asyncio.sleep(0.01)
            for writer in writers:
                writer.transport.abort()
        bob = kvpool.client_config(authority=cluster / "ca.pem", token=cluster / "bob.token")
        async with await kvpool.connect("127.0.0.1", port, config=bob) as pool:
            assert (await pool.stat())["links"] == 1
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
    assert 1 <= said.count("refused 127.0.0.1:") <= 2
    assert "\x1b" not in said


def test_the_report_sums_up():
    now, lines = [0.0], []
    report = RefusalReport(lambda: now[0], lines.append)
    for _ in range(100):
        report.refused("1.2.3.4:5", TlsError("no\x1b[2J"))
    now[0] = 11.0
    report.refused("1.2.3.4:6", HandshakeError("who?"))
    assert lines == [
        "refused 1.2.3.4:5: no?[2J",
        "refused 1.2.3.4:6: who? (99 more refused since the last such line: 99 tls)",
    ]
