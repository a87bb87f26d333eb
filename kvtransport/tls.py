"""TLS as it is configured: certificate, key, authority; checked before they are used, read again when they change.

Every complaint names the file and what to do. The handshake and the records are ``io.tls``'s.
"""

from __future__ import annotations

import datetime
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from . import _pure_tls
from .buffers import native_available
from .errors import CertificateError, ConfigError
from .identity import Identity
from .reloading import Reloading, check_private, read_file

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

    from . import _native as _tls_types

EXPIRES_SOON = datetime.timedelta(days=14)
TENANT_URI = "kvpool://tenant/"
NODE_URI = "kvpool://node/"
SUITES = "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"
"""By speed on processors with AES instructions, as measured (docs/performance.md); all three are sound."""

ClientCertificates = Literal["require", "accept", "off"]


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """TLS 1.3 for one endpoint, all its connections in both directions.

    ``authority``: PEM file of the certificate authorities that peers are held against. ``certificate`` and ``key``:
    PEM files of this process's own certificate (with its chain); needed to listen, and to show a client certificate.
    ``client_certificates`` that dialling peers show: "require" one, "accept" one instead of a token, or "off": not asked for.
    ``server_name``: what a dialled peer's certificate must be made out to, where that is not the host that is dialled.
    """

    authority: Path | str
    certificate: Path | str | None = None
    key: Path | str | None = None
    client_certificates: ClientCertificates = "accept"
    server_name: str | None = None
    suites: str = SUITES


@cache
def implementation() -> Any:
    """The module that has ``Tls`` and ``TlsContext``: the extension, or its twin where it finds no OpenSSL 3."""
    if native_available:
        from . import _native

        try:
            _native.tls_version()
            return _native
        except ImportError as error:
            reason = str(error)
    else:
        reason = "kvtransport._native is not built"
    warnings.warn(
        f"TLS runs over Python's ssl, several times slower and without tokens: {reason}. "
        "Install OpenSSL 3 (Debian and Ubuntu: libssl3) and build the extension",
        RuntimeWarning,
        stacklevel=2,
    )
    return _pure_tls


def require_cryptography() -> None:
    """Raises ConfigError where the ``tls`` extra is missing."""
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise ConfigError("TLS needs the package 'cryptography': pip install 'kvtransport[tls]'") from None


def read_certificates(data: bytes, path: Path) -> list[Certificate]:
    """The certificates of a PEM file, at least one. Raises CertificateError."""
    require_cryptography()
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError as error:
        hint = "it holds a private key: name the certificate file" if b"PRIVATE KEY" in data else str(error)
        raise CertificateError(
            f"{path} holds no certificate in PEM form ('-----BEGIN CERTIFICATE-----'): {hint}"
        ) from error


def common_name(certificate: Certificate) -> str:
    """The subject's common name, "" where there is none."""
    from cryptography.x509.oid import NameOID

    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def alternative_names(certificate: Certificate) -> tuple[list[str], list[str]]:
    """What a certificate is made out to: (host names and addresses, URIs)."""
    from cryptography import x509

    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return [], []
    hosts = names.get_values_for_type(x509.DNSName) + [str(a) for a in names.get_values_for_type(x509.IPAddress)]
    return hosts, names.get_values_for_type(x509.UniformResourceIdentifier)


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def identity_of(der: bytes) -> Identity:
    """Who a verified certificate is. Raises CertificateError where it names nobody usable."""
    from cryptography import x509

    certificate = x509.load_der_x509_certificate(der)
    name = common_name(certificate)
    uris = alternative_names(certificate)[1]
    tenants = [uri.removeprefix(TENANT_URI) for uri in uris if uri.startswith(TENANT_URI)]
    node = any(uri.startswith(NODE_URI) for uri in uris)
    tenant = tenants[0] if tenants else "" if node else name
    if len(tenants) > 1 or not (node or _NAME.fullmatch(tenant)):
        raise CertificateError(
            f"the certificate of {name!r} names no single tenant: its common name, or one URI {TENANT_URI}NAME, must be "
            "1 to 64 letters, digits, dots, dashes and underscores"
        )
    return Identity("certificate", name, tenant, node)


@dataclass(frozen=True, slots=True)
class Credentials:
    """Contexts made of one state of the files. ``server`` is None without a certificate of one's own."""

    client: _tls_types.TlsContext
    server: _tls_types.TlsContext | None
    expires: datetime.datetime | None
    """When this process's own certificate does."""
    notes: tuple[str, ...]
    """What is fine today and will not be soon."""


