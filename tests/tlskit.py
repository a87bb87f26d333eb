"""Both ends of a TLS handshake without a network around them."""

from __future__ import annotations

from kvtransport import _native
from kvtransport.tls import SUITES


def contexts(pki, types=(_native, _native), suites=SUITES):
    """A context for a client that trusts, and one for a server that shows, the certificates of the fixture ``pki``."""
    ca, cert, key = ((pki / name).read_bytes() for name in ("ca.pem", "n1.pem", "n1.key"))
    return (
        types[0].TlsContext(False, None, None, ca, 2, suites),
        types[1].TlsContext(True, cert, key, None, 0, suites),
    )


def shake(*ends) -> None:
    for _ in range(50):
        if sum(end.handshake() for end in ends) == 0:
            return
    raise AssertionError("no handshake in 50 steps")
