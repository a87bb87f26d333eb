"""Settings of kvpoold: a TOML file, validated; every key is documented here and in ``kvpoold --help``."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import msgspec

from kvtransport.errors import ConfigError
from kvtransport.identity import TokenStore
from kvtransport.tls import TlsConfig

from .cluster.replicas import ReplicaPolicy
from .eviction import DEFAULT_POLICY, POLICIES
from .security import TlsSettings

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def parse_size(text: str) -> int:
    """Bytes of a size such as "512 MiB", "2GB" or "1048576". Raises ConfigError."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in _UNITS:
        raise ConfigError(f"{text!r} is not a size: write a number and a unit, such as 512MiB or 2GB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


class DaemonConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one kvpoold."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 7777
    """Port to listen on; 0 takes any free one."""
    memory: str = "1GiB"
    """Memory for blocks, states and transfers, as a size; taken and pinned at the start."""
    page_bytes: int = 65_536
    """Bytes of one page of that memory."""
    name: str = "kvpoold"
    """Name shown to peers."""
    tls: TlsSettings | None = None
    """TLS 1.3 on every connection, as a table: authority, certificate, key, client_certificates. "kvpool certs" makes the files."""
    tokens: str = ""
    """File of the tokens that clients may show instead of a certificate, one a line; "kvpool token" makes one."""
    insecure: bool = False
    """Allow listening beyond loopback without encryption and authentication."""
    local_socket: str = ""
    """Unix socket at which clients on this machine get the memory to read it in place; the pool then serves local_tenant only."""
    local_tenant: str = "default"
    """Whose clients may map the memory, all of it."""
    metrics_port: int | None = None
    """Port for Prometheus (GET /metrics, plain HTTP); 0 takes any free one, none is served without. Needs the metrics extra."""
    metrics_host: str = "127.0.0.1"
    """Address to serve metrics on: whoever reaches it reads them."""
    grace_s: float = 10.0
    """Seconds that transfers in progress get after SIGTERM."""
    keepalive_s: float = 5.0
    """Seconds of silence before a peer is pinged."""
    dead_after_s: float = 15.0
    """Seconds of silence after which a peer is given up."""
    reconnect_s: float = 10.0
    """Seconds that a client whose connections are lost is waited for; its puts and gets stay as they are meanwhile."""
    window_bytes: int = 64 << 20
    """Bytes a producer may have sent and not yet seen applied, per put."""
    prefix_floor: str = ""
    """Blocks and states that transfer bytes never push out, as a size; default half the memory."""
    policy: str = DEFAULT_POLICY
    """What is evicted first: marconi, lru, s3fifo, sieve or gdsf."""
    quotas: dict[str, str] = {}
    """Memory by tenant, as sizes."""
    tenant_gbps: dict[str, float] = {}
    """Bandwidth by tenant of what this node sends it, all its reads together, 1e9 bits a second; others are not limited."""
    explain_tenants: bool = False
    """Let explanations say that another tenant has the same tokens: for pools whose users may know of one another."""
    lock: bool = True
    """Lock the memory where the system allows it."""
    join: str = ""
    """Directory of the cluster to join, such as valkey://10.0.0.5:6379?name=pool; none by default."""
    node: str = ""
    """This node's id in the cluster, the same after a restart; default its advertised address."""
    cluster: str = "default"
    """The cluster (datacenter) this node is in."""
    advertise: str = ""
    """HOST:PORT under which others reach this node; default where it listens."""
    ttl_s: float = 3.0
    """Seconds after which the cluster takes this node for gone when it is silent."""
    replicas: int = 1
    """Copies of every block and state in the cluster; the nodes make them in the background."""
    replicas_by_model: dict[str, int] = {}
    """The same for layouts by their model's name, or "TENANT/MODEL"."""
    hot_replicas: int = 3
    """Copies that what is read most gets at most."""
    hot_hits: float = 60.0
    """Reads (those of a minute ago count half) for which a segment gets another copy."""
    rebalance: bool = True
    """Copy to a node that joins what belongs there by placement; false where clients write with placement="local"."""
    copy_gbps: float = 1.0
    """Bandwidth of this node's copies to others (replication, repair, joins), 1e9 bits a second."""

    events: str = ""
    """ZeroMQ address at which stored and removed blocks are published, such as tcp://127.0.0.1:5557; none by default. Needs pyzmq."""
    events_replay: str = ""
    """ZeroMQ address at which subscribers ask for what they missed."""
    events_topic: str = ""
    """Topic of the messages."""
    events_tenant: str = "default"
    """Whose blocks are told of."""

    directory: str = "."
    """Where relative paths start; by default where the settings' file is."""

    @property
    def tls_config(self) -> TlsConfig | None:
        """Raises ConfigError."""
        return None if self.tls is None else self.tls.config(Path(self.directory))

    @property
    def token_store(self) -> TokenStore | None:
        """Raises ConfigError."""
        return TokenStore(Path(self.directory) / self.tokens) if self.tokens else None

    @property
    def replica_policy(self) -> ReplicaPolicy:
        return ReplicaPolicy(
            factor=self.replicas,
            by_model=self.replicas_by_model,
            most=self.hot_replicas,
            hits_per_copy=self.hot_hits,
        )

    @property
    def memory_bytes(self) -> int:
        return parse_size(self.memory)


def load(path: Path | None, overrides: dict[str, object]) -> DaemonConfig:
    """The settings of a TOML file (None: defaults), with ``overrides`` on top; raises ConfigError naming the key."""
    body: dict[str, object] = {}
    if path is not None:
        try:
            body = tomllib.loads(path.read_text())
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not TOML: {error}") from error
    if path is not None:
        body.setdefault("directory", str(path.parent))
    tls = {key.removeprefix("tls_"): value for key, value in overrides.items() if key.startswith("tls_")}
    overrides = {key: value for key, value in overrides.items() if not key.startswith("tls_")}
    if any(value is not None for value in tls.values()):
        # Given by hand: from where the command was typed.
        given = {key: str(Path(str(value)).absolute()) for key, value in tls.items() if value is not None}
        there = body.get("tls")
        body["tls"] = {**there, **given} if isinstance(there, dict) else given
    if overrides.get("tokens"):
        overrides["tokens"] = str(Path(str(overrides["tokens"])).absolute())
    body.update({key: value for key, value in overrides.items() if value is not None})
    try:
        config = msgspec.convert(body, DaemonConfig)
    except msgspec.ValidationError as error:
        known = ", ".join(DaemonConfig.__struct_fields__)
        raise ConfigError(f"{path or 'settings'}: {error}; known keys: {known}") from error
    if not 0 <= config.port <= 65_535:
        raise ConfigError(f"port {config.port} is not in 0..65535")
    for name in (
        "grace_s",
        "keepalive_s",
        "dead_after_s",
        "window_bytes",
        "page_bytes",
        "ttl_s",
        "copy_gbps",
        "hot_hits",
    ):
        if not getattr(config, name) > 0:
            raise ConfigError(f"{name} must be above 0, got {getattr(config, name)}")
    for tenant, gbps in config.tenant_gbps.items():
        if not gbps > 0:
            raise ConfigError(f"tenant_gbps of {tenant!r} must be above 0, got {gbps}")
    for key, count in {
        "replicas": config.replicas,
        "hot_replicas": config.hot_replicas,
        **config.replicas_by_model,
    }.items():
        if not 1 <= count <= 16:
            raise ConfigError(f"{key}: copies are 1 to 16, got {count}")
    if config.policy not in POLICIES:
        raise ConfigError(f"there is no eviction policy {config.policy!r}: choose one of {', '.join(POLICIES)}")
    if config.memory_bytes <= 0:
        raise ConfigError(f"memory must be above 0, got {config.memory!r}")
    if config.reconnect_s < 0:
        raise ConfigError(f"reconnect_s must not be below 0, got {config.reconnect_s}")
    return config
