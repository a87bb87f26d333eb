"""Replays through the real index and policies, without payload."""

import gzip
import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from kvpool.arena import BlockClass
from kvpool.cli import app
from kvpool.errors import PoolFullError, SlabError
from kvpool.eviction import POLICIES
from kvpool.replay.accounting import AccountingArena, page_bytes_for
from kvpool.replay.clairvoyant import clairvoyant
from kvpool.replay.run import Replay, folded, working_set_bytes
from kvpool.replay.sweep import blocks_in, sweep
from kvpool.replay.table import SweepFile, claims
from kvpool.scheduling.traces import Trace, load_trace, parse_trace
from kvtransport import presets
from kvtransport.errors import ConfigError

FULL_TRACE = "mooncake-conversation-full"
LAYOUTS = ("kimi-linear-48b", "qwen3.5-397b", "mimo-v2-flash", "qwen3-235b")


@pytest.fixture(scope="module")
def short():
    trace = load_trace("mooncake-conversation")
    return Trace(
        trace.arrivals[:250],
        trace.input_tokens[:250],
        trace.output_tokens[:250],
        trace.blocks[:250],
        trace.block_tokens,
    )


def trace_of(*requests, block_tokens=512):
    """Requests as (input tokens, ids)."""
    tokens = np.array([float(n) for n, _ in requests])
    return Trace(
        np.arange(len(requests), dtype=float), tokens, tokens, tuple(tuple(i) for _, i in requests), block_tokens
    )


# -- the arena -----------------------------------------------------------------------------------------


def test_an_accounting_arena_counts_like_a_real_one():
    arena = AccountingArena(10 * 4096, 4096)
    assert (arena.total_pages, arena.free_bytes) == (10, 40_960)
    slabs = arena.allocate_rows(3, 5_000, BlockClass.PREFIX)
    state = arena.allocate(4_096, BlockClass.STATE)
    assert (len(slabs), slabs.page_count, arena.free_pages) == (3, 6, 3)
    assert arena.bytes_of(BlockClass.STATE) == 4_096
    with pytest.raises(PoolFullError):
        arena.allocate_rows(4, 1, BlockClass.PREFIX)
    with pytest.raises(SlabError, match="no bytes"):
        arena.pages(state)
    arena.free_many([slabs.take(slice(0, 2)), state])
    assert (arena.free_pages, arena.bytes_of(BlockClass.PREFIX)) == (8, 8_192)
    with pytest.raises(SlabError, match="twice"):
        arena.free(state)
    assert not arena.is_live(state)
    assert arena.is_live(slabs[2])
    assert AccountingArena(None).free_bytes > 1 << 60
    with pytest.raises(ConfigError, match="more memory"):
        AccountingArena(100)


def test_pages_cut_large_blocks_exactly():
    assert page_bytes_for(63 * 65_536) == 65_536
    assert page_bytes_for(1504 * 65_536) == 32 * 65_536 + 15 * 65_536
    for pages in (1, 64, 240, 1504):
        assert pages * 65_536 % page_bytes_for(pages * 65_536) == 0


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folded_layout_has_the_same_bytes(name):
    layout = presets.load(name)
    slim = folded(layout)
    for n in (1, 512, 10_000):
        assert slim.group_bytes(n) == layout.group_bytes(n)


# -- replays -------------------------------------------------------------------------------------------


def test_a_dense_layout_without_limit_hits_what_there_is():
    """The trace's own figure, of the whole hour."""
    trace = load_trace(FULL_TRACE)
    outcome = Replay(trace, presets.load("qwen3-235b"), memory_bytes=None, policy="lru").run()
    body = outcome.as_dict()
    assert body["requests"] == 12_031
    assert round(body["block_hit_rate"], 4) == 0.3664
    assert round(body["token_hit_rate"], 4) == 0.3736
    assert body["evictions"] == 0
    assert body["peak_bytes"] == {"full": 182_790 * 512 * 192_512}
    best = clairvoyant(trace, None, partial=True, exact=False)
    assert (best.kind, best.token_hit_rate, best.block_hit_rate) == (
        "optimum",
        body["token_hit_rate"],
        body["block_hit_rate"],
    )


def test_a_last_partial_block_counts_its_real_tokens():
    trace = trace_of((700, [0, 1]), (700, [0, 1]), (1_500, [0, 2, 3]))
    dense = Replay(trace, presets.load("qwen3-235b"), memory_bytes=None, policy="lru").run().counts
    assert (dense.blocks, dense.hit_blocks) == (7, 3)
    assert (dense.tokens, dense.hit_tokens) == (2_900, 700 + 512)
    hybrid = Replay(trace, presets.load("kimi-linear-48b"), memory_bytes=None, policy="lru").run().counts
    assert (hybrid.hit_tokens, hybrid.states) == (512 + 512, 2)


