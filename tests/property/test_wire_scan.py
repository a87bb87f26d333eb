"""The container count against msgpack itself."""

from __future__ import annotations

import msgpack
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransport.wire.scan import more_containers_than

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
    | st.binary(max_size=300)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=40))
)
trees = st.recursive(
    scalars, lambda v: st.lists(v, max_size=20) | st.dictionaries(st.text(max_size=3), v, max_size=20), max_leaves=60
)


def containers(value: object) -> int:
    if isinstance(value, dict):
        return 1 + sum(map(containers, value.values()))
    return 1 + sum(map(containers, value)) if isinstance(value, list) else 0


@given(trees)
@settings(max_examples=300, deadline=None)
def test_counts_what_is_there(tree):
    raw = msgpack.packb(tree, use_bin_type=True)
    count = containers(tree)
    assert not more_containers_than(count, raw)
    assert not more_containers_than(count, memoryview(raw))
    for fewer in range(max(count - 3, 0), count):
        assert more_containers_than(fewer, raw)


@given(st.binary(max_size=200), st.integers(0, 5))
def test_ends_on_noise(noise, bound):
    assert more_containers_than(bound, noise) in (True, False)


def test_large_elements_are_skipped_whole():
    raw = msgpack.packb([b"\x90" * 70000, "\x7f" * 70000, msgpack.ExtType(1, b"\x90" * 70000), b"\x90" * 300, []])
    assert more_containers_than(1, raw)
    assert not more_containers_than(2, raw)
