"""Flat objects of a client on their way: what is joined, what is copied together, and where they land."""

import numpy as np
import pytest
import xxhash

from kvpool.objects import GATHER_BYTES, SMALL_BYTES, Landing, copied, joined, packed, units, unpacked
from kvtransport.buffers import PageList
from kvtransport.errors import KVBufferError, ProtocolError


def test_page_lists_of_one_buffer_are_joined_without_a_copy():
    base = bytearray(range(200))
    whole = PageList.of(base)
    parts = [whole.slice(10, 20), whole.slice(100, 150), whole.slice(150, 151), whole.slice(5, 5)]
    one = joined(parts)
    assert one is not None
    assert one.base is whole.base
    assert one.pieces.tolist() == [[10, 10], [100, 51]]
    assert [start for start, _ in units(parts, one)] == [0]
    assert joined([*parts, PageList.of(b"elsewhere")]) is None
    assert joined([]).nbytes == 0


@pytest.mark.parametrize(
    "sizes",
    [
        [5, 6, 7],
        [SMALL_BYTES, 3, SMALL_BYTES + 1, 0, 1],
        [1, SMALL_BYTES * 3, 2, 3],
        [0, 0],
        [SMALL_BYTES - 1] * 40,
    ],
)
def test_units_of_scattered_objects_are_all_bytes_in_order(sizes):
    rng = np.random.default_rng(1)
    pages = [PageList.of(rng.bytes(n)) for n in sizes]
    found = list(units(pages, joined(pages)))
    at = 0
    for start, unit in found:
        assert start == at
        at += unit.nbytes
        assert unit.nbytes <= max(GATHER_BYTES, *sizes)
    assert b"".join(u.tobytes() for _, u in found) == b"".join(p.tobytes() for p in pages)
    assert len([u for _, u in found if u.nbytes]) <= len(sizes)
    large = [p for p in pages if p.nbytes >= SMALL_BYTES]
    assert [u for _, u in found if any(u is p for p in large)] == large


def land(into, sizes, data):
    landing = Landing(into)
    landing.grant(sizes).copy_from(PageList.of(data))
    return landing


def test_objects_land_in_memory_of_ours_or_in_the_callers():
    sizes, data = [3, -1, 0, 2], b"abcde"
    found = land(None, sizes, data).objects()
    assert [None if p is None else p.tobytes() for p in found] == [b"abc", None, b"", b"de"]
    memory = bytearray(b"." * 20)
    whole = PageList.of(memory)
    into = [whole.slice(i * 5, i * 5 + 5) for i in range(4)]
    landing = land(into, sizes, data)
    assert memory == b"abc............de..."  # at once: nothing is copied
    assert [None if p is None else p.nbytes for p in landing.objects()] == [3, None, 0, 2]
    apart = [PageList.of(bytearray(b"....")) for _ in range(4)]
    assert [None if p is None else p.tobytes() for p in land(apart, sizes, data).objects()] == [
        b"abc",
        None,
        b"",
        b"de",
    ]
    assert [p.tobytes() for p in apart] == [b"abc.", b"....", b"....", b"de.."]


def test_memory_that_is_too_small():
    with pytest.raises(KVBufferError):
        Landing([PageList.of(bytearray(4))]).grant([5])


def test_small_objects_travel_together_and_are_verified_one_by_one():
    buffers = [b"abc", b"", bytes(range(200)), b"z"]
    body = packed([PageList.of(b) for b in buffers])
    assert body["data"] == b"".join(buffers)
    sizes = np.frombuffer(body["sizes"], "<i8").tolist()
    sums = np.frombuffer(body["checksums"], "<u8").tolist()
    assert sums == [xxhash.xxh3_64_intdigest(b) for b in buffers]
    there = [True, False, True, True, True]
    assert unpacked(body["data"], there, sizes, sums) == ([b"abc", None, b"", bytes(range(200)), b"z"], [])
    damaged = bytearray(body["data"])
    damaged[10] ^= 1
    objects, wrong = unpacked(bytes(damaged), there, sizes, sums)
    assert (objects, wrong) == ([b"abc", None, b"", None, b"z"], [3])
    for data in (body["data"][:-1], body["data"] + b"x", None, "text"):
        with pytest.raises(ProtocolError, match="not as long"):
            unpacked(data, there, sizes, sums)


def test_small_objects_are_copied_where_they_all_fit_or_nowhere():
    memory = np.zeros(10, np.uint8)
    whole = PageList.of(memory)
    places = [whole.slice(0, 4), whole.slice(4, 7), whole.slice(7, 10)]
    assert copied([b"abc", None, b"xyz"], places) == [3, None, 3]
    assert memory.tobytes() == b"abc\0\0\0\0xyz"
    with pytest.raises(KVBufferError):
        copied([b"ABC", b"four", b"XYZ"], places)
    assert memory.tobytes() == b"abc\0\0\0\0xyz"
