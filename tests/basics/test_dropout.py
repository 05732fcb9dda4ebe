import numpy as np
import pytest

from minideepseek.autograd.shapes import ShapeError
from minideepseek.basics.dropout import dropout, dropout_backward, dropout_forward, dropout_mask


def test_by_hand():
    mask = np.array([True, False, True])
    y, cache = dropout_forward(np.array([1.0, 2.0, 3.0]), mask=mask, p=0.5)
    assert y.tolist() == [2, 0, 6]
    assert dropout_backward(np.array([10.0, 10.0, 10.0]), cache).tolist() == [20, 0, 20]


def test_p_zero_changes_nothing():
    x = np.array([1.0, 2.0])
    assert (dropout_forward(x, mask=dropout_mask(x.shape, 0.0, np.random.default_rng(0)), p=0.0)[0] == x).all()


def test_what_is_dropped_is_gone_even_when_it_is_infinite():
    y, _ = dropout_forward(np.array([np.inf, 1.0]), mask=np.array([False, True]), p=0.5)
    assert y.tolist() == [0, 2]


def test_the_mask_repeats_with_its_seed_and_has_the_right_share():
    a, b = [dropout_mask((1000, 1000), 0.3, np.random.default_rng(7)) for _ in range(2)]
    assert (a == b).all() and a.dtype == bool
    assert abs(a.mean() - 0.7) < 5 * np.sqrt(0.3 * 0.7 / a.size)


@pytest.mark.parametrize("p", (-0.1, 1.0, 1.5, float("nan")))
def test_p_out_of_range(p):
    with pytest.raises(ValueError, match=f"p = {p} is not in"):
        dropout_mask((2,), p, np.random.default_rng(0))


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ShapeError, match="dropout: mask has"):
        dropout(np.ones((2, 3)), mask=np.ones(3, bool), p=0.5)
