"""Who a peer is: a token it proved to know, or the certificate it showed.

A token is never sent. What travels is an HMAC over the channel binding of the TLS session (RFC 9266), so that what one
connection carries is worthless on any other: it cannot be replayed, and a peer in the middle cannot pass it on.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

from .errors import ConfigError, Fault, HandshakeError
from .reloading import Reloading, check_private, read_file

MIN_SECRET = 16
"""Bytes of a token's secret, at least."""
PROOF_BYTES = 32
_LABEL = b"kvtransport token proof 1"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Identity:
    """An authenticated peer.

    ``name``: the token's, or the common name of the certificate's subject. ``tenant``: what the token's line names, or
    the certificate's URI ``kvpool://tenant/NAME``; "" where neither says one. ``node``: the certificate has a URI
    ``kvpool://node/NAME``.
    """

    method: Literal["token", "certificate"]
    name: str
    tenant: str = ""
    node: bool = False


@dataclass(frozen=True, slots=True)
class Token:
    """A shared secret with a name. ``tenant``: who its owner is in the pool; by default the name."""

    name: str
    secret: bytes = field(repr=False)
    tenant: str = ""

    def __post_init__(self) -> None:
        for what, text in (("name", self.name), ("tenant", self.tenant or self.name)):
            if not _NAME.fullmatch(text):
                raise ConfigError(
                    f"{text!r} is no {what} of a token: 1 to 64 letters, digits, dots, dashes and underscores"
                )
        if len(self.secret) < MIN_SECRET:
            raise ConfigError(
                f"the secret of token {self.name!r} has {len(self.secret)} bytes, at least {MIN_SECRET} random ones are needed; "
                "'kvpool token NAME' makes one"
            )

    @classmethod
    def parse(cls, line: str) -> Self:
        """``name:secret`` or ``name:secret:tenant``. Raises ConfigError that does not repeat the secret."""
        name, _, rest = line.partition(":")
        secret, _, tenant = rest.partition(":")
        if not secret:
            raise ConfigError("a token is written name:secret, or name:secret:tenant; 'kvpool token NAME' makes one")
        return cls(name, secret.encode(), tenant)

    @classmethod
    def shared(cls, text: str) -> Self:
        """``name:secret``, or only a secret that both ends know (its name is then "shared"). Raises ConfigError."""
        return cls.parse(text if ":" in text else f"shared:{text}")

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """The one token of a file. Raises ConfigError."""
        tokens = load_tokens(Path(path))
        if len(tokens) != 1:
            raise ConfigError(f"{path} holds {len(tokens)} tokens; a peer that dials presents exactly one")
        (only,) = tokens.values()
        return cls(only.name, only.secret, only.tenant)

    def proof(self, binding: bytes, link: bytes, index: int) -> bytes:
        """What shows, on this one connection, that its sender knows the secret: 32 bytes of proof, and the name."""
        # Every part has a fixed length but the name, which is last: no two messages are the same bytes.
        name = self.name.encode()
        message = _LABEL + binding + link + index.to_bytes(4, "little") + name
        return hmac.new(self.secret, message, hashlib.sha256).digest() + name


def load_tokens(path: Path) -> dict[str, Token]:
    """Tokens by name, one a line; ``#`` starts a comment. Raises ConfigError naming file and line."""
    tokens: dict[str, Token] = {}
    try:
        text = read_file(path, "tokens").decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not text: one token a line, name:secret") from None
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.partition("#")[0].strip()
        if not stripped:
            continue
        try:
            token = Token.parse(stripped)
        except ConfigError as error:
            raise ConfigError(f"{path}, line {number}: {error.message}") from None
        if token.name in tokens:
            raise ConfigError(f"{path}, line {number}: a second token named {token.name!r}")
        tokens[token.name] = token
    check_private(path, "tokens")
    return tokens


class TokenStore:
    """The tokens an endpoint accepts: fixed ones, or a file that is read again when it changes."""

    def __init__(self, source: Path | str | Iterable[Token]) -> None:
        self._fixed: dict[str, Token] | None = None
        if isinstance(source, Path | str):
            path = Path(source)
            self.file: Reloading[dict[str, Token]] | None = Reloading(lambda: load_tokens(path), [path], "tokens")
        else:
            self._fixed = {token.name: token for token in source}
            self.file = None

    def check(self, proof: bytes, *, binding: bytes, link: bytes, index: int) -> Identity:
        """Whose proof this is. Raises HandshakeError that does not tell an unknown name from a wrong secret."""
        tokens = self.file.get() if self.file is not None else self._fixed
        assert tokens is not None
        # An unknown name costs the same time as a wrong secret.
        token = tokens.get(proof[PROOF_BYTES:].decode("ascii", "replace"), _NOBODY)
        right = hmac.compare_digest(token.proof(binding, link, index), proof)
        if not right or token is _NOBODY:
            raise HandshakeError("the token is not known here, or its secret is another", fault=Fault.LOCAL)
        return Identity("token", token.name, token.tenant or token.name)


_NOBODY = Token("nobody", bytes(MIN_SECRET))
