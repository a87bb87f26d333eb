"""One computation per concurrent miss: the first who misses computes, the others wait for what it stores, or for their patience to end."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from functools import partial
from types import TracebackType
from typing import Self

from kvpool.errors import KeyChainError
from kvpool.keys import KeyChain, Namespace
from kvtransport.errors import KVError

from .links import NodeLinks
from .members import Member

FIRST_S = 0.02
MOST_S = 0.5
"""Pause between two looks: doubles up to this, each between half and all of it."""


class Turn:
    """What :meth:`kvpool.cluster.pool.ClusterPool.turn` gives; leave it (``async with``) when the result is put, or will not be.

    ``length``: tokens that can be restored. ``computes``: the caller computes the rest (False: it is there). ``waited_s``: seconds.
    """

    def __init__(self, length: int, computes: bool, waited_s: float, end: Callable[[], Awaitable[None]] | None) -> None:
        self.length, self.computes, self.waited_s = length, computes, waited_s
        self._end = end

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end, self._end = self._end, None
        if end is not None:
            await end()


class Turns:
    """``match(ns, chain)`` gives the restorable length, ``order(name)`` the nodes a claim is kept on, best first."""

    def __init__(
        self,
        match: Callable[[Namespace, KeyChain], Awaitable[int]],
        order: Callable[[bytes], list[Member]],
        links: NodeLinks,
        *,
        holder: Callable[[], bytes],
        random: Callable[[], float],
        answer_s: float,
        now: Callable[[], float],
    ) -> None:
        self._match, self._order, self._links = match, order, links
        self._holder = holder
        self._random = random
        self._answer_s = answer_s
        self._now = now

    async def take(self, ns: Namespace, chain: KeyChain, length: int, *, wait_s: float, seconds: float) -> Turn:
        """See :meth:`kvpool.cluster.pool.ClusterPool.turn`."""
        if not 0 < length < chain.tokens:
            raise KeyChainError(
                f"a match never covers the last of {chain.tokens} tokens: ask for 1 to {chain.tokens - 1}, got {length}"
            )
        begin = self._now()
        name = hashlib.blake2b(chain.key_at(length), digest_size=16, key=ns.id[:32]).digest()
        holder = self._holder()
        pause = FIRST_S
        while True:
            found = await self._match(ns, chain)
            waited = self._now() - begin
            if found >= length:
                return Turn(found, False, waited, None)
            member, left = await self._ask(name, holder, seconds)
            if member is None:
                return Turn(found, True, waited, None)
            if left == 0.0:
                # It may have been put between the look and the grant.
                found = await self._match(ns, chain)
                if found >= length:
                    await self._give_back(member, name, holder)
                    return Turn(found, False, self._now() - begin, None)
                return Turn(found, True, self._now() - begin, partial(self._give_back, member, name, holder))
            if waited >= wait_s:
                return Turn(found, True, waited, None)
            await asyncio.sleep(min(pause * (0.5 + self._random() / 2), max(wait_s - waited, 0.0), left))
            pause = min(pause * 2, MOST_S)

    async def _ask(self, name: bytes, holder: bytes, seconds: float) -> tuple[Member | None, float]:
        """The node that keeps the claim and how long somebody else has it; None: nobody can say, so everybody computes."""
        for member in self._order(name)[:1]:
            try:
                client = await self._links.client(member)
                args = {"name": name, "holder": holder, "seconds": seconds}
                reply = await client.link.call("claim", args, timeout_s=self._answer_s)
                return member, max(float(reply["left_s"]), 0.0)
            except KVError as error:
                self._links.failed(member, error)
        return None, 0.0

    async def _give_back(self, member: Member, name: bytes, holder: bytes) -> None:
        try:
            client = await self._links.client(member)
            await client.link.call("claim", {"name": name, "holder": holder, "end": True}, timeout_s=self._answer_s)
        except KVError as error:
            self._links.failed(member, error)  # its time ends by itself
