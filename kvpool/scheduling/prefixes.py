"""Between the router, which is pure, and the pool: what each cluster has of a prompt, and a prefix brought where a decision wants it.

:class:`Clusters` is all that is asked of a pool; :class:`kvpool.cluster.pool.ClusterPool` is one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from kvpool.keys import KeyChain, Namespace
from kvpool.match import Match
from kvtransport.errors import ConfigError

from .router import Decision, Path, Request

if TYPE_CHECKING:
    from kvpool.cluster.pulling import Pulled


class Clusters(Protocol):
    """A pool over two clusters or more."""

    async def match_across_clusters(
        self, ns: Namespace, chain: KeyChain, limit: int | None = None
    ) -> dict[str, tuple[int, ...]]:
        """Cluster -> the lengths (tokens, ascending) that its nodes can restore by themselves."""

    async def pull(
        self,
        ns: Namespace,
        chain: KeyChain,
        *,
        into: str,
        sources: Collection[str] | None = None,
        length: int | None = None,
        deadline_s: float = ...,
        bytes_per_s: float | None = None,
    ) -> Pulled:
        """Bring the longest prefix of ``chain`` into a cluster."""


class Engine(Protocol):
    """What an engine holds by its own events; :class:`kvpool.events.engine.EngineCache` is one."""

    block_tokens: int

    def match(self, hashes: Sequence[bytes], tokens: int) -> Match:
        """The lengths that it can start from."""


class Prefixes:
    """``pd`` and ``prfaas`` name the two clusters. ``engines``: caches of engines by cluster, as an optional source.

    An engine's own cache counts for the cluster it is in, when its blocks are as long as the namespace's and the chain is of that engine's
    hashes. What only an engine has cannot be pulled: the other cluster then gets what the pool has.
    """

    def __init__(
        self, clusters: Clusters, *, pd: str, prfaas: str, engines: Mapping[str, Sequence[Engine]] | None = None
    ) -> None:
        if pd == prfaas:
            raise ConfigError(f"the PD and the PrfaaS cluster are both {pd!r}")
        self._clusters, self._pd, self._prfaas = clusters, pd, prfaas
        self._engines = engines or {}

    async def request(self, ns: Namespace, chain: KeyChain) -> Request:
        """The prompt for :meth:`kvpool.scheduling.router.Router.route`: its length, and each cluster's match (0: none)."""
        lengths = await self._clusters.match_across_clusters(ns, chain)

        def longest(cluster: str) -> int:
            pool = max(lengths.get(cluster, ()), default=0)
            engines = (e for e in self._engines.get(cluster, ()) if e.block_tokens == ns.block_tokens)
            return max([pool, *(e.match(chain.blocks, chain.tokens).length for e in engines)])

        return Request(chain.tokens, match_pd=longest(self._pd), match_prfaas=longest(self._prfaas))

    async def carry_out(
        self,
        decision: Decision,
        ns: Namespace,
        chain: KeyChain,
        *,
        deadline_s: float = 30.0,
        bytes_per_s: float | None = None,
    ) -> Pulled | None:
        """Pull what the decision wants pulled, into the cluster that will prefill; None when it wants nothing.

        Prefill begins at ``reached`` tokens, however far it came.
        """
        if decision.path is Path.SHED or decision.pull_bytes <= 0:
            return None
        into, source = (self._pd, self._prfaas) if decision.path is Path.LOCAL else (self._prfaas, self._pd)
        return await self._clusters.pull(
            ns,
            chain,
            into=into,
            sources=[source],
            length=max(chain.tokens - 1, 0),
            deadline_s=deadline_s,
            bytes_per_s=bytes_per_s,
        )
