"""The real protocol, link, sender and receiver over a network that exists only in memory, on a virtual clock.

``make test-sim`` runs ten thousand schedules; here are the first few hundred, and that faults in the code are noticed.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from .transport.__main__ import first_caught
from .transport.faults import ACTIONS_BY_NAME
from .transport.mutations import MUTATIONS, mutated
from .transport.plan import ACTIONS, PROFILES
from .transport.world import Violation, run_seed

ROOT = Path(__file__).resolve().parents[2]
BLOCK = 50
FAILED_ONCE = (1125, 1138, 2289, 2412, 4578, 4634, 5159, 6593, 7375, 7419)
"""An old copy read its source after a later one was acknowledged; a handshake that was late for one side ended the link; bytes cut otherwise
came again while they were being decoded and were counted twice; an endpoint closed while it decoded."""


@pytest.mark.parametrize("first", range(0, 300, BLOCK))
def test_schedules_of_faults(first):
    """The bytes sent, or an error, within the deadline; no write outside a live claim; nothing left behind."""
    for seed in range(first, first + BLOCK):
        run_seed(seed)


@pytest.mark.parametrize("seed", FAILED_ONCE)
def test_schedules_that_failed_once(seed):
    run_seed(seed)


def test_the_schedules_say_something():
    """Every profile and every fault occurs, transfers of each kind end well or badly."""
    profiles, faults, ends, words, coded = set(), set(), set(), set(), Counter()
    for seed in range(150):
        world = run_seed(seed)
        profiles.add(world.plan.profile)
        faults.update(world.injected)
        ends.update(said if isinstance(said, str) else said.code for job in world.jobs for said in (job.sent, job.got))
        assert world.loop.events > 100
        words.update(world.addresses)
        for stats in (job.receiver.stats for job in world.jobs if world.plan.codec and job.receiver is not None):
            coded += Counter(bytes=stats.coded_raw_bytes, resent=stats.corrupt_chunks, twice=stats.duplicate_bytes)
    assert profiles == set(PROFILES)
    assert faults == {action for actions in ACTIONS.values() for action in actions} == set(ACTIONS_BY_NAME)
    assert {"sealed", "cancelled", "deadline", "refused", "peer_lost", "incarnation"} <= ends
    assert words == {"reached", "unreached", "not said"}
    assert coded["bytes"] > 100_000
    assert coded["resent"]
    assert coded["twice"]


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_fault_in_the_code_is_noticed(mutation):
    caught = first_caught(mutation)
    assert caught is not None, f"1000 seeds do not notice: {mutation}"
    seed, _ = caught
    run_seed(seed)  # it is the mutation that fails, not the seed


def test_one_command_replays_a_seed_exactly():
    """In another process, with other addresses and hashes: the same events at the same times."""
    with mutated("range merged wrongly"), pytest.raises(Violation) as caught:
        for seed in range(1000):
            run_seed(seed)
    command = [sys.executable, "-m", "tests.sim.transport", "--seed", str(seed)]
    mutant = ["--mutation", "range merged wrongly"]
    told = [
        subprocess.run([*command, *extra], cwd=ROOT, env={"PYTHONHASHSEED": salt}, capture_output=True, text=True)
        for salt, extra in (("1", mutant), ("2", mutant), ("3", []))
    ]
    assert [t.returncode for t in told] == [1, 1, 0]
    assert str(caught.value) in told[0].stdout
    assert told[0].stdout == told[1].stdout
    assert "every invariant holds" in told[2].stdout
