"""Addresses as they are written: HOST:PORT."""

from __future__ import annotations

import ipaddress

from .errors import ConfigError


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT" or "[HOST]:PORT". Raises ConfigError."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65_536:
        raise ConfigError(f"{address!r} is not an address: write HOST:PORT, such as 127.0.0.1:7777")
    return host, int(port)


def same_host(one: str, other: str) -> bool:
    """Whether two hosts are the same by what is written: nothing is looked up. "localhost" is this machine's loopback."""
    hosts = [host.strip("[]") for host in (one, other)]
    try:
        first, second = (_numeric(host) for host in hosts)
    except ValueError:
        return bool(hosts[0]) and hosts[0] == hosts[1]
    return first == second or (first.is_loopback and second.is_loopback)


def _numeric(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    found = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    mapped = getattr(found, "ipv4_mapped", None)
    return mapped or found
