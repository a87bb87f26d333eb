"""The index's hash table and its pure-Python twin: one suite over both, and both against a dict."""

from __future__ import annotations

import hashlib
import random
import resource

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool import _native, _pure_table

BOTH = [_native.KeyTable, _pure_table.KeyTable]


@pytest.fixture(params=BOTH, ids=["native", "pure"])
def new(request):
    return request.param


def key(i: int) -> bytes:
    return hashlib.sha256(b"%d" % i).digest()


def add(table, keys, width=0):
    out = np.full(len(keys) if not width else len(keys) // width, -7, np.int32)
    table.add(keys, width, out)
    return out.tolist()


def find(table, keys, width=0):
    out = np.full(len(keys) if not width else len(keys) // width, -7, np.int32)
    return out[: table.find(keys, width, out)].tolist()


def test_numbers_and_back(new):
    table = new(1)
    keys = [key(i) for i in range(1000)]
    assert add(table, keys) == list(range(1000))
    assert find(table, keys) == list(range(1000))
    assert [table.key(i) for i in range(1000)] == keys
    assert (len(table), table.high, table.get(keys[5]), table.get(b"other")) == (1000, 1000, 5, -1)


def test_find_stops_at_the_first_unknown(new):
    table = new(1)
    add(table, [key(i) for i in range(100)])
    asked = [key(i) for i in (3, 2, 1, 777, 4)]
    assert find(table, asked) == [3, 2, 1]
    assert find(table, []) == []
    assert find(table, [key(777)]) == []
    assert find(table, [key(i) for i in range(99, -1, -1)] + [b"x"]) == list(range(99, -1, -1))


@pytest.mark.parametrize("which", [_native.which, _pure_table.which], ids=["native", "pure"])
def test_which_of_many_keys_a_dict_has(which):
    entries = {b"k%d" % i: i for i in range(0, 300, 7)} | {b"x" * 256: 0}
    keys = [b"k%d" % i for i in range(300)] + [b"x" * 256, b"x" * 255]
    lengths = np.array(list(map(len, keys)), "<u2").tobytes()
    bits = which(entries, b"".join(keys), lengths, 256)
    assert np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little").tolist() == [
        *(int(k in entries) for k in keys),
        *[0] * (-len(keys) % 8),
    ]
    assert which({}, b"", b"", 256) == b""
    for packed, sizes, words in (
        (b"abc", b"\3", "2 bytes each"),
        (b"abc", b"\4\0", "1 to 256"),
        (b"abc", b"\2\0", "add up to 2 bytes"),
        (b"", b"\0\0", "1 to 256"),
        (b"x" * 257, b"\1\1", "1 to 256"),
        (b"ab", b"\1\0\2\0", "key 1 of 2 bytes at 1"),
    ):
        with pytest.raises(ValueError, match=words):
            which({}, packed, sizes, 256)
    with pytest.raises(TypeError):
        which({}, "text", b"", 256)


@pytest.mark.parametrize("twin", [_native, _pure_table], ids=["native", "pure"])
def test_many_keys_are_packed_and_cut_again(twin):
    keys = [b"k%d" % i for i in range(300)] + [b"x" * 256, b"\0"]
    packed, lengths = twin.pack_keys(keys, 256)
    assert (packed, lengths) == (b"".join(keys), np.array(list(map(len, keys)), "<u2").tobytes())
    assert twin.cut_keys(packed, lengths) == keys
    assert twin.cut_keys(memoryview(packed), bytearray(lengths)) == keys
    assert twin.pack_keys([], 256) == (b"", b"")
    assert twin.cut_keys(b"", b"") == []
    assert twin.cut_keys(b"ab", b"\0\0\2\0\0\0") == [b"", b"ab", b""]
    assert twin.pack_keys([b"x" * 0xFFFF], 0xFFFF)[1] == b"\xff\xff"
    for bad, most, words in (
        ([b"a", b""], 256, "key 1 of 0 bytes"),
        ([b"x" * 257], 256, "1 to 256"),
        ([b"a", bytearray(b"b")], 256, "key 1 is not bytes"),
        ([None], 256, "key 0 is not bytes"),
        ([b"a"], 0x10000, "no length of 2 bytes"),
        ([b"a"], 0, "no length of 2 bytes"),
    ):
        with pytest.raises(ValueError, match=words):
            twin.pack_keys(bad, most)
    for data, sizes in ((b"ab", b"\1\0"), (b"ab", b"\3\0"), (b"ab", b"\2\0\0"), (b"", b"\xff\xff" * 3)):
        with pytest.raises(ValueError, match="add up"):
            twin.cut_keys(data, sizes)


@pytest.mark.parametrize("twin", [_native, _pure_table], ids=["native", "pure"])
def test_bits_are_flags(twin):
    for count in (0, 1, 7, 8, 9, 300):
        expected = [i % 3 == 0 for i in range(count)]
        bits = np.packbits(np.array(expected, np.bool_), bitorder="little").tobytes()
        found = twin.flags(bits, count)
        assert found == expected
        assert {bool}.issuperset(map(type, found))
    for bits, count in ((b"", 1), (b"\0", 0), (b"\0", 9), (b"\0\0", 8), (b"", -1), (b"", 1 << 60)):
        with pytest.raises(ValueError, match="bits are not"):
            twin.flags(bits, count)
    with pytest.raises(TypeError):
        twin.flags(None, 0)


@pytest.mark.parametrize("width", [1, 8, 31, 32, 33, 64])
def test_packed_keys_are_the_same_as_listed_ones(new, width):
    table = new(1)
    keys = [hashlib.shake_128(b"%d" % i).digest(width) for i in range(3 if width == 1 else 200)]
    assert add(table, b"".join(keys), width) == list(range(len(keys)))
    assert find(table, keys) == find(table, np.frombuffer(b"".join(keys), np.uint8), width) == list(range(len(keys)))
    assert [table.key(i) for i in range(len(keys))] == keys


def test_keys_that_differ_in_length_only(new):
    table = new(1)
    keys = [b"\0" * n for n in range(1, 65)]
    add(table, keys)
    assert find(table, keys) == list(range(64))
    for i in range(0, 64, 2):
        table.remove(i)
    assert [table.get(k) for k in keys] == [i if i % 2 else -1 for i in range(64)]


def test_a_removed_number_is_given_out_again(new):
    table = new(1)
    add(table, [key(i) for i in range(10)])
    for number in (9, 8, 4):
        table.remove(number)
    assert (len(table), table.get(key(4))) == (7, -1)
    assert add(table, [key(20), key(21), key(22), key(23)]) == [4, 8, 9, 10]
    assert table.key(4) == key(20)


def test_many_at_once(new):
    table = new(1)
    add(table, [key(i) for i in range(10)])
    assert table.absent([key(i) for i in (20, 21, 3, 22)], 0) == 2
    assert table.absent(key(20) + key(21), 32) == 2
    assert table.absent([], 0) == 0
    with pytest.raises(ValueError):
        table.absent([b""], 0)
    table.remove_all(np.array([9, 3], np.int32))
    assert [table.get(key(i)) for i in (9, 3, 8)] == [-1, -1, 8]
    with pytest.raises(ValueError, match="no key has the number 9"):
        table.remove_all(np.array([8, 9, 7], np.int32))
    assert [table.get(key(i)) for i in (8, 7)] == [-1, 7]
    table.remove_all(np.empty(0, np.int32))
    assert add(table, [key(30), key(31), key(32)]) == [8, 3, 9]


def test_adding_is_all_or_nothing(new):
    table = new(1)
    add(table, [key(0)])
    with pytest.raises(ValueError, match="key 2 is in the table already"):
        add(table, [key(1), key(2), key(0), key(3)])
    with pytest.raises(ValueError, match="key 1 is in the table already"):
        add(table, [key(1), key(1)])
    with pytest.raises(ValueError, match="1 to 64 bytes, got 65"):
        add(table, [key(1), b"x" * 65])
    with pytest.raises(TypeError):
        add(table, [key(1), "text"])
    assert (len(table), table.get(key(1)), table.get(key(0))) == (1, -1, 0)
    assert add(table, [key(1), key(2)]) == [1, 2]


def test_bad_arguments(new):
    table = new(1)
    add(table, [key(0)])
    small, read_only = np.empty(1, np.int32), np.empty(4, np.int32)
    read_only.flags.writeable = False
    for keys, width, out, error in [
        ((key(0),), 0, small, TypeError),
        ([key(0), key(1)], 0, small, ValueError),
        ([key(0)], 0, read_only, (BufferError, ValueError)),
        (b"x" * 33, 32, small, ValueError),
        (b"x" * 65, 65, small, ValueError),
        (b"x", -1, small, ValueError),
        ([b""], 0, small, ValueError),
    ]:
        with pytest.raises(error):
            table.find(keys, width, out)
        with pytest.raises(error):
            table.add(keys, width, out)
    for number in (-1, 1, 1 << 31):
        with pytest.raises((ValueError, OverflowError)):
            table.remove(number)
        with pytest.raises((ValueError, OverflowError)):
            table.key(number)
    for bad in (b"", b"x" * 65):
        with pytest.raises(ValueError):
            table.get(bad)
    with pytest.raises(TypeError):
        new()
    assert len(table) == 1


@pytest.mark.parametrize("seed", [0, 1, (1 << 64) - 1])
def test_growing_and_shrinking_through_every_size(seed):
    """Enough to grow nine times, with removals at every moment of it: a slot lost in a move would be a key lost."""
    table, rng, known = _native.KeyTable(seed), random.Random(seed), {}
    for i in range(24_000):
        number = add(table, [key(i)])[0]
        assert number not in known
        known[number] = key(i)
        if rng.random() < 0.3:
            gone = rng.choice(list(known)) if len(known) < 50 else number
            assert table.key(gone) == known.pop(gone)
            table.remove(gone)
        if i % 1500 == 0:
            order = list(known)
            rng.shuffle(order)
            assert find(table, [known[n] for n in order]) == order
    assert len(table) == len(known)
    for number in list(known):
        table.remove(number)
        del known[number]
        if len(known) % 4000 == 0:
            assert find(table, list(known.values())) == list(known)
    assert len(table) == 0
    assert find(table, [key(i) for i in range(10)]) == []


@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "remove", "find"]), st.lists(st.integers(0, 60), min_size=1, max_size=12)),
        max_size=60,
    ),
    st.sampled_from([8, 32, 48]),
)
@settings(max_examples=80, deadline=None)
def test_both_behave_alike(steps, width):
    native, pure = (impl(3) for impl in BOTH)
    for what, ids in steps:
        keys = [key(i)[:width] if width <= 32 else key(i) + key(i)[:16] for i in ids]
        results = []
        for table in (native, pure):
            try:
                if what == "add":
                    results.append(add(table, keys))
                elif what == "find":
                    results.append(find(table, keys))
                else:
                    number = table.get(keys[0])
                    results.append(table.remove(number) if number >= 0 else None)
            except ValueError as error:
                results.append(str(error))
        assert results[0] == results[1]
        assert (len(native), native.high) == (len(pure), pure.high)


def test_a_table_that_grows_touches_its_new_memory_in_order():
    """A page of it for each new key would be a page fault each: milliseconds for those of one sequence."""
    table = _native.KeyTable(1)
    before_growing = (1 << 19) * 3 // 4 - 300
    add(table, random.Random(1).randbytes(32 * before_growing), 32)
    new = random.Random(2).randbytes(32 * 1_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    add(table, new, 32)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 300  # some 800 if they went all over it
    assert table.nbytes > 24 << 20  # it did grow: a million slots, and the old ones still


def test_memory_a_key():
    """33 bytes of the key, and 8 of each slot, of which at least three in eight are used once the table has grown."""
    table = _native.KeyTable(1)
    add(table, [key(i) for i in range(150_000)])
    assert table.nbytes / 150_000 < 33 + 8 * 8 / 3 + 1
    for number in range(150_000):
        table.remove(number)
    before = table.nbytes
    add(table, [key(i) for i in range(150_000)])
    assert table.nbytes == before
