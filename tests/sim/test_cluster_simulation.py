"""A few seeds of the cluster's simulation, and the faults it must notice. Thousands of seeds: make test-sim-cluster."""

import pytest

from tests.sim.cluster.mutations import MUTATIONS, mutated
from tests.sim.cluster.world import PROFILES, Violation, run_seed

CATCHES = {
    "incarnation unchecked": range(46, 60),
    "generation unchecked": range(341, 400),
    "stale directory trusted": range(20),
    "repair during a frozen view": range(5, 40),
    "drain that deletes first": range(4, 60),
}


FOUND = (53, 38, 265, 912, 3065)
"""Seeds that found something: a node that joined just after the directory had lost everything copied by what it saw there; what joined
while a node was not yet allowed to move anything was overlooked by it; one that was stopped took a loss for as old as its question; a
client found no node; what one node was told not to have, another one had by then."""


@pytest.mark.parametrize("seed", FOUND)
def test_seeds_that_found_something(seed):
    run_seed(seed)


def test_seeds():
    seen = {run_seed(seed).profile for seed in range(100, 120)}
    assert seen == set(PROFILES)


@pytest.mark.parametrize("name", sorted(MUTATIONS))
def test_faults_in_the_code_are_noticed(name):
    with mutated(name), pytest.raises(Violation):
        for seed in CATCHES[name]:
            run_seed(seed)
