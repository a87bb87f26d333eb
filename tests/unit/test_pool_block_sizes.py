"""Blocks of any size a namespace may have: every restorable length is found, and only those, on the grid and off it."""

import pytest

from kvpool.errors import KeyChainError, MissError
from kvpool.keys import KeyChain
from tests.poolkit import LAYOUTS, check_get, check_idle, make_core, store


@pytest.mark.parametrize("step", [16, 17, 64, 100, 528, 1024])
@pytest.mark.parametrize("layout", ["everything", "dense"])
def test_all_restorable_lengths(step, layout):
    core = make_core(6000, 256)
    ns = core.open_namespace("t", LAYOUTS[layout], step)
    tokens = [(i * 7) % 251 for i in range(3 * step + step // 2 + 1)]
    end, inside = 3 * step + step // 2, step + 5
    store(core, ns, tokens, end, checkpoints=(inside, 2 * step))
    found = core.match(ns, KeyChain(ns, tokens))
    states = [inside, 2 * step, end]
    assert list(found.restorable) == (states if layout == "everything" else sorted({step, 3 * step, *states}))
    for length in found.restorable:
        check_get(core, ns, tokens, length)
        assert core.match(ns, KeyChain(ns, [*tokens[:length], 9999])).length == length
    with pytest.raises(MissError):
        check_get(core, ns, tokens, inside + 1)
    # Another continuation after the checkpoint inside a block finds that checkpoint and nothing further on.
    other = core.match(ns, KeyChain(ns, [*tokens[:inside], *[5] * (2 * step)]))
    assert other.length == inside
    store(core, ns, [*tokens[: 3 * step], *[5] * step], 4 * step, start=3 * step)
    assert core.match(ns, KeyChain(ns, [*tokens[: 3 * step], *[5] * (step + 1)])).length == 4 * step
    check_idle(core)


def test_block_sizes_do_not_meet():
    core = make_core(4000, 256)
    tokens = list(range(2049))
    spaces = [core.open_namespace("t", LAYOUTS["dense"], step) for step in (16, 1024)]
    store(core, spaces[0], tokens, 2048)
    assert core.match(spaces[0], KeyChain(spaces[0], tokens)).length == 2048
    assert core.match(spaces[1], KeyChain(spaces[1], tokens)).length == 0
    for step in (15, 1025):
        with pytest.raises(KeyChainError, match="16 to 1024"):
            core.open_namespace("t", LAYOUTS["dense"], step)
