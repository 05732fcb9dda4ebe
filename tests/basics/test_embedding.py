import numpy as np
import pytest

from minideepseek.autograd.shapes import ShapeError
from minideepseek.basics.embedding import embedding, embedding_backward, embedding_forward


def test_rows_are_looked_up():
    E = np.arange(6.0).reshape(3, 2)
    y, _ = embedding_forward(np.array([[2, 0], [2, 1]]), E)
    assert y.tolist() == [[[4, 5], [0, 1]], [[4, 5], [2, 3]]]


def test_repeated_ids_add_and_absent_ones_get_zero():
    ids = np.array([1, 0, 1, 1])
    _, cache = embedding_forward(ids, np.zeros((3, 1)))
    dids, dE = embedding_backward(np.array([[1.0], [10.0], [100.0], [1000.0]]), cache)
    assert dids is None and dE.ravel().tolist() == [10, 1101, 0]


def test_equal_to_a_scatter_add_in_both_precisions_and_every_integer_type():
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        for kind in (np.int16, np.int32, np.int64, np.uint8):
            ids, dy = rng.integers(0, 7, (3, 50)).astype(kind), rng.standard_normal((3, 50, 4)).astype(dtype)
            _, cache = embedding_forward(ids, np.zeros((7, 4), dtype))
            expected = np.zeros((7, 4), dtype)
            np.add.at(expected, ids, dy)
            _, dE = embedding_backward(dy, cache)
            assert dE.dtype == dtype
            np.testing.assert_allclose(dE, expected, rtol=1e-5, atol=1e-5)


def test_the_output_is_a_copy_of_the_table():
    E = np.zeros((3, 2))
    y, _ = embedding_forward(np.array([0]), E)
    y += 1
    assert not E.any()


def test_an_id_out_of_range_is_named_with_its_place():
    with pytest.raises(ShapeError, match=r"embedding: ids\[0, 2\] = 3 is not in 0 .. 2"):
        embedding(np.array([[0, 1, 3]]), np.zeros((3, 2)))
