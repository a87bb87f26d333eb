"""Pages: allocation, accounting, page lists."""

import numpy as np
import pytest

from kvpool.arena import BlockClass, PageArena, Slabs
from kvpool.errors import PoolFullError, SlabError
from kvtransport.buffers import Arena, PageList
from kvtransport.errors import ConfigError

PAGE = 256


@pytest.fixture
def arena():
    return PageArena(Arena(64 * PAGE, lock="off", cuda="off", huge="off"), PAGE)


def test_allocation_is_accounted_by_class(arena):
    a = arena.allocate(PAGE * 3 + 1, BlockClass.PREFIX)
    b = arena.allocate(5, BlockClass.STATE)
    assert (len(a.pages), len(b.pages)) == (4, 1)
    assert a.pages.dtype == np.int32
    assert arena.bytes_of(BlockClass.PREFIX) == 4 * PAGE
    assert arena.bytes_of(BlockClass.STATE) == PAGE
    assert arena.used_bytes == 5 * PAGE
    arena.free(a)
    arena.free(b)
    assert arena.used_bytes == 0
    assert arena.free_pages == 64
    assert arena.bytes_of(BlockClass.PREFIX) == 0


def test_too_much_changes_nothing(arena):
    arena.allocate(60 * PAGE, BlockClass.PREFIX)
    with pytest.raises(PoolFullError, match="asked for 5 pages of 256 bytes, 4 of 64"):
        arena.allocate_many([PAGE, 4 * PAGE], BlockClass.STATE)
    assert arena.free_pages == 4
    assert arena.bytes_of(BlockClass.STATE) == 0
    arena.allocate(4 * PAGE, BlockClass.STATE)
    with pytest.raises(SlabError, match="-1 bytes"):
        arena.allocate(-1, BlockClass.STATE)


def test_double_free_and_use_after_free(arena):
    a, b = arena.allocate_many([PAGE, PAGE], BlockClass.PREFIX)
    arena.free(a)
    with pytest.raises(SlabError, match="freed twice"):
        arena.free(a)
    with pytest.raises(SlabError, match="freed twice"):
        arena.free_many([b, a])
    with pytest.raises(SlabError, match="freed twice"):
        arena.free_many([b, b])
    assert arena.is_live(b)
    with pytest.raises(SlabError, match="after it was freed"):
        arena.pages(a)
    again = arena.allocate(64 * PAGE - PAGE, BlockClass.PREFIX)  # the same page in another generation
    assert again.generation > a.generation
    with pytest.raises(SlabError, match="freed twice"):
        arena.free(a)
    assert arena.free_pages == 0


def test_fresh_slabs_are_contiguous(arena):
    slab = arena.allocate(10 * PAGE - 3, BlockClass.PREFIX)
    pages = arena.pages(slab)
    assert len(pages.pieces) == 1
    assert pages.nbytes == 10 * PAGE - 3


def test_rows_are_slabs_of_one_size(arena):
    rows = arena.allocate_rows(5, 2 * PAGE + 1, BlockClass.PREFIX)
    other = arena.allocate_rows(3, 2 * PAGE + 1, BlockClass.PREFIX)
    assert (len(rows), rows.page_count, rows.pages.shape) == (5, 15, (5, 3))
    assert arena.bytes_of(BlockClass.PREFIX) == 24 * PAGE
    assert all(arena.is_live(rows[i]) for i in range(5))
    assert rows[2].page_count == 3
    assert (arena.stack(rows) == rows.pages).all()
    some = rows.take(np.array([True, False, True, False, False]))
    arena.free_many([some, other[1]])
    assert arena.bytes_of(BlockClass.PREFIX) == 15 * PAGE
    with pytest.raises(SlabError, match="freed twice"):
        arena.free_many([rows])
    with pytest.raises(SlabError, match="freed twice"):
        arena.free_many([other])
    arena.free_many([rows.take(np.array([1, 3, 4])), other[0], other[2], rows.take(slice(0, 0))])
    assert arena.free_pages == arena.total_pages
    assert not arena.page_generation.any()


def test_rows_that_cannot_be(arena):
    with pytest.raises(PoolFullError, match="asked for 66 pages"):
        arena.allocate_rows(22, 3 * PAGE, BlockClass.STATE)
    for count, nbytes in ((-1, 5), (1, -5)):
        with pytest.raises(SlabError):
            arena.allocate_rows(count, nbytes, BlockClass.STATE)
    assert len(arena.allocate_rows(0, PAGE, BlockClass.STATE)) == 0
    assert arena.free_pages == arena.total_pages


def test_rows_and_slabs_one_by_one_are_the_same(arena):
    rows = arena.allocate_rows(4, 2 * PAGE, BlockClass.STATE)
    again = Slabs.of([rows[i] for i in range(4)])
    assert (again.pages == rows.pages).all()
    assert (again.generation == rows.generation).all()
    assert (again.nbytes, again.kind) == (rows.nbytes, rows.kind)
    arena.free_many([again])
    assert arena.free_pages == arena.total_pages


def test_page_lists_of_scattered_slabs(arena):
    keep = [arena.allocate(PAGE, BlockClass.PREFIX) for _ in range(64)]
    order = np.random.default_rng(3).permutation(64)
    for i in order[:40].tolist():
        arena.free(keep[i])
    slabs = arena.allocate_many([3 * PAGE + 17] * 8, BlockClass.PREFIX)
    data = np.random.default_rng(4).integers(0, 256, (8, 3 * PAGE + 17), np.uint8)
    for slab, row in zip(slabs, data, strict=True):
        arena.pages(slab).copy_from(PageList.of(row.tobytes()))
    for offset, nbytes in [(0, 1), (0, 3 * PAGE + 17), (PAGE - 1, 2), (PAGE, PAGE), (5, 2 * PAGE), (3 * PAGE, 17)]:
        got = arena.pages_of_blocks(slabs, offset, nbytes).tobytes()
        assert got == data[:, offset : offset + nbytes].tobytes()
        assert arena.pages(slabs[2], offset, offset + nbytes).tobytes() == data[2, offset : offset + nbytes].tobytes()
    assert arena.pages_of_blocks([], 0, 10).nbytes == 0
    with pytest.raises(SlabError, match="not inside"):
        arena.pages_of_blocks(slabs, 3 * PAGE, 2 * PAGE)
    with pytest.raises(SlabError, match="not inside"):
        arena.pages(slabs[0], 0, 3 * PAGE + 18)


def test_bad_page_sizes():
    memory = Arena(4096, lock="off", cuda="off", huge="off")
    for bad in (0, 63, 100, -64):
        with pytest.raises(ConfigError, match="multiple of 64"):
            PageArena(memory, bad)
    with pytest.raises(ConfigError, match="0 pages"):
        PageArena(memory, 8192)
