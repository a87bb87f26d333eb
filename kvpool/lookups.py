"""Lookups: what of a chain can be restored, why not more, and where states are worth taking; counted by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from kvtransport.layout import GroupKind

from .admission import CheckpointHints, hints_of_view
from .errors import KeyChainError, MissError
from .index import Nodes, Path, Selection, Tree
from .keys import KeyChain, Namespace
from .match import Explanation, Ghost, Match, Reason, View, explain, match
from .rooms import Rooms


class Lookups(Rooms):
    """The reading side of :class:`kvpool.core.PoolCore`."""

    def match(self, ns: Namespace, chain: KeyChain, limit: int | None = None) -> Match:
        """The restorable lengths of ``chain`` up to ``limit`` tokens; what the longest needs is now recently used.

        A match never covers the chain's last token: engines must compute it.
        """
        tree = self._room(ns, chain).tree
        path = tree.find(chain.blocks)
        found = match(tree.view(chain, path), self._limit(chain, limit))
        self._counts["matches"] += 1
        self._counts["asked_tokens"] += found.limit
        self._counts["matched_tokens"] += found.length
        if found.length:
            self._counts["hits"] += 1
            tree.touch(tree.select(path, found.length, self._tail(tree, chain, path, found.length)))
        else:
            self._misses[self._miss_reason(tree, chain, path)] += 1
        self._count_reach(tree, chain, path, found)
        return found

    def chains(self, ns: Namespace) -> list[Path]:
        """See :meth:`kvpool.index.Tree.chains`."""
        return self._room(ns, None).tree.chains()

    def view(self, ns: Namespace, chain: KeyChain) -> View:
        """What is resident of ``chain``, as the rules of :mod:`kvpool.match` take it; touches nothing."""
        tree = self._room(ns, chain).tree
        return tree.view(chain, tree.find(chain.blocks))

    def explain(
        self, ns: Namespace, chain: KeyChain, limit: int | None = None, *, operator: bool = False
    ) -> Explanation:
        """Why :meth:`match` is as long as it is; touches nothing.

        Only an ``operator`` is told that another tenant has the same tokens; to a tenant they were never stored.
        """
        tree = self._room(ns, chain).tree
        view = tree.view(chain, tree.find(chain.blocks))

        def ghost(group: int, position: int) -> Ghost | None:
            named = 0 < position <= chain.tokens and not (chain.opaque and position % ns.block_tokens)
            return tree.ghost(group, chain.key_at(position)) if named else None

        others = {
            r.tree.tenant == ns.tenant
            for r in self._rooms.values()
            if r.tree is not tree
            and (operator or r.tree.tenant == ns.tenant)
            and len(r.tree)
            and (key := chain.first_block_in(r.tree.ns)) is not None
            and len(r.tree.find([key]))
        }
        elsewhere = None
        if others:
            elsewhere = Reason.OTHER_FINGERPRINT if True in others else Reason.OTHER_TENANT
        return explain(view, self._limit(chain, limit), self.clock(), ghost, elsewhere=elsewhere)

    def checkpoint_hints(self, ns: Namespace, chain: KeyChain, insists: Iterable[int] = ()) -> CheckpointHints:
        """Where states of ``chain`` are worth taking, before it is prefilled (see :mod:`kvpool.admission`); touches nothing.

        ``insists``: lengths the engine wants in any case.
        """
        tree = self._room(ns, chain).tree
        path = tree.find(chain.blocks)
        return hints_of_view(
            tree.view(chain, path),
            chain.tokens,
            branches=tree.branches_after(path),
            known=len(path),
            off_grid=not chain.opaque,
            insists=insists,
        )

    def has_off_grid(self, ns: Namespace, chain: KeyChain) -> bool:
        """Whether a checkpoint off the grid lies along the known part of ``chain``."""
        tree = self._room(ns, chain).tree
        return tree.has_tails and tree.tails_along(tree.find(chain.blocks))

    # -- inside -------------------------------------------------------------------------------------

    def _restorable(
        self, tree: Tree, chain: KeyChain, length: int, *, counts: bool = True
    ) -> tuple[Nodes, int | None, Selection]:
        """Path, tail node and needed units of ``length``; MissError when it cannot be restored.

        ``counts``: that is a miss. (A reader that came before its request's put waits for it: not yet.)
        """
        path = tree.find(chain.blocks)
        lengths = match(tree.view(chain, path), length)
        if lengths.length != length:
            if counts:
                self._misses[self._miss_reason(tree, chain, path)] += 1
            raise MissError(
                f"{length} tokens cannot be restored; the longest that can is {lengths.length} "
                f"(groups alone: {', '.join(f'{g} {n}' for g, n in lengths.reach.items())})",
                restorable=lengths.length,
            )
        tail = self._tail(tree, chain, path, length)
        return path, tail, tree.select(path, length, tail)

    @staticmethod
    def _limit(chain: KeyChain, limit: int | None) -> int:
        most = max(0, chain.tokens - 1)
        return most if limit is None else max(0, min(limit, most))

    @staticmethod
    def _tail(tree: Tree, chain: KeyChain, path: Nodes, length: int) -> int | None:
        return tree.find_tail(chain, length, path) if length % tree.ns.block_tokens else None

    @staticmethod
    def _check_reach(chain: KeyChain, boundary: int, points: Iterable[int]) -> None:
        if boundary > chain.tokens:
            raise KeyChainError(f"the key chain has {chain.tokens} tokens, the boundary is {boundary}: extend it first")
        if not all(chain.names(p) for p in points if p % chain.ns.block_tokens):
            raise KeyChainError(
                f"a chain of engine hashes can only end at multiples of {chain.ns.block_tokens} tokens, got {sorted(points)}"
            )

    # -- counting -----------------------------------------------------------------------------------

    def _count_reach(self, tree: Tree, chain: KeyChain, path: Nodes, found: Match) -> None:
        """For the statistics: how far each group reaches, and in a word what ends it (:meth:`explain` says more)."""
        step = tree.ns.block_tokens
        for group, rule in enumerate(tree.rules):
            counts = self._reach.setdefault(f"{tree.ns.layout.model}/{rule.name}", Counter())
            reach = found.reach[rule.name]
            counts["asked_tokens"] += found.limit
            counts["reached_tokens"] += reach
            missing = len(path) if rule.kind is GroupKind.RECURRENT else reach // step
            if reach >= found.limit // step * step:
                counts[Reason.COMPLETE] += 1
            elif rule.kind is GroupKind.RECURRENT and reach < len(path) * step:
                counts[Reason.NO_CHECKPOINT] += 1
            elif tree.ghost(group, chain.blocks[missing]) is not None:
                counts[Reason.EVICTED] += 1
            else:
                counts[Reason.NEVER_STORED] += 1

    @staticmethod
    def _miss_reason(tree: Tree, chain: KeyChain, path: Nodes) -> str:
        if len(path):
            return str(Reason.NO_CHECKPOINT) if tree.state is not None else "incomplete"
        if chain.blocks and any(tree.ghost(group, chain.blocks[0]) for group in range(len(tree.rules))):
            return str(Reason.EVICTED)
        return str(Reason.NEVER_STORED)
