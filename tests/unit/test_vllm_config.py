"""The vLLM connector's settings and request parameters."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpool.engines.vllm.config import ConnectorConfig, read_config
from kvpool.engines.vllm.params import Rendezvous, read_params
from kvtransport.errors import ConfigError
from kvtransport.flow.spilling import WhenFull
from kvtransport.identity import Token
from kvtransport.tls import TlsConfig

ID = "00112233445566778899aabbccddeeff"


def test_settings_reach_the_transport():
    config = read_config(
        {
            "listen_port": 7000,
            "connections": 2,
            "token": "a secret of 16 bytes",
            "keepalive_s": 1,
            "dead_after_s": 4.5,
            "reconnect_s": 0,
            "spill_bytes": 0,
            "when_spill_full": "fail",
            "chunk_bytes": 65_536,
        }
    )
    endpoint = config.endpoint("vllm:m:0")
    assert (endpoint.name, endpoint.insecure) == ("vllm:m:0", False)
    assert endpoint.token == Token("shared", b"a secret of 16 bytes")
    assert endpoint.tokens is not None  # either side may dial
    assert (endpoint.keepalive_s, endpoint.dead_after_s, endpoint.reconnect_s) == (1, 4.5, 0)
    assert endpoint.chunk_bytes == 65_536
    assert (endpoint.spill.budget_bytes, endpoint.spill.when_full) == (0, WhenFull.FAIL)


def test_every_key_is_documented_where_users_look():
    text = (Path(__file__).parents[2] / "docs/engines.md").read_text()
    for field in ConnectorConfig.__struct_fields__:
        assert f"`{field}`" in text, f"docs/engines.md does not explain {field}"


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"listen_prt": 1}, "listen_prt"),
        ({"listen_port": 0}, "listen_port"),
        ({"listen_port": "x"}, "listen_port"),
        ({"dial": "both"}, "dial"),
        ({"connections": 65}, "connections"),
        ({"keepalive_s": 20}, "dead_after_s (15) must be above keepalive_s (20)"),
        ({"debug_hashes": True}, "debug_hashes needs debug_dir"),
        ({"receive_deadline_s": 0}, "receive_deadline_s"),
        ({"tls_certificate": "me.pem", "tls_key": "me.key"}, "tls_certificate needs tls_authority"),
        ({"tls_authority": "ca.pem", "tls_key": "me.key"}, "tls_certificate and tls_key belong together"),
    ],
)
def test_wrong_settings_are_named(extra, says):
    with pytest.raises(ConfigError, match="kv_connector_extra_config") as caught:
        read_config(extra)
    assert says in caught.value.message
    assert "the keys are: dial, listen_host" in caught.value.message


def test_tls_reaches_the_transport():
    config = read_config(
        {"tls_authority": "ca.pem", "tls_certificate": "me.pem", "tls_key": "me.key", "tls_server_name": "d"}
    )
    assert config.endpoint("x").tls == TlsConfig("ca.pem", "me.pem", "me.key", server_name="d")
    assert read_config({}).endpoint("x").tls is None


@pytest.mark.parametrize("dial", ["producer", "consumer"])
def test_the_side_that_listens_needs_a_port(dial):
    config = read_config({"dial": dial})
    listener = {"producer": dial == "consumer", "consumer": dial == "producer"}
    assert config.listens(**listener)
    assert not config.listens(producer=not listener["producer"], consumer=not listener["consumer"])
    with pytest.raises(ConfigError, match=r"listen_port is required on the (decode|prefill) side"):
        config.require_port()
    assert read_config({"listen_port": 7000}).require_port() == 7000


def prefill(**params):
    return read_params(params, dial="producer", producer=True, consumer=False)


def decode(**params):
    return read_params(params, dial="producer", producer=False, consumer=True)


def test_prefill_is_told_where_decode_listens():
    meeting = prefill(do_remote_decode=True, transfer_id=ID, remote_host="10.0.0.2", remote_port=7000, other=object())
    assert meeting == Rendezvous("send", bytes.fromhex(ID), ("10.0.0.2", 7000))
    assert decode(do_remote_prefill=True, transfer_id=ID) == Rendezvous("receive", bytes.fromhex(ID), None)


def test_or_decode_where_prefill_listens():
    def read(**params):
        return read_params(params, dial="consumer", producer=True, consumer=True)

    assert read(do_remote_decode=True, transfer_id=ID).address is None
    assert read(do_remote_prefill=True, transfer_id=ID, remote_host="::1", remote_port=1).address == ("::1", 1)
    with pytest.raises(ConfigError, match="where the prefill engine listens"):
        read(do_remote_prefill=True, transfer_id=ID)


@pytest.mark.parametrize("params", [None, {}, {"transfer_id": ID}, {"do_remote_decode": False}])
def test_requests_that_ask_nothing(params):
    assert read_params(params, dial="producer", producer=True, consumer=True) is None


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"do_remote_decode": True}, "transfer_id is missing"),
        ({"do_remote_decode": True, "transfer_id": "xyz"}, "transfer_id"),
        ({"do_remote_decode": True, "transfer_id": ID}, "where the decode engine listens"),
        ({"do_remote_decode": True, "transfer_id": ID, "remote_host": "h", "remote_port": 70_000}, "remote_port"),
        ({"do_remote_decode": True, "do_remote_prefill": True, "transfer_id": ID}, "exclude each other"),
        ({"do_remote_prefill": True, "transfer_id": ID}, "cannot receive caches; its kv_role is kv_producer"),
        ({"do_remote_decode": "yes", "transfer_id": ID}, "do_remote_decode"),
    ],
)
def test_unusable_parameters_are_named(params, says):
    with pytest.raises(ConfigError, match="kv_transfer_params") as caught:
        prefill(**params)
    assert says in caught.value.message
