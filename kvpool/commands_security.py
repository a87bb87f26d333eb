"""``kvpool certs`` and ``kvpool token``."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kvtransport.bench.output import console, write_json
from kvtransport.identity import Token

from . import certs as making
from .options import JsonTo

EPILOG = """
Examples:

  kvpool certs pki --node node1=10.0.0.1,node1.example --node node2=10.0.0.2 --client prefill --client decode

  kvpool certs pki --client alice=acme      (one more client, of tenant acme, from the same authority)

  kvpool certs pki --renew                  (new certificates for everybody in there; nodes take them up by themselves)
"""


def certs(
    directory: Annotated[Path, typer.Argument(help="Where the files are and go; made if need be")],
    node: Annotated[
        list[str] | None, typer.Option(help="NAME=HOST,HOST: a kvpoold, and the names and addresses it is dialled by")
    ] = None,
    client: Annotated[
        list[str] | None, typer.Option(help="NAME or NAME=TENANT: a client, and whose cache it uses \\[its name]")
    ] = None,
    days: Annotated[int, typer.Option(help="Days that the certificates hold")] = making.DAYS,
    cluster: Annotated[str, typer.Option(help="Name in the authority's certificate")] = "kvpool",
    renew: Annotated[bool, typer.Option("--renew", help="Replace certificates; without names all of them")] = False,
    json_to: JsonTo = None,
) -> None:
    """Make a private certificate authority and the certificates of a cluster.

    The authority (ca.pem, ca.key) is made the first time and used afterwards. ca.key signs whoever is let in: keep it
    off the nodes. Keys are readable by their owner only.
    """
    subjects = [making.Subject.node(text) for text in node or ()]
    subjects += [making.Subject.client(text) for text in client or ()]
    if not subjects and not renew:
        raise typer.BadParameter("name at least one --node or --client, or say --renew")
    made = making.make(directory, subjects, days=days, cluster=cluster, renew=renew)
    _show(made, console(json_to))
    write_json(
        json_to,
        {
            "authority": {
                "certificate": str(made.authority),
                "new": made.new_authority,
                "expires": made.authority_expires.isoformat(),
            },
            "certificates": [
                {
                    "name": subject.name,
                    "kind": "node" if subject.is_node else "client",
                    "hosts": list(subject.hosts),
                    "tenant": None if subject.is_node else subject.tenant or subject.name,
                    "certificate": str(path),
                    "key": str(key),
                    "expires": expires.isoformat(),
                }
                for subject, path, key, expires in made.issued
            ],
        },
    )


def _show(made: making.Made, out: Console) -> None:
    table = Table(title=f"{made.directory}: what goes where")
    for heading in ("file", "for", "expires", "copy to"):
        table.add_column(heading)
    what = "new authority" if made.new_authority else "authority"
    table.add_row(made.authority.name, what, f"{made.authority_expires:%Y-%m-%d}", "every node and client")
    table.add_row("ca.key", "[bold]signs everybody[/]", "", "[bold]nowhere[/]")
    for subject, path, key, expires in made.issued:
        whom = (
            f"node {subject.name} ({', '.join(subject.hosts)})"
            if subject.is_node
            else f"client {subject.name} of tenant {subject.tenant or subject.name}"
        )
        table.add_row(f"{path.name}, {key.name}", whom, f"{expires:%Y-%m-%d}", f"{subject.name} only")
    out.print(table)
    out.print(f"Whoever has {made.directory / 'ca.key'} can let anybody in: keep it offline.", soft_wrap=True)
    nodes = [(s, p, k) for s, p, k, _ in made.issued if s.is_node]
    clients = [(s, p, k) for s, p, k, _ in made.issued if not s.is_node]
    if nodes:
        subject, path, key = nodes[0]
        out.print(f"\nIn the settings of kvpoold on {subject.name} (kvpoold --config kvpoold.toml):\n")
        out.print(
            f'host = "0.0.0.0"\n\n[tls]\nauthority = "{made.authority.name}"\ncertificate = "{path.name}"\nkey = "{key.name}"',
            markup=False,
            highlight=False,
        )
    if clients:
        subject, path, key = clients[0]
        host = nodes[0][0].hosts[0] if nodes else "NODE"
        out.print(f"\nAs {subject.name}:\n")
        command = (
            f"kvpool stat -a {host}:7777 --ca {made.authority.name} --certificate {path.name} --key {key.name}\n\n"
            f'config = kvpool.client_config(authority="{made.authority.name}", certificate="{path.name}", key="{key.name}")\n'
            f'pool = await kvpool.connect("{host}", 7777, config=config)'
        )
        out.print(command, markup=False, highlight=False, soft_wrap=True)


def token(
    name: Annotated[str, typer.Argument(help="Who it is for: 1 to 64 letters, digits, dots, dashes, underscores")],
    tenant: Annotated[str, typer.Option(help="Whose cache it opens \\[its name]")] = "",
) -> None:
    """Make a token: a name and a random secret, for peers without a certificate of their own.

    Prints one line. Append it to the file that kvpoold's setting "tokens" names (mode 0600; read again by itself), and
    give the same line to the client, in a file of its own (--token FILE).
    """
    made = Token(name, secrets.token_urlsafe(32).encode(), tenant)
    print(":".join(part for part in (made.name, made.secret.decode(), made.tenant) if part))


def register(app: typer.Typer) -> None:
    """Add both to ``kvpool``."""
    app.command(epilog=EPILOG)(certs)
    app.command(
        epilog="Example:  (umask 077; kvpool token alice --tenant acme | tee alice.token >> tokens)  makes both files"
    )(token)
