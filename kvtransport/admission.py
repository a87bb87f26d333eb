"""Who is let in, and how this side shows who it is: TLS, tokens, certificates, and the rule for doing without.

Closed by default: beyond loopback there is TLS, and whoever dials proves to be somebody, or the configuration says
``insecure``.
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .errors import CertificateError, ConfigError, Fault, HandshakeError, InsecureBindError, KVError
from .flow.gate import Gate, Pacer
from .identity import Identity
from .io.base import ByteStream, Network
from .io.tcp import TcpNetwork
from .io.tls import TlsNetwork, native_records
from .tls import identity_of, reloading_credentials
from .wire.bodies import Hello

if TYPE_CHECKING:
    from .endpoint import EndpointConfig

STRANGER_SHARE = 0.1
"""Of each second of the event loop, at most this is spent on accepting and shaking hands with TLS."""
STRANGER_BURST_S = 0.1
PER_ADDRESS = 4
"""One address has at most a quarter of the handshakes in progress."""
NO_BINDING = bytes(32)
"""Without TLS there is no session to bind a token to."""


class Admission:
    """The security of one endpoint. Raises ConfigError, CertificateError for files that cannot be used."""

    def __init__(self, config: EndpointConfig, refused: Callable[[str, KVError], None]) -> None:
        self._config = config
        self.credentials = None if config.tls is None else reloading_credentials(config.tls)
        self.gate = Gate(config.max_handshakes, max(1, config.max_handshakes // PER_ADDRESS))
        self._pacer = Pacer(STRANGER_SHARE, STRANGER_BURST_S)
        self._refused = refused

    @property
    def native(self) -> bool:
        """Whether connections are such that the native I/O engine can move their bytes."""
        return self._config.tls is None or native_records()

    @property
    def required(self) -> bool:
        """Whether a peer that dials in has to prove who it is."""
        tls = self._config.tls
        return self._config.tokens is not None or (tls is not None and tls.client_certificates != "off")

    def network(self) -> Network:
        """TCP, with TLS on it where that is configured."""
        config = self._config
        tcp = TcpNetwork(config.tcp, pacer=self._pacer)
        if config.tls is None or self.credentials is None:
            return tcp
        return TlsNetwork(
            tcp,
            self.credentials,
            server_name=config.tls.server_name,
            timeout_s=config.handshake_timeout_s,
            gate=Gate(config.max_handshakes, max(1, config.max_handshakes // PER_ADDRESS)),
            pacer=self._pacer,
            refused=self._refused,
        )

    def check_listen(self, host: str) -> None:
        """Raises InsecureBindError beyond loopback without TLS, or where anybody could come in."""
        if self._config.insecure or is_loopback(host):
            return
        where = host or "all addresses"
        if self.credentials is None:
            raise InsecureBindError(
                f"refusing to listen on {where}: it is beyond loopback and nothing is encrypted or authenticated; "
                "configure TLS ('kvpool certs' makes the files), use 127.0.0.1, or set insecure = true if the network "
                "itself is trusted"
            )
        if not self.required:
            raise InsecureBindError(
                f'refusing to listen on {where}: it is beyond loopback, and with client_certificates = "off" and no tokens '
                "anybody could come in; accept client certificates, name a file of tokens, or set insecure = true"
            )

    def check_dial(self, host: str) -> None:
        """Raises InsecureBindError beyond loopback without TLS."""
        if self._config.insecure or self.credentials is not None or is_loopback(host):
            return
        raise InsecureBindError(
            f"refusing to connect to {host}: it is beyond loopback and nothing is encrypted or authenticated; "
            "configure TLS (the authority's file at least), use 127.0.0.1, or set insecure = true if the network itself is trusted"
        )

    def present(self, stream: ByteStream, link: bytes, index: int) -> dict[str, Any]:
        """The fields of a HELLO that prove who this side is, on this connection. Raises ConfigError."""
        token = self._config.token
        if token is None:
            return {}
        return {"token": token.proof(_binding(stream), link, index)}

    def identify(self, stream: ByteStream, hello: Hello) -> Identity | None:
        """Who dialled in; None where nobody has to be somebody. Raises HandshakeError."""
        if self._config.tokens is not None and hello.token is not None:
            binding = _binding(stream)
            return self._config.tokens.check(hello.token, binding=binding, link=hello.link, index=hello.index)
        certificate = stream.session.peer_certificate if stream.session is not None else None
        if certificate is not None:
            try:
                return identity_of(certificate)
            except CertificateError as error:
                raise HandshakeError(error.message) from error
        if not self.required:
            return None
        ways = ["a token"] if self._config.tokens is not None else []
        if self._config.tls is not None and self._config.tls.client_certificates != "off":
            ways.append("a client certificate")
        raise HandshakeError(f"this peer has to show who it is: {' or '.join(ways)} is wanted", fault=Fault.LOCAL)


def _binding(stream: ByteStream) -> bytes:
    if stream.session is None:
        return NO_BINDING
    if stream.session.channel_binding is None:
        raise ConfigError(
            "a token is bound to the TLS session, which this Python's ssl cannot do: build the native extension "
            "(and install OpenSSL 3), or use a client certificate"
        )
    return stream.session.channel_binding


def is_loopback(host: str) -> bool:
    """Whether an address, or "localhost", is on this machine only. Other names are not resolved: they are not."""
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return False
