"""One seed: nodes, clients, a directory, faults, and what must hold whatever happens.

Agents, servers, indexes, links and clients are the real ones; only loop, network and directory are not. What must hold:

* bytes returned are bytes put, or it is a miss (or an error of ours);
* nothing takes longer than its deadline and a little;
* entries of a process that is gone are not believed;
* when the faults are over and a while has passed, what the directory says is restorable can be read; an owner that is told of an
  entry that is not true takes it back at once;
* losing the directory costs no hit while the nodes are well;
* what a drained node held is still there, if nothing else went wrong;
* with two copies of everything nothing is lost with one node, and what is left has two again;
* what belongs to a node that joined is there;
* no copy begins by a view of the members that the directory has not confirmed within the TTL.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import random
from dataclasses import dataclass, field

from kvpool.arena import PageArena
from kvpool.cluster.agent import NodeAgent
from kvpool.cluster.links import NodeLinks
from kvpool.cluster.locate import Cut
from kvpool.cluster.members import Member
from kvpool.cluster.placement import Rendezvous
from kvpool.cluster.pool import ClusterPool
from kvpool.cluster.replicas import ReplicaPolicy
from kvpool.cluster.segments import placement_name, units_of
from kvpool.core import PoolCore
from kvpool.errors import MissError
from kvpool.keys import KeyChain, Namespace
from kvpool.server import PoolServer
from kvtransport.buffers import Arena, PageList
from kvtransport.endpoint import Endpoint, EndpointConfig
from kvtransport.errors import KVError
from kvtransport.flow.spilling import SpillPolicy
from kvtransport.layout import CacheGroup, CacheLayout, GroupKind, TensorSpec
from kvtransport.manifest import Manifest, new_transfer_id
from tests.poolkit import content
from tests.sim.transport.loop import VirtualLoop
from tests.sim.transport.network import Path, SimNetwork

from .directory import SimDirectory, Store

STEP = 16
SEGMENT = 64 * STEP
TTL_S = 1.0
DEADLINE_S = 4.0
SLACK_S = 1.5
LAYOUT = CacheLayout(
    "simulated",
    (
        CacheGroup("full", GroupKind.FULL, (0,), (TensorSpec("k", "int8", (1,)),)),
        CacheGroup("linear", GroupKind.RECURRENT, (1,), (TensorSpec("s", "int8", (9,)),)),
    ),
)
PROFILES = {
    "calm": (),
    "restarts": ("restart", "restart", "kill"),
    "evictions": ("evict", "evict", "late"),
    "directory": ("lose", "down", "cut off"),
    "network": ("reset", "hole", "stall"),
    "drain": ("drain",),
    "join": ("join", "join", "quiet kill"),
    "frozen": ("stop", "stop", "lose", "cut off", "join"),
    "chaos": (
        "restart",
        "kill",
        "evict",
        "late",
        "lose",
        "down",
        "cut off",
        "reset",
        "hole",
        "stall",
        "drain",
        "join",
        "stop",
    ),
}


class Violation(AssertionError):
    """Something that must hold does not."""


@dataclass(eq=False)
class Node:
    """One node through all its incarnations."""

    name: str
    port: int
    incarnation: int = 0
    up: bool = False
    arena: PageArena = field(init=False)
    core: PoolCore = field(init=False)
    endpoint: Endpoint = field(init=False)
    server: PoolServer = field(init=False)
    agent: NodeAgent = field(init=False)


class World:
    def __init__(self, seed: int, *, trace: bool = False) -> None:
        self.seed, self.trace = seed, trace
        self.rng = rng = random.Random(seed)
        self.lines: list[str] = []
        self.violations: list[str] = []
        self.loop = VirtualLoop()
        self.loop.limit_turns = 3_000_000
        self.loop.submit = lambda run, args: self.loop.call_later(0.001, run)  # type: ignore[assignment]
        self.loop.set_exception_handler(self._unhandled)
        path = Path(latency_s=rng.choice((0.0002, 0.003)), bytes_per_s=2e7, capacity=64 << 10, packet=16 << 10)
        self.network = SimNetwork(self.loop, rng, path)
        self.profile = rng.choice(tuple(PROFILES))
        self.store = Store(self.loop, rng)
        self.nodes = [Node(f"n{i}", 7001 + i) for i in range(rng.choice((2, 3, 3, 4)))]
        self.factor = rng.choice((1, 2))
        self.prompts = self._prompts(rng.randint(2, 3))
        self.put: dict[int, set[int]] = {i: set() for i in range(len(self.prompts))}
        self.tried: dict[int, set[int]] = {i: set() for i in range(len(self.prompts))}
        self.hits = self.misses = self.errors = self.copies = 0
        self.faults: list[str] = []
        self.safe: dict[int, set[int]] = {}
        self.config = EndpointConfig(
            keepalive_s=0.2,
            dead_after_s=0.8,
            reconnect_s=0.3,
            handshake_timeout_s=0.8,
            spill=SpillPolicy(budget_bytes=0),
        )

    def _prompts(self, n: int) -> list[list[int]]:
        rng = self.rng
        trunk = [rng.randrange(999) for _ in range(SEGMENT + 400)]
        out = []
        for _ in range(n):
            shared = rng.choice((0, 48, SEGMENT - STEP, SEGMENT + 64))
            out.append(trunk[:shared] + [rng.randrange(999) for _ in range(rng.choice((160, SEGMENT + 100)))])
        return out

    # -- saying ----------------------------------------------------------------------------------

    def log(self, text: str) -> None:
        if self.trace:
            self.lines.append(f"{self.loop.time():9.4f}  {text}")

    def violate(self, text: str) -> None:
        self.log(f"VIOLATION {text}")
        self.violations.append(f"{text} (at {self.loop.time():.3f} s)")

    def _unhandled(self, loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        error = context.get("exception")
        if not isinstance(error, KVError):
            self.violate(f"unhandled: {context.get('message')} {error!r}")

    # -- nodes and clients -----------------------------------------------------------------------

    async def start(self, node: Node, pages: int = 2048) -> None:
        node.incarnation += 1
        node.arena = PageArena(Arena(pages * 256, lock="off", cuda="off", huge="off"), 256)
        node.core = PoolCore(node.arena, clock=self.loop.time)
        network = self.network.of(node.name)
        node.endpoint = Endpoint(self.config, network=network, entropy=self.rng.randbytes)
        node.server = PoolServer(node.endpoint, node.core)
        node.agent = NodeAgent(
            node.endpoint,
            node.core,
            node=node.name,
            cluster="a",
            capacity=node.arena.total_bytes,
            clock=self.loop.time,
            network=network,
            entropy=self.rng.randbytes,
            replicas=ReplicaPolicy(factor=self.factor, most=3, hits_per_copy=5.0),
            copy_bytes_per_s=self.rng.choice((None, 5e4)),
            load=lambda: node.server.sending_bytes,
        )
        node.server.on_read = node.agent.read
        await node.endpoint.listen("10.0.0.1", node.port)
        try:
            await node.agent.join(
                SimDirectory(self.store, node.name), f"10.0.0.1:{node.port}", ttl_s=TTL_S, config=self.config
            )
        except KVError as error:
            self.log(f"{node.name} cannot join: {error}")
            await self.stop(node)
            return
        assert node.agent.keeper is not None
        node.agent.keeper.on_copy = lambda to: self.copying(node, to)
        node.up = True
        self.log(f"{node.name} is up, incarnation {node.incarnation}")

    async def stop(self, node: Node) -> None:
        """As a crash: nobody is told."""
        node.up = False
        await node.agent.stop()
        await node.server.close()
        await node.endpoint.close()
        node.arena.close()
        self.log(f"{node.name} is gone")

    def copying(self, node: Node, to: Member) -> None:
        """``node`` begins a copy; it may only by a view that is true enough."""
        now, store = self.loop.time(), self.store
        self.copies += 1
        age = now - store.confirmed.get(node.name, float("-inf"))
        self.log(f"{node.name} copies to {to.id}, by a view of {age:.2f} s ago")
        if age > TTL_S + 0.01:
            self.violate(f"{node.name} copies to {to.id} by a view of {age:.1f} s ago")
        if store.lost_at + 0.7 * TTL_S < now < store.lost_at + 2 * TTL_S:
            self.violate(f"{node.name} copies {now - store.lost_at:.1f} s after the directory has lost everything")

    async def client(self, name: str) -> ClusterPool:
        links = NodeLinks(
            self.config,
            random=self.rng.random,
            dial_s=0.8,
            network=self.network.of(name),
            entropy=self.rng.randbytes,
        )
        pool = ClusterPool(
            SimDirectory(self.store, name),
            links,
            placement=Rendezvous(),
            ttl_s=TTL_S,
            answer_s=0.5,
            random=self.rng.random,
            entropy=self.rng.randbytes,
        )
        try:
            await pool.start()
        except BaseException:
            await pool.close()
            raise
        return pool

    # -- what clients do ---------------------------------------------------------------------------

    async def do_put(self, pool: ClusterPool, ns: Namespace, which: int, length: int, points: list[int]) -> None:
        tokens = self.prompts[which]
        self.tried[which] |= {length, *points}
        try:
            outgoing = await pool.put(
                ns, KeyChain(ns, tokens), boundary=length, checkpoints=points, deadline_s=DEADLINE_S
            )
            for extent in outgoing.manifest.extents:
                outgoing.ready(extent.layer, extent.tensor, PageList.of(content(extent, tokens)))
            await outgoing.seal()
        except KVError as error:
            self.log(f"put {which} to {length}: {type(error).__name__} {error}")
            self.errors += 1
            return
        self.put[which] |= {length, *points}
        self.log(f"put {which} to {length}, states at {points}")

    async def do_get(self, pool: ClusterPool, ns: Namespace, which: int, length: int) -> bool:
        """Read and check; whether it was a hit."""
        tokens = self.prompts[which]
        manifest = Manifest.of_layout(ns.layout, length, transfer=new_transfer_id(), block_tokens=STEP)
        into = {slot: PageList.of(bytearray(b"\xee" * e.nbytes)) for slot, e in manifest.by_slot.items()}
        try:
            incoming = await pool.get(ns, KeyChain(ns, tokens), boundary=length, into=into, deadline_s=DEADLINE_S)
            await incoming.sealed()
        except KVError as error:
            self.log(f"get {which} of {length}: {type(error).__name__} {error}")
            self.misses += isinstance(error, MissError)
            self.errors += not isinstance(error, MissError)
            return False
        for extent in manifest.extents:
            if into[extent.layer, extent.tensor].tobytes() != content(extent, tokens):
                self.violate(f"prompt {which} at {length}: wrong bytes in layer {extent.layer}")
        self.log(f"get {which} of {length}: hit")
        self.hits += 1
        return True

    async def act(self, pool: ClusterPool, ns: Namespace) -> None:
        rng = self.rng
        which = rng.randrange(len(self.prompts))
        blocks = (len(self.prompts[which]) - 1) // STEP
        begin = self.loop.time()
        if rng.random() < 0.45:
            length = rng.randint(1, blocks) * STEP
            points = sorted({rng.randint(1, length // STEP) * STEP for _ in range(rng.randint(0, 2))} - {length})
            await self.do_put(pool, ns, which, length, points)
        else:
            try:
                found = await pool.match(ns, KeyChain(ns, self.prompts[which]))
            except KVError as error:
                self.log(f"match {which}: {type(error).__name__}")
                return
            for length in found.restorable:
                if not self._tried(which, length):
                    self.violate(f"prompt {which}: {length} is said to be restorable and was never put")
            lengths = [*found.restorable[-2:], *list(self.put[which])[:1]]
            if lengths:
                await self.do_get(pool, ns, which, rng.choice(lengths))
        if self.loop.time() - begin > 2 * DEADLINE_S + SLACK_S:
            self.violate(f"an operation took {self.loop.time() - begin:.1f} s")

    def _tried(self, which: int, length: int) -> bool:
        """Whether somebody began to put this length of this very prefix."""
        mine = self.prompts[which][:length]
        return any(length in self.tried[i] and p[:length] == mine for i, p in enumerate(self.prompts))

    async def work(self, name: str, until: float) -> None:
        try:
            pool = await self.client(name)
        except KVError as error:  # every node may be gone for the moment
            self.log(f"{name}: {type(error).__name__} {error}")
            self.errors += 1
            return
        ns = await pool.namespace(LAYOUT, STEP)
        while self.loop.time() < until:
            await self.act(pool, ns)
            await asyncio.sleep(self.rng.random() * 0.25)
        await pool.close()

    # -- faults --------------------------------------------------------------------------------------

    async def inject(self, until: float) -> None:
        rng = self.rng
        choices = PROFILES[self.profile]
        for _ in range(rng.randint(1, 4) if choices else 0):
            await asyncio.sleep(rng.random() * (until - self.loop.time()) * 0.5)
            name = rng.choice(choices)
            self.faults.append(name)
            self.log(f"fault: {name}")
            await getattr(self, "fault_" + name.replace(" ", "_"))()

    def _some(self) -> Node | None:
        up = [n for n in self.nodes if n.up]
        return self.rng.choice(up) if up else None

    async def fault_restart(self) -> None:
        node = self._some()
        if node is not None:
            await self.stop(node)
            await asyncio.sleep(self.rng.choice((0.05, 0.5, 2.0)))
            await self.start(node)

    async def fault_kill(self) -> None:
        node = self._some()
        if node is not None and sum(n.up for n in self.nodes) > 1:
            await self.stop(node)

    async def fault_join(self) -> None:
        if len(self.nodes) < 6:
            node = Node(f"n{len(self.nodes)}", 7001 + len(self.nodes))
            self.nodes.append(node)
            await self.start(node)

    async def kept(self, patience_s: float = 30.0) -> bool:
        """Wait until no node has anything to copy; whether that came."""
        until = self.loop.time() + patience_s
        quiet = 0
        while quiet < 4 and self.loop.time() < until:
            await asyncio.sleep(0.25)
            keepers = [n.agent.keeper for n in self.nodes if n.up]
            idle = all(k is not None and k.idle and not k.progress.waiting for k in keepers)
            quiet = quiet + 1 if idle else 0
        return quiet >= 4

    async def fault_quiet_kill(self) -> None:
        """A node dies when all that was put has its copies."""
        if self.factor < 2 or sum(n.up for n in self.nodes) < 3:
            return
        if await self.kept():
            # Puts go on; what was sealed before is safe.
            before = {which: set(lengths) for which, lengths in self.put.items()}
            await self.kept()
            node = self._some()
            assert node is not None
            await self.stop(node)
            self.safe = before

    async def fault_stop(self) -> None:
        """SIGSTOP, and SIGCONT later: what it knew is old then, and it does not know."""
        node = self._some()
        if node is None:
            return
        seconds = self.rng.choice((0.3, 1.5, 3.0))
        event = self.store.stopped[node.name] = asyncio.Event()
        for pair in self.network.live():
            for stream in pair:
                if stream.name.startswith((f"{node.name}>", f"{node.name}<")):
                    stream.stall(seconds)
                    stream.pause(seconds)
        await asyncio.sleep(seconds)
        self.store.stopped.pop(node.name, None)
        event.set()

    async def fault_evict(self) -> None:
        node = self._some()
        if node is not None:
            node.core.clear()

    async def fault_late(self) -> None:
        self.store.late = 0.7
        await asyncio.sleep(self.rng.random())
        await self.fault_evict()
        await asyncio.sleep(self.rng.random() * 0.5)
        self.store.late = 0.0

    async def fault_lose(self) -> None:
        self.store.lose_everything()

    async def fault_down(self) -> None:
        self.store.down = True
        await asyncio.sleep(self.rng.choice((0.3, 3.0)))
        self.store.down = False

    async def fault_cut_off(self) -> None:
        name = self.rng.choice([*(n.name for n in self.nodes), "c0", "c1"])
        self.store.cut_off.add(name)
        await asyncio.sleep(self.rng.choice((0.3, 3.0)))
        self.store.cut_off.discard(name)

    async def fault_reset(self) -> None:
        for pair in self.network.live():
            if self.rng.random() < 0.4:
                for stream in pair:
                    stream.broke(0.0)

    async def fault_hole(self) -> None:
        for pair in self.network.live():
            if self.rng.random() < 0.3:
                pair[0].black_hole()

    async def fault_stall(self) -> None:
        for pair in self.network.live():
            pair[self.rng.randrange(2)].stall(self.rng.choice((0.1, 0.6)))

    async def fault_drain(self) -> None:
        node = self._some()
        if node is not None and sum(n.up for n in self.nodes) > 1:
            try:
                await node.agent.drain(deadline_s=20.0)
            except KVError as error:
                self.log(f"{node.name} does not drain: {error}")
                return
            draining = node.agent._draining
            assert draining is not None
            await asyncio.wait([draining])
            if node.agent._mover is not None:
                self.log(f"{node.name} drained: {node.agent._mover.progress}")
            await self.stop(node)

    # -- the end -------------------------------------------------------------------------------------

    async def check_quiet(self) -> None:
        """The faults are over: what the directory says holds."""
        self.store.down, self.store.late = False, 0.0
        for event in self.store.stopped.values():
            event.set()
        self.store.stopped.clear()
        self.store.cut_off.clear()
        await asyncio.sleep(3.6)  # what was announced late has arrived
        pool = await self.client("judge")
        ns = await pool.namespace(LAYOUT, STEP)
        if set(self.faults) <= {"late", "evict"}:
            await self._check_healing(pool, ns)
        await asyncio.sleep(6 * TTL_S)
        if set(pool.roster.members) != {n.name for n in self.nodes if n.up}:
            self.violate(
                f"members are {sorted(pool.roster.members)}, up are {sorted(n.name for n in self.nodes if n.up)}"
            )
        last: dict[int, tuple[int, ...]] = {}
        for which, tokens in enumerate(self.prompts):
            found = await pool.match(ns, KeyChain(ns, tokens))
            last[which] = found.restorable
            for length in found.restorable[-2:]:
                if not await self.do_get(pool, ns, which, length):
                    self.violate(f"prompt {which}: {length} is said to be restorable and cannot be read")
        if self.profile in ("calm", "drain"):
            for which, lengths in self.put.items():
                gone = lengths - set(last[which])
                if gone:
                    self.violate(f"prompt {which}: {sorted(gone)} were put and are gone, and no node was lost")
        await self._check_copies(pool, ns, last)
        await self._check_loss(pool, ns, last)
        await pool.close()

    async def _check_copies(self, pool: ClusterPool, ns: Namespace, last: dict[int, tuple[int, ...]]) -> None:
        """All is calm: what should have been copied is."""
        if not await self.kept(60.0):
            self.violate("nodes do not come to an end of copying")
        for which, lengths in self.safe.items():
            gone = lengths - set(last[which])
            if gone:
                self.violate(f"prompt {which}: {sorted(gone)} had two copies and are gone with one node")
        await asyncio.sleep(1.0)  # announced
        up = [n.agent.member for n in self.nodes if n.up]
        if self.profile in ("calm", "join", "restarts"):
            for which, tokens in enumerate(self.prompts):
                if not last[which]:
                    continue
                found = Cut(ns, units_of(ns), KeyChain(ns, tokens[: last[which][-1]]).blocks)
                found.fill(await pool.directory.look(found.keys), pool.roster.incarnations())
                for unit, segment in found.parts:
                    holders = {h.node for h in found.holders[unit, segment.index]}
                    homes = [m.id for m in Rendezvous("a").order(placement_name(found.blocks[segment.first]), up)]
                    if holders and self.factor == 2 and len(holders) < min(2, len(up)):
                        self.violate(
                            f"prompt {which}: segment {segment.index} of unit {unit} has only {len(holders)} copies"
                        )
                    if self.profile == "join" and holders and homes[0] not in holders:
                        self.violate(f"prompt {which}: {homes[0]} lacks segment {segment.index} of unit {unit}")

    @staticmethod
    async def _said(pool: ClusterPool, ns: Namespace, tokens: list[int]) -> dict[tuple[int, int], set[str]]:
        """Who holds what, as the directory has it: nodes by unit and segment."""
        cut = Cut(ns, units_of(ns), KeyChain(ns, tokens).blocks)
        cut.fill(await pool.directory.look(cut.keys), pool.roster.incarnations())
        return {(unit, s.index): {h.node for h in cut.holders[unit, s.index]} for unit, s in cut.parts}

    async def _check_healing(self, pool: ClusterPool, ns: Namespace) -> None:
        """Who believed an entry that a late announcement left behind has told its owner: nobody believes it again."""
        for which, tokens in enumerate(self.prompts):
            for _ in range(len(self.nodes) + 1):
                found = await pool.match(ns, KeyChain(ns, tokens))
                if not found.length:
                    break
                said = await self._said(pool, ns, tokens[: found.length])
                if await self.do_get(pool, ns, which, found.length):
                    break
                await asyncio.sleep(0.3)
                # The same length may be true by now: of another node, whose announcement was late as well.
                if await self._said(pool, ns, tokens[: found.length]) == said:
                    self.violate(f"prompt {which}: {found.length} was not true, its owner was told, and it is still said")
                    break
            else:
                self.violate(f"prompt {which}: what is said to be restorable is not, however often it is told")

    async def _check_loss(self, pool: ClusterPool, ns: Namespace, known: dict[int, tuple[int, ...]]) -> None:
        """The directory loses everything while all is well: nothing is missed, at once and later."""
        self.store.lose_everything()
        await pool.refresh()
        for pause in (0.0, 0.3, 3 * TTL_S):
            await asyncio.sleep(pause)
            for which, tokens in enumerate(self.prompts):
                found = await pool.match(ns, KeyChain(ns, tokens))
                if found.restorable != known[which]:
                    self.violate(
                        f"prompt {which}: {len(known[which])} lengths before the directory was lost, {len(found.restorable)} after"
                    )

    async def main(self) -> None:
        for node in self.nodes:
            await self.start(node)
        until = self.loop.time() + self.rng.choice((1.0, 3.0))
        workers = [self.loop.create_task(self.work(f"c{i}", until)) for i in range(2)]
        await self.inject(until)
        await asyncio.gather(*workers)
        if any(n.up for n in self.nodes):
            await self.check_quiet()
        for node in self.nodes:
            if node.up:
                await self.stop(node)
        await asyncio.sleep(2.0)

    def run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_until_complete(asyncio.wait_for(self.main(), 600))
            left = [t for t in asyncio.all_tasks(self.loop) if not t.done()]
            if left:
                self.violate(f"tasks are left: {left[:3]}")
        finally:
            self.network.silence()
            asyncio.set_event_loop(None)
            self.loop.close()
        if self.violations:
            raise Violation(f"seed {self.seed} ({self.profile}): " + "; ".join(self.violations[:4]))


def run_seed(seed: int, *, trace: bool = False) -> World:
    """Run one seed; raises Violation with what did not hold."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        world = World(seed, trace=trace)
        try:
            world.run()
        except Violation as violation:
            if trace:
                violation.add_note("\n".join(world.lines[-400:]))
            raise
        return world
    finally:
        if enabled:
            gc.enable()
        if next(_count) % 20 == 0:
            gc.collect()


_count = itertools.count()
