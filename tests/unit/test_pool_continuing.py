"""What the default policy learns: which kinds of sequence go on, and which weights would have hit most."""

import itertools

import numpy as np

from kvpool.eviction.base import Stored
from kvpool.eviction.continuing import KINDS, LATE, UNKNOWN, Continuing, kind_of, turn_of
from kvpool.eviction.marconi import CANDIDATES, WARM, Marconi, Weights
from kvpool.eviction.shadow import Shadow, Shown


def names(*numbers):
    return [(0, b"%d" % n) for n in numbers]


def test_kinds_are_turns_and_sizes():
    kinds = {kind_of(turn, size) for turn in range(12) for size in (16, 1_024, 2_048, 4_096, 100_000)}
    assert kinds == set(range(1, KINDS))
    assert UNKNOWN not in kinds
    for turn in range(1, 9):
        assert turn_of(kind_of(turn, 5_000)) == turn
    assert kind_of(8, 10) == kind_of(50, 10)


def test_odds_follow_what_went_on():
    learnt = Continuing()
    short, long = kind_of(3, 100), kind_of(2, 50_000)
    for i in range(200):
        learnt.stored(names(0, 10 * i, 10 * i + 1, 10 * i + 2), 1, short, i, 1e9)
        learnt.stored(names(0, 10 * i, 10 * i + 1, 10 * i + 2, 10 * i + 3), 4, kind_of(4, 100), i, 1e9)
        learnt.stored(names(0, 5_000 + i, 9_000 + i), 1, long, i, 1e9)
    assert learnt.odds(short) > 0.5
    assert learnt.odds(long) < -1
    assert learnt.odds(UNKNOWN) == 0.0
    assert abs(learnt.odds(kind_of(8, 5_000))) < 1e-9  # never seen: the mean


def test_who_comes_back_too_late_does_not_count():
    learnt = Continuing()
    kind = kind_of(2, 100)
    for i in range(100):
        learnt.stored(names(1, 10 * i, 10 * i + 1), 1, kind, 1_000 * i, 10.0)
        learnt.stored(names(1, 10 * i, 10 * i + 1, 10 * i + 2), 3, kind_of(3, 5_000), 1_000 * i + 500, 10.0)
    assert learnt._continued[kind] == 0


def test_an_unfinished_block_that_is_replaced_still_counts():
    """Turn by turn only the last, partial block is new, and the next turn replaces it."""
    learnt = Continuing()
    for turn in range(3, 8):
        learnt.stored(names(1, 2, 3, 100 + turn), 3, kind_of(turn, 100), turn, 1e9)
    assert sum(learnt._continued) == 4


def test_what_is_remembered_is_bounded():
    learnt = Continuing(remembered=10)
    for i in range(100):
        learnt.stored(names(1, 1_000 + i), 1, 1, i, 1e9)
    assert len(learnt) == 10


def test_who_is_too_late_is_forgotten():
    """What is remembered is what came lately enough to be continued, however much is stored altogether."""
    learnt = Continuing()
    for i in range(1_000):
        learnt.stored(names(1, 1_000 + i), 1, 1, 10 * i, 400.0)
    assert len(learnt) == 40
    # Busier times, then quieter ones: what has piled up goes a few at a time.
    for i in range(300):
        learnt.stored(names(1, 5_000 + i), 1, 1, 10_000 + i, 400.0)
    assert 300 <= len(learnt) <= 340
    sizes = []
    for i in range(200):
        learnt.stored(names(1, 9_000 + i), 1, 1, 11_000 + 10 * i, 400.0)
        sizes.append(len(learnt))
    assert max(a - b for a, b in itertools.pairwise(sizes)) == LATE - 1
    assert sizes[-1] == 40


def test_what_is_remembered_like_a_dict():
    """At random, against the plainest thing that does the same: whom it knows, what counts as continued, whose tag goes on."""
    rng = np.random.default_rng(5)
    learnt, plain, stored, continued = Continuing(remembered=30), {}, [], 0
    first_tag = {}
    for now in range(3_000):
        path = rng.integers(0, 40, 3).tolist()
        horizon = float(rng.integers(10, 60))
        tag = learnt.stored(names(*path), 2, 1, now, horizon)
        known = next((k for k in reversed(path) if k in plain), None)
        if known is not None:
            continued += now - plain[known][0] < horizon
            assert tag == plain.pop(known)[1]
        else:
            assert tag == first_tag.setdefault(path[2], tag)
        if len(stored) == 30:
            oldest = stored.pop(0)
            if oldest[1] in plain and plain[oldest[1]][0] == oldest[0]:
                del plain[oldest[1]]
        plain[path[2]] = (now, tag)
        stored.append((now, path[2]))
        for _ in range(LATE):
            at, key = stored[0]
            current = key in plain and plain[key][0] == at
            if current and at > now - horizon:
                break
            stored.pop(0)
            if current:
                del plain[key]
            if not stored:
                break
        assert len(learnt) == len(plain)
        assert sum(learnt._continued) == continued


