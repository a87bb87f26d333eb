"""Who a peer is to the pool, how clients are configured, and how refused strangers are told of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec

from kvtransport.endpoint import EndpointConfig
from kvtransport.errors import ConfigError, KVError
from kvtransport.identity import Identity, Token
from kvtransport.tls import TlsConfig

DEFAULT_TENANT = "default"
REPORT_S = 10.0
"""Seconds between two lines about refused peers."""


def tenant_of(identity: Identity | None) -> str:
    """The tenant of a session: what the token or the certificate says.

    Where nobody has to prove anything (loopback, or ``insecure``), and for nodes of the cluster, "default".
    """
    if identity is None or not identity.tenant:
        return DEFAULT_TENANT
    return identity.tenant


class TlsSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table ``[tls]`` of kvpoold's settings. Relative paths are relative to the file they stand in."""

    authority: str
    """PEM file of the certificate authorities that peers are held against."""
    certificate: str
    """PEM file of this node's certificate, with its chain."""
    key: str
    """PEM file of its private key; not readable by everybody."""
    client_certificates: str = "accept"
    """What clients show: "require" a certificate, "accept" one instead of a token, or "off": tokens only."""

    def config(self, base: Path) -> TlsConfig:
        """The transport's form of it."""
        if self.client_certificates not in ("require", "accept", "off"):
            raise ConfigError(
                f'tls.client_certificates is "require", "accept" or "off", not {self.client_certificates!r}'
            )
        return TlsConfig(
            base / self.authority,
            base / self.certificate,
            base / self.key,
            client_certificates=self.client_certificates,  # type: ignore[arg-type]
        )


def client_config(
    *,
    authority: Path | str | None = None,
    certificate: Path | str | None = None,
    key: Path | str | None = None,
    token: Path | str | None = None,
    server_name: str | None = None,
    insecure: bool = False,
    name: str = "",
) -> EndpointConfig:
    """How a client dials: ``authority`` switches TLS on; with it a certificate and key, or a file with a token.

    Raises ConfigError for a combination that makes no sense.
    """
    if authority is None:
        for what, given in (("certificate", certificate), ("key", key), ("server name", server_name)):
            if given is not None:
                raise ConfigError(f"a {what} without the authority's file: TLS needs ca.pem to know the pool by")
    tls = None if authority is None else TlsConfig(authority, certificate, key, server_name=server_name)
    return EndpointConfig(name=name, insecure=insecure, tls=tls, token=None if token is None else Token.load(token))


class RefusalReport:
    """Lines about peers that were not let in: the first at once, then at most one every :data:`REPORT_S` seconds.

    The lines are bounded however many peers there are; ``clock`` in seconds.
    """

    def __init__(self, clock: Callable[[], float], say: Callable[[str], None]) -> None:
        self._clock = clock
        self._say = say
        self._since: Counter[str] = Counter()
        self._last: float | None = None

    def refused(self, peer: str, error: KVError) -> None:
        """A peer was not let in."""
        now = self._clock()
        if self._last is not None and now - self._last < REPORT_S:
            self._since[error.code] += 1
            return
        more = ""
        if self._since:
            counts = ", ".join(f"{count:,} {code}" for code, count in self._since.most_common(5))
            more = f" ({self._since.total():,} more refused since the last such line: {counts})"
        self._since.clear()
        self._last = now
        self._say(f"refused {_printable(peer)}: {_printable(error.message)}{more}")


def _printable(text: str) -> str:
    """Strangers do not write into our terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)[:400]