def test_a_branch_point_gets_its_state():
    """Three documents behind one template: the second takes a state where they part, the third uses it."""
    requests = [(2_048, [0, 1, 2 + 2 * i, 3 + 2 * i]) for i in range(3)]
    replay = Replay(trace_of(*requests), presets.load("kimi-linear-48b"), memory_bytes=None, policy="marconi")
    counts = replay.run().counts
    assert counts.hit_tokens == 1_024
    assert counts.states == 1 + 2 + 1


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("name", LAYOUTS)
def test_small_memory_is_never_exceeded_and_never_beats_the_clairvoyant(short, name, policy):
    layout = presets.load(name)
    memory = working_set_bytes(short, layout) // 12
    replay = Replay(short, layout, memory_bytes=memory, policy=policy)
    outcome = replay.run(first=125)
    assert sum(outcome.peak_bytes.values()) <= memory * len(outcome.peak_bytes)
    assert all(sum(s.group_bytes.values()) <= memory for s in outcome.timeline)
    assert outcome.evictions > 50
    assert outcome.counts.requests == 125
    exact = len(layout.groups) > 1
    best = clairvoyant(short, blocks_in(layout, memory, 512), first=125, partial=not exact, exact=exact)
    assert best.kind == ("bound" if exact else "optimum")
    assert 0 < outcome.counts.hit_blocks / outcome.counts.blocks <= best.block_hit_rate
    replay.core.clear()
    assert replay.core.arena.used_bytes == 0


def test_finer_blocks_hold_the_same_prefixes(short):
    coarse, fine = (
        Replay(short, presets.load("qwen3-235b"), memory_bytes=None, policy="lru", block_tokens=size).run().counts
        for size in (512, 128)
    )
    assert coarse.hit_tokens <= fine.hit_tokens < coarse.hit_tokens * 1.01
    with pytest.raises(ConfigError, match="do not divide"):
        Replay(short, presets.load("qwen3-235b"), memory_bytes=None, policy="lru", block_tokens=100)


def test_belady_is_the_best_of_all_choices():
    """Against a search over every choice of what to keep, on small random trees."""
    rng = np.random.default_rng(4)
    for _ in range(20):
        requests = []
        for _ in range(7):
            a, b = int(rng.integers(2)), int(rng.integers(3))
            requests.append((1_536, [a, 10 + 3 * a + b, 100 + 9 * a + 3 * b + int(rng.integers(2))]))
        trace = trace_of(*requests)
        got = clairvoyant(trace, 4, partial=True, exact=False)
        assert round(got.block_hit_rate * 21) == _search([set(ids) for _, ids in requests], 4)


def _search(requests, capacity):
    import itertools

    states = {frozenset(): 0}
    for blocks in requests:
        after = {}
        for held, hits in states.items():
            now = hits + len(held & blocks)
            pool = sorted(held | blocks)
            for kept in itertools.combinations(pool, min(capacity, len(pool))):
                key = frozenset(kept)
                after[key] = max(after.get(key, 0), now)
        states = after
    return max(states.values())


# -- formats -------------------------------------------------------------------------------------------

BAILIAN = """\
{"chat_id": 1, "parent_chat_id": -1, "timestamp": 0.5, "input_length": 40, "output_length": 9, "type": "text", "turn": 1, "hash_ids": [7, 8, 9]}
{"chat_id": 2, "parent_chat_id": 1, "timestamp": 61.0, "input_length": 64, "output_length": 9, "type": "text", "turn": 2, "hash_ids": [7, 8, 3, 8]}
{"chat_id": 3, "parent_chat_id": -1, "timestamp": 62.0, "input_length": 32, "output_length": 9, "type": "file", "turn": 1, "hash_ids": [8, 8]}
"""


