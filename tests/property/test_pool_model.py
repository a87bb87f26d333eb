"""Random histories of a pool against a naive model."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool.errors import MissError, PoolFullError, PrefixMissingError
from kvpool.keys import KeyChain
from kvtransport.layout import GroupKind
from tests.poolkit import LAYOUTS, STEP, check_get, check_idle, check_sources, fill, make_core, store

LIMIT = 90
"""Tokens of a sequence: five blocks and a bit."""


def sequence(branches) -> list[int]:
    """A path through a small tree of sequences: many share prefixes of many lengths."""
    rng = random.Random(0)
    tokens = [rng.randrange(100) for _ in range(LIMIT)]
    for at, value in branches:
        tokens[at:] = [(t * 7 + value) % 1000 for t in tokens[at:]]
    return tokens


sequences = st.lists(st.tuples(st.sampled_from([0, 5, 16, 20, 32, 40, 48, 64]), st.integers(1, 2)), max_size=2).map(
    sequence
)
lengths = st.one_of(st.sampled_from([16, 32, 48, 64, 80]), st.integers(1, LIMIT))


class Model:
    """What a pool that never evicts holds, by the tokens themselves."""

    def __init__(self, layout):
        self.layout = layout
        self.held: set[tuple[str, int, tuple[int, ...]]] = set()  # (group, length, tokens up to it)

    def put(self, tokens, start, boundary, checkpoints):
        points = sorted({*checkpoints, boundary})
        for group in self.layout.groups:
            if group.kind is GroupKind.RECURRENT:
                ends = set(points)
            else:
                ends = {p for p in points if p % STEP}  # partial blocks
                for point in points:
                    first = start if group.window is None else max(start, point - (group.window - 1))
                    ends |= {e for e in range(first // STEP * STEP + STEP, boundary + 1, STEP) if e <= point}
            self.held |= {(group.name, e, tuple(tokens[:e])) for e in ends}

    def full_blocks(self, tokens):
        """Tokens up to which all full-attention groups have whole blocks."""
        end = 0
        while end + STEP <= len(tokens) and all(
            (g.name, end + STEP, tuple(tokens[: end + STEP])) in self.held
            for g in self.layout.groups
            if g.kind is GroupKind.FULL
        ):
            end += STEP
        return end

    def restorable(self, tokens, limit):
        return [b for b in range(1, limit + 1) if all(self._allows(g, tokens, b) for g in self.layout.groups)]

    def _allows(self, group, tokens, b):
        def has(end):
            return (group.name, end, tuple(tokens[:end])) in self.held

        if group.kind is GroupKind.RECURRENT:
            return has(b)
        first = 0 if group.window is None else max(0, b - (group.window - 1))
        ends = [min(b, (block + 1) * STEP) for block in range(first // STEP, (b - 1) // STEP + 1)]
        return all(has(e) for e in ends)


operations = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "put", "abort", "get", "match"]),
        sequences,
        lengths,
        st.lists(lengths, max_size=2),
        st.sampled_from([0, 0, 16, 32, 48]),
    ),
    min_size=1,
    max_size=14,
)


def _points(boundary, start, raw):
    return tuple(sorted({p for p in raw if start < p < boundary}))


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=40, deadline=None)
@given(history=operations)
def test_with_room_for_all_the_pool_is_the_model(name, history):
    layout = LAYOUTS[name]
    core, model = make_core(pages=8192), Model(layout)
    ns = core.open_namespace("t", layout, STEP)
    has_full = any(g.kind is GroupKind.FULL for g in layout.groups)
    for verb, tokens, length, raw, start in history:
        if verb in ("put", "abort"):
            start = start if start < length else 0
            checkpoints = _points(length, start, raw)
            if has_full and model.full_blocks(tokens) < start:
                with pytest.raises(PrefixMissingError):
                    store(core, ns, tokens, length, start=start, checkpoints=checkpoints)
                continue
            if verb == "put":
                store(core, ns, tokens, length, start=start, checkpoints=checkpoints)
                model.put(tokens, start, length, checkpoints)
            else:
                put = core.begin_put(
                    ns, KeyChain(ns, tokens), boundary=length, start=start, checkpoints=checkpoints, deadline=1e9
                )
                fill(put, tokens, list(put.extents)[:1])
                put.abort()
        elif verb == "match":
            limit = min(length, LIMIT - 1)
            assert list(core.match(ns, KeyChain(ns, tokens), limit).restorable) == model.restorable(tokens, limit)
        elif length in model.restorable(tokens, length):
            check_get(core, ns, tokens, length, start=start if start < length else 0)
        else:
            with pytest.raises(MissError):
                check_get(core, ns, tokens, length)
    for _, tokens, _, _, _ in history:
        found = core.match(ns, KeyChain(ns, tokens))
        assert list(found.restorable) == model.restorable(tokens, LIMIT - 1)
        for length in found.restorable:
            check_get(core, ns, tokens, length)
    check_idle(core)


@pytest.mark.parametrize("name", ["hybrid", "everything", "dense", "windows"])
@settings(max_examples=40, deadline=None)
@given(history=operations, seed=st.integers(0, 1000))
def test_under_pressure_bytes_are_right_or_a_miss(name, history, seed):
    """A pool far too small, with leases, readers and flat objects: nothing wrong comes out, nothing leaks."""
    core = make_core(pages=112, page_bytes=256, tenant_quota_bytes={"u": 60 * 256})
    rooms = [core.open_namespace(t, LAYOUTS[name], STEP) for t in ("t", "u")]
    rng = random.Random(seed)
    readers, leases = [], []
    for turn, (verb, tokens, length, raw, start) in enumerate(history * 3):
        ns = rng.choice(rooms)
        chain = KeyChain(ns, tokens)
        if verb in ("put", "abort"):
            start = start if start < length else 0
            try:
                put = core.begin_put(
                    ns,
                    chain,
                    boundary=length,
                    start=start,
                    checkpoints=_points(length, start, raw),
                    request=turn.to_bytes(16, "little"),
                    deadline=core.clock() + 5,
                )
            except (PoolFullError, PrefixMissingError):
                continue
            if rng.random() < 0.5:
                try:
                    reader = core.plan_get(
                        ns, chain, boundary=length, request=turn.to_bytes(16, "little"), deadline=core.clock() + 5
                    )
                    readers.append((reader, tokens))
                except MissError:
                    pass
            if verb == "abort":
                put.abort()
            else:
                fill(put, tokens)
                put.commit()
        elif verb == "match":
            found = core.match(ns, chain)
            for b in found.restorable:
                check_get(core, ns, tokens, b)
            if found.length and rng.random() < 0.3:
                leases.append((core.lease(ns, chain, found.length, 5.0), ns, tokens))
            core.explain(ns, chain)
        else:
            try:
                reader = core.plan_get(ns, chain, boundary=length, deadline=core.clock() + 5)
                readers.append((reader, tokens))
            except MissError:
                pass
            if rng.random() < 0.3:
                try:
                    flat = core.begin_put_flat(ns.tenant, {b"%d" % (turn % 3): rng.randrange(2000)}, deadline=1e9)
                    flat.commit()
                except PoolFullError:
                    pass
        for reader, read in readers:
            if not reader.closed and reader.sealed:
                check_sources(reader.sources, reader.extents.values(), read)
        for lease, room, held in leases:
            if not lease.closed:
                check_get(core, room, held, lease.length)
        if readers and rng.random() < 0.4:
            readers.pop(rng.randrange(len(readers)))[0].close()
        if rng.random() < 0.2:
            core.clock.now += 3
            core.expire()
        stat = core.stat()
        assert stat["used_bytes"] + stat["free_bytes"] == stat["total_bytes"]
        assert sum(stat["class_bytes"].values()) == stat["used_bytes"]
        assert stat["evictable_bytes"] <= stat["used_bytes"]
        assert core.stat("u")["used_bytes"] <= 60 * 256
    core.clock.now += 100
    core.expire()
    check_idle(core)
