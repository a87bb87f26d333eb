"""The peers of ``kvbench peers``: what each needs, how it is driven, what it reached before against the C loop."""

from __future__ import annotations

from dataclasses import dataclass, field

from .environments import Environment

TORCH = "torch==2.13.0"


@dataclass(frozen=True, slots=True)
class Known:
    """One peer. ``driver`` is a script in drivers/; ``moves`` are the operations it is measured in.

    ``documented`` is, by congestion control, the goodput at 1 MiB of its best operation over that of the C loop with
    four connections, as measured when the driver was settled (docs/performance.md): a run in which it
    stays below 0.85 of that did the peer no justice. ``latency_only``: a store, not a transport; only its 4 KiB count.
    """

    name: str
    title: str
    driver: str
    environment: Environment
    moves: tuple[str, ...]
    pings: tuple[str, ...]
    settings: str
    documented: dict[str, float] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    latency_only: bool = False


# C loop at 1 MiB with four connections in the runs the documented figures come from: 5.25 GB/s cubic, 4.0 GB/s BBR.
KNOWN = (
    Known(
        "mooncake",
        "Mooncake Transfer Engine, TCP",
        "mooncake_tcp.py",
        Environment(
            "mooncake",
            ("mooncake-transfer-engine-non-cuda", "numpy"),
            advice="apt-get install libibverbs1 librdmacm1 libnuma1",
        ),
        ("write", "read"),
        ("write", "read"),
        "batches of 64 MiB",
        {"cubic": 2.13 / 5.25, "bbr": 1.69 / 4.0},
    ),
    Known(
        "nixl",
        "NIXL over UCX TCP",
        "nixl_ucx.py",
        Environment("nixl", ("numpy", TORCH), ("nixl-cu12",)),
        ("write", "read"),
        ("write", "read"),
        "batches of 64 MiB, prepared descriptors, UCX_TLS=tcp,self",
        {"bbr": 1.0 / 4.0},
        {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "lo", "NIXL_LOG_LEVEL": "ERROR"},
    ),
    Known(
        "gloo",
        "torch.distributed gloo",
        "torch_gloo.py",
        Environment("gloo", ("numpy", TORCH)),
        ("send",),
        ("echo",),
        "16 sends in flight",
        {"cubic": 3.46 / 5.25, "bbr": 1.74 / 4.0},
        {"GLOO_SOCKET_IFNAME": "lo"},
    ),
    Known(
        "zeromq",
        "ZeroMQ",
        "zeromq.py",
        Environment("zeromq", ("pyzmq",)),
        ("send",),
        ("echo",),
        "DEALER to ROUTER, two sockets, no copy at both ends",
        {"cubic": 1.32 / 5.25, "bbr": 1.39 / 4.0},
    ),
    Known(
        "aiohttp",
        "aiohttp",
        "aiohttp_stream.py",
        Environment("aiohttp", ("aiohttp",)),
        ("post", "get"),
        ("post",),
        "one streamed body",
        {"cubic": 2.8 / 5.25},
    ),
    Known(
        "grpc",
        "gRPC",
        "grpc_stream.py",
        Environment("grpc", ("grpcio",)),
        ("stream",),
        ("unary",),
        "client streaming of raw bytes, no message limit",
        {"bbr": 0.75 / 4.0},
    ),
    Known(
        "memcached",
        "memcached with pylibmc",
        "memcached_store.py",
        Environment(
            "memcached",
            ("pylibmc",),
            programs=("memcached",),
            advice="apt-get install memcached libmemcached-dev zlib1g-dev",
        ),
        (),
        ("set", "get"),
        "binary protocol, TCP_NODELAY",
        latency_only=True,
    ),
)
