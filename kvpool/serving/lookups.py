"""Verbs that move no bytes: what is there, why, what is worth keeping, and leases on it."""

from __future__ import annotations

from typing import Any

from kvtransport.layout import CacheLayout

from ..core import PoolCore
from ..keys import KeyChain, Namespace
from ..messages import Args, chain_steps, match_to_wire
from ..steps import run_in_turns
from .sessions import Session, Verb


async def chain_of(ns: Namespace, args: Args) -> KeyChain:
    """The key chain of a call that must have one."""
    chain = await run_in_turns(chain_steps(ns, args.get("chain", dict)))
    assert chain is not None
    return chain


class Lookups:
    """``explain_tenants``: explanations may say that another tenant has the same tokens."""

    def __init__(self, core: PoolCore, *, explain_tenants: bool) -> None:
        self._core = core
        self.explain_tenants = explain_tenants

    @property
    def verbs(self) -> dict[str, Verb]:
        return {
            "namespace": self._namespace,
            "match": self._match,
            "explain": self._explain,
            "checkpoint_hints": self._checkpoint_hints,
            "lease": self._lease,
            "release": self._release,
            "clear": self._clear,
        }

    async def _namespace(self, session: Session, args: Args) -> dict[str, Any]:
        tenant = session.speaks_for(args.get("tenant", (str, type(None)), None))
        layout = CacheLayout.from_description(args.get("layout", dict), tp_rank=args.integer("tp_rank", 0))
        ns = self._core.open_namespace(tenant, layout, args.integer("block_tokens"), args.get("salt", bytes, b""))
        session.namespaces[ns.id] = ns
        return {"ns": ns.id}

    async def _match(self, session: Session, args: Args) -> dict[str, Any]:
        ns = args.namespace(session.namespaces)
        chain = await chain_of(ns, args)
        if args.get("asks_again", bool, False) and self._core.has_off_grid(ns, chain):
            return {"again": True}  # with the tokens: keys off the grid are made of them
        return match_to_wire(self._core.match(ns, chain, args.get("limit", (int, type(None)), None)))

    async def _explain(self, session: Session, args: Args) -> dict[str, Any]:
        ns = args.namespace(session.namespaces)
        chain = await chain_of(ns, args)
        limit = args.get("limit", (int, type(None)), None)
        return self._core.explain(ns, chain, limit, operator=self.explain_tenants).as_dict()

    async def _checkpoint_hints(self, session: Session, args: Args) -> dict[str, Any]:
        ns = args.namespace(session.namespaces)
        chain = await chain_of(ns, args)
        return self._core.checkpoint_hints(ns, chain, args.integers("insists")).as_dict()

    async def _lease(self, session: Session, args: Args) -> dict[str, Any]:
        ns = args.namespace(session.namespaces)
        chain = await chain_of(ns, args)
        lease = self._core.lease(ns, chain, args.integer("length"), args.seconds("seconds"))
        session.leases.add(lease.id)
        return {"lease": lease.id}

    async def _release(self, session: Session, args: Args) -> dict[str, Any]:
        number = args.integer("lease")
        if number in session.leases:
            session.leases.discard(number)
            self._core.release(number)
        return {}

    async def _clear(self, session: Session, args: Args) -> dict[str, Any]:
        return {"entries": self._core.clear(tenant=session.tenant)}