def test_who_is_stored_again_is_the_newest():
    learnt = Continuing()
    for i in range(100):
        learnt.stored(names(1, 1_000 + i), 1, 1, i, 50.0)
        learnt.stored(names(1, 7, 8), 3, kind_of(2, 100), i, 50.0)  # nothing of it is new
    assert len(learnt) == 51


def test_a_pool_remembers_no_more_sequences_than_it_has_pages():
    policy = Marconi()
    policy.bind((), 200)
    for i in range(3_000):
        keys = names(1_000_000 + i)
        policy.first_rank(np.arange(10 * i, 10 * i + 1), np.ones(1, np.float32), np.ones(1, np.int32), 1)
        policy.learn(Stored(keys, [1], [1.0], [512], [], False, 0, 1))
        assert len(policy._continuing) <= 200
    assert len(policy._continuing) == 200


def test_a_conversation_keeps_its_tag_and_others_spread():
    learnt = Continuing()
    tags = []
    for i in range(400):
        first = learnt.stored(names(0, 10 * i + 1), 1, 1, i, 1e9)
        assert learnt.stored(names(0, 10 * i + 1, 10 * i + 2), 2, kind_of(2, 10), i, 1e9) == first
        tags.append(first)
    assert 0.4 < np.mean(np.array(tags) < 1 << 31) < 0.6  # though all begin with the same block


# -- shadows -------------------------------------------------------------------------------------------


def shown(keys, *, odds=0.0, pages=1, ends=(), needs_ends=False):
    n = len(keys)
    return Shown(keys, [pages] * n, [10] * n, [0.0] * n, list(ends), needs_ends, odds)


def test_a_shadow_without_weights_is_least_recently_used():
    shadow = Shadow(0.0, 0.0, 4)
    assert shadow.request(shown([1, 2])) == 0
    assert shadow.request(shown([1, 3])) == 10
    assert shadow.request(shown([4])) == 0
    assert (shadow.used, shadow.nodes) == (4, 4)
    assert shadow.request(shown([5])) == 0  # block 2 goes: the oldest leaf
    assert shadow.request(shown([1, 3])) == 20
    assert shadow.request(shown([1, 2])) == 10
    assert shadow.request(shown(range(100, 110))) == 0  # larger than all memory
    assert shadow.used <= 4


def test_a_shadow_with_weights_keeps_what_goes_on():
    hits = []
    for beta in (0.0, 4.0):
        shadow = Shadow(0.0, beta, 20)
        total = 0
        for i in range(300):
            total += shadow.request(shown([1, 2, 3], odds=2.0)) if i % 8 == 0 else 0
            shadow.request(shown([1_000 + 4 * i + j for j in range(4)], odds=-2.0))
        hits.append(total)
    assert hits[1] > 30 * 30
    assert hits[0] == 0


def test_a_shadow_hits_at_checkpoints_only():
    shadow = Shadow(0.0, 0.0, 100)
    assert shadow.request(shown([1, 2, 3], ends=[(2, 5, 0.0)], needs_ends=True)) == 0
    assert shadow.used == 8
    assert shadow.request(shown([1, 2, 4], ends=[(1, 5, 0.0), (2, 5, 0.0)], needs_ends=True)) == 0
    assert shadow.request(shown([1, 2, 5], ends=[(2, 5, 0.0)], needs_ends=True)) == 20
    assert shadow.request(shown([1, 2, 3, 6], ends=[(3, 5, 0.0)], needs_ends=True)) == 30


