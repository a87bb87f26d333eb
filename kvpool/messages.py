"""What travels between client and daemon besides transfers: key chains, matches, explanations, arguments."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtransport.errors import ProtocolError
from kvtransport.layout import GroupKind

from .admission import CheckpointHints
from .errors import KeyChainError, NamespaceError
from .keys import MAX_CHAIN_TOKENS, MAX_FLAT_KEY_BYTES, KeyChain, Namespace, check_flat_keys
from .match import Explanation, GroupReach, Match, Reason
from .steps import Steps
from .table import cut_keys, flags, pack_keys

MAX_TIMEOUT_S = 3_600.0
MAX_RATE = 1e12
"""Bytes a second."""
MAX_PRIORITY = 1_000
KEY_BYTES = 32
HASHES = 1_024
"""Keys hashed in one step: about a millisecond."""
INLINE_BYTES = 64 << 10
"""Objects of a call that are no more than this together travel in it, or in its answer: a transfer would take more turns."""


def chain_to_wire(chain: KeyChain | None, *, keys: bool = False) -> dict[str, Any] | None:
    """The tokens that keys are made of, or an engine's own hashes; None stays None.

    ``keys``: instead of tokens only the keys of full blocks, which is all that looking up at block boundaries needs: the other
    side need not hash 128K tokens again.
    """
    if chain is None:
        return None
    if keys and all(len(k) == KEY_BYTES for k in (chain.blocks if chain.opaque else ())):
        return {"packed": b"".join(chain.blocks), "count": chain.tokens}
    if chain.opaque:
        body: dict[str, Any] = {"hashes": list(chain.blocks), "count": chain.tokens}
        return {**body, "tails": [[p, k] for p, k in chain.tails.items()]} if chain.tails else body
    return {"tokens": chain.token_bytes, "extra": chain.extra}


def chain_steps(ns: Namespace, body: object, *, stores: bool = False) -> Steps[KeyChain | None]:
    """Inverse of :func:`chain_to_wire` for a body from a peer, in steps of 1,024 hashes; raises KeyChainError or ProtocolError.

    ``stores``: only keys that are computed here from tokens, or are an engine's own, so that nothing is ever stored under a
    key that is not that of its tokens. Looking up by a wrong one finds nothing, or what the tenant's own hashes would find.
    """
    if body is None:
        return None
    if not isinstance(body, dict):
        raise ProtocolError(f"a key chain is a map, got {type(body).__name__}")
    if "packed" in body and not stores:
        packed, count = body["packed"], body.get("count")
        if not isinstance(packed, bytes) or type(count) is not int:
            raise ProtocolError("a chain of keys needs bytes 'packed' and an integer 'count'")
        return KeyChain.of_packed(ns, packed, count)
    if "hashes" in body:
        hashes, count = body["hashes"], body.get("count")
        if not isinstance(hashes, list) or not isinstance(count, int):
            raise ProtocolError("a chain of engine hashes needs a list 'hashes' and an integer 'count'")
        tails = body.get("tails", [])
        if not isinstance(tails, list) or not all(
            isinstance(t, list) and len(t) == 2 and type(t[0]) is int and isinstance(t[1], bytes) for t in tails
        ):
            raise ProtocolError("'tails' of a chain are a list of positions and keys")
        return KeyChain.of_hashes(ns, hashes, count, dict(tails))
    tokens, extra = body.get("tokens"), body.get("extra", b"")
    if not isinstance(tokens, bytes) or not isinstance(extra, bytes):
        raise ProtocolError("a key chain needs 'tokens' (bytes, little-endian u32) and 'extra' (bytes)")
    if len(tokens) % 4:
        raise ProtocolError(f"tokens are 4 bytes each, got {len(tokens)} bytes")
    numbers = np.frombuffer(tokens, "<u4")
    if len(numbers) > MAX_CHAIN_TOKENS:
        raise KeyChainError(f"a chain holds at most {MAX_CHAIN_TOKENS} tokens, got {len(numbers)}")
    chain = KeyChain(ns, numbers[:0], extra)
    for at in range(0, len(numbers), HASHES * ns.block_tokens):
        if at:
            yield
        chain.extend(numbers[at : at + HASHES * ns.block_tokens])
    return chain


def keys_to_wire(keys: Sequence[bytes]) -> dict[str, Any]:
    """Flat keys one after another and their lengths: a value each would cost more to pack and check than to look up.

    Raises KeyChainError for one that is none.
    """
    listed = keys if type(keys) is list else list(keys)
    try:
        packed, lengths = pack_keys(listed, MAX_FLAT_KEY_BYTES)
    except ValueError as error:
        check_flat_keys(listed)
        raise KeyChainError(f"these are no flat keys: {error}") from None
    return {"keys": packed, "lengths": lengths}


def bits_to_wire(flags: Sequence[bool]) -> bytes:
    """One bit each, the first in the lowest bit of the first byte."""
    if len(flags) <= 8:
        return bytes([sum(flag << i for i, flag in enumerate(flags))] if flags else [])
    return np.packbits(np.array(flags, dtype=np.bool_), bitorder="little").tobytes()


def bits_from_wire(bits: object, count: int) -> list[bool]:
    """Inverse of :func:`bits_to_wire`; raises ProtocolError when these are not ``count``."""
    try:
        return flags(bits, count)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ProtocolError(f"{count} bits were asked for, the answer is {bits!r:.40}") from None


def numbers_to_wire(numbers: Sequence[int] | NDArray[Any]) -> bytes:
    """8 bytes each, little-endian: lengths, or checksums, which have no sign."""
    if isinstance(numbers, np.ndarray):
        return numbers.astype("<i8" if numbers.dtype.kind == "i" else "<u8", copy=False).tobytes()
    return struct.pack(f"<{len(numbers)}Q", *numbers)


def numbers_from_wire(body: Mapping[str, Any], name: str, count: int) -> NDArray[np.int64]:
    """The ``count`` numbers (little-endian, 8 bytes each) that an answer has under ``name``; raises ProtocolError."""
    data = body.get(name)
    if not isinstance(data, bytes) or len(data) != 8 * count:
        raise ProtocolError(f"{count} numbers were expected as {name!r}, the answer has {data!r:.40}")
    return np.frombuffer(data, "<i8")


def match_to_wire(match: Match) -> dict[str, Any]:
    return {
        "length": match.length,
        "limit": match.limit,
        "restorable": list(match.restorable),
        "reach": dict(match.reach),
    }


def match_from_wire(body: Mapping[str, Any]) -> Match:
    """Raises ProtocolError for a malformed answer."""
    try:
        reach = {str(k): int(v) for k, v in body["reach"].items()}
        return Match(int(body["length"]), tuple(int(n) for n in body["restorable"]), reach, int(body["limit"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProtocolError(f"not a match: {type(error).__name__} {error}") from error


def hints_from_wire(body: Mapping[str, Any]) -> CheckpointHints:
    """Inverse of :meth:`CheckpointHints.as_dict`; raises ProtocolError for a malformed answer."""
    try:
        branch, last = (None if body[name] is None else int(body[name]) for name in ("branch", "last"))
        lengths = tuple(int(n) for n in body["lengths"])
        return CheckpointHints(lengths, branch, last, int(body["restorable"]), int(body["start"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"not checkpoint hints: {type(error).__name__} {error}") from error


def explanation_from_wire(body: Mapping[str, Any]) -> Explanation:
    """Inverse of :meth:`Explanation.as_dict`; raises ProtocolError for a malformed answer."""
    try:
        groups = tuple(
            GroupReach(
                str(g["group"]),
                GroupKind(g["kind"]),
                int(g["reach"]),
                Reason(g["ended_by"]),
                int(g["at"]),
                str(g["detail"]),
            )
            for g in body["groups"]
        )
        reach = {g.group: g.reach for g in groups}
        match = Match(int(body["length"]), tuple(int(n) for n in body["restorable"]), reach, int(body["limit"]))
        return Explanation(match, groups, str(body["verdict"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"not an explanation: {type(error).__name__} {error}") from error


class Args:
    """Typed access to the arguments of a call; ProtocolError names what is missing or wrong."""

    def __init__(self, verb: str, args: Mapping[str, Any]) -> None:
        self._verb = verb
        self._args = args

    def get(self, name: str, kind: type[Any] | tuple[type[Any], ...], default: Any = ...) -> Any:
        value = self._args.get(name, default)
        if value is ...:
            raise ProtocolError(f"{self._verb}: argument {name!r} is missing")
        if value is default and name not in self._args:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            raise ProtocolError(f"{self._verb}: argument {name!r} must not be a {type(value).__name__}")
        return value

    def has(self, name: str) -> bool:
        """Whether it was given."""
        return self._args.get(name) is not None

    def integer(self, name: str, default: Any = ...) -> int:
        value: int = self.get(name, int, default)
        if value < 0:
            raise ProtocolError(f"{self._verb}: argument {name!r} must not be negative, got {value}")
        return value

    def seconds(self, name: str, default: float = 60.0) -> float:
        value = float(self.get(name, (int, float), default))
        if not 0 < value <= MAX_TIMEOUT_S:
            raise ProtocolError(
                f"{self._verb}: argument {name!r} must be within 0..{MAX_TIMEOUT_S:g} seconds, got {value}"
            )
        return value

    def rate(self, name: str) -> float | None:
        """Bytes a second, 1 or more; None when there is no limit."""
        value = self.get(name, (int, float, type(None)), None)
        if value is not None and not 1 <= value <= MAX_RATE:
            raise ProtocolError(f"{self._verb}: argument {name!r} must be 1..{MAX_RATE:g} bytes a second, got {value}")
        return None if value is None else float(value)

    def priority(self) -> int:
        """As of an OPEN: higher goes first."""
        value: int = self.get("priority", int, 0)
        if not -MAX_PRIORITY <= value <= MAX_PRIORITY:
            raise ProtocolError(f"{self._verb}: argument 'priority' must be within {MAX_PRIORITY} of 0, got {value}")
        return value

    def name(self, name: str, *, optional: bool = False) -> bytes | None:
        """16 bytes that name a transfer or a request."""
        value = self.get(name, (bytes, type(None)), None if optional else ...)
        if value is None and optional:
            return None
        if not isinstance(value, bytes) or len(value) != 16:
            raise ProtocolError(f"{self._verb}: argument {name!r} must be 16 bytes")
        return value

    def integers(self, name: str) -> list[int]:
        values = self.get(name, list, [])
        if len(values) > 4_096 or not all(type(v) is int and v >= 0 for v in values):
            raise ProtocolError(f"{self._verb}: argument {name!r} must be a list of at most 4096 non-negative integers")
        return list(values)

    def key_list(self, name: str = "keys") -> list[bytes]:
        values = self.get(name, list)
        if not {bytes}.issuperset(map(type, values)):
            raise ProtocolError(f"{self._verb}: argument {name!r} must be a list of byte strings")
        return values  # type: ignore[no-any-return]

    def packed_keys(self) -> list[bytes]:
        """Inverse of :func:`keys_to_wire`."""
        try:
            return cut_keys(self.get("keys", bytes), self.get("lengths", bytes))
        except ValueError:
            raise ProtocolError(f"{self._verb}: argument 'lengths' does not say how 'keys' are cut") from None

    def numbers(self, name: str) -> NDArray[np.int64]:
        """Numbers of 8 bytes, one after another: sizes as they are, checksums when viewed as unsigned."""
        data = self.get(name, bytes)
        if len(data) % 8:
            raise ProtocolError(
                f"{self._verb}: argument {name!r} must be numbers of 8 bytes each, got {len(data)} bytes"
            )
        return np.frombuffer(data, "<i8")

    def namespace(self, known: Mapping[bytes, Namespace]) -> Namespace:
        ns = known.get(self.get("ns", bytes))
        if ns is None:
            raise NamespaceError(f"{self._verb}: this link has not opened that namespace")
        return ns
