"""ZeroMQ, an optional dependency, and where its sockets may be."""

from __future__ import annotations

import ipaddress
from typing import Any

from kvtransport.errors import ConfigError, InsecureBindError


def zeromq() -> tuple[Any, Any]:
    """(zmq, zmq.asyncio). Raises ConfigError without pyzmq."""
    try:
        import zmq
        import zmq.asyncio
    except ImportError as error:
        raise ConfigError("KV cache events travel over ZeroMQ: pip install 'kvtransport[cluster]'") from error
    return zmq, zmq.asyncio


def check_bind(endpoint: str, insecure: bool) -> None:
    """Raises ConfigError for an endpoint that is none, InsecureBindError for one beyond this machine without ``insecure``."""
    scheme, found, rest = endpoint.partition("://")
    if not found or scheme not in ("tcp", "ipc", "inproc") or not rest:
        raise ConfigError(f"{endpoint!r} is no ZeroMQ endpoint: write tcp://HOST:PORT, tcp://*:PORT or ipc://PATH")
    if scheme != "tcp" or insecure:
        return
    host = rest.rpartition(":")[0].strip("[]")
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local:
        raise InsecureBindError(
            f"{endpoint} is reachable from other machines and events are neither encrypted nor authenticated: set insecure = true, or "
            "publish on loopback"
        )