def test_a_checkpoint_that_cuts_a_segment_in_two():
    """What follows the new cut is known already: it is not held twice, and goes when it is its turn."""
    shadow = Shadow(0.0, 0.0, 100)
    whole = Shown([1, 9], [10, 20], [512, 512], [0.0, 0.0], [(1, 5, 0.0)], True, 0.0)
    assert shadow.request(whole) == 0
    assert shadow.used == 35
    cut = Shown([1, 5, 9], [10, 10, 10], [512, 256, 256], [0.0] * 3, [(1, 5, 0.0), (2, 5, 0.0)], True, 0.0)
    assert shadow.request(cut) == 1024
    assert (shadow.used, shadow.nodes) == (40, 3)
    assert [shadow._pages[shadow._rows[key]] for key in (1, 5, 9)] == [10, 10, 10]
    # Cut elsewhere, when what ends there is known no more by the pool: before one of the shadow's own cuts, too.
    early = Shown([1, 3, 9], [10, 5, 15], [512, 128, 384], [0.0] * 3, [(1, 5, 0.0), (2, 5, 0.0)], True, 0.0)
    assert shadow.request(early) == 1024
    assert [shadow._pages[shadow._rows[key]] for key in (1, 3, 5, 9)] == [10, 5, 5, 10]
    assert (shadow.used, shadow.nodes) == (45, 4)
    shadow.request(Shown([50], [100], [512], [0.0], [], False, 0.0))
    assert (shadow.used, shadow.nodes) == (100, 1)


def test_a_shadow_holds_what_it_counts_however_sequences_are_cut():
    rng = np.random.default_rng(3)
    shadow = Shadow(0.0, 1.0, 500)
    hits = 0
    for _ in range(3_000):
        family, end = int(rng.integers(12)), int(rng.integers(1, 17))
        cuts = sorted({*(8 * i for i in range(1, end // 8 + 1)), *rng.integers(1, end + 1, 2).tolist(), end})
        sizes = np.diff(cuts, prepend=0).tolist()
        ends = [(i, 3, 0.0) for i, c in enumerate(cuts) if c % 8]
        keys = [1_000 * family + c for c in cuts]
        hits += shadow.request(
            Shown(keys, [4 * n for n in sizes], [64 * n for n in sizes], [0.0] * len(keys), ends, True, 0.0)
        )
        rows = shadow._rows.values()
        assert sum(shadow._pages[r] + shadow._end_pages[r] for r in rows) == shadow.used <= 500
        assert len(shadow._rows) + len(shadow._free) == len(shadow._keys)
    assert hits > 0
    assert shadow.request(Shown([1], [500], [64], [0.0], [], False, 0.0)) == 0
    assert (shadow.used, shadow.nodes) == (500, 1)  # everything else could go


def conversation(i, turn):
    """Turn after turn one segment more, of conversations that a third of the traffic goes on with."""
    return names(0, *(1_000 * i + t for t in range(1, turn + 3)))


def test_weights_are_those_that_would_have_hit_most():
    """Memory for a few sequences, one kind that goes on and one that never does: recency alone must lose."""
    policy = Marconi(Weights(0.0, 0.0))
    policy.bind((), 60)
    rng = np.random.default_rng(1)
    open_at = {}
    for now in range(4 * WARM):
        if rng.random() < 0.25:
            which = int(rng.integers(5))
            turn = open_at[which] = open_at.get(which, 0) + 1
            keys, added, kind = conversation(which, min(turn, 6)), min(turn, 6) + 1, kind_of(min(turn, 8), 100)
        else:
            keys, added, kind = names(0, *(10**6 + 10 * now + j for j in range(9))), 1, kind_of(2, 9_000)
        n = len(keys)
        policy.first_rank(np.arange(now * 20, now * 20 + n), np.ones(n, np.float32), np.ones(n, np.int32), kind)
        policy.learn(Stored(keys, [1] * n, [1.0] * n, [512] * n, [], False, added, kind))
    told = policy.describe()
    assert policy.weights.beta > 0
    best = max(told["candidates"], key=lambda c: c["token_hit_rate"])
    assert best["token_hit_rate"] > told["candidates"][0]["token_hit_rate"] * 1.2
    assert len(told["candidates"]) == len(CANDIDATES)


def test_large_pools_learn_from_a_sample():
    policy = Marconi()
    policy.bind((), 1 << 30)
    for i in range(400):
        keys = names(0, 10 * i + 1, 10 * i + 2)
        policy.learn(Stored(keys, [100] * 3, [1.0] * 3, [512] * 3, [], False, 1, 1))
    assert 0 < policy._share < 0.01
    assert policy._seen < 40