def test_bailian_ids_become_prefixes(tmp_path):
    """Its ids name the contents of a block: the same content behind something else is another prefix."""
    trace = parse_trace(BAILIAN, where="t")
    assert trace.block_tokens == 16
    assert trace.arrivals.tolist() == pytest.approx([0.0, 60.5, 61.5])
    assert trace.blocks[0][:2] == trace.blocks[1][:2]
    assert len({i for ids in trace.blocks for i in ids}) == 7
    path = tmp_path / "bailian.jsonl"
    path.write_text(BAILIAN)
    counts = Replay(load_trace(str(path)), presets.load("qwen3-235b"), memory_bytes=None, policy="lru").run().counts
    assert (counts.blocks, counts.hit_blocks, counts.hit_tokens) == (9, 2, 32)
    with pytest.raises(ConfigError, match="line 1"):
        parse_trace(BAILIAN.replace('"input_length": 40', '"input_length": 400'), where="t")


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("timestamp", "NaN", "infinite"),
        ("input_length", "Infinity", "infinite"),
        ("input_length", "0", "do not fit together"),
        ("output_length", "-1", "do not fit together"),
        ("hash_ids", "[-1]", "hash_ids are numbers"),
        ("hash_ids", "[18446744073709551616]", "hash_ids are numbers"),
        ("hash_ids", "[NaN]", "ValueError"),
        ("hash_ids", "[1e999]", "OverflowError"),
        ("hash_ids", "7", "TypeError"),
        ("hash_ids", "[]", "do not fit together"),
    ],
)
def test_a_bad_line_is_named(field, value, says):
    good = {"timestamp": "0", "input_length": "1000", "output_length": "1", "hash_ids": "[0, 1]"}

    def line(of):
        return "{" + ", ".join(f'"{name}": {text}' for name, text in of.items()) + "}"

    assert len(parse_trace(line(good), where="t")) == 1
    with pytest.raises(ConfigError, match=f"trace t, line 2: .*{says}"):
        parse_trace(line(good) + "\n" + line({**good, field: value}), where="t")


@pytest.mark.parametrize(
    "data",
    [b"\x1f\x8b\x08" + bytes(30), gzip.compress(b"x" * 999, mtime=0)[:-9], b"\xfd7zXZ\x00" + bytes(9), b"\xff"],
    ids=["no stream", "cut off", "xz", "no text"],
)
def test_a_damaged_file_is_an_error(tmp_path, data):
    path = tmp_path / "t.jsonl"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="not readable"):
        load_trace(str(path))


def test_the_excerpt_is_the_head_of_the_whole_trace():
    excerpt, whole = load_trace("mooncake-conversation"), load_trace(FULL_TRACE)
    assert (len(excerpt), len(whole)) == (2_000, 12_031)
    assert excerpt.blocks == whole.blocks[:2_000]


# -- the command -----------------------------------------------------------------------------------------


def run(*args):
    return CliRunner().invoke(app, ["replay", *map(str, args)])


def test_the_command_gives_json_and_pictures(tmp_path):
    trace = tmp_path / "t.jsonl"
    rows = [
        {"timestamp": i * 500, "input_length": 1_100, "output_length": 5, "hash_ids": [0, 1 + i % 7, 50 + i]}
        for i in range(60)
    ]
    trace.write_text("\n".join(map(json.dumps, rows)))
    result = run(trace, "--layout", "kimi-linear-48b", "--memory", "500MB", "--json", "-", "--plot", tmp_path / "out")
    assert result.exit_code == 0, result.output
    body = json.loads(result.stdout)
    assert body["policy"] == "marconi"
    assert body["requests"] == 60
    for name in ("block_hit_rate", "token_hit_rate", "flops_saved", "clairvoyant_token_hit_rate"):
        assert body[name] > 0
    assert set(body["peak_bytes"]) == {"mla", "kda"}
    assert body["clairvoyant_kind"] == "bound"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "replay-kimi-linear-48b.png",
        "replay-kimi-linear-48b.svg",
    ]
    several = run(trace, "--layout", "qwen3-235b", "--memory", "20%", "--policy", "all", "--json", tmp_path / "j.json")
    assert several.exit_code == 0, several.output
    assert "clairvoyant (optimum)" in several.stdout
    assert [r["policy"] for r in json.loads((tmp_path / "j.json").read_text())["runs"]] == list(POLICIES)


def test_the_command_says_what_is_wrong(tmp_path):
    for args, words in (
        (("nowhere.jsonl", "--layout", "qwen3-235b"), "not packaged"),
        (("[/no].jsonl", "--layout", "qwen3-235b"), "no trace '[/no].jsonl'"),
        (("mooncake-conversation",), "--layout PRESET"),
        (("mooncake-conversation", "--layout", "qwen3-235b", "--policy", "fifo"), "no eviction policy 'fifo'"),
        (("mooncake-conversation", "--layout", "qwen3-235b", "--memory", "much"), "not a size"),
        (("mooncake-conversation", "--layout", "qwen3-235b", "--memory", "x%"), "not a share"),
        (("mooncake-conversation", "--layout", "qwen3-235b", "--memory", "nan%"), "not a share"),
        (("mooncake-conversation", "--layout", "qwen3-235b", "--memory=-5%"), "not a share"),
        (("mooncake-conversation", "--layout", "qwen3-235b", "--memory", "1000"), "less than one page"),
        (("mooncake-conversation", "--layout", "qwen3-235b", "--block-tokens", "0"), "--block-tokens"),
        (("mooncake-conversation", "--layout", "qwen3-235b", "--block-tokens", "100"), "do not divide"),
        (("mooncake-conversation", "--layout", "qwen3-235"), "known presets"),
        (("mooncake-conversation", "--layout", "qwen3-235b", "--jobs", "2"), "give --sweep"),
        (("mooncake-conversation", "--sweep", "--memory", "5%"), "leave out --memory"),
        (("mooncake-conversation", "--layout", "qwen3-235b", "--json", tmp_path / "no" / "j"), "no folder"),
        (("mooncake-conversation", "--layout", "qwen3-235b", "--plot", __file__), "exists"),
    ):
        result = run(*args)
        assert result.exit_code == 2
        assert words in re.sub(r"\s+", " ", result.output + result.stderr)
    assert "Examples" in run("--help").output


