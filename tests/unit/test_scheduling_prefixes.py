"""From the pool's clusters and engines' events to the router's request, and from its decision to a pull."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kvpool.cluster.pulling import Pulled
from kvpool.events.engine import EngineCache
from kvpool.events.messages import BlockStored, EventBatch
from kvpool.keys import KeyChain, Namespace
from kvpool.scheduling.prefixes import Prefixes
from kvpool.scheduling.router import Path
from kvtransport.errors import ConfigError
from tests.poolkit import LAYOUTS

NS = Namespace("default", LAYOUTS["hybrid"], 16)
CHAIN = KeyChain.of_hashes(NS, [bytes([i]) * 32 for i in range(10)], 170)


class Clusters:
    def __init__(self, **lengths: tuple[int, ...]) -> None:
        self.lengths = lengths
        self.pulls: list[dict] = []

    async def match_across_clusters(self, ns, chain, limit=None):
        return self.lengths

    async def pull(self, ns, chain, **options):
        self.pulls.append(options)
        return Pulled(options["into"], options["sources"], wanted=64, reached=64, finished=True)


def engine(blocks: int, block_tokens: int = 16) -> EngineCache:
    cache = EngineCache()
    stored = BlockStored(CHAIN.blocks[:blocks], None, [], block_tokens, None, "GPU", None)
    cache.apply(EventBatch(1.0, [stored]))
    return cache


async def test_each_clusters_longest_match_is_the_routers():
    request = await Prefixes(Clusters(a=(16, 64), b=(32,)), pd="a", prfaas="b").request(NS, CHAIN)
    assert (request.tokens, request.match_pd, request.match_prfaas) == (170, 64, 32)
    request = await Prefixes(Clusters(), pd="a", prfaas="b").request(NS, CHAIN)
    assert (request.match_pd, request.match_prfaas) == (0, 0)


async def test_engines_count_where_they_are():
    """Of several the best; one with other blocks, or nothing, does not count; a chain of other keys finds none."""
    engines = {"b": [engine(5), engine(3), engine(9, block_tokens=32), EngineCache()]}
    prefixes = Prefixes(Clusters(a=(64,), b=(32,)), pd="a", prfaas="b", engines=engines)
    request = await prefixes.request(NS, CHAIN)
    assert (request.match_pd, request.match_prfaas) == (64, 80)
    other = KeyChain.of_hashes(NS, [bytes([i]) * 32 for i in range(100, 110)], 170)
    assert (await prefixes.request(NS, other)).match_prfaas == 32


async def test_a_decision_that_pulls_is_carried_out_where_it_prefills():
    clusters = Clusters()
    prefixes = Prefixes(clusters, pd="a", prfaas="b")
    for path, pull_bytes in ((Path.SHED, 5.0), (Path.LOCAL, 0.0), (Path.PRFAAS, 0.0)):
        assert await prefixes.carry_out(SimpleNamespace(path=path, pull_bytes=pull_bytes), NS, CHAIN) is None
    for path in (Path.LOCAL, Path.PRFAAS):
        pulled = await prefixes.carry_out(SimpleNamespace(path=path, pull_bytes=1.0), NS, CHAIN, deadline_s=3.0)
        assert pulled is not None
        assert pulled.reached == 64
    # A prompt's last token must be computed: nothing of it is pulled.
    assert [(p["into"], p["sources"], p["length"], p["deadline_s"]) for p in clusters.pulls] == [
        ("a", ["b"], 169, 3.0),
        ("b", ["a"], 169, 3.0),
    ]


def test_one_cluster_is_not_two():
    with pytest.raises(ConfigError, match="both 'a'"):
        Prefixes(Clusters(), pd="a", prfaas="a")
