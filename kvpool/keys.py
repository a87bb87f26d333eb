"""Namespaces and key chains: how tokens become keys.

Hashes, all SHA-256 (a tenant may choose both colliding inputs, so nothing weaker serves)::

    root  = SHA-256("kvt1" + layout fingerprint + salt)
    h_0   = SHA-256(root    + tokens of block 0 + extra)
    h_i   = SHA-256(h_(i-1) + tokens of block i)
    tail  = SHA-256("kvt1-tail" + parent + u32 count + tail tokens [+ extra when the parent is the root])

Tokens are little-endian u32. The encoding is injective: inside one root every block has the same number of
tokens (the fingerprint covers the block size), so whatever follows them is ``extra``; a tail says its own count,
and its tag keeps it apart from blocks. ``extra`` (an adapter's name, the hash of an image) enters at block 0
only: every later key depends on it through its parent.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from kvtransport.layout import CacheLayout

from .errors import KeyChainError

MIN_BLOCK_TOKENS = 16
MAX_BLOCK_TOKENS = 1024
MAX_CHAIN_TOKENS = 1 << 24
"""Tokens of one chain at most (16.8 million)."""
MAX_KEY_BYTES = 64
"""An engine's own block hashes may be this long."""
MAX_FLAT_KEY_BYTES = 256
MAX_EXTRA_BYTES = 4096
MAX_SALT_BYTES = 64
MAX_TAILS = 1024
"""Off-grid keys that an opaque chain may be given."""
MAX_TENANT_BYTES = 256

Tokens = Sequence[int] | np.ndarray[Any, np.dtype[Any]] | Iterable[int]


def check_tenant(tenant: str) -> str:
    """``tenant`` itself, or KeyChainError when it is not a name of 1 to MAX_TENANT_BYTES bytes."""
    if not isinstance(tenant, str) or not 0 < len(tenant.encode("utf-8", "replace")) <= MAX_TENANT_BYTES:
        raise KeyChainError(f"a tenant is a name of 1 to {MAX_TENANT_BYTES} bytes, got {tenant!r:.80}")
    return tenant


def check_flat_keys(keys: Sequence[bytes]) -> Sequence[bytes]:
    """``keys`` themselves, or KeyChainError when one is not 1 to MAX_FLAT_KEY_BYTES bytes."""
    if set(map(type, keys)) - {bytes} or (
        keys and not 0 < min(map(len, keys)) <= max(map(len, keys)) <= MAX_FLAT_KEY_BYTES
    ):
        bad = next(k for k in keys if type(k) is not bytes or not 0 < len(k) <= MAX_FLAT_KEY_BYTES)
        raise KeyChainError(f"a flat key is 1 to {MAX_FLAT_KEY_BYTES} bytes, got {bad!r:.80}")
    return keys


@dataclass(frozen=True)
class Namespace:
    """A layout's fingerprint inside a tenant, with one block size (tokens).

    ``salt`` separates users of one tenant further: different salts never share a key. The tenant comes
    from the authenticated session, never from a request.
    """

    tenant: str
    layout: CacheLayout
    block_tokens: int
    salt: bytes = b""

    def __post_init__(self) -> None:
        check_tenant(self.tenant)
        if not MIN_BLOCK_TOKENS <= self.block_tokens <= MAX_BLOCK_TOKENS:
            raise KeyChainError(
                f"blocks are {MIN_BLOCK_TOKENS} to {MAX_BLOCK_TOKENS} tokens, got block_tokens={self.block_tokens}"
            )
        if not isinstance(self.salt, bytes) or len(self.salt) > MAX_SALT_BYTES:
            raise KeyChainError(f"a salt is at most {MAX_SALT_BYTES} bytes, got {self.salt!r:.80}")

    @cached_property
    def fingerprint(self) -> bytes:
        """32 bytes: model, revision, dtypes, layout, tensor parallelism, block size."""
        return self.layout.fingerprint(self.block_tokens)

    @cached_property
    def root(self) -> bytes:
        """32 bytes: the parent of every first block."""
        return hashlib.sha256(b"kvt1" + self.fingerprint + self.salt).digest()

    @cached_property
    def id(self) -> bytes:
        """32 bytes that name this namespace inside a pool.

        The tensor parallel rank is part of it: ranks share a fingerprint, but hold different bytes.
        """
        tenant = self.tenant.encode("utf-8", "replace")
        head = b"kvt1-namespace" + struct.pack("<IIQ", len(tenant), self.layout.tp_rank, self.block_tokens)
        return hashlib.sha256(head + tenant + self.root).digest()