def load_credentials(config: TlsConfig, now: Callable[[], datetime.datetime] | None = None) -> Credentials:
    """Read and check every file. Raises ConfigError, CertificateError naming the file and what to do."""
    today = (now or _now)()
    authority_path = Path(config.authority)
    authority = read_file(authority_path, "TLS authority")
    authorities = read_certificates(authority, authority_path)
    for each in authorities:
        _check_dates(each, authority_path, today)
    _check_authorities(authorities, authority_path)
    certificate = key = expires = None
    notes: list[str] = []
    if (config.certificate is None) != (config.key is None):
        missing, there = ("key", "certificate") if config.key is None else ("certificate", "key")
        raise ConfigError(f"TLS: there is a {there} but no {missing}; they come in pairs")
    if config.certificate is not None and config.key is not None:
        path, key_path = Path(config.certificate), Path(config.key)
        certificate = read_file(path, "TLS certificate")
        own = read_certificates(certificate, path)[0]
        _check_dates(own, path, today)
        key = read_file(key_path, "TLS key")
        _check_key(own, key, path, key_path)
        check_private(key_path, "TLS key")
        _check_issuer(own, authorities, path, authority_path)
        expires = own.not_valid_after_utc
        if expires - today < EXPIRES_SOON:
            notes.append(
                f"{path} expires on {expires:%Y-%m-%d}: renew it ('kvpool certs --renew'); it is read again by itself"
            )
    types = implementation()
    verify = {"require": 2, "accept": 1, "off": 0}[config.client_certificates]
    try:
        client = types.TlsContext(False, certificate, key, authority, 2, config.suites)
        server = None
        if certificate is not None:
            server = types.TlsContext(True, certificate, key, authority, verify, config.suites)
    except (OSError, ValueError) as error:
        raise CertificateError(f"OpenSSL refuses the TLS settings: {getattr(error, 'strerror', error)}") from error
    return Credentials(client, server, expires, tuple(notes))


def reloading_credentials(config: TlsConfig) -> Reloading[Credentials]:
    """Credentials that follow their files. Raises what :func:`load_credentials` raises."""
    if config.client_certificates not in ("require", "accept", "off"):
        raise ConfigError(
            f'client_certificates is "require", "accept" or "off", not {cast(str, config.client_certificates)!r}'
        )
    paths = [Path(p) for p in (config.authority, config.certificate, config.key) if p is not None]
    return Reloading(lambda: load_credentials(config), paths, "certificates")


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _check_dates(certificate: Certificate, path: Path, today: datetime.datetime) -> None:
    if certificate.not_valid_after_utc < today:
        raise CertificateError(
            f"{path} expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC: make a new one ('kvpool certs --renew')"
        )
    if certificate.not_valid_before_utc > today:
        raise CertificateError(
            f"{path} is valid only from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on: is this machine's clock right?"
        )


def _check_authorities(authorities: list[Certificate], path: Path) -> None:
    from cryptography import x509

    for each in authorities:
        try:
            if each.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
                continue
        except x509.ExtensionNotFound:
            if each.issuer == each.subject:
                continue
        raise CertificateError(
            f"{path} holds the certificate of {common_name(each)!r}, which is no certificate authority: name the CA's file (ca.pem)"
        )


def _check_key(certificate: Certificate, pem: bytes, path: Path, key_path: Path) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

    try:
        key = load_pem_private_key(pem, None)
    except TypeError:
        raise CertificateError(
            f"{key_path} is encrypted with a passphrase, which nobody is there to type: openssl pkey -in {key_path} -out plain.key"
        ) from None
    except ValueError as error:
        hint = "it holds a certificate: name the key file" if b"BEGIN CERTIFICATE" in pem else "is the file whole?"
        raise CertificateError(f"{key_path} holds no private key in PEM form; {hint}") from error
    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    if key.public_key().public_bytes(*form) != certificate.public_key().public_bytes(*form):
        raise CertificateError(f"{key_path} is not the key of {path}: they must come from the same issue")


def _check_issuer(own: Certificate, authorities: list[Certificate], path: Path, authority_path: Path) -> None:
    """A single-level hierarchy is checked here; a chain with intermediates is left to OpenSSL and the peer."""
    names = {each.subject for each in authorities}
    if own.issuer not in names:
        return
    from cryptography.exceptions import InvalidSignature

    for each in authorities:
        if each.subject != own.issuer:
            continue
        try:
            own.verify_directly_issued_by(each)
            return
        except (InvalidSignature, ValueError, TypeError):
            continue
    raise CertificateError(
        f"{path} was signed by another authority than the one in {authority_path}, which has the same name: "
        "was the authority made again? Then make all certificates again"
    )
