"""Flat objects of a cluster: each on the node that rendezvous hashing of its key gives."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

from kvpool.client import PoolClient
from kvpool.errors import NoNodeError
from kvtransport.errors import KVBufferError, LinkError

from .links import NodeLinks
from .members import Member
from .segments import placement_name


class FlatObjects:
    """``order(name)`` gives the nodes that take what is placed by ``name``, best first."""

    def __init__(self, links: NodeLinks, order: Callable[[bytes], Sequence[Member]]) -> None:
        self._links = links
        self._order = order

    async def exists(self, keys: Sequence[bytes]) -> list[bool]:
        """See :class:`kvpool.protocol.PoolProtocol`, as for the others; objects of a node that does not answer are misses."""
        found = [False] * len(keys)

        async def ask(client: PoolClient, mine: list[int]) -> None:
            for i, there in zip(mine, await client.exists([keys[i] for i in mine]), strict=True):
                found[i] = there

        await self._each(keys, ask)
        return found

    async def put(self, objects: Mapping[bytes, Any]) -> None:
        """All or none on each node. Raises the first error of a node."""
        keys = list(objects)

        async def one(member: Member, mine: list[int]) -> None:
            client = await self._links.client(member)
            await client.put_objects({keys[i]: objects[keys[i]] for i in mine})

        await asyncio.gather(*(one(m, mine) for m, mine in self._by_node(keys)))

    async def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        found: list[bytes | None] = [None] * len(keys)

        async def ask(client: PoolClient, mine: list[int]) -> None:
            for i, data in zip(mine, await client.get_objects([keys[i] for i in mine]), strict=True):
                found[i] = data

        await self._each(keys, ask)
        return found

    async def get_into(self, keys: Sequence[bytes], into: Sequence[Any]) -> list[int | None]:
        if len(into) != len(keys):
            raise KVBufferError(f"{len(keys)} objects were asked for, there is memory for {len(into)}")
        found: list[int | None] = [None] * len(keys)

        async def ask(client: PoolClient, mine: list[int]) -> None:
            sizes = await client.get_objects_into([keys[i] for i in mine], [into[i] for i in mine])
            for i, size in zip(mine, sizes, strict=True):
                found[i] = size

        await self._each(keys, ask)
        return found

    async def _each(self, keys: Sequence[bytes], ask: Callable[[PoolClient, list[int]], Awaitable[None]]) -> None:
        async def one(member: Member, mine: list[int]) -> None:
            try:
                await ask(await self._links.client(member), mine)
            except (LinkError, NoNodeError) as error:
                self._links.failed(member, error)

        await asyncio.gather(*(one(m, mine) for m, mine in self._by_node(keys)))

    def _by_node(self, keys: Iterable[bytes]) -> list[tuple[Member, list[int]]]:
        """Nodes and the places of their keys in ``keys``. Raises NoNodeError."""
        out: dict[str, tuple[Member, list[int]]] = {}
        for i, key in enumerate(keys):
            where = self._order(placement_name(key))
            if not where:
                raise NoNodeError("no node of the cluster takes new data")
            out.setdefault(where[0].id, (where[0], []))[1].append(i)
        return list(out.values())
