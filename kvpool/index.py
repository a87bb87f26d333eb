"""The prefix tree of one namespace: which blocks and states of which key chains are resident.

Nodes are numbers, their properties columns of arrays; a hash table leads from key to node. What a node holds is
kept per *unit*, which is what is evicted together: all full-attention groups are one unit, all recurrent groups
are one (a checkpoint needs every state), every sliding group is its own (windows differ).

Invariants:

* A node with full-attention bytes has a parent with them: leaves go first, and with a full block goes everything else
  its node holds, for it could never be restored.
* An off-grid checkpoint (*tail*) is a node of its own under the block before it; its units come and go together.
* Whoever pins anything of a node pins the full-attention unit of its whole path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kvtransport.layout import GroupKind

from .arena import BlockClass, PageArena, Slab, Slabs
from .columns import Column
from .errors import KeyChainError
from .eviction import BLOCKED, FIRST, GONE, Eviction, GhostList, Stored
from .eviction.flops import FlopsModel
from .eviction.segments import describe
from .keys import KeyChain, Namespace
from .match import Ghost, Tail, View, rules_of
from .placement import Geometry
from .slabstore import EveryNode, FewNodes, SlabStore
from .table import ancestors, new_table

Nodes = NDArray[np.int32]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Selection = list[tuple[int, Nodes]]
"""(unit, nodes) pairs: what an operation touches or pins."""

ROOT = -1
_NO_NODES: Nodes = np.empty(0, dtype=np.int32)
_FIRST_ROWS = 64


class Path(NamedTuple):
    """Block keys from a first block on, and the off-grid checkpoint at the end if there is one: its position (tokens) and key."""

    keys: list[bytes]
    tail: tuple[int, bytes] | None = None


class Watcher(Protocol):
    """Who is told what becomes resident and what goes; called from inside the change, must not change the tree."""

    def stored(self, tree: Tree, unit: int, nodes: Nodes) -> None: ...

    def removed(self, tree: Tree, unit: int, nodes: Nodes) -> None: ...


class Tree:
    """The index of ``ns``. ``free`` takes the slabs of what is evicted, ``clock`` gives seconds for ghosts.

    ``arena`` is where the slabs lie, ``geometry`` how large they are.
    """

    def __init__(
        self,
        ns: Namespace,
        eviction: Eviction,
        ghosts: GhostList,
        free: Callable[[list[Slabs]], None],
        clock: Callable[[], float],
        geometry: Geometry,
        arena: PageArena,
    ) -> None:
        self.ns = ns
        self.rules = rules_of(ns.layout)
        self.unit_of: list[int] = []
        """Unit of each group."""
        self.units: list[list[int]] = []
        """Groups of each unit."""
        joint: dict[GroupKind, int] = {}
        for group, rule in enumerate(self.rules):
            if rule.kind not in joint or rule.kind is GroupKind.SLIDING:
                joint[rule.kind] = len(self.units)
                self.units.append([])
            self.unit_of.append(joint[rule.kind])
            self.units[joint[rule.kind]].append(group)
        self.full: int | None = joint.get(GroupKind.FULL)
        self.state: int | None = joint.get(GroupKind.RECURRENT)
        self.number = eviction.add(self)
        self.unpinned_pages = 0
        self.group_slabs = [0] * len(self.rules)
        self.group_pages = [0] * len(self.rules)
        self._eviction, self._ghosts, self._free, self._clock = eviction, ghosts, free, clock
        self._policy = eviction.policy
        self.flops = FlopsModel(ns.layout)
        """What a prefix saves."""
        self._arena = arena
        self._page_bytes = arena.page_bytes
        self._group_bytes = geometry.group_bytes
        self._ends = [u for u in range(len(self.units)) if u != self.full]
        self.watcher: Watcher | None = None
        """Told of every change of what is resident."""
        self._table = new_table()
        self._slabs = [self._store(group) for group in range(len(self.rules))]
        self._tails: dict[int, dict[int, int]] = {}  # parent -> position -> tails there
        self._entries = [0] * len(self.units)
        self._capacity = 0
        units = (len(self.units),)
        self._columns = {
            "_parent": Column(np.int32),
            "_position": Column(np.int32),
            "_children": Column(np.int32),
            "_with_tails": Column(np.bool_),
            "_turn": Column(np.int32),
            "_kind": Column(np.int16),
            # by unit
            "_resident": Column(np.bool_, units),
            "_queued": Column(np.bool_, units),
            "_pins": Column(np.int32, units),
            "_pages": Column(np.int32, units),
            "_rank": Column(np.float64, units),
            "_uses": Column(np.int32, units),
            "_value": Column(np.float32, units),
            "_generation": Column(np.int32, units),
        }
        self._show_columns()

    def _store(self, group: int) -> SlabStore:
        nbytes = self._group_bytes[group]
        if self.rules[group].kind is GroupKind.RECURRENT:
            return FewNodes(BlockClass.STATE, self._arena.pages_for(nbytes))
        return EveryNode(BlockClass.PREFIX, self._arena.pages_for(nbytes * self.ns.block_tokens))

    @property
    def tenant(self) -> str:
        return self.ns.tenant

    def __len__(self) -> int:
        """Nodes."""
        return len(self._table)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the index takes, room for nodes to come included (which takes none until they do)."""
        columns = sum(c.rows.nbytes for c in self._columns.values())
        return self._table.nbytes + columns + sum(s.nbytes for s in self._slabs)

    def place_of(self, node: int) -> tuple[int, int]:
        """(parent, position in tokens at the end of what the node holds); ROOT is the parent of first blocks."""
        return int(self._parent[node]), int(self._position[node])

    def chains(self) -> list[Path]:
        """Every path from a first block to a last one or to an off-grid checkpoint, what would be evicted last at the front.

        A checkpoint inside the very first block is left out.
        """
        held = np.flatnonzero(self._resident.any(axis=0) & (self._position >= self.ns.block_tokens))
        above = np.zeros(len(self._parent), dtype=np.bool_)
        parents = self._parent[held]
        above[parents[parents >= 0]] = True
        ends = held[~above[held]]
        ranks = np.where(self._resident[:, ends], self._rank[:, ends], -np.inf).max(axis=0)
        return [self.path_to(node) for node in ends[np.argsort(-ranks, kind="stable")].tolist()]

    def path_to(self, node: int) -> Path:
        """The path that ends with ``node``."""
        position = int(self._position[node])
        path = []
        while node != ROOT:
            path.append(node)
            node = int(self._parent[node])
        keys = self._table.keys(np.array(path[::-1], np.int32))
        if position % self.ns.block_tokens:
            return Path(keys[:-1], (position, keys[-1]))
        return Path(keys)

    def places_of(self, nodes: Nodes) -> tuple[list[int], list[int]]:
        """Parents and positions of ``nodes``, as of :meth:`place_of`."""
        return self._parent[nodes].tolist(), self._position[nodes].tolist()

    def held(self, unit: int) -> Nodes:
        """All nodes that ``unit`` is resident of, parents before what follows them as far as the index grew that way."""
        return np.flatnonzero(self._resident[unit]).astype(np.int32)

    def holds_at(self, unit: int, nodes: Nodes) -> Bools:
        """Whether ``unit`` is resident of each of ``nodes``."""
        there: Bools = self._resident[unit, nodes]
        return there

    # -- finding ---------------------------------------------------------------------------------

    def find(self, keys: list[bytes]) -> Nodes:
        """The nodes of the longest known prefix of the chain ``keys``."""
        nodes = np.empty(len(keys), np.int32)
        nodes = nodes[: self._table.find(keys, 0, nodes)]
        # An opaque key may be known under another parent, or as a tail: then this is not its chain.
        right = self._position[nodes] == np.arange(1, len(nodes) + 1, dtype=np.int32) * self.ns.block_tokens
        right[:1] &= self._parent[nodes[:1]] == ROOT
        right[1:] &= self._parent[nodes[1:]] == nodes[:-1]
        return nodes if right.all() else nodes[: int(np.argmin(right))]

    def branches_after(self, path: Nodes) -> bool:
        """Whether something follows the last node of ``path`` (False at the root: nothing comes before it)."""
        return bool(len(path)) and bool(self._children[path[-1]])

    def find_tail(self, chain: KeyChain, position: int, path: Nodes) -> int | None:
        """The node of the off-grid checkpoint at ``position``, given the path of the blocks before it."""
        block = position // self.ns.block_tokens
        if not chain.names(position) or len(path) < block:
            return None
        node = self._table.get(chain.key_at(position))
        parent = int(path[block - 1]) if block else ROOT
        if node < 0 or self._parent[node] != parent or self._position[node] != position:
            return None
        return node

    def view(self, chain: KeyChain, path: Nodes) -> View:
        """What the rules of :mod:`kvpool.match` decide on; ``path`` comes from :meth:`find`."""
        resident = self._resident[np.array(self.unit_of)[:, None], path[None, :]]
        tails = []
        if self._tails and (not chain.opaque or chain.tails):
            for parent in (ROOT, *path[self._with_tails[path]].tolist()):
                for position in self._tails.get(parent, ()):
                    node = self.find_tail(chain, position, path)
                    if node is not None:
                        tails.append(Tail(position, tuple(bool(self._resident[u, node]) for u in self.unit_of)))
        return View(self.ns.block_tokens, self.rules, resident, tuple(tails))

    @property
    def has_tails(self) -> bool:
        """Whether there is any off-grid checkpoint."""
        return bool(self._tails)

    def tails_along(self, path: Nodes) -> bool:
        """Whether off-grid checkpoints hang on ``path``, or on the root."""
        return ROOT in self._tails or bool(self._with_tails[path].any())

    def select(self, path: Nodes, length: int, tail: int | None) -> Selection:
        """What restoring ``length`` tokens needs; ``tail`` is the node of an off-grid length."""
        blocks = length // self.ns.block_tokens
        chosen: Selection = []
        for unit, groups in enumerate(self.units):
            rule = self.rules[groups[0]]
            if rule.kind is GroupKind.RECURRENT:
                nodes = path[blocks - 1 : blocks] if tail is None and blocks else _NO_NODES
            else:
                first = 0
                if rule.window is not None:
                    first = max(0, length - (rule.window - 1)) // self.ns.block_tokens
                nodes = path[first:blocks]
            if tail is not None:
                nodes = np.append(nodes, np.int32(tail))
            chosen.append((unit, nodes))
        return chosen

    def only_resident(self, selection: Selection) -> Selection:
        """``selection`` without what is not there."""
        return [(unit, nodes[self._resident[unit, nodes]]) for unit, nodes in selection]

    def holds(self, selection: Selection) -> bool:
        """Whether all of ``selection`` is resident."""
        return all(bool(self._resident[unit, nodes].all()) for unit, nodes in selection)

    def slabs(self, group: int, nodes: Nodes) -> Slabs:
        """The slabs of one group at nodes at block boundaries. Raises KeyChainError when it is not resident at one of them."""
        there = self._resident[self.unit_of[group], nodes]
        if not there.all():
            node = nodes[int(np.argmin(there))]
            raise KeyChainError(f"group {self.rules[group].name!r} is not resident at node {node}")
        nbytes = self._slab_bytes(group, self.ns.block_tokens)
        return self._slabs[group].get(nodes, nbytes, self._arena.pages_for(nbytes))

    def slab(self, group: int, node: int) -> Slab:
        """The slab of one group at one node, which may be an off-grid checkpoint. Raises KeyChainError."""
        if not self._resident[self.unit_of[group], node]:
            raise KeyChainError(f"group {self.rules[group].name!r} is not resident at node {node}")
        return self._slabs_at(group, np.array([node], dtype=np.int32))[0]

    def _slabs_at(self, group: int, nodes: Nodes) -> Slabs:
        """The slabs of nodes that hold equally much: block boundaries, or one off-grid checkpoint."""
        nbytes = self._slab_bytes(group, int(self._position[nodes[0]]))
        return self._slabs[group].get(nodes, nbytes, self._arena.pages_for(nbytes))

    def _slab_bytes(self, group: int, position: int) -> int:
        """Bytes of what ends at ``position`` tokens: a state, a whole or a partial block."""
        if self.rules[group].kind is GroupKind.RECURRENT:
            return self._group_bytes[group]
        return self._group_bytes[group] * (position % self.ns.block_tokens or self.ns.block_tokens)

    def ghost(self, group: int, key: bytes) -> Ghost | None:
        return self._ghosts.get(self.number, self.unit_of[group], key)

    # -- recency and pins ------------------------------------------------------------------------

    def touch(self, selection: Selection, *, used: bool = False) -> None:
        """Make ``selection`` the most recently used, what is nearer to the root more so.

        ``used`` counts as a use of what is in it.
        """
        longest = max((len(nodes) for _, nodes in selection), default=0)
        if not longest:
            return
        base = self._eviction.tick(longest + 1)
        last = max((nodes[-1] for _, nodes in selection if len(nodes)), key=lambda n: int(self._position[n]))
        kind = int(self._kind[last])
        for unit, nodes in selection:
            if used:
                self._uses[unit, nodes] += 1
            touches = base + np.arange(len(nodes) - 1, -1, -1)
            ranks = self._policy.rank(touches, self._uses[unit, nodes], self._value[unit, nodes], kind)
            if ranks is not None:
                self._rank[unit, nodes] = ranks

    def turn_after(self, path: Nodes) -> int:
        """The turn of a sequence that goes on after ``path``: one more than that of its last node, 1 after the root."""
        return int(self._turn[path[-1]]) + 1 if len(path) else 1

    def pin(self, selection: Selection) -> None:
        """Keep ``selection`` until :meth:`unpin` of the same."""
        for unit, nodes in selection:
            self._pins[unit, nodes] += 1
            self.unpinned_pages -= int(self._pages[unit, nodes[self._pins[unit, nodes] == 1]].sum())

    def unpin(self, selection: Selection) -> None:
        for unit, nodes in selection:
            self._pins[unit, nodes] -= 1
            freed = nodes[self._pins[unit, nodes] == 0]
            self.unpinned_pages += int(self._pages[unit, freed].sum())
            self._offer(unit, freed)

    def _offer(self, unit: int, nodes: Nodes) -> None:
        """Queue for eviction what is not queued yet."""
        nodes = nodes[~self._queued[unit, nodes] & self._resident[unit, nodes]]
        if unit == self.full and not self._policy.queues_interior:
            nodes = nodes[self._children[nodes] == 0]  # the others are offered when they have become leaves
        self._queued[unit, nodes] = True
        generations = self._generation[unit, nodes].tolist()
        names = [(self.number, unit, node, age) for node, age in zip(nodes.tolist(), generations, strict=True)]
        self._eviction.push_all(self.tenant, names, self._rank[unit, nodes].tolist())

    def _demote(self, unit: int, node: int, rank: float) -> None:
        """Have an entry evicted earlier than its order knows: the old place in it becomes void when it comes up."""
        if self._rank[unit, node] > rank:
            self._rank[unit, node] = rank
            if self._queued[unit, node]:
                self._queued[unit, node] = False
                self._offer(unit, np.array([node], dtype=np.int32))
                self._eviction.forget(self.tenant, 1)

    # -- storing ---------------------------------------------------------------------------------

    def check_path(self, keys: list[bytes]) -> None:
        """Raise KeyChainError when a key of the chain is known at another place.

        Only engines' own hashes can do that: they must depend on everything before the block.
        """
        new = keys[len(self.find(keys)) :]
        absent = self._table.absent(new, 0)
        if absent < len(new):
            raise KeyChainError(
                f"block hash {new[absent].hex()[:16]} ({absent} after the known prefix) is already known after other blocks: "
                "hashes must depend on everything before them"
            )

    def grow_path(self, keys: list[bytes]) -> Nodes:
        """The nodes of the whole chain ``keys``, made where they are missing. Raises as :meth:`check_path`."""
        path = self.find(keys)
        first = len(path)
        if first == len(keys):
            return path
        try:
            new = self._new_nodes(keys[first:])
        except ValueError:
            self.check_path(keys)
            raise
        path = np.concatenate([path, new])
        self._parent[new] = path[first - 1 : -1] if first else np.r_[np.int32(ROOT), new[:-1]]
        self._position[new] = np.arange(first + 1, len(path) + 1, dtype=np.int32) * self.ns.block_tokens
        self._take_turns(keys, path, first)
        parents = path[max(0, first - 1) : -1]
        self._children[parents] += 1
        return path

    def grow_tail(self, chain: KeyChain, position: int, path: Nodes) -> int:
        """The node of an off-grid checkpoint, made when it is missing."""
        known = self.find_tail(chain, position, path)
        if known is not None:
            return known
        block = position // self.ns.block_tokens
        parent = int(path[block - 1]) if block else ROOT
        key = chain.key_at(position)
        if self._table.get(key) >= 0:
            raise KeyChainError(f"checkpoint key {key.hex()[:16]} is already known as an engine's block hash")
        node = int(self._new_nodes([key])[0])
        self._parent[node], self._position[node] = parent, position
        self._turn[node] = 1 if parent == ROOT else self._turn[parent]
        added = self._policy.kind_of(1, position)
        self._kind[node] = added if parent == ROOT else self._kind[parent]
        if parent != ROOT:
            self._children[parent] += 1
            self._with_tails[parent] = True
        here = self._tails.setdefault(parent, {})
        here[position] = here.get(position, 0) + 1
        return node

    def _take_turns(self, keys: list[bytes], path: Nodes, first: int) -> None:
        """Turns and kinds of the new nodes ``path[first:]``; the turns of nodes that were evicted lately are remembered."""
        turn, unit = self.turn_after(path[:first]), 0 if self.full is None else self.full
        known = self._ghosts.turns(self.number, unit, keys[first:])
        at = first + len(known)
        if len(known):
            self._turn[path[first:at]] = known
            turn = int(known[-1]) + 1
        self._turn[path[at:]] = turn
        self._kind[path[first:]] = self._policy.kind_of(
            int(self._turn[path[-1]]), (len(keys) - at) * self.ns.block_tokens
        )

    def place(self, unit: int, nodes: Nodes, slabs: Sequence[Slabs], path: Nodes = _NO_NODES) -> list[Slabs]:
        """Make ``slabs[i][j]`` (group ``units[unit][i]``, node ``nodes[j]``) resident; returns those of nodes that have them already.

        ``path`` leads to the last of ``nodes``: what a checkpoint saves is counted from the one before it.
        """
        there = self._resident[unit, nodes]
        spare: list[Slabs] = [column.take(there) for column in slabs] if there.any() else []
        fresh = nodes[~there]
        if not len(fresh):
            return spare
        pages = 0
        for group, column in zip(self.units[unit], slabs, strict=True):
            new = column.take(~there)
            self._slabs[group].put(fresh, new)
            self.group_slabs[group] += len(new)
            self.group_pages[group] += new.page_count
            pages += new.pages.shape[1]
        self._resident[unit, fresh] = True
        self._entries[unit] += len(fresh)
        self._pages[unit, fresh] = pages
        self._uses[unit, fresh] = 0
        self._value[unit, fresh] = self._saved(unit, fresh, path) / (self._pages[unit, fresh] * self._page_bytes)
        touches = self._eviction.tick(len(fresh) + 1) + np.arange(len(fresh) - 1, -1, -1)
        self._rank[unit, fresh] = self._policy.first_rank(
            touches, self._value[unit, fresh], self._pages[unit, fresh], int(self._kind[fresh[-1]])
        )
        self.unpinned_pages += pages * len(fresh)
        if len(self._ghosts):
            self._ghosts.drop(self.number, unit, self._table.keys(fresh))
        self._offer(unit, fresh)
        if self.watcher is not None:
            self.watcher.stored(self, unit, fresh)
        return spare

    def _saved(self, unit: int, nodes: Nodes, path: Nodes) -> Floats:
        """FLOPs that each of ``nodes`` saves relative to its parent: the block before it, or the checkpoint before it.

        The blocks of one window serve one checkpoint and share what it saves.
        """
        stops = self._position[nodes].astype(np.int64)
        if unit == self.full:
            step = self.ns.block_tokens
            return self.flops.upto(stops) - self.flops.upto(np.maximum(0, (stops - 1) // step * step))
        ends = self._position[path[self._resident[unit, path]]].astype(np.int64)
        gap = 0 if unit == self.state else self.ns.block_tokens
        return self.flops.between_checkpoints(stops, ends, gap)

    def stored(self, path: Nodes) -> None:
        """Everything of a sequence along ``path`` is placed: demote what it supersedes, tell a policy that learns."""
        if not len(path):
            return
        for unit in self._ends:
            for node in self._superseded(unit, path):
                self._demote(unit, node, self._policy.superseded(float(self._rank[unit, node])))
        if self._policy.learns and self.full is not None:
            self._policy.learn(self._describe(path, self.full))

    def _superseded(self, unit: int, path: Nodes) -> list[int]:
        """What served the last checkpoint but one of ``path``, if its sequence only went on from there: a state, or a window's blocks."""
        window = self.rules[self.units[unit][0]].window
        need = 1 if window is None else -(-(window - 1) // self.ns.block_tokens)
        at = np.flatnonzero(self._resident[unit, path])
        if not len(at):
            return []
        at = at[at <= at[-1] - need]
        if not len(at) or self._children[path[at[-1]]] > 1:
            return []
        older: list[int] = path[at[at > at[-1] - need]].tolist()
        return older

    def _added(self, path: Nodes) -> int:
        """How many blocks of ``path`` were known before the sequence that grew it last: all of its own have one turn."""
        turns = self._turn[path]
        return len(path) - int(np.argmin(np.append(turns[::-1] == turns[-1], False)))

    def _describe(self, path: Nodes, full: int) -> Stored:
        """The sequence as a policy that learns sees it."""
        ends = np.asarray(self._ends, dtype=np.intp)[:, None]
        resident = self._resident[ends, path]
        pages = self._pages[ends, path] * resident
        values = np.where(resident, self._value[ends, path], 0.0).sum(axis=0) / np.maximum(1, resident.sum(axis=0))
        return describe(
            lambda at: [(self.number, key) for key in self._table.keys(path[at])],
            positions=self._position[path].astype(np.int64),
            pages=self._pages[full, path],
            end_pages=pages.sum(axis=0),
            end_values=values,
            needs_ends=bool(self._ends),
            flops=self.flops,
            page_bytes=self._page_bytes,
            added=self._added(path),
            kind=int(self._kind[path[-1]]),
        )

    def prune(self, node: int) -> None:
        """Forget ``node`` and its ancestors as far as they hold nothing and lead nowhere."""
        while node != ROOT and not self._children[node] and not self._resident[:, node].any():
            parent = int(self._parent[node])
            self._forget(node)
            if parent != ROOT:
                self._children[parent] -= 1
                if not self._children[parent] and self.full is not None:
                    self._check_orphan(parent)
                    if not self._pins[self.full, parent]:
                        self._offer(self.full, np.array([parent], dtype=np.int32))
            node = parent

    def _forget(self, node: int) -> None:
        """The node's number is free for another key."""
        self._table.remove(node)
        position = int(self._position[node])
        if position % self.ns.block_tokens:
            parent = int(self._parent[node])
            here = self._tails[parent]
            here[position] -= 1
            if not here[position]:
                del here[position]
            if not here:
                del self._tails[parent]
                if parent != ROOT:
                    self._with_tails[parent] = False

    # -- evicting --------------------------------------------------------------------------------

    def check(self, unit: int, node: int, generation: int) -> float:
        """The entry's rank, BLOCKED or GONE (see :class:`kvpool.eviction.Shelf`)."""
        if self._generation[unit, node] != generation or not self._resident[unit, node]:
            return GONE
        if self._pins[unit, node] or (unit == self.full and self._children[node]):
            self._queued[unit, node] = False
            return BLOCKED
        return float(self._rank[unit, node])

    def uses(self, unit: int, node: int) -> int:
        return int(self._uses[unit, node])

    def set_uses(self, unit: int, node: int, uses: int) -> None:
        self._uses[unit, node] = uses

    def pages_of(self, unit: int, node: int) -> int:
        return int(self._pages[unit, node])

    def key(self, unit: int, node: int) -> bytes:
        return self._table.key(node)

    def _check_orphan(self, node: int) -> None:
        """Blocks at the end of a sequence that lost its checkpoint can only be evicted: the policy may want them first."""
        if self.full is None or not self._ends or not self._policy.orphans_first:
            return
        if self._resident[self.full, node] and not self._children[node] and not self._resident[self._ends, node].any():
            self._demote(self.full, node, FIRST)

    def evict(self, unit: int, node: int, why: str, *, below: float = float("-inf"), pages: int = 0) -> int:
        """Free what :meth:`check` allowed, with what is of no use without it; see :class:`kvpool.eviction.Shelf`."""
        whole = unit == self.full or self._position[node] % self.ns.block_tokens
        run = self._run(node, below, pages) if unit == self.full else [node]
        nodes = np.array(run, dtype=np.int32)
        keys = self._table.keys(nodes)
        turns = self._turn[nodes]
        slabs: list[Slabs] = []
        lost = -int(self._queued[unit, node])  # whose place the order has given up already
        for u in range(len(self.units)) if whole else [unit]:
            there = self._resident[u, nodes]
            held = nodes[there]
            if not len(held):
                continue
            for group in self.units[u]:
                slabs.append(self._slabs_at(group, held))
                self._slabs[group].drop(held)
                self.group_slabs[group] -= len(held)
                self.group_pages[group] -= slabs[-1].page_count
            self._entries[u] -= len(held)
            self.unpinned_pages -= int(self._pages[u, held].sum())
            lost += int(self._queued[u, held].sum())
            self._resident[u, held] = self._queued[u, held] = False
            self._generation[u, held] += 1
            gone = keys if len(held) == len(run) else [k for k, was in zip(keys, there.tolist(), strict=True) if was]
            self._ghosts.add(self.number, u, gone, self._clock(), why, turns[there])
            if self.watcher is not None:
                self.watcher.removed(self, u, held)
        self._free(slabs)
        if not whole:
            self._check_orphan(node)
        self._table.remove_all(nodes[:-1])  # none of them has tails, or is one
        self._children[nodes[1:]] = 0
        self.prune(run[-1])
        if lost:
            self._eviction.forget(self.tenant, lost)
        return len(run)

    def _run(self, node: int, below: float, pages: int) -> list[int]:
        """The leaf ``node`` and what goes right after it: ancestors that only it keeps, that rank ``below``, for ``pages`` pages."""
        full = self.full
        assert full is not None
        run = [node]
        if self._position[node] % self.ns.block_tokens:
            return run
        freed = int(self._pages[:, node].sum(where=self._resident[:, node]))
        looked = 32
        while freed < pages:
            above = self._ancestors(run[-1], looked)
            there = self._resident[:, above]
            ranks = self._rank[full, above]
            bare = there.sum(axis=0) == 1  # else what else it holds has ranks of its own
            if self._policy.orphans_first and self._ends:
                ranks = np.where(bare, FIRST, ranks)
            goes = (self._children[above] == 1) & (self._pins[full, above] == 0) & there[full] & bare & (ranks < below)
            sums = freed + np.cumsum(self._pages[full, above])
            count = min(int(np.argmin(goes)) if not goes.all() else len(goes), int(sums.searchsorted(pages)) + 1)
            if count:
                run += above[:count].tolist()
                freed = int(sums[count - 1])
                self._policy.evicted(float(ranks[:count].max()))
            if count < looked:
                break
            looked *= 4
        return run

    def _ancestors(self, node: int, most: int) -> Nodes:
        """The nearest ancestors of ``node``, at most so many."""
        found = np.empty(most, np.int32)
        return found[: ancestors(self._parent, node, found)]

    def clear(self, why: str = "cleared") -> int:
        """Evict all that is not pinned; returns how many entries went."""
        before = sum(self._entries)
        held = np.flatnonzero(self._resident.any(axis=0))
        for node in held[np.argsort(-self._position[held], kind="stable")].tolist():
            for unit in np.flatnonzero(self._resident[:, node]).tolist():
                if not self._resident[unit, node] or self._pins[unit, node]:
                    continue
                if unit == self.full and self._children[node]:
                    continue
                queued = bool(self._queued[unit, node])
                self.evict(unit, node, why)
                if queued:
                    self._eviction.forget(self.tenant, 1)
        return before - sum(self._entries)

    def entries(self) -> dict[str, int]:
        """Counts of what is resident: nodes, blocks' units, states, off-grid checkpoints."""
        state = 0 if self.state is None else self._entries[self.state]
        tails = sum(sum(here.values()) for here in self._tails.values())
        return {"nodes": len(self._table), "units": sum(self._entries), "states": state, "tails": tails}

    # -- nodes -----------------------------------------------------------------------------------

    def _new_nodes(self, keys: list[bytes]) -> Nodes:
        """Nodes for new keys; ValueError, making none, when one is known."""
        while self._table.high + len(keys) > self._capacity:
            self._extend()
        nodes = np.empty(len(keys), np.int32)
        self._table.add(keys, 0, nodes)
        self._children[nodes] = 0
        return nodes

    def _extend(self) -> None:
        """Double the columns: only addresses, memory comes as nodes do."""
        capacity = max(_FIRST_ROWS, 2 * self._capacity)
        for name in self._columns:
            delattr(self, name)
        try:
            for column in self._columns.values():
                column.grow(capacity)
            for store in self._slabs:
                store.grow(capacity)
        finally:
            self._show_columns()
        self._capacity = capacity

    def _show_columns(self) -> None:
        """Have the columns as attributes: indexed by node, or by unit and node."""
        rows = {name: column.rows.T for name, column in self._columns.items()}
        self._parent: NDArray[np.int32] = rows["_parent"]
        self._position: NDArray[np.int32] = rows["_position"]
        self._children: NDArray[np.int32] = rows["_children"]
        self._with_tails: NDArray[np.bool_] = rows["_with_tails"]
        self._turn: NDArray[np.int32] = rows["_turn"]
        self._kind: NDArray[np.int16] = rows["_kind"]
        self._resident: NDArray[np.bool_] = rows["_resident"]
        self._queued: NDArray[np.bool_] = rows["_queued"]
        self._pins: NDArray[np.int32] = rows["_pins"]
        self._pages: NDArray[np.int32] = rows["_pages"]
        self._rank: NDArray[np.float64] = rows["_rank"]
        self._uses: NDArray[np.int32] = rows["_uses"]
        self._value: NDArray[np.float32] = rows["_value"]
        self._generation: NDArray[np.int32] = rows["_generation"]
