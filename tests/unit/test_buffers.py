"""kvtransport.buffers over the extension and over the twin."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import warnings

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransport import buffers as native_buffers
from kvtransport.errors import ArenaError, ConfigError, KVBufferError


def load_without_native(require="0"):
    """A second copy of the module, made where ``kvtransport._native`` cannot be imported."""
    name = "kvtransport._buffers_over_the_twin"
    import kvtransport

    spec = importlib.util.spec_from_file_location(name, native_buffers.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, module)  # dataclasses look their module up
        patch.setitem(sys.modules, "kvtransport._native", None)
        patch.delattr(kvtransport, "_native", raising=False)
        patch.setenv("KVTRANSPORT_REQUIRE_NATIVE", require)
        spec.loader.exec_module(module)
    return module


with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)
    pure_buffers = load_without_native()

BOTH = pytest.mark.parametrize("buffers", [native_buffers, pure_buffers], ids=["native", "pure"])


@pytest.fixture(params=[native_buffers, pure_buffers], ids=["native", "pure"])
def buffers(request):
    return request.param


# ---- which implementation ----


def test_both_implementations_are_tested():
    assert native_buffers.native_available
    assert not pure_buffers.native_available
    assert native_buffers.send_pages is not pure_buffers.send_pages


def test_the_twin_says_once_what_is_lost():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_without_native()
    assert [warning.category for warning in caught] == [RuntimeWarning]
    for word in ("GIL", "huge pages", "locking", "CUDA", "build_ext"):
        assert word in str(caught[0].message)


def test_native_can_be_required():
    with pytest.raises(ConfigError, match=r"KVTRANSPORT_REQUIRE_NATIVE=1.*gcc, python3-dev"):
        load_without_native(require="1")


# ---- arenas ----


def test_arena_and_its_info(buffers):
    with buffers.Arena(5000, name="kv-facade", lock="off", cuda="off", huge="off") as arena:
        info = arena.info
        assert isinstance(info, buffers.ArenaInfo)
        assert (info.requested, info.nbytes, info.page_bytes) == (5000, 8192, 4096)
        assert (info.huge, info.locked, info.cuda, info.notes) == ("none", False, False, ())
        assert info.fd == arena.fd
        pages = buffers.PageList.of(arena)
        pages.slice(10, 15).copy_from(buffers.PageList.of(b"hello"))
        with buffers.Arena.attach(arena.fd, 8192) as attached:
            assert isinstance(attached, buffers.Arena)
            assert bytes(memoryview(attached)[10:15]) == b"hello"
            assert buffers.PageList.of(attached).readonly
        view = buffers.PageList.of(arena.view(10, 5))
        assert view.tobytes() == b"hello"
    assert arena.closed
    assert view.tobytes() == b"hello"  # the list keeps the memory


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"nbytes": 100 << 40}, "asked for an arena of 109951162777600 bytes, but only"),
        ({"nbytes": 0}, "asked for an arena of 0 bytes"),
        ({"nbytes": -1}, "negative"),
        ({"nbytes": 1 << 64}, ""),
        ({"nbytes": 4096, "huge": "require"}, 'huge="require"'),
        ({"nbytes": 4096, "huge": "yes"}, 'expected "auto", "require" or "off"'),
    ],
)
def test_arena_errors_are_of_the_tree(buffers, options, reason):
    with pytest.raises(ArenaError, match="no arena 'kvtransport': ") as caught:
        buffers.Arena(**options)
    assert reason in caught.value.message
    assert "[Errno" not in caught.value.message
    assert caught.value.__cause__ is not None


def test_attach_errors_are_of_the_tree(buffers, tmp_path):
    (tmp_path / "file").write_bytes(bytes(10))
    with (tmp_path / "file").open() as file, pytest.raises(ArenaError, match="not sealed"):
        buffers.Arena.attach(file.fileno(), 10)
    with pytest.raises(ArenaError):
        buffers.Arena.attach(-1, 10)


# ---- making page lists ----


def concat(pages):
    return b"".join(bytes(pages.base[o : o + n]) for o, n in pages.pieces.tolist())


SOURCES = {
    "bytes": b"\1\0\2\0",
    "bytearray": bytearray(b"\1\0\2\0"),
    "memoryview": memoryview(b"xx\1\0\2\0")[2:],
    "memoryview of shorts": memoryview(b"\1\0\2\0").cast("h"),
    "numpy": np.array([1, 2], np.int16),
    "numpy, two dimensions": np.array([[1, 2], [0, 0]], np.int16)[:1],
    "numpy half": np.array([1, 2], np.int16).view(np.float16),
    "numpy record": np.array([(1, 2)], np.dtype([("a", "<i2"), ("b", "<i2")])),
    "numpy date": np.array([0x20001], "<i4").view("V4"),
    "ctypes": (ctypes.c_short * 2)(1, 2),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_any_contiguous_buffer(buffers, source):
    pages = buffers.PageList.of(source)
    assert pages.nbytes == 4
    assert pages.base.format == "B"
    assert pages.pieces.tolist() == [[0, 4]]
    assert pages.tobytes() == b"\1\0\2\0"


def test_of_shares_the_memory(buffers):
    array = np.zeros((3, 4), np.float32)
    pages = buffers.PageList.of(array)
    pages.copy_from(buffers.PageList.of(np.arange(12, dtype=np.float32)))
    assert array.tolist() == np.arange(12).reshape(3, 4).tolist()
    assert not pages.readonly
    assert buffers.PageList.of(b"x").readonly


@pytest.mark.parametrize("empty", [b"", bytearray(), np.empty((0, 3)), np.empty(0, np.uint8)], ids=repr)
def test_nothing_is_a_page_list_too(buffers, empty):
    pages = buffers.PageList.of(empty)
    assert (pages.nbytes, pages.tobytes(), pages.pieces.shape) == (0, b"", (0, 2))
    assert pages.slice(0, 0).nbytes == pages.merged().nbytes == 0
    assert pages.hash() == xxhash.xxh3_64_intdigest(b"")
    assert buffers.PageList.from_pieces(empty, []).nbytes == 0
    assert buffers.PageList.pages(empty, [], 8, 0).nbytes == 0


@pytest.mark.torch
def test_tensors_of_any_dtype(buffers):
    import torch

    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.float8_e4m3fn, torch.bool):
        tensor = torch.zeros(6, dtype=torch.float32).to(dtype).reshape(2, 3)
        pages = buffers.PageList.of(tensor)
        assert pages.nbytes == 6 * tensor.element_size()
        pages.slice(0, 1).copy_from(buffers.PageList.of(b"\1"))
        assert tensor.view(torch.uint8)[0, 0] == 1
    weights = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    assert buffers.PageList.of(weights).tobytes() == b"\x80\x3f" * 3
    assert buffers.PageList.of(torch.tensor(7, dtype=torch.int16)).tobytes() == b"\7\0"
    assert buffers.PageList.of(torch.empty(0)).nbytes == 0
    del tensor
    assert pages.tobytes()[:1] == b"\1"  # the list keeps the tensor's memory
    with pytest.raises(KVBufferError, match="not contiguous"):
        buffers.PageList.of(torch.zeros(4, 4).t())
    with pytest.raises(KVBufferError, match="on meta: stage it into host memory first"):
        buffers.PageList.of(torch.zeros(4, device="meta"))


def test_what_only_speaks_dlpack_is_taken(buffers):
    class Foreign:
        def __init__(self):
            self.array = np.arange(4, dtype=np.uint16)

        def __dlpack__(self, **options):
            return self.array.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    assert buffers.PageList.of(Foreign()).tobytes() == np.arange(4, dtype=np.uint16).tobytes()


def test_what_is_no_memory_is_refused(buffers):
    for wrong in ("text", 5, None, [1, 2]):
        with pytest.raises(KVBufferError, match="has no bytes to name"):
            buffers.PageList.of(wrong)
    for scattered in (np.zeros((4, 4))[:, :2], memoryview(bytes(8))[::2]):
        with pytest.raises(KVBufferError, match="not C-contiguous"):
            buffers.PageList.of(scattered)


def test_uniform_pages(buffers):
    base = bytes(range(100))
    pages = buffers.PageList.pages(base, [50, 0, 20], 10)
    assert pages.tobytes() == base[50:60] + base[:10] + base[20:30]
    cut = buffers.PageList.pages(base, np.array([50, 0, 95], np.uint32), 10, 25)
    assert cut.tobytes() == base[50:60] + base[:10] + base[95:100]
    assert cut.pieces.tolist() == [[50, 10], [0, 10], [95, 5]]


@pytest.mark.parametrize(
    ("offsets", "page_bytes", "nbytes", "reason"),
    [
        ([0, 10], 10, 21, "21 bytes do not fill 2 pages"),
        ([0, 10], 10, 10, "10 bytes do not fill 2 pages"),
        ([0], 10, 0, "0 bytes do not fill 1 pages"),
        ([], 10, 1, "1 bytes do not fill 0 pages"),
        ([0], 0, None, "at least 1 byte"),
        ([95], 10, None, "piece 0: offset 95, length 10 does not fit a base of 100 bytes"),
        ([-1], 10, None, "piece 0: offset -1"),
        ([0.5], 10, None, "must be integers"),
        (np.array([2**64 - 1], np.uint64), 10, None, "below 2^63"),
    ],
)
def test_pages_that_do_not_fit_are_refused(buffers, offsets, page_bytes, nbytes, reason):
    with pytest.raises(KVBufferError) as caught:
        buffers.PageList.pages(bytes(100), offsets, page_bytes, nbytes)
    assert reason in caught.value.message


def test_from_pieces(buffers):
    base = b"0123456789"
    pages = buffers.PageList.from_pieces(base, [(8, 2), (0, 0), (3, 1), (3, 4)])
    assert pages.tobytes() == b"8933456"
    assert pages.pieces.tolist() == [[8, 2], [3, 1], [3, 4]]
    assert buffers.PageList(base, ((0, 1), (2, 1))).tobytes() == b"02"
    for wrong in ([(0, 1, 2)], [1, 2], np.zeros((2, 2))):
        with pytest.raises(KVBufferError, match=r"expected shape|must be integers"):
            buffers.PageList.from_pieces(base, wrong)
    for offset, length in ((0, 11), (11, 0), (-1, 1), (1, -1), (2**63 - 1, 2**63 - 1)):
        with pytest.raises(KVBufferError, match=r"piece 1: .* does not fit a base of 10 bytes"):
            buffers.PageList.from_pieces(base, [(0, 1), (offset, length)])


def test_page_lists_do_not_change(buffers):
    given_pieces = np.array([[0, 2], [4, 2]], np.int64)
    pages = buffers.PageList(b"abcdef", given_pieces)
    given_pieces[0, 0] = 5
    assert pages.tobytes() == b"abef"
    for some in (pages, pages.slice(0, 3), pages.slice(0, 1), buffers.PageList.of(b"xyz")):
        with pytest.raises(ValueError, match="read-only"):
            some.pieces[0, 0] = 1
    for name in ("base", "pieces", "nbytes", "other"):
        with pytest.raises(AttributeError):
            setattr(pages, name, None)


def test_repr_says_the_shape(buffers):
    assert repr(buffers.PageList(b"abcdef", [(0, 2), (4, 2)])) == "PageList(4 bytes in 2 pieces of 6)"


# ---- using them ----


@st.composite
def lists(draw, buffers):
    base = draw(st.binary(max_size=120))
    edges = draw(st.lists(st.tuples(st.integers(0, len(base)), st.integers(0, len(base))), max_size=12))
    pieces = [(min(a, b), abs(a - b)) for a, b in edges]
    return buffers.PageList.from_pieces(base, pieces), b"".join(base[o : o + n] for o, n in pieces)


@BOTH
@given(st.data())
@settings(max_examples=60, deadline=None)
def test_slices_and_merges_equal_bytes(buffers, data):
    pages, whole = data.draw(lists(buffers))
    assert pages.nbytes == len(whole)
    assert pages.tobytes() == concat(pages) == whole
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    part = pages.slice(start, stop)
    assert part.tobytes() == concat(part) == whole[start:stop]
    assert part.pieces.size == 0 or part.pieces[:, 1].min() > 0
    inner = data.draw(st.integers(0, stop - start))
    assert part.slice(inner, stop - start).tobytes() == whole[start + inner : stop]
    merged = part.merged()
    assert concat(merged) == whole[start:stop]
    ends = merged.pieces[:-1].sum(axis=1)
    assert not (ends == merged.pieces[1:, 0]).any()
    assert part.hash(9) == xxhash.xxh3_64_intdigest(whole[start:stop], 9)


@BOTH
@given(st.data())
@settings(max_examples=40, deadline=None)
def test_copies_between_lists(buffers, data):
    source, whole = data.draw(lists(buffers))
    page_bytes = data.draw(st.integers(1, 30))
    count = -(-len(whole) // page_bytes)
    order = data.draw(st.permutations(range(count)))
    target = buffers.PageList.pages(bytearray(count * page_bytes), np.array(order) * page_bytes, page_bytes, len(whole))
    target.copy_from(source)
    assert target.tobytes() == whole
    again = buffers.PageList.of(bytearray(len(whole)))
    target.copy_to(again)
    assert again.tobytes() == whole


def test_slices_outside_are_refused(buffers):
    for pages in (buffers.PageList.of(b"abcdef"), buffers.PageList(b"abcdef", [(0, 2), (2, 2), (4, 2)])):
        for start, stop in ((-1, 2), (3, 2), (0, 7), (7, 7)):
            with pytest.raises(KVBufferError, match=f"bytes {start} to {stop} of a page list of 6"):
                pages.slice(start, stop)


def test_merging_keeps_order(buffers):
    pages = buffers.PageList(bytes(range(40)), [(0, 4), (4, 4), (20, 4), (16, 4), (20, 1), (21, 3)])
    assert pages.merged().pieces.tolist() == [[0, 8], [20, 4], [16, 8]]
    apart = buffers.PageList(bytes(40), [(0, 4), (5, 4)])
    assert apart.merged() is apart
    assert buffers.PageList(bytes(40), [(0, 4), (4, 4)]).merged().pieces.tolist() == [[0, 8]]


def test_copies_that_do_not_fit_are_refused(buffers):
    target = buffers.PageList.of(bytearray(4))
    with pytest.raises(KVBufferError, match="cannot copy 5 bytes into a page list of 4"):
        target.copy_from(buffers.PageList.of(b"12345"))
    with pytest.raises(KVBufferError, match="read-only"):
        buffers.PageList.of(b"1234").copy_from(target)
    with pytest.raises(KVBufferError, match="read-only"):
        target.copy_to(buffers.PageList.of(b"1234"))


@pytest.mark.parametrize("nbytes", [0, 1, 1 << 20, (1 << 20) + 1, (5 << 20) - 3])
def test_scratch_and_zeros_have_any_length(buffers, nbytes):
    scratch, zeros = buffers.PageList.scratch(nbytes), buffers.PageList.zeros(nbytes)
    assert scratch.nbytes == zeros.nbytes == nbytes == len(scratch.tobytes())
    assert len(scratch.base) == len(zeros.base) == 1 << 20
    assert not scratch.readonly
    assert zeros.readonly
    if nbytes:
        scratch.copy_from(buffers.PageList.of(b"\xff" * nbytes))
        assert buffers.PageList.scratch(1).tobytes() == b"\xff"  # shared
    assert zeros.tobytes() == bytes(nbytes)  # and never what was drained
    with pytest.raises(KVBufferError, match="-1 bytes"):
        buffers.PageList.scratch(-1)


def test_a_page_list_travels(buffers):
    import socket

    left, right = socket.socketpair()
    with left, right:
        source = buffers.PageList.pages(np.random.default_rng(1).bytes(50 * 300), np.arange(0, 15000, 600), 300)
        target = buffers.PageList.pages(bytearray(50 * 300), np.arange(14400, -1, -600), 300)
        sent = buffers.send_pages(left, b"head", source.base, source.pieces, 0)
        assert sent == 4 + source.nbytes
        assert right.recv(4) == b"head"
        assert buffers.recv_pages(right, target.base, target.pieces, 0) == target.nbytes
        assert target.hash(3) == source.hash(3)
        hasher = buffers.Hasher(3)
        for start in range(0, source.nbytes, 1000):
            hasher.update_pages(target.base, target.pieces, start, min(start + 1000, target.nbytes))
        assert hasher.intdigest() == source.hash(3)
