"""``kvpool certs``: a private certificate authority and the certificates of a cluster, in one command.

Elliptic-curve keys (P-256: the fastest handshakes of what every TLS 1.3 peer speaks). A node's certificate serves to
listen and to dial; a client's only to dial. Files with secrets are made 0600 and never overwritten without being asked.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kvtransport.errors import ConfigError
from kvtransport.tls import (
    NODE_URI,
    TENANT_URI,
    alternative_names,
    common_name,
    read_certificates,
    require_cryptography,
)

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

CA_DAYS = 3650
DAYS = 365
BACKDATE = datetime.timedelta(minutes=5)
"""Clocks differ."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HOST = re.compile(
    r"(?=.{1,253}$)(?:\*\.)?[A-Za-z0-9_](?:[A-Za-z0-9_-]*[A-Za-z0-9_])?(?:\.[A-Za-z0-9_](?:[A-Za-z0-9_-]*[A-Za-z0-9_])?)*"
)


@dataclass(frozen=True, slots=True)
class Subject:
    """Whom a certificate is for. ``hosts``: names and addresses a node is dialled by; empty for a client.

    ``tenant``: a client's; by default its name.
    """

    name: str
    hosts: tuple[str, ...] = ()
    tenant: str = ""

    @property
    def is_node(self) -> bool:
        return bool(self.hosts)

    @classmethod
    def node(cls, text: str) -> Subject:
        """``NAME`` or ``NAME=HOST,HOST...``. Raises ConfigError."""
        name, _, hosts = text.partition("=")
        listed = tuple(dict.fromkeys(h.strip() for h in hosts.split(",") if h.strip())) or (name,)
        for host in listed:
            try:
                ipaddress.ip_address(host)
            except ValueError:
                if not _HOST.fullmatch(host):
                    raise ConfigError(f"--node {text}: {host!r} is neither a host name nor an address") from None
        return cls(_name("--node", name), listed)

    @classmethod
    def client(cls, text: str) -> Subject:
        """``NAME`` or ``NAME=TENANT``. Raises ConfigError."""
        name, _, tenant = text.partition("=")
        return cls(_name("--client", name), (), _name("--client", tenant or name))


def _name(option: str, name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{option}: {name!r} is no name: 1 to 64 letters, digits, dots, dashes and underscores")
    if name == "ca":
        raise ConfigError(f"{option}: 'ca' is the authority's own name, choose another")
    return name


@dataclass(slots=True)
class Made:
    """What one run made: files, and until when what is in them holds."""

    directory: Path
    authority: Path
    authority_expires: datetime.datetime
    new_authority: bool
    issued: list[tuple[Subject, Path, Path, datetime.datetime]] = field(default_factory=list)


def make(
    directory: Path,
    subjects: Sequence[Subject],
    *,
    days: int = DAYS,
    cluster: str = "kvpool",
    renew: bool = False,
    now: datetime.datetime | None = None,
) -> Made:
    """Certificates and keys for ``subjects`` under ``directory``, with its authority, which is made when there is none.

    ``renew``: new certificates for those that are there already, same names; with no subjects, for all of them. Raises
    ConfigError where a file is in the way, cannot be written, or the authority cannot be used.
    """
    require_cryptography()
    if not 1 <= days <= CA_DAYS:
        raise ConfigError(f"--days must be 1 to {CA_DAYS}, got {days}")
    today = now or datetime.datetime.now(datetime.UTC)
    ca_path, ca_key_path = directory / "ca.pem", directory / "ca.key"
    if renew and not ca_path.exists():
        raise ConfigError(f"nothing to renew: {ca_path} is not there")
    wanted = list(subjects)
    if renew and not wanted:
        wanted = _present(directory)
    if len({subject.name for subject in wanted}) != len(wanted):
        raise ConfigError("two of the certificates have the same name")
    for subject in wanted:
        path = directory / f"{subject.name}.pem"
        if path.exists() and not renew:
            raise ConfigError(f"{path} is there already: say --renew to replace it, or choose another name")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        new = not ca_path.exists()
        if new:
            ca, ca_key = _make_authority(ca_path, ca_key_path, cluster, today)
        else:
            ca, ca_key = _load_authority(ca_path, ca_key_path, today)
        made = Made(directory, ca_path, ca.not_valid_after_utc, new)
        for subject in wanted:
            path, key_path = directory / f"{subject.name}.pem", directory / f"{subject.name}.key"
            expires = _issue(subject, path, key_path, ca, ca_key, days, today)
            made.issued.append((subject, path, key_path, expires))
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename or directory}: {error.strerror}") from error
    return made


