"""Errors of the pool; they hang on the tree of :mod:`kvtransport.errors`.

::

    KVError
    └── PoolError
        ├── KeyChainError          a key, chain or tenant name is not usable       local
        ├── NamespaceError         unknown namespace, or too many of them          local
        ├── MissError              not in the pool (or not restorable)             remote
        ├── PrefixMissingError     a put starts where nothing is stored            remote, retryable
        ├── PoolFullError          no memory, and nothing that may be evicted      remote, retryable
        │   └── QuotaError         the tenant's own quota is the limit             remote, retryable
        ├── PoolLimitError         a bounded table of the pool is full             remote, retryable
        ├── DuplicateRequestError  the request id is in use                        local
        ├── LeaseError             no such lease, or it has expired                local
        ├── DirectoryError         the directory of a cluster cannot be asked      network, retryable
        ├── NoNodeError            no node of the cluster can take or give it      remote, retryable
        └── SlabError              a slab was freed twice or used after its free   local
"""

from __future__ import annotations

from kvtransport.errors import Fault, KVError


class PoolError(KVError):
    code = "pool"


class KeyChainError(PoolError):
    code = "key_chain"


class NamespaceError(PoolError):
    code = "namespace"


class MissError(PoolError):
    """``restorable`` is the largest length (tokens) that could be restored instead, 0 when none."""

    code = "miss"
    default_fault = Fault.REMOTE

    def __init__(
        self, message: str, *, fault: Fault | None = None, retryable: bool | None = None, restorable: int = 0
    ) -> None:
        super().__init__(message, fault=fault, retryable=retryable)
        self.restorable = restorable


class PrefixMissingError(PoolError):
    """``resident`` is the number of tokens whose blocks are there: produce from there, or from an earlier start."""

    code = "prefix_missing"
    default_fault = Fault.REMOTE
    default_retryable = True

    def __init__(
        self, message: str, *, fault: Fault | None = None, retryable: bool | None = None, resident: int = 0
    ) -> None:
        super().__init__(message, fault=fault, retryable=retryable)
        self.resident = resident


class PoolFullError(PoolError):
    code = "pool_full"
    default_fault = Fault.REMOTE
    default_retryable = True


class QuotaError(PoolFullError):
    code = "quota"


class PoolLimitError(PoolError):
    code = "pool_limit"
    default_fault = Fault.REMOTE
    default_retryable = True


class DuplicateRequestError(PoolError):
    code = "duplicate_request"


class LeaseError(PoolError):
    code = "lease"


class SlabError(PoolError):
    code = "slab"


class DirectoryError(PoolError):
    code = "directory"
    default_fault = Fault.NETWORK
    default_retryable = True


class NoNodeError(PoolError):
    code = "no_node"
    default_fault = Fault.REMOTE
    default_retryable = True
