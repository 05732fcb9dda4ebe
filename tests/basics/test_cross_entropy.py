import math

import numpy as np
import pytest

from minideepseek.autograd.shapes import ShapeError
from minideepseek.autograd.tape import Tape, Tensor
from minideepseek.basics.cross_entropy import cross_entropy, cross_entropy_backward, cross_entropy_forward

rng = np.random.default_rng(0)


def test_by_hand():
    loss, cache = cross_entropy_forward(np.log([[1.0, 2.0, 5.0]]), np.array([2]))
    assert loss == pytest.approx(-math.log(5 / 8), rel=1e-15)
    dlogits, dtargets = cross_entropy_backward(np.array(1.0), cache)
    np.testing.assert_allclose(dlogits, [[1 / 8, 2 / 8, 5 / 8 - 1]], rtol=1e-14)
    assert dtargets is None


def test_the_mean_is_over_valid_targets_only():
    logits = rng.standard_normal((4, 5))
    targets = np.array([1, -100, 3, -100])
    loss, cache = cross_entropy_forward(logits, targets)
    assert loss == pytest.approx(float(cross_entropy_forward(logits[::2], targets[::2])[0]), rel=1e-15)
    dlogits, _ = cross_entropy_backward(np.array(1.0), cache)
    assert not dlogits[1::2].any() and dlogits[::2].all()


def test_without_a_valid_target_loss_and_gradient_are_zero():
    loss, cache = cross_entropy_forward(rng.standard_normal((2, 5)), np.array([-100, -100]))
    assert loss == 0 and not cross_entropy_backward(np.array(1.0), cache)[0].any()


def test_each_row_of_the_gradient_sums_to_zero():
    _, cache = cross_entropy_forward(rng.standard_normal((2, 3, 5)), rng.integers(0, 5, (2, 3)))
    np.testing.assert_allclose(cross_entropy_backward(np.array(1.0), cache)[0].sum(-1), 0, atol=1e-16)


def test_a_confident_wrong_answer_costs_much_but_not_infinity():
    loss, cache = cross_entropy_forward(np.array([[1000.0, 0.0]]), np.array([1]))
    assert loss == 1000 and cross_entropy_backward(np.array(1.0), cache)[0].tolist() == [[1, -1]]


@pytest.mark.parametrize("targets, message", [
    (np.array([0, 5]), r"targets\[1\] = 5 is not in 0 .. 4"),
    (np.array([-1, 0]), r"targets\[0\] = -1 is not in 0 .. 4"),
])
def test_targets_out_of_range(targets, message):
    with pytest.raises(ShapeError, match=message):
        cross_entropy(np.zeros((2, 5)), targets)


def test_targets_of_the_wrong_kind_or_shape():
    with pytest.raises(TypeError, match="targets has dtype float64"):
        cross_entropy(np.zeros((2, 5)), np.zeros(2))
    with pytest.raises(ShapeError):
        cross_entropy(np.zeros((2, 5)), np.zeros(3, int))


def test_on_the_tape_in_float32():
    logits = Tensor(rng.standard_normal((2, 5)).astype(np.float32))
    with Tape() as tape:
        loss = cross_entropy(logits, np.array([1, 2]))
    tape.backward(loss)
    assert loss.data.dtype == logits.grad.dtype == np.float32
