"""Lookups in a cluster: what is where, in one round trip to the directory, or from the nodes themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from kvpool.admission import CheckpointHints, hints_of_view
from kvpool.errors import DirectoryError, NamespaceError
from kvpool.keys import KeyChain, Namespace
from kvpool.match import Explanation, Match, View, explain, match, rules_of
from kvpool.protocol import DEFAULT_BLOCK_TOKENS
from kvtransport.layout import CacheLayout

from .directory import Directory
from .links import NodeLinks
from .locate import Cut, Whole, empty_view
from .members import Roster, by_cluster
from .peers import ask_entries
from .segments import Unit, can_be_cut, units_of


class Lookup:
    """Answers from ``directory``; while the view of ``roster`` is frozen from the nodes. Seconds are those of ``now``."""

    def __init__(
        self,
        directory: Directory,
        links: NodeLinks,
        roster: Roster,
        *,
        tenant: str,
        whole_chains: bool,
        answer_s: float,
        now: Callable[[], float],
    ) -> None:
        self._directory, self._links, self._roster = directory, links, roster
        self._tenant = tenant
        self._whole_chains = whole_chains
        self._answer_s = answer_s
        self._now = now
        self._units: dict[bytes, tuple[Unit, ...]] = {}

    def open(self, layout: CacheLayout, block_tokens: int = DEFAULT_BLOCK_TOKENS, salt: bytes = b"") -> Namespace:
        """Remember a namespace. Nodes open it when they are first used for it; they go by the session's tenant, ours finds it in the
        directory.
        """
        ns = Namespace(self._tenant, layout, block_tokens, salt)
        self._units[ns.id] = () if self._whole_chains or not can_be_cut(layout, block_tokens) else units_of(ns)
        return ns

    async def match(self, ns: Namespace, chain: KeyChain, limit: int | None = None) -> Match:
        known = await self.find(ns, chain)
        limit = limit_of(chain, limit)
        if isinstance(known, Cut):
            return match(known.view(), limit)
        best = Match(0, (), {g.name: 0 for g in ns.layout.groups}, limit)
        for view in known.views.values():
            found = match(view, limit)
            if found.length > best.length:
                best = found
        return best

    async def match_across_clusters(
        self, ns: Namespace, chain: KeyChain, limit: int | None = None
    ) -> dict[str, tuple[int, ...]]:
        """Cluster -> the lengths (tokens, ascending) that its nodes can restore by themselves."""
        known = await self.find(ns, chain)
        limit = limit_of(chain, limit)
        out = {}
        for cluster, members in by_cluster(self._roster.members.values()).items():
            nodes = frozenset(m.id for m in members)
            if isinstance(known, Cut):
                out[cluster] = match(known.view(nodes), limit).restorable
            else:
                lengths = {
                    n for node in nodes if node in known.views for n in match(known.views[node], limit).restorable
                }
                out[cluster] = tuple(sorted(lengths))
        return out

    async def explain(self, ns: Namespace, chain: KeyChain) -> Explanation:
        known = await self.find(ns, chain)
        limit = limit_of(chain, None)
        views = [known.view()] if isinstance(known, Cut) else list(known.views.values()) or [empty_view(ns)]
        best = max(views, key=lambda v: match(v, limit).length)
        return explain(best, limit, 0.0, lambda group, position: None)

    async def checkpoint_hints(self, ns: Namespace, chain: KeyChain, insists: Iterable[int] = ()) -> CheckpointHints:
        """See :meth:`kvpool.protocol.PoolProtocol.checkpoint_hints`; the directory does not say what follows a block, so every end
        of what is known that cannot be restored counts as a branch.
        """
        known = await self.find(ns, chain)
        limit = limit_of(chain, None)
        views = [known.view()] if isinstance(known, Cut) else list(known.views.values())
        nothing = View(ns.block_tokens, rules_of(ns.layout), np.zeros((len(ns.layout.groups), 0), dtype=np.bool_))
        best = max(views, key=lambda v: match(v, limit).length, default=nothing)
        off_grid = not isinstance(known, Cut) and not chain.opaque
        return hints_of_view(best, chain.tokens, branches=True, off_grid=off_grid, insists=insists)

    async def find(self, ns: Namespace, chain: KeyChain) -> Cut | Whole:
        """Ask the directory about the whole chain, in one round trip."""
        units = self.units(ns)
        known: Cut | Whole = Cut(ns, units, chain.blocks) if units else Whole(ns, chain)
        known.fill(await self.look(known.keys), self._roster.incarnations())
        return known

    async def look(self, keys: Sequence[bytes]) -> list[dict[str, bytes]]:
        if not self._roster.frozen(self._now()):
            try:
                async with asyncio.timeout(self._answer_s):
                    return await self._directory.look(keys)
            except (DirectoryError, TimeoutError):
                self._roster.failed()
        return await ask_entries(self._links, self._roster.members.values(), keys, self._answer_s)

    def units(self, ns: Namespace) -> tuple[Unit, ...]:
        """How chains of ``ns`` are stored; empty when they stay whole. Raises NamespaceError."""
        units = self._units.get(ns.id)
        if units is None:
            raise NamespaceError(f"the namespace of {ns.layout.model!r} is not open: open it first")
        return units


def limit_of(chain: KeyChain, limit: int | None) -> int:
    """The longest match that may be answered: never the chain's last token."""
    most = max(0, chain.tokens - 1)
    return most if limit is None else max(0, min(limit, most))
