"""Coded payloads: exactly the bytes that went in or an error; coding only where it pays."""

from __future__ import annotations

import random
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransport import _native, _pure
from kvtransport.buffers import PageList
from kvtransport.compression import HEADER, MAX_RAW, Codec, available, choose_codecs, decode, encode, raw_bytes
from kvtransport.errors import ConfigError, IntegrityError, ProtocolError
from kvtransport.flow.coding import MARGIN, BusyRate, CodingChoice, out_of_reach

CODECS = [Codec.LZ4, Codec.ZSTD]


def bf16(count: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(count).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


def scattered(data: np.ndarray, page: int, seed: int = 0) -> PageList:
    """The same bytes in shuffled pages."""
    count = -(-len(data) // page)
    base = np.zeros(2 * count * page, np.uint8)
    pages = PageList.pages(
        base, [i * page for i in random.Random(seed).sample(range(2 * count), count)], page, len(data)
    )
    _native.copy_pages(pages.base, pages.pieces, data, None)
    return pages


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("page", [1, 3, 16, 2304, 1 << 20])
def test_what_went_in_comes_out(codec, page):
    data = bf16(20_000)
    coded = encode(scattered(data, page), codec)
    assert coded is not None
    assert len(coded) < len(data) / 1.1
    assert raw_bytes(coded) == len(data)
    assert decode(coded) == data.tobytes()


@given(st.binary(min_size=2, max_size=400).filter(lambda b: len(b) % 2 == 0), st.integers(1, 9), st.booleans())
def test_planes_of_any_bytes_in_any_pages(data, page, native):
    here, there = (_native, _pure) if native else (_pure, _native)
    source = scattered(np.frombuffer(data, np.uint8), page)
    planes = [bytearray(len(data) // 2) for _ in range(2)]
    again = [bytearray(len(data) // 2) for _ in range(2)]
    assert here.split_planes(source.base, source.pieces, *planes) == len(data)
    there.split_planes(source.base, source.pieces, *again)
    assert planes == again
    into = scattered(np.zeros(len(data), np.uint8), page, 1)
    assert there.join_planes(into.base, into.pieces, *planes) == len(data)
    assert into.tobytes() == data


@pytest.mark.parametrize("module", [_native, _pure])
def test_planes_must_fit(module):
    for nbytes, planes in ((3, (1, 1)), (4, (2, 1)), (4, (3, 2))):
        with pytest.raises(ValueError, match="two planes"):
            module.split_planes(bytes(nbytes), None, *map(bytearray, planes))
        with pytest.raises(ValueError, match="two planes"):
            module.join_planes(bytearray(nbytes), None, *map(bytes, planes))
    with pytest.raises(BufferError):
        module.join_planes(bytes(2), None, b"a", b"b")


def test_what_does_not_shrink_is_left_alone():
    noise = PageList.of(np.random.default_rng(1).integers(0, 256, 65_536, np.uint8))
    assert encode(noise, Codec.LZ4) is None
    assert encode(PageList.of(bytes(3)), Codec.LZ4) is None
    assert encode(PageList.of(bytes(64)), Codec.NONE) is None


@pytest.mark.parametrize("codec", CODECS)
def test_damage_is_an_error(codec):
    """Also where the codec does not notice: the checksum of what went in does."""
    data = bf16(3000)
    coded = encode(PageList.of(data), codec)
    rng = random.Random(1)
    for _ in range(300):
        bad = bytearray(coded)
        for _ in range(rng.randrange(1, 4)):
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        if bad != coded:
            with pytest.raises((ProtocolError, IntegrityError)):
                decode(bytes(bad))


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (b"", "at least 20 bytes"),
        (HEADER.pack(3, 1, 0, 4, 0, 0) + b"xx", "is not known here"),
        (HEADER.pack(1, 2, 0, 4, 0, 0) + b"xx", "is not known here"),
        (HEADER.pack(1, 1, 0, 5, 0, 0) + b"xx", "expected an even number"),
        (HEADER.pack(1, 1, 0, 0, 0, 0), "expected an even number"),
        (HEADER.pack(1, 1, 0, MAX_RAW + 2, 0, 0) + bytes(MAX_RAW // 2 + 1), "expected an even number"),
        (HEADER.pack(1, 1, 0, 4, 2**32 - 1, 0) + b"xx", "says it has"),
        (HEADER.pack(1, 1, 0, 4, 3, 0) + b"\xff\xff\xff" + b"xx", "cannot be decoded|has .* bytes"),
        (HEADER.pack(2, 1, 0, 4, 3, 0) + b"\xff\xff\xff" + b"xx", "cannot be decoded"),
    ],
)
def test_payloads_that_are_none(payload, says):
    with pytest.raises(ProtocolError, match=says):
        decode(payload)


def zstd_frame(said: int) -> bytes:
    """A frame of one empty block that says how many bytes it has."""
    return b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", said) + b"\x01\x00\x00"


@pytest.mark.parametrize("sized", [True, False])
def test_a_bomb_does_not_go_off(sized):
    """A few coded bytes that become many take no more memory than there is room for, whether the frame says their number or not."""
    zstandard = pytest.importorskip("zstandard")
    bomb = zstandard.ZstdCompressor(level=1, write_content_size=sized).compress(bytes(64 << 20))
    payload = HEADER.pack(2, 1, 0, 4, len(bomb), 0) + bomb + b"xx"
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="says it has 67108864 bytes, expected 2" if sized else "cannot be decoded"):
            decode(payload)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("said", [0, 1, 3, 2**31, 2**40, 2**63, 2**64 - 2, 2**64 - 1])
def test_a_frame_that_says_another_size_is_refused(said):
    plane = zstd_frame(said)
    with pytest.raises(ProtocolError):
        decode(HEADER.pack(2, 1, 0, 4, len(plane), 0) + plane + b"xx")


def test_nothing_hides_behind_a_coded_plane():
    coded = encode(PageList.of(bf16(3000)), Codec.ZSTD)
    nbytes = raw_bytes(coded)
    plane, rest = coded[HEADER.size : -nbytes // 2], coded[-nbytes // 2 :]
    checksum = HEADER.unpack_from(coded)[5]
    for plus in (b"x", plane):
        with pytest.raises(ProtocolError, match="unused data"):
            decode(HEADER.pack(2, 1, 0, nbytes, len(plane + plus), checksum) + plane + plus + rest)


def test_codecs_of_this_process():
    assert available() == (Codec.NONE, Codec.LZ4, Codec.ZSTD)
    assert choose_codecs() == (Codec.LZ4, Codec.ZSTD)
    assert choose_codecs(("zstd",)) == (Codec.ZSTD,)
    with pytest.raises(ConfigError, match="codec 'snappy' is not there"):
        choose_codecs(("snappy",))


# -- the choice ----------------------------------------------------------------------------------------

GBPS = 1e9 / 8


def chosen(choice: CodingChoice, link: float) -> list[int | None]:
    return [choice.choose(link) for _ in range(200)]


def test_unknown_codecs_are_tried_once_and_a_link_that_is_not_known_is_left_alone():
    choice = CodingChoice((1, 2))
    assert choice.choose(None) is None
    assert choice.choose(1 * GBPS) == 1
    choice.observe(1, 100, 80, 1e-7)
    assert choice.choose(1 * GBPS) == 2


@pytest.mark.parametrize("gbps", [0.1, 0.5, 1, 2, 3, 4, 5, 6, 8, 10, 25, 40, 100])
def test_coding_never_promises_less_than_none(gbps):
    """lz4: 0.9 GB/s, 1.2 times; zstd: 0.6 GB/s, 1.47 times."""
    choice = CodingChoice((1, 2))
    for codec, rate, ratio in ((1, 0.9e9, 1.2), (2, 0.6e9, 1.47)):
        choice.observe(codec, 1 << 20, int((1 << 20) / ratio), (1 << 20) / rate)
    link = gbps * GBPS
    for codec in chosen(choice, link):
        if codec is not None:
            assert choice.goodput(codec, link) > link * MARGIN
    best = max((1, 2), key=lambda c: choice.goodput(c, link))
    if choice.goodput(best, link) > link * MARGIN:
        assert set(chosen(choice, link)) == {best}
    if gbps >= 8:
        assert set(chosen(CodingChoice(()), link)) == {None}


def test_data_that_stops_shrinking_is_no_longer_coded_and_looked_at_again():
    choice = CodingChoice((1,))
    choice.observe(1, 150, 100, 1e-9)
    assert choice.choose(GBPS) == 1
    for _ in range(20):
        choice.observe(1, 100, 100, 1e-9)
    later = [choice.choose(GBPS) for _ in range(600)]
    assert 1 <= later.count(1) <= 3
    for _ in range(20):
        choice.observe(1, 150, 100, 1e-9)
    assert choice.choose(GBPS) == 1


def test_a_codec_that_is_too_slow_for_the_link_is_not_tried_again_for_other_data():
    speeds: dict[int, float] = {}
    first, second = CodingChoice((1,), speeds), CodingChoice((1,), speeds)
    assert first.choose(40 * GBPS) == 1
    first.observe(1, 1 << 20, 800_000, (1 << 20) / 1e9)
    assert set(chosen(second, 40 * GBPS)) == {None}
    assert second.choose(1 * GBPS) == 1


@pytest.mark.parametrize("known", [(), (1,), (1, 2)])
@pytest.mark.parametrize("gbps", [1, 10, 40])
def test_what_is_out_of_reach_would_not_have_been_tried(known, gbps):
    speeds = {codec: 1e9 * codec for codec in known}
    fresh = CodingChoice((1, 2), dict(speeds))
    assert out_of_reach((1, 2), speeds, gbps * GBPS) == (fresh.choose(gbps * GBPS) is None)


def test_the_rate_of_a_path_is_what_it_delivers_while_it_is_busy():
    rate = BusyRate()
    assert rate.wants(0.0)
    rate.look(0.0, 0, 0, 0.0)
    assert not rate.wants(0.05)
    rate.look(0.1, 50_000_000, 10_000_000, 0.0)  # nothing waited when it began
    assert rate.bytes_per_s is None
    rate.look(0.2, 60_000_000, 10_000_000, 0.0)
    assert rate.bytes_per_s == pytest.approx(1e8)
    rate.look(0.3, 65_000_000, 10_000_000, 0.08)  # idle for most of it
    rate.look(0.4, 66_000_000, 0, 0.08)  # nothing waits any more
    assert rate.bytes_per_s == pytest.approx(1e8)
    rate.look(100.0, 70_000_000, 10, 0.08)
    rate.look(200.0, 80_000_000, 10, 0.08)  # seen too seldom
    assert rate.bytes_per_s == pytest.approx(1e8)
    for i in range(1, 12):  # a slower path is believed when it has been so for a second
        rate.look(200.0 + i * 0.1, 80_000_000 + i * 2_000_000, 10, 0.08)
    assert rate.bytes_per_s == pytest.approx(2e7)
