"""``kv_connector_extra_config`` of the vLLM connector: every key, its unit and what it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from kvtransport.endpoint import EndpointConfig
from kvtransport.errors import ConfigError
from kvtransport.flow.spilling import SpillPolicy, WhenFull
from kvtransport.identity import Token, TokenStore
from kvtransport.tls import TlsConfig

Port = Annotated[int, msgspec.Meta(ge=1, le=65_535)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
Text = Annotated[str, msgspec.Meta(min_length=1)]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 44)]


class ConnectorConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Both sides take the same keys; each uses its own. Sizes in bytes, times in seconds."""

    dial: Literal["producer", "consumer"] = "producer"
    """Who opens the TCP connections; the same on both sides. "producer": prefill dials, decode listens. "consumer": decode
    dials, prefill listens; for a decode side that cannot be reached. The side that listens needs ``listen_port``."""
    listen_host: str = "127.0.0.1"
    """Address to listen on. Beyond loopback ``insecure`` must be true."""
    listen_port: Port | None = None
    """Port of tensor parallel rank 0 (of data parallel rank 0); rank r listens on ``listen_port + r``, data parallel rank d
    on ``listen_port + d * tensor_parallel_size + r``. Required on the side that listens."""
    connections: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    """TCP connections per link (a pair of ranks), opened by the side that dials."""
    token: str | None = None
    """Shared secret of at least 16 bytes (or ``name:secret``) that the dialling side proves to know and the listening side demands."""
    tls_authority: Text | None = None
    """PEM file of the certificate authorities that the other side's certificate is held against; turns TLS 1.3 on. Then both sides
    need it, the listening one with a certificate of its own."""
    tls_certificate: Text | None = None
    """PEM file of this side's certificate (with its chain)."""
    tls_key: Text | None = None
    """PEM file of its key."""
    tls_client_certificates: Literal["require", "accept", "off"] = "accept"
    """Certificates of dialling peers: "require" one, "accept" one instead of a token, or "off": they are not asked for."""
    tls_server_name: Text | None = None
    """What the listening side's certificate is made out to, where that is not the host that is dialled."""
    insecure: bool = False
    """Allow addresses beyond loopback although nothing is encrypted or nobody is authenticated. Only for networks that are trusted
    themselves."""

    receive_deadline_s: Seconds = 120.0
    """Decode: from its blocks' allocation until the cache must be complete; then the request counts as failed and vLLM follows
    ``kv_load_failure_policy``. Must cover queueing and prefill."""
    send_deadline_s: Seconds = 120.0
    """Prefill: from a request's first computed chunk until decode must have confirmed everything; then its blocks are freed."""
    connect_deadline_s: Seconds = 10.0
    """Dialling a peer that does not answer is repeated for so long."""
    keepalive_s: Seconds = 5.0
    """A peer that is silent for so long is pinged."""
    dead_after_s: Seconds = 15.0
    """A peer that is silent for so long is given up: its connections are closed."""
    reconnect_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 10.0
    """Connections that were lost are dialled again, or waited for, for so long, and transfers go on with what is missing; then they
    fail. 0: they fail at once."""

    chunk_bytes: Annotated[int, msgspec.Meta(ge=4_096, le=16 << 20)] = 1 << 20
    """Largest chunk: the unit of striping, checksum and acknowledgement."""
    window_bytes: Annotated[int, msgspec.Meta(ge=64 << 10, le=1 << 34)] = 64 << 20
    """Decode: bytes of one transfer that may be on their way."""
    spill_bytes: Bytes = 256 << 20
    """Prefill: host memory for ready layers that decode does not take yet, so that vLLM's blocks are freed. 0: none."""
    when_spill_full: Literal["wait", "fail"] = "wait"
    """Prefill, with ``spill_bytes`` used up: hold vLLM's blocks, or fail the transfer (decode then recomputes)."""
    staging_bytes: Bytes = 1 << 30
    """Host memory for copies from and to a device (pinned), and for prefixes that decode already has. A transfer that would
    exceed it fails."""

    full_cudagraphs: bool = False
    """Decode (``kv_role`` kv_consumer) on CUDA: let vLLM capture whole steps in CUDA graphs. Not on prefill, where layers leave from
    hooks between captured pieces."""

    model_id: str | None = None
    """What both sides call the model; part of the fingerprint. Default: the last component of its path or name."""
    revision: str = ""
    """Revision of the weights; part of the fingerprint: sides with different ones refuse each other."""

    debug_dir: Text | None = None
    """Append a JSON line per ended transfer to ``transfers-<role>-<rank>-<pid>.jsonl`` here: end, error, bytes, times per layer."""
    debug_hashes: bool = False
    """With ``debug_dir``: also xxh3_64 of every layer's bytes, at both ends, to ``hashes-<role>-<rank>-<pid>.jsonl``. Slow."""
    debug_drop_state: bool = False
    """Decode: zero the recurrent states on arrival. A control for tests: outputs must change."""

    def __post_init__(self) -> None:
        if self.dead_after_s <= self.keepalive_s:
            raise ValueError(f"dead_after_s ({self.dead_after_s:g}) must be above keepalive_s ({self.keepalive_s:g})")
        if self.tls_authority is None:
            for name in ("tls_certificate", "tls_key", "tls_server_name"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} needs tls_authority, which turns TLS on")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together")
        if self.debug_hashes and self.debug_dir is None:
            raise ValueError("debug_hashes needs debug_dir, where the hashes are written")

    def listens(self, *, producer: bool, consumer: bool) -> bool:
        """Whether an engine of this role listens."""
        return producer if self.dial == "consumer" else consumer

    def require_port(self) -> int:
        """``listen_port``; raises ConfigError where it is missing."""
        if self.listen_port is None:
            side = "decode" if self.dial == "producer" else "prefill"
            raise ConfigError(
                f"kv_connector_extra_config: listen_port is required on the {side} side (dial = {self.dial!r}); "
                "give a free port, and its number as remote_port in the other side's kv_transfer_params"
            )
        return self.listen_port

    def endpoint(self, name: str) -> EndpointConfig:
        """The transport's settings for an endpoint called ``name``."""
        token = None if self.token is None else Token.shared(self.token)
        return EndpointConfig(
            name=name,
            insecure=self.insecure,
            tls=self._tls(),
            token=token,
            tokens=None if token is None else TokenStore([token]),
            keepalive_s=self.keepalive_s,
            dead_after_s=self.dead_after_s,
            reconnect_s=self.reconnect_s,
            chunk_bytes=self.chunk_bytes,
            spill=SpillPolicy(budget_bytes=self.spill_bytes, when_full=WhenFull(self.when_spill_full)),
        )

    def _tls(self) -> TlsConfig | None:
        if self.tls_authority is None:
            return None
        return TlsConfig(
            self.tls_authority,
            self.tls_certificate,
            self.tls_key,
            client_certificates=self.tls_client_certificates,
            server_name=self.tls_server_name,
        )


def read_config(extra: Mapping[str, Any]) -> ConnectorConfig:
    """The validated form of ``kv_connector_extra_config``; raises ConfigError naming the key."""
    try:
        return msgspec.convert(dict(extra), ConnectorConfig)
    except msgspec.ValidationError as error:
        known = ", ".join(field.name for field in msgspec.structs.fields(ConnectorConfig))
        raise ConfigError(f"kv_connector_extra_config: {error}; the keys are: {known}") from None
