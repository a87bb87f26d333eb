"""Keeps KVCache for reuse: a hybrid prefix cache, embedded or behind a daemon."""

from .errors import MissError, PoolError, PoolFullError
from .keys import KeyChain, Namespace
from .match import Explanation, Match
from .pool import Pool
from .protocol import LeaseInfo, PoolProtocol

__all__ = [
    "Explanation",
    "KeyChain",
    "LeaseInfo",
    "Match",
    "MissError",
    "Namespace",
    "Pool",
    "PoolError",
    "PoolFullError",
    "PoolProtocol",
]
