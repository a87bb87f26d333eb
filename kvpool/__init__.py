"""A distributed hybrid prefix cache for KVCache; see docs/design.md."""

from .client import PoolClient
from .connecting import connect
from .core import PoolCore
from .errors import PoolError
from .keys import KeyChain, Namespace
from .match import Explanation, Match
from .pool import Pool
from .protocol import LeaseInfo, PoolProtocol
from .security import client_config

__all__ = [
    "Explanation",
    "KeyChain",
    "LeaseInfo",
    "Match",
    "Namespace",
    "Pool",
    "PoolClient",
    "PoolCore",
    "PoolError",
    "PoolProtocol",
    "client_config",
    "connect",
]