def _token_bytes(tokens: Tokens) -> bytes:
    array = np.asarray(tokens if isinstance(tokens, np.ndarray | Sequence) else list(tokens))
    if array.size == 0:
        return b""
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise KeyChainError(f"tokens are a flat list of integers, got {array.dtype} with shape {array.shape}")
    if int(array.min()) < 0 or int(array.max()) > 0xFFFFFFFF:
        raise KeyChainError(f"tokens are unsigned 32-bit numbers, got {int(array.min())}..{int(array.max())}")
    return np.ascontiguousarray(array, dtype="<u4").tobytes()


class KeyChain:
    """The keys of one token sequence in one namespace; grows as the sequence does.

    :meth:`extend` hashes new full blocks only. Raises KeyChainError for tokens that are no u32, an ``extra`` over
    MAX_EXTRA_BYTES, or more than MAX_CHAIN_TOKENS tokens.
    """

    __slots__ = ("_blocks", "_opaque_tokens", "_tails", "_tokens", "extra", "ns")

    def __init__(self, ns: Namespace, tokens: Tokens = (), extra: bytes = b"") -> None:
        if not isinstance(extra, bytes) or len(extra) > MAX_EXTRA_BYTES:
            raise KeyChainError(f"extra keys are at most {MAX_EXTRA_BYTES} bytes, got {extra!r:.80}")
        self.ns = ns
        self.extra = extra
        self._tokens = bytearray()
        self._blocks: list[bytes] = []
        self._opaque_tokens: int | None = None
        self._tails: Mapping[int, bytes] = {}
        self.extend(tokens)

    @classmethod
    def of_hashes(
        cls, ns: Namespace, hashes: Iterable[bytes], tokens: int, tails: Mapping[int, bytes] | None = None
    ) -> KeyChain:
        """A chain of an engine's own block hashes (1 to 64 bytes each, passed through unread).

        ``tokens`` is the length of the whole sequence; every full block of it has one hash. Such a chain has no
        off-grid keys but those given: ``tails``, by position (tokens), are for whoever knows keys and no tokens, as a node that
        copies what it holds. Raises KeyChainError when counts, lengths or uniqueness do not hold.
        """
        chain = cls(ns)
        blocks = list(hashes)
        if not 0 <= tokens <= MAX_CHAIN_TOKENS or len(blocks) != tokens // ns.block_tokens:
            raise KeyChainError(
                f"{tokens} tokens in blocks of {ns.block_tokens} have {max(0, tokens) // ns.block_tokens} full blocks "
                f"(at most {MAX_CHAIN_TOKENS} tokens), got {len(blocks)} hashes"
            )
        for block in blocks:
            if not isinstance(block, bytes) or not 0 < len(block) <= MAX_KEY_BYTES:
                raise KeyChainError(f"a block hash is 1 to {MAX_KEY_BYTES} bytes, got {block!r:.80}")
        if len(set(blocks)) != len(blocks):
            raise KeyChainError("a chain holds the same block hash twice: hashes must depend on everything before them")
        tails = tails or {}
        if len(tails) > MAX_TAILS or not all(
            0 < p <= tokens and p % ns.block_tokens and isinstance(k, bytes) and 0 < len(k) <= MAX_KEY_BYTES
            for p, k in tails.items()
        ):
            raise KeyChainError(
                f"keys off the grid are 1 to {MAX_KEY_BYTES} bytes, at positions up to {tokens} tokens inside blocks, at most {MAX_TAILS}"
            )
        chain._blocks = blocks
        chain._opaque_tokens = tokens
        chain._tails = dict(tails)
        return chain

    @classmethod
    def of_token_bytes(cls, ns: Namespace, data: bytes, extra: bytes = b"") -> KeyChain:
        """A chain of tokens given as little-endian u32 (what :attr:`token_bytes` gives)."""
        if len(data) % 4:
            raise KeyChainError(f"tokens are 4 bytes each, got {len(data)} bytes")
        return cls(ns, np.frombuffer(data, dtype="<u4"), extra)

    @classmethod
    def of_packed(cls, ns: Namespace, keys: bytes, tokens: int) -> KeyChain:
        """A chain of keys of 32 bytes, one after another, for looking up at block boundaries. Raises KeyChainError.

        Opaque like one of engine hashes, which these may be or may not be: whoever asks knows them.
        """
        chain = cls(ns)
        if not 0 <= tokens <= MAX_CHAIN_TOKENS or len(keys) != tokens // ns.block_tokens * 32:
            raise KeyChainError(
                f"{tokens} tokens in blocks of {ns.block_tokens} do not go with {len(keys)} bytes of keys of 32 bytes"
            )
        chain._blocks = [keys[at : at + 32] for at in range(0, len(keys), 32)]
        chain._opaque_tokens = tokens
        return chain

    def extend(self, tokens: Tokens) -> None:
        """Append tokens; costs the hashing of the new ones only."""
        if self._opaque_tokens is not None:
            raise KeyChainError(
                "a chain of engine hashes cannot be extended by tokens: make a new one of all its hashes"
            )
        new = _token_bytes(tokens)
        if (len(self._tokens) + len(new)) // 4 > MAX_CHAIN_TOKENS:
            raise KeyChainError(f"a chain holds at most {MAX_CHAIN_TOKENS} tokens")
        self._tokens += new
        size = self.ns.block_tokens * 4
        parent = self._blocks[-1] if self._blocks else self.ns.root
        view = memoryview(self._tokens)
        try:
            for at in range(len(self._blocks) * size, len(self._tokens) - size + 1, size):
                digest = hashlib.sha256(parent)
                digest.update(view[at : at + size])
                if at == 0 and self.extra:
                    digest.update(self.extra)
                parent = digest.digest()
                self._blocks.append(parent)
        finally:
            view.release()  # an exported bytearray could not grow

    @property
    def blocks(self) -> list[bytes]:
        """Keys of the full blocks, in order. Do not modify."""
        return self._blocks

    @property
    def tokens(self) -> int:
        """Tokens in the chain, those of the unfinished last block included."""
        return len(self._tokens) // 4 if self._opaque_tokens is None else self._opaque_tokens

    @property
    def opaque(self) -> bool:
        """Whether the keys are given, not made of tokens: no off-grid checkpoints then but those of :attr:`tails`."""
        return self._opaque_tokens is not None

    @property
    def tails(self) -> Mapping[int, bytes]:
        """The off-grid keys of an opaque chain, by position in tokens. Do not modify."""
        return self._tails

    def names(self, position: int) -> bool:
        """Whether :meth:`key_at` knows a key for ``position``."""
        if not 0 < position <= self.tokens:
            return False
        return not self.opaque or position % self.ns.block_tokens == 0 or position in self._tails

    @property
    def token_bytes(self) -> bytes:
        """All tokens as little-endian u32; empty when opaque."""
        return bytes(self._tokens)

    def first_block_in(self, ns: Namespace) -> bytes | None:
        """The key these tokens' first block has in another namespace; None when there is no full block of its size."""
        if self.opaque:
            return self._blocks[0] if self._blocks else None
        size = ns.block_tokens * 4
        if len(self._tokens) < size:
            return None
        return hashlib.sha256(ns.root + bytes(self._tokens[:size]) + self.extra).digest()

    def key_at(self, position: int) -> bytes:
        """The key of ``position`` tokens: a block's when aligned, else that of the off-grid checkpoint there.

        Raises KeyChainError outside ``1..tokens``, and off the grid of an opaque chain.
        """
        if not 0 < position <= self.tokens:
            raise KeyChainError(f"position {position} is not in this chain of {self.tokens} tokens")
        block, tail = divmod(position, self.ns.block_tokens)
        if tail == 0:
            return self._blocks[block - 1]
        if position in self._tails:
            return self._tails[position]
        if self.opaque:
            raise KeyChainError(
                f"position {position} is inside a block of {self.ns.block_tokens} tokens: a chain of engine hashes has "
                "no keys there, use a chain of tokens"
            )
        parent = self._blocks[block - 1] if block else self.ns.root
        first = block * self.ns.block_tokens * 4
        digest = hashlib.sha256(b"kvt1-tail" + parent + struct.pack("<I", tail))
        digest.update(bytes(self._tokens[first : first + tail * 4]))
        if block == 0:
            digest.update(self.extra)
        return digest.digest()
