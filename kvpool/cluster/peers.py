"""The nodes as their own directory: asked directly when there is no other, or when it cannot be trusted now."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence

from kvpool.errors import DirectoryError
from kvtransport.errors import KVError, ProtocolError

from .links import NodeLinks, at_address
from .members import Member, Snapshot

MAX_KEYS = 4_096
"""Segments of one question."""


async def ask_entries(
    links: NodeLinks, members: Iterable[Member], keys: Sequence[bytes], timeout_s: float
) -> list[dict[str, bytes]]:
    """The entries that the members themselves have of segments; those that do not answer in time have none."""

    async def one(member: Member) -> tuple[str, list[bytes]] | None:
        try:
            async with asyncio.timeout(timeout_s):
                client = await links.client(member)
                out: list[bytes] = []
                for at in range(0, len(keys), MAX_KEYS):
                    part = list(keys[at : at + MAX_KEYS])
                    reply = await client.link.call("entries", {"keys": part}, timeout_s=timeout_s)
                    out += reply["entries"]
                return (member.id, out) if len(out) == len(keys) else None
        except KVError as error:
            links.failed(member, error)
            return None
        except (TimeoutError, KeyError, TypeError):
            return None

    found: list[dict[str, bytes]] = [{} for _ in keys]
    for answer in await asyncio.gather(*(one(m) for m in members)):
        if answer is not None:
            for at, entry in enumerate(answer[1]):
                if isinstance(entry, bytes) and entry:
                    found[at][answer[0]] = entry
    return found


class PeerDirectory:
    """A fixed list of nodes ("HOST:PORT"), which answer for themselves. Nothing is announced to it."""

    def __init__(self, links: NodeLinks, addresses: Sequence[str], *, timeout_s: float = 1.0) -> None:
        self._links = links
        self._seeds = [at_address(a) for a in addresses]
        self._timeout_s = timeout_s
        self._members: tuple[Member, ...] = ()

    async def beat(self, member: Member, ttl_s: float) -> bytes:
        raise DirectoryError("a list of nodes cannot be joined: it is fixed", retryable=False)

    async def leave(self, member: Member) -> None:
        raise DirectoryError("a list of nodes cannot be left: it is fixed", retryable=False)

    async def announce(self, node: str, changes: Mapping[bytes, bytes | None], ttl_s: float) -> None:
        raise DirectoryError("a list of nodes takes no announcements: nodes are asked", retryable=False)

    async def snapshot(self) -> Snapshot:
        answers = await asyncio.gather(*(self._who(seed) for seed in self._seeds))
        self._members = tuple(m for m in answers if m is not None)
        return Snapshot(b"peers", self._members)

    async def _who(self, seed: Member) -> Member | None:
        try:
            async with asyncio.timeout(self._timeout_s):
                client = await self._links.client(seed)
                member = Member.decode((await client.link.call("member", timeout_s=self._timeout_s))["member"])
        except (KVError, TimeoutError, KeyError, TypeError):
            return None
        if member.incarnation != client.link.peer_incarnation:
            raise ProtocolError(f"{seed.id} says it is another process than it is")
        # Where it can be reached is what it was found under, whatever it believes itself.
        return Member(
            id=member.id,
            incarnation=member.incarnation,
            cluster=member.cluster,
            addresses=seed.addresses,
            capacity=member.capacity,
            used=member.used,
            state=member.state,
        )

    async def look(self, keys: Sequence[bytes]) -> list[dict[str, bytes]]:
        return await ask_entries(self._links, self._members, keys, self._timeout_s)

    async def close(self) -> None:
        return None
