"""Arrays that grow in place."""

import numpy as np
import pytest

from kvpool.columns import Column


@pytest.mark.parametrize(("dtype", "shape"), [("int32", ()), ("bool", (3,)), ("int64", (2, 5)), ("int32", (0,))])
def test_rows_stay_and_new_ones_are_zero(dtype, shape):
    column = Column(dtype, shape)
    want = np.zeros((0, *shape), dtype)
    rng = np.random.default_rng(1)
    for capacity in (1, 64, 63, 5_000, 100_000, 100_001, 300_000):
        column.grow(capacity)
        assert len(column.rows) >= capacity
        assert column.rows.dtype == dtype
        assert (column.rows[: len(want)] == want).all()
        assert not column.rows[len(want) :].any()
        want = rng.integers(0, 2, (capacity, *shape)).astype(dtype)
        column.rows[:capacity] = want
        want = column.rows.copy()


def test_a_view_that_is_kept_is_noticed():
    column = Column("int64")
    column.grow(100_000)
    column.rows[:] = 7
    view = column.rows[5:]
    with pytest.raises(BufferError):
        column.grow(200_000)
    assert len(column.rows) == 100_000
    assert (column.rows == 7).all()
    del view
    column.grow(200_000)
    assert (column.rows[:100_000] == 7).all()
    assert not column.rows[100_000:].any()


def test_memory_that_does_not_exist_leaves_the_rows():
    column = Column("int64")
    column.grow(100_000)
    column.rows[-1] = 9
    with pytest.raises((MemoryError, OSError)):
        column.grow(1 << 55)
    assert (len(column.rows), column.rows[-1]) == (100_000, 9)
