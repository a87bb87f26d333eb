"""What the commands have in common: their options, the access these say, and how amounts and prompts are written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from kvtransport.endpoint import EndpointConfig
from kvtransport.errors import ConfigError

from .security import client_config

Insecure = Annotated[bool, typer.Option("--insecure", help="Connect beyond loopback without encryption")]
Ca = Annotated[
    Path | None, typer.Option("--ca", envvar="KVPOOL_CA", help="PEM file of the pool's certificate authority: TLS")
]
Certificate = Annotated[
    Path | None, typer.Option("--certificate", envvar="KVPOOL_CERTIFICATE", help="PEM file of a client certificate")
]
Key = Annotated[Path | None, typer.Option("--key", envvar="KVPOOL_KEY", help="PEM file of its key")]
TokenFile = Annotated[
    Path | None, typer.Option("--token", envvar="KVPOOL_TOKEN", help="File with a token, instead of a certificate")
]
JsonTo = Annotated[
    str | None, typer.Option("--json", metavar="PATH", help="Write one JSON object to PATH; '-' is standard output")
]

UNIT = 1024.0


def access(
    insecure: bool, ca: Path | None, certificate: Path | None, key: Path | None, token: Path | None
) -> EndpointConfig:
    """Of a command that was given these options. Raises ConfigError, CertificateError."""
    return client_config(name="kvpool", insecure=insecure, authority=ca, certificate=certificate, key=key, token=token)


def human(nbytes: float) -> str:
    """ "1.5 GiB" """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < UNIT:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= UNIT
    return f"{nbytes:.1f} TiB"


def token_ids(source: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The JSON list of token ids in a file, or on standard input for "-". Raises ConfigError."""
    try:
        body = json.loads(sys.stdin.read() if source == "-" else Path(source).read_text())
        ids = np.asarray(body)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ConfigError(f"{source}: expected a JSON list of token ids")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read token ids from {source}: {error}") from error
    return ids.astype(np.int64)