def swept(short, table, policies, shares=(0.05,), known=()):
    said = []
    sweep(
        short,
        {"kimi-linear-48b": presets.load("kimi-linear-48b")},
        policies,
        shares,
        first=125,
        jobs=2,
        add=table.add,
        known=known,
        progress=lambda part, what: said.append((part, what)),
    )
    return said


def test_a_sweep_writes_every_row_and_goes_on_where_it_stopped(short, tmp_path):
    path = tmp_path / "sweep.json"
    table = SweepFile({"trace": "short"}, path)
    seen = []

    class Watched(SweepFile):
        def add(self, row):
            super().add(row)
            seen.append([r["policy"] for r in json.loads(path.read_text())["runs"]])

    said = swept(short, Watched({"trace": "short"}, path), ["lru", "marconi"])
    assert said[-1][0] == 1.0
    assert [len(policies) for policies in seen] == [1, 2, 3]
    table = SweepFile({"trace": "short"}, path)
    rows = table.rows(["kimi-linear-48b"], ["lru", "marconi"])
    assert [r["policy"] for r in rows] == ["lru", "marconi", "clairvoyant"]
    assert rows[2]["kind"] == "bound"
    assert rows[2]["block_hit_rate"] >= max(r["block_hit_rate"] for r in rows[:2])
    before = path.read_bytes()
    assert swept(short, table, ["lru", "marconi"], known=table.names) == []
    assert path.read_bytes() == before
    more = swept(short, table, ["lru", "sieve"], known=table.names)
    assert [what for _, what in more] == ["kimi-linear-48b: working set", "kimi-linear-48b 5% sieve"]
    assert len(SweepFile({"trace": "short"}, path).rows()) == 4
    assert not list(tmp_path.glob("*.part"))


def test_a_file_of_something_else_is_not_continued(tmp_path):
    path = tmp_path / "sweep.json"
    SweepFile({"trace": "one"}, path).add({"layout": "a", "memory_share": 0.1, "policy": "lru", "token_hit_rate": 0.1})
    with pytest.raises(ConfigError, match="trace 'one', not 'two'"):
        SweepFile({"trace": "two"}, path)
    path.write_text('{"runs": 3}')
    with pytest.raises(ConfigError, match="holds no sweep"):
        SweepFile({"trace": "one"}, path)


def test_claims_hold_the_default_against_lru_and_the_best():
    rates = {"lru": 0.20, "gdsf": 0.23, "marconi": 0.22, "clairvoyant": 0.3}
    rows = [{"layout": "a", "memory_share": 0.1, "policy": p, "token_hit_rate": r} for p, r in rates.items()]
    (found,) = claims(rows)
    assert found["over_lru_points"] == pytest.approx(2.0)
    assert (found["best_other"], found["behind_best_points"]) == ("gdsf", pytest.approx(1.0))
    assert found["behind_clairvoyant_points"] == pytest.approx(8.0)
    (found,) = claims(rows[:1])
    assert found["over_lru_points"] is None
    assert found["behind_best_points"] is None


def test_the_command_sweeps_draws_and_continues(short, tmp_path, monkeypatch):
    monkeypatch.setattr("kvpool.replay.cli.SHARES", (0.05, 0.2))
    monkeypatch.setattr("kvpool.replay.cli.load_trace", lambda name: short)
    args = (
        "trace",
        "--sweep",
        "--layout",
        "qwen3-235b",
        "--json",
        tmp_path / "t.json",
        "--plot",
        tmp_path,
        "--jobs",
        "2",
    )
    result = run(*args, "--policy", "lru")
    assert result.exit_code == 0, result.output
    result = run(*args, "--policy", "marconi")
    assert result.exit_code == 0, result.output
    body = json.loads((tmp_path / "t.json").read_text())
    assert len(body["runs"]) == 6
    assert [c["over_lru_points"] is None for c in body["claims"]] == [False, False]
    assert "behind best" in re.sub(r"\s+", " ", result.stdout)
    assert {p.suffix for p in tmp_path.glob("caching.*")} == {".png", ".svg"}
    wrong = run(*args, "--count-from", "0.5")
    assert wrong.exit_code == 2
    assert "count_from" in wrong.output + wrong.stderr
