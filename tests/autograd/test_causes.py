"""Each cause is recognised when it is there, and not when it is not."""
import numpy as np
import pytest

from minideepseek.autograd.causes import UNKNOWN, likely_cause

rng = np.random.default_rng(0)
x, W, dy = rng.standard_normal((4, 3)), rng.standard_normal((3, 3)), rng.standard_normal((4, 3))
dx, dW, db = dy @ W.T, x.T @ dy, dy.sum(axis=0)
names, args, numerics = ("x", "W", "b"), (x, W, np.zeros(3)), {0: dx, 1: dW, 2: db}


@pytest.mark.parametrize("position, wrong, expected", [
    (1, np.zeros_like(dW), "it is zero"),
    (1, -dW, "wrong sign"),
    (1, 2 * dW, "looks 2 times too large"),
    (1, dW / 4, "x has 4 entries along axis 0"),
    (1, -3.5 * dW, "wrong sign, and looks 3.5 times too large"),
    (1, dW.T, "transposed"),
    (0, dx.T, "transposed"),
    (2, dy, "a sum over the leading axis is missing"),
    (2, np.broadcast_to(dy, (2, 4, 3)) / 2, "a sum over the 2 leading axes is missing"),
    (1, rng.standard_normal((3, 3)), UNKNOWN),
    (1, dW + 0.01, UNKNOWN),
    (1, np.full_like(dW, np.nan), UNKNOWN),
])
def test_a_single_gradient(position, wrong, expected):
    gradients = [dx, dW, db]
    gradients[position] = wrong
    assert expected in likely_cause(position, gradients, numerics, args, names)


def test_a_missing_sum_over_a_kept_axis():
    assert "axis 0 is missing" in likely_cause(0, [dy], {0: dy.sum(axis=0, keepdims=True)}, (np.zeros((1, 3)),), ("b",))


def test_axes_of_a_stack_permuted():
    stack = rng.standard_normal((2, 3, 4))
    assert "permuted" in likely_cause(0, [stack.transpose(0, 2, 1)], {0: stack}, (stack,), ("W",))


def test_two_gradients_swapped_or_one_of_them_twice():
    a, b = rng.standard_normal((2, 3)), rng.standard_normal((2, 3))
    assert "of a and b are swapped" in likely_cause(0, [b, a], {0: a, 1: b}, (a, b), ("a", "b"))
    assert "this is the gradient of b" in likely_cause(0, [b, b], {0: a, 1: b}, (a, b), ("a", "b"))


def test_a_scatter_that_loses_duplicates():
    ids, dy = np.array([1, 0, 1]), rng.standard_normal((3, 2))
    right, lost = np.zeros((4, 2)), np.zeros((4, 2))
    np.add.at(right, ids, dy)
    lost[ids] += dy
    cause = likely_cause(1, [None, lost], {1: right}, (ids, right), ("ids", "E"))
    assert "occur more than once in ids" in cause


def test_no_numeric_gradient_no_guess():
    assert likely_cause(0, [dx], {}, args, names) == UNKNOWN
