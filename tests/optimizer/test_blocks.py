"""A flat range of a matrix as rectangles: nothing missing, nothing twice, at most three of them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.optimizer.owned import blocks


@st.composite
def ranges(draw):
    shape = draw(st.one_of(st.tuples(st.integers(1, 12)), st.tuples(st.integers(1, 7), st.integers(1, 7))))
    size = int(np.prod(shape))
    start, end = sorted((draw(st.integers(0, size)), draw(st.integers(0, size))))
    return shape, start, end


@given(ranges())
def test_blocks_cover_a_range_exactly(drawn):
    shape, start, end = drawn
    elements = np.arange(np.prod(shape)).reshape(shape[0], -1)
    owned = elements.reshape(-1)[start:end]
    found = list(blocks(start, end, shape))
    assert [offset for offset, *_ in found] == [sum(b[1] for b in found[:i]) for i in range(len(found))]
    assert sum(length for _, length, *_ in found) == end - start
    for offset, length, rows, columns in found:
        rectangle = elements[rows, columns]
        assert rectangle.shape == (rows.stop - rows.start, columns.stop - columns.start)
        assert np.array_equal(owned[offset : offset + length].reshape(rectangle.shape), rectangle)
    assert len(found) <= (3 if len(shape) == 2 else 1)


def test_the_middle_of_one_row_is_one_block():
    assert list(blocks(11, 13, (4, 5))) == [(0, 2, slice(2, 3), slice(1, 3))]


def test_a_range_across_rows_is_a_tail_full_rows_and_a_head():
    assert list(blocks(3, 17, (4, 5))) == [
        (0, 2, slice(0, 1), slice(3, 5)),
        (2, 10, slice(1, 3), slice(0, 5)),
        (12, 2, slice(3, 4), slice(0, 2)),
    ]
