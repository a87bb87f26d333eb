"""A node sees to it that its chains have the copies they should have, where they should be.

What is new, popular, homeless since a node was lost, or due to a node that joined: all is work for one loop, which asks the directory
who holds what and copies what is missing, no faster than allowed and below live transfers. Its state is what the nodes hold: interrupting
it loses nothing, and whoever comes back goes on. Nothing is deleted; what lies on more nodes than it needs to is evicted like the rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

import msgspec

from kvpool.core import PoolCore
from kvpool.errors import DirectoryError, MissError
from kvpool.index import Nodes, Path, Residency
from kvpool.keys import KeyChain, Namespace
from kvtransport.errors import KVError

from .copying import Copier, Copyable, last_segment
from .demand import Demand
from .directory import Directory
from .entries import INCARNATION_BYTES
from .links import NodeLinks
from .members import Member, Roster, State
from .pacing import Pacer
from .placement import Rendezvous
from .replicas import ReplicaPolicy, missing
from .segments import placement_name

PAUSE_S = 0.2
"""Between two looks at whether there is work."""
BATCH = 256
"""Chains that the directory is asked about at once."""
MAX_QUEUE = 65_536
"""Chains waiting; what is beyond is found by the next scan."""
FULL_PART = 0.9
"""A node fuller than this gets no copies that only move things home."""
TRIES = 3
RETRY_S = 1.0

Work = tuple[Namespace, Path]


def _name(ns: Namespace, path: Path) -> bytes:
    """What names a path in a queue."""
    return last_segment(ns, path.keys)[0] + (path.keys[-1] if path.tail is None else path.tail[1])


class Kept(msgspec.Struct):
    """How far a node has got; ``kvpool cluster status`` shows it."""

    copies: int = 0
    """Copies made, since the start."""
    moved_bytes: int = 0
    failed: int = 0
    waiting: int = 0
    """Chains that are still to be looked at, or are being copied."""
    scanned: int = 0
    """Chains of the last scan (a node came or went), of which those waiting are left."""
    held_up: bool = False
    """There is work, and the view of the cluster is not one to move data by."""
    note: str = ""


class Keeper:
    """Of the node ``node``; a :class:`kvpool.index.Watcher`. ``clock`` gives seconds; ``bytes_per_s`` None: as fast as it goes.

    ``rebalance``: nodes that join get what they are the home of. ``grace_s``: seconds that a lost node gets to come back before
    what it held is copied. Every tenant's chains are copied under that tenant; each has as many copies as the policy says.
    """

    def __init__(
        self,
        core: PoolCore,
        node: str,
        cluster: str,
        policy: ReplicaPolicy,
        clock: Callable[[], float],
        *,
        rebalance: bool = True,
        bytes_per_s: float | None = None,
        grace_s: float = 3.0,
    ) -> None:
        self._core, self._node, self._clock = core, node, clock
        self._cluster = cluster
        self._policy = policy
        self._rebalance = rebalance
        self._grace_s = grace_s
        self._pacer = Pacer(bytes_per_s, clock())
        self._placement = Rendezvous(cluster)
        self._demand = Demand()
        self._fresh: dict[tuple[bytes, int], tuple[Residency, bytes]] = {}
        self._urgent: dict[bytes, Work] = {}
        self._queue: dict[bytes, Work] = {}
        self._tries: dict[bytes, int] = {}
        self._scan_at: float | None = None
        self._seen: dict[str, bytes] | None = None
        self.progress = Kept()
        self.on_copy: Callable[[Member], None] | None = None
        """Told of the node that a copy begins to, when set."""

    # -- what makes work -------------------------------------------------------------------------

    def stored(self, tree: Residency, unit: int, nodes: Nodes) -> None:
        if self._policy.base(tree.ns) < 2:
            return
        step = tree.ns.block_tokens
        parents, positions = tree.places_of(nodes)
        above = set(parents)
        for node, position in zip(nodes.tolist(), positions, strict=True):
            if node not in above and position >= step and len(self._fresh) < MAX_QUEUE:
                self._fresh[tree.ns.id, node] = (tree, tree.key(unit, node))

    def removed(self, tree: Residency, unit: int, nodes: Nodes) -> None:
        """What was evicted is not copied back."""

    def read(self, ns: Namespace, chain: KeyChain, boundary: int) -> None:
        """Somebody read ``chain`` up to ``boundary`` here: it may deserve another copy."""
        blocks = boundary // ns.block_tokens
        if not blocks:
            return
        keys = chain.blocks[:blocks]
        name = last_segment(ns, keys)[0]
        before = self._policy.wanted(ns, self._demand.heat(self._clock(), name), 1)
        # Asked once each time that another copy is earned, not for every hit.
        if self._policy.wanted(ns, self._demand.hit(self._clock(), name), 1) > before and len(self._queue) < MAX_QUEUE:
            self._queue[name] = (ns, Path(list(keys)))

    def seen(self, roster: Roster) -> None:
        """The view of the members was asked for again: what came and what went makes work."""
        now = self._clock()
        known = {m.id: m.incarnation for m in roster.members.values() if m.cluster == self._cluster}
        if not roster.steady(now):
            # Who comes before this node may move anything has come, too.
            self._seen = known if self._seen is None else self._seen
            return
        before, self._seen = self._seen, known
        if before is None or before == known:
            return
        lost = any(known.get(node) != incarnation for node, incarnation in before.items())
        came = any(before.get(node) != incarnation for node, incarnation in known.items())
        if lost or (came and self._rebalance):
            due = now + (self._grace_s if lost else 0.0)
            self._scan_at = due if self._scan_at is None else min(self._scan_at, due)

    def _scan(self) -> None:
        self._scan_at = None
        count = 0
        for ns in self._core.namespaces():
            if not (self._rebalance or self._policy.base(ns) > 1):
                continue
            for path in self._core.chains(ns):
                count += 1
                if len(self._queue) < MAX_QUEUE:
                    self._queue.setdefault(_name(ns, path), (ns, path))
        self.progress.scanned = count

    def _take_fresh(self) -> None:
        fresh, self._fresh = self._fresh, {}
        for (_, node), (tree, key) in fresh.items():
            try:
                if tree.key(0, node) != key:
                    continue  # evicted, and its place taken
            except ValueError:
                continue  # evicted
            path = tree.path_to(node)
            self._urgent[_name(tree.ns, path)] = (tree.ns, path)

    # -- doing it --------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Nothing is to be done, as far as is known."""
        return not (self._fresh or self._urgent or self._queue or self._scan_at is not None)

    async def run(self, directory: Directory, links: NodeLinks, roster: Roster, state: Callable[[], State]) -> None:
        """Until cancelled. While ``roster`` is not steady nothing is copied; a draining node leaves all to its drain."""
        copier = Copier(self._core, links, self._clock)
        while True:
            await asyncio.sleep(PAUSE_S)
            if self._fresh:
                self._take_fresh()
            steady = roster.steady(self._clock()) and state() is State.UP
            self.progress.held_up = not steady and not self.idle
            if not steady:
                continue
            if self._scan_at is not None and self._clock() >= self._scan_at:
                self._scan()
            while (self._urgent or self._queue) and roster.steady(self._clock()) and state() is State.UP:
                await self._batch(directory, links, roster, copier)
            self.progress.waiting = 0

    async def _batch(self, directory: Directory, links: NodeLinks, roster: Roster, copier: Copier) -> None:
        work: dict[bytes, Work] = {}
        for queue in (self._urgent, self._queue):
            while queue and len(work) < BATCH:
                name = next(iter(queue))
                work[name] = queue.pop(name)
        self.progress.waiting = len(self._urgent) + len(self._queue) + len(work)
        chains = {name: Copyable(self._core, ns, path) for name, (ns, path) in work.items()}
        chains = {name: what for name, what in chains.items() if what.points}
        try:
            answers = await directory.look([what.name for what in chains.values()])
        except DirectoryError as error:
            self.progress.note = error.message
            for name in chains:
                self._queue.setdefault(name, work[name])
            roster.failed()
            return
        for (name, what), found in zip(chains.items(), answers, strict=True):
            try:
                if not await self._keep(what, found, roster, copier):
                    self._queue.setdefault(name, work[name])  # when the view is good again, with a new look
            except MissError:
                pass  # evicted here meanwhile
            except KVError as error:
                self.progress.note = error.message
                self._again(name, work[name])
            else:
                self._tries.pop(name, None)
            self.progress.waiting = max(self.progress.waiting - 1, 0)

    def _again(self, name: bytes, work: Work) -> None:
        tries = self._tries[name] = self._tries.get(name, 0) + 1
        if tries < TRIES:
            asyncio.get_running_loop().call_later(RETRY_S * tries, self._queue.setdefault, name, work)
        else:
            self.progress.failed += 1
            del self._tries[name]

    def _holders(self, what: Copyable, found: dict[str, bytes], members: Iterable[Member]) -> set[str]:
        """The nodes whose entries, of their current incarnations, have all of it; this one has it."""
        out = {self._node}
        for member in members:
            entry = found.get(member.id)
            if (
                entry is not None
                and entry[:INCARNATION_BYTES] == member.incarnation[:INCARNATION_BYTES]
                and what.held_by(entry)
            ):
                out.add(member.id)
        return out

    async def _keep(self, what: Copyable, found: dict[str, bytes], roster: Roster, copier: Copier) -> bool:
        """Make the copies of one chain that this node has to make. False: the view grew old, and they may not all be there."""

        def steady() -> bool:
            return roster.steady(self._clock())

        members = {m.id: m for m in roster.writable()}
        order: Sequence[str] = [
            m.id for m in self._placement.order(placement_name(what.keys[0]), list(members.values()))
        ]
        holders = self._holders(what, found, members.values())
        heat = self._demand.heat(self._clock(), what.name)
        wanted = self._policy.wanted(what.ns, heat, len(holders))
        for node in missing(order, holders, wanted, self._node):
            member = members[node]
            if not steady():
                return False
            if len(holders) >= wanted and (not self._rebalance or member.used > FULL_PART * member.capacity):
                continue
            held = await copier.held(member, what)
            if not held.issuperset(what.points):
                if self.on_copy is not None and steady():
                    self.on_copy(member)
                nbytes = await copier.copy(member, what, held, self._pacer, steady)
                self.progress.moved_bytes += nbytes
                if not steady():
                    return False  # the copy may have been cut short: its node will be asked
                self.progress.copies += 1
            holders.add(node)
        return True
