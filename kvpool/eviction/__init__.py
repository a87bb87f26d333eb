"""What goes first when memory is needed: policies behind one small interface."""

from __future__ import annotations

from collections.abc import Callable

from kvtransport.errors import ConfigError

from .base import BLOCKED, FIRST, GONE, Policy, Shelf, Stored
from .gdsf import Gdsf
from .ghosts import GhostList
from .lru import Lru
from .manager import Eviction
from .marconi import Marconi
from .queues import S3Fifo, Sieve

DEFAULT_POLICY = "marconi"
POLICIES: dict[str, Callable[[], Policy]] = {
    "lru": Lru,
    "s3fifo": S3Fifo,
    "sieve": Sieve,
    "gdsf": Gdsf,
    "marconi": Marconi,
}


def make_policy(name: str = DEFAULT_POLICY) -> Policy:
    """A policy by name; raises ConfigError naming those there are."""
    if name not in POLICIES:
        raise ConfigError(f"there is no eviction policy {name!r}: choose one of {', '.join(POLICIES)}")
    return POLICIES[name]()


__all__ = [
    "BLOCKED",
    "DEFAULT_POLICY",
    "FIRST",
    "GONE",
    "POLICIES",
    "Eviction",
    "GhostList",
    "Policy",
    "Shelf",
    "Stored",
    "make_policy",
]
