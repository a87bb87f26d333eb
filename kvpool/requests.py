"""Which put answers which request: so that a reader may come before, during or after it."""

from __future__ import annotations

from collections import OrderedDict

from kvtransport.errors import KVError

from .errors import DuplicateRequestError, KeyChainError, MissError
from .keys import KeyChain, Namespace
from .put import Put

REQUEST_BYTES = 16
MAX_FINISHED = 4_096
"""Outcomes remembered; the oldest are forgotten first."""


class Requests:
    """Puts by (tenant, 16-byte request). The number of open ones is bounded by the core's bound on puts."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, bytes], Put] = {}
        self._finished: OrderedDict[tuple[str, bytes], KVError | None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def known(self, tenant: str, request: bytes) -> bool:
        """Whether a put with this request has begun, and its outcome is not forgotten yet."""
        return (tenant, request) in self._open or (tenant, request) in self._finished

    def check_new(self, tenant: str, request: bytes | None, chain: KeyChain | None) -> None:
        """Raise KeyChainError for a malformed request, DuplicateRequestError for one in use."""
        if request is None:
            if chain is None:
                raise KeyChainError("a put needs a key chain or a request, else nobody could ever read it")
            return
        if not isinstance(request, bytes) or len(request) != REQUEST_BYTES:
            raise KeyChainError(f"a request is {REQUEST_BYTES} bytes, got {request!r:.80}")
        if (tenant, request) in self._open:
            raise DuplicateRequestError(f"request {request.hex()} is in use by a put that has not ended")

    def begin(self, put: Put) -> None:
        if put.request is not None:
            self._open[put.ns.tenant, put.request] = put
            self._finished.pop((put.ns.tenant, put.request), None)

    def finish(self, put: Put, error: KVError | None) -> None:
        """The request's put is over: with ``error``, or what it brought is in the index, or was read and is gone."""
        if put.request is None or self._open.get((put.ns.tenant, put.request)) is not put:
            return
        if error is None and put.chain is None:
            error = MissError(
                f"request {put.request.hex()} has been read, or its deadline has passed: its bytes are gone"
            )
        name = (put.ns.tenant, put.request)
        del self._open[name]
        self._finished[name] = error
        while len(self._finished) > MAX_FINISHED:
            self._finished.popitem(last=False)

    def follow(self, ns: Namespace, chain: KeyChain | None, request: bytes | None, boundary: int) -> Put | None:
        """The put that a reader of ``request`` follows; None when the index has to answer.

        Raises the error of a request that failed, KeyChainError when the put is of something else.
        """
        if request is None:
            return None
        put = self._open.get((ns.tenant, request))
        if put is None:
            error = self._finished.get((ns.tenant, request))
            if error is not None:
                raise error
            return None
        if put.ns.id != ns.id or put.boundary != boundary:
            raise KeyChainError(
                f"request {request.hex()} is a put of {put.boundary} tokens of {put.ns.layout.model!r}; asked for {boundary} "
                f"tokens of {ns.layout.model!r}"
            )
        if chain is not None and put.chain is not None:
            # Opaque chains have no keys off the grid: their last block speaks for them.
            opaque = chain.opaque or put.chain.opaque
            last = boundary - boundary % ns.block_tokens if opaque else boundary
            if last and chain.key_at(last) != put.chain.key_at(last):
                raise KeyChainError(f"request {request.hex()} is a put of other tokens than this chain's")
        return put
