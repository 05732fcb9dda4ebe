import numpy as np
import pytest

from minideepseek.autograd.shapes import ShapeError
from minideepseek.basics.residual import add, add_backward, add_forward


def test_by_hand():
    y, _ = add_forward(np.array([1.0, 2.0]), np.array([10.0, 20.0]))
    assert y.tolist() == [11, 22]


def test_both_roads_get_their_own_copy():
    dy = np.array([1.0, 2.0])
    dx, dr = add_backward(dy, None)
    dx += 100
    assert dr.tolist() == [1, 2] and dy.tolist() == [1, 2]


def test_no_silent_broadcast():
    with pytest.raises(ShapeError, match="add: r has"):
        add(np.ones((2, 3)), np.ones(3))
