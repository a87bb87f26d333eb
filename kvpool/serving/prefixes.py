"""Verbs that move prefixes: a put is received into its blocks, a get is sent from them, or relays a put that still arrives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..core import PoolCore
from ..errors import MissError
from ..keys import KeyChain, Namespace
from ..local import Located, pack_places
from ..messages import Args, chain_steps
from ..steps import run_in_turns
from ..waiting import Waiting
from .lookups import chain_of
from .moving import Moving
from .sessions import Session, Sessions, Verb


class Prefixes:
    """``on_read`` is told of (namespace, chain, boundary) of every get."""

    def __init__(
        self, core: PoolCore, moving: Moving, sessions: Sessions, on_read: Callable[[Namespace, KeyChain, int], None]
    ) -> None:
        self._core = core
        self._moving = moving
        self._sessions = sessions
        self._on_read = on_read
        self._waiting = Waiting(core)

    @property
    def verbs(self) -> dict[str, Verb]:
        return {"put": self._put, "get": self._get, "locate": self._locate}

    async def _put(self, session: Session, args: Args) -> dict[str, Any]:
        self._moving.check_open()
        ns = args.namespace(session.namespaces)
        deadline_s = args.seconds("deadline_s")
        chain = await run_in_turns(chain_steps(ns, args.get("chain", (dict, type(None)), None), stores=True))
        put = await self._moving.begin(
            self._core.put_steps(
                ns,
                chain,
                boundary=args.integer("boundary"),
                start=args.integer("start", 0),
                checkpoints=args.integers("checkpoints"),
                request=args.name("request", optional=True),
                deadline=self._core.clock() + deadline_s,
            )
        )
        return self._moving.receive(
            session, put, deadline_s, layout=ns.layout, block_tokens=ns.block_tokens, progress=put.progress
        )

    async def _get(self, session: Session, args: Args) -> dict[str, Any]:
        self._moving.check_open()
        ns = args.namespace(session.namespaces)
        deadline_s = args.seconds("deadline_s")
        deadline = self._core.clock() + deadline_s
        request = args.name("request", optional=True)
        transfer = args.name("transfer")
        assert transfer is not None
        # All of it is read before anything is held.
        priority, bytes_per_s = args.priority(), args.rate("bytes_per_s")
        boundary, start = args.integer("boundary"), args.integer("start", 0)
        chain = await run_in_turns(chain_steps(ns, args.get("chain", (dict, type(None)), None)))
        while True:
            early = request is not None and not self._core.request_known(session.tenant, request)
            try:
                get = self._core.plan_get(
                    ns,
                    chain,
                    boundary=boundary,
                    start=start,
                    request=request,
                    deadline=deadline,
                )
                break
            except MissError:
                if request is None or not early:
                    raise
            await self._waiting.for_request(session.tenant, request, max(0.001, deadline - self._core.clock()))
        self._moving.send(
            session,
            get,
            transfer,
            deadline - self._core.clock(),
            priority=priority,
            bytes_per_s=bytes_per_s,
        )
        if chain is not None:
            self._on_read(ns, chain, boundary)
        return {}

    async def _locate(self, session: Session, args: Args) -> dict[str, Any]:
        """Where the bytes of a get lie, for a client that maps the memory; nothing is pinned."""
        self._sessions.check_lends()
        ns = args.namespace(session.namespaces)
        get = self._core.plan_get(
            ns,
            await chain_of(ns, args),
            boundary=args.integer("boundary"),
            start=args.integer("start", 0),
            deadline=self._core.clock() + 1,
        )
        places = [Located.of(self._core.arena, pages) for pages in get.sources.values()]
        slots = list(get.sources)
        get.close()
        return {"slots": slots, "places": pack_places(places)}