def _present(directory: Path) -> list[Subject]:
    """Whoever has a certificate here."""
    found: list[Subject] = []
    for path in sorted(directory.glob("*.pem")):
        if path.name == "ca.pem":
            continue
        certificate = read_certificates(path.read_bytes(), path)[0]
        hosts, uris = alternative_names(certificate)
        tenant = next((u.removeprefix(TENANT_URI) for u in uris if u.startswith(TENANT_URI)), "")
        found.append(Subject(common_name(certificate), tuple(hosts), tenant))
    if not found:
        raise ConfigError(f"{directory} holds no certificates to renew")
    return found


def _make_authority(
    path: Path, key_path: Path, cluster: str, today: datetime.datetime
) -> tuple[x509.Certificate, EllipticCurvePrivateKey]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    if key_path.exists():
        raise ConfigError(f"{key_path} is there without {path.name}: restore the certificate, or move the key away")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{cluster} certificate authority")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - BACKDATE)
        .not_valid_after(today + datetime.timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write_key(key_path, key)
    _write(path, _pem(certificate), 0o644)
    return certificate, key


def _load_authority(
    path: Path, key_path: Path, today: datetime.datetime
) -> tuple[x509.Certificate, EllipticCurvePrivateKey]:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    certificate = read_certificates(path.read_bytes(), path)[0]
    if not key_path.exists():
        raise ConfigError(f"{key_path} is not there: certificates can only be made where the authority's key is")
    try:
        key = load_pem_private_key(key_path.read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{key_path} holds no private key that can be used: {error}") from error
    if not isinstance(key, EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ConfigError(f"{key_path} is not the key of {path}")
    if certificate.not_valid_after_utc <= today:
        raise ConfigError(
            f"the authority {path} expired on {certificate.not_valid_after_utc:%Y-%m-%d}: make a new one in another directory, "
            "and let the peers trust both (one file may hold several) until all certificates are replaced"
        )
    return certificate, key


def _issue(
    subject: Subject,
    path: Path,
    key_path: Path,
    ca: x509.Certificate,
    ca_key: EllipticCurvePrivateKey,
    days: int,
    today: datetime.datetime,
) -> datetime.datetime:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    expires = min(today + datetime.timedelta(days=days), ca.not_valid_after_utc)
    names: list[x509.GeneralName] = [_general_name(host) for host in subject.hosts]
    uri = NODE_URI + subject.name if subject.is_node else TENANT_URI + (subject.tenant or subject.name)
    names.append(x509.UniformResourceIdentifier(uri))
    purposes = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if subject.is_node:
        purposes.append(ExtendedKeyUsageOID.SERVER_AUTH)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject.name)]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - BACKDATE)
        .not_valid_after(expires)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    # A process that reads them between the two sees a key that does not fit, and keeps what it has.
    _write_key(key_path, key)
    _write(path, _pem(certificate), 0o644)
    return certificate.not_valid_after_utc


def _general_name(host: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(*, sign: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign,
        crl_sign=sign,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM)


def _write_key(path: Path, key: EllipticCurvePrivateKey) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    _write(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)


def _write(path: Path, data: bytes, mode: int) -> None:
    """The whole file or none of it, never readable by more than ``mode`` says."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
