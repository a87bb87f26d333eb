"""Draining: copying what this node holds to the nodes that would hold it without it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from kvpool.core import PoolCore
from kvpool.errors import MissError, NoNodeError, PoolFullError, PrefixMissingError
from kvpool.index import Path
from kvpool.keys import Namespace
from kvtransport.errors import KVError

from .copying import Copier, Copyable
from .links import NodeLinks
from .members import Member
from .pacing import Pacer, Progress
from .placement import Placement
from .segments import placement_name

TRIES = 3


class Mover:
    """Moves over ``links``; ``members()`` gives those that take new data, ``clock`` seconds.

    Unless ``steady()`` the view of the members is an old one, and nothing is moved by it.
    """

    def __init__(
        self,
        core: PoolCore,
        links: NodeLinks,
        placement: Placement,
        members: Callable[[], Sequence[Member]],
        clock: Callable[[], float],
        steady: Callable[[], bool] = lambda: True,
    ) -> None:
        self._steady = steady
        self._core = core
        self._links = links
        self._copier = Copier(core, links, clock)
        self._placement = placement
        self._members = members
        self._clock = clock
        self.progress = Progress()

    async def run(self, *, deadline: float, bytes_per_s: float | None) -> Progress:
        """Copy everything that is worth it until ``deadline`` (seconds of the clock); what is most used goes first.

        Of all tenants, each under its own. States that lead nowhere, blocks without a state behind them, checkpoints inside a
        very first block and flat objects are left to be missed.
        """
        progress = self.progress = Progress(running=True)
        pacer = Pacer(bytes_per_s, self._clock())
        work = [(ns, path) for ns in self._core.namespaces() for path in self._core.chains(ns)]
        progress.chains = len(work)
        for ns, path in work:
            # A view grows steady by being asked for again, in the background.
            while not self._steady() and self._clock() < deadline:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            if self._clock() >= deadline:
                progress.left = len(work) - progress.done
                progress.note = "the deadline came first"
                break
            try:
                await self._move(ns, path, pacer, deadline)
            except KVError as error:
                progress.failed += 1
                progress.note = error.message
            progress.done += 1
        progress.running, progress.finished = False, True
        return progress

    async def _move(self, ns: Namespace, path: Path, pacer: Pacer, deadline: float) -> None:
        what = Copyable(self._core, ns, path)
        if not what.points:
            return
        error: KVError = NoNodeError("no other node takes new data")
        for member in self._placement.order(placement_name(what.keys[0]), self._members())[:TRIES]:
            try:
                held = await self._copier.held(member, what)
                if held.issuperset(what.points):
                    self.progress.skipped += 1
                    return
                self.progress.moved_bytes += await self._copier.copy(
                    member, what, held, pacer, lambda: self._clock() < deadline
                )
            except MissError:
                return  # evicted here meanwhile
            except (PoolFullError, PrefixMissingError) as why:
                error = why
                continue
            except KVError as why:
                self._links.failed(member, why)
                error = why
                continue
            return
        raise error
