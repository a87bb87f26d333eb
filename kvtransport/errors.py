"""The one error tree of kvtransport and kvpool.

::

    KVError
    ├── ConfigError              a setting is wrong                     local
    │   ├── InsecureBindError    listening beyond loopback, unprotected local
    │   ├── CertificateError     a certificate or key cannot be used    local
    │   └── AddressError         others cannot dial what is advertised  local
    ├── KVBufferError            memory
    │   ├── ArenaError           an arena could not be made             local
    │   └── DestinationError     granted memory does not fit            local
    ├── LayoutError              geometry
    │   ├── ManifestError        a manifest contradicts its layout      remote
    │   ├── FingerprintError     the two sides cache different things   remote
    │   └── ParallelismError     different tensor parallelism           remote
    ├── ProtocolError            the peer broke the wire protocol       remote
    │   ├── HeaderError          a frame header failed its own check    network
    │   ├── VersionError         unknown version or frame type          remote
    │   └── LimitError           something on the wire is over a limit  remote
    ├── IntegrityError           payload bytes failed their checksum    network
    ├── LinkError                the connection layer
    │   ├── ConnectError         nobody answered                        network, retryable
    │   ├── HandshakeError       the peer refused us                    remote
    │   │   └── TlsError         TLS could not be agreed on             remote
    │   ├── PeerLostError        all connections to the peer are gone   network, retryable
    │   ├── PeerFrozenError      connected, but silent past a deadline  remote, retryable
    │   └── IncarnationError     the peer restarted                     remote, retryable
    ├── TransferError            one transfer
    │   ├── TransferCancelledError cancelled by either side               local or remote
    │   ├── DeadlineError        not finished in time                   network, retryable
    │   ├── SpillFullError       no credit and no spill budget left     remote, retryable
    │   └── RefusedError         the consumer does not want it          remote
    └── RemoteError              an error of the peer's own code        remote

``kvpool.errors`` hangs its errors on the same root. Every error knows whose *fault* it is and whether
the same call may succeed if repeated (*retryable*); both may be overridden where an instance knows better.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar


class Fault(StrEnum):
    """Whose side an error comes from: act on it there."""

    LOCAL = "local"
    REMOTE = "remote"
    NETWORK = "network"


class KVError(Exception):
    """Root of the tree.

    ``message`` says what happened and, where there is something to do, what to do. ``code`` is the stable
    name that travels in ERROR frames and in JSON output.
    """

    code: ClassVar[str] = "error"
    default_fault: ClassVar[Fault] = Fault.LOCAL
    default_retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, fault: Fault | None = None, retryable: bool | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.fault: Fault = self.default_fault if fault is None else fault
        self.retryable: bool = self.default_retryable if retryable is None else retryable

    def as_dict(self) -> dict[str, object]:
        """The form that travels and that ``--json`` prints."""
        return {
            "code": self.code,
            "message": self.message,
            "fault": str(self.fault),
            "retryable": self.retryable,
        }


class ConfigError(KVError):
    code = "config"


class InsecureBindError(ConfigError):
    code = "insecure_bind"


class CertificateError(ConfigError):
    code = "certificate"


class AddressError(ConfigError):
    code = "address"


class KVBufferError(KVError):
    code = "buffer"


class ArenaError(KVBufferError):
    code = "arena"


class DestinationError(KVBufferError):
    code = "destination"


class LayoutError(KVError):
    code = "layout"


class ManifestError(LayoutError):
    code = "manifest"
    default_fault = Fault.REMOTE


class FingerprintError(LayoutError):
    code = "fingerprint"
    default_fault = Fault.REMOTE


class ParallelismError(LayoutError):
    code = "parallelism"
    default_fault = Fault.REMOTE


class ProtocolError(KVError):
    code = "protocol"
    default_fault = Fault.REMOTE


class HeaderError(ProtocolError):
    code = "header"
    default_fault = Fault.NETWORK


class VersionError(ProtocolError):
    code = "version"


class LimitError(ProtocolError):
    code = "limit"


class IntegrityError(KVError):
    code = "integrity"
    default_fault = Fault.NETWORK


class LinkError(KVError):
    code = "link"
    default_fault = Fault.NETWORK


class ConnectError(LinkError):
    code = "connect"
    default_retryable = True


class HandshakeError(LinkError):
    code = "handshake"
    default_fault = Fault.REMOTE


class TlsError(HandshakeError):
    code = "tls"


class PeerLostError(LinkError):
    code = "peer_lost"
    default_retryable = True


class PeerFrozenError(LinkError):
    code = "peer_frozen"
    default_fault = Fault.REMOTE
    default_retryable = True


class IncarnationError(LinkError):
    code = "incarnation"
    default_fault = Fault.REMOTE
    default_retryable = True


class TransferError(KVError):
    code = "transfer"


class TransferCancelledError(TransferError):
    code = "cancelled"


class DeadlineError(TransferError):
    code = "deadline"
    default_fault = Fault.NETWORK
    default_retryable = True


class SpillFullError(TransferError):
    code = "spill_full"
    default_fault = Fault.REMOTE
    default_retryable = True


class RefusedError(TransferError):
    code = "refused"
    default_fault = Fault.REMOTE


class RemoteError(KVError):
    code = "remote"
    default_fault = Fault.REMOTE


def _tree(cls: type[KVError]) -> dict[str, type[KVError]]:
    found = {cls.code: cls}
    for sub in cls.__subclasses__():
        found.update(_tree(sub))
    return found


def error_from_dict(body: dict[str, object], *, prefix: str = "") -> KVError:
    """Rebuild an error that the peer reported.

    An unknown code becomes :class:`RemoteError`. A fault travels from the peer's point of view: what was
    *local* there is *remote* here and the other way round.
    """
    code = str(body.get("code", "remote"))
    cls = _tree(KVError).get(code, RemoteError)
    swap = {"local": Fault.REMOTE, "remote": Fault.LOCAL}
    fault = swap.get(str(body.get("fault")), Fault.NETWORK)
    return cls(prefix + str(body.get("message", code)), fault=fault, retryable=bool(body.get("retryable", False)))
