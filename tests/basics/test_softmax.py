import numpy as np
import pytest

from minideepseek.basics.softmax import log_softmax_forward, softmax_backward, softmax_forward

z = np.random.default_rng(0).standard_normal((3, 5))


def test_by_hand():
    np.testing.assert_allclose(softmax_forward(np.log([1.0, 2.0, 5.0]))[0], [1 / 8, 2 / 8, 5 / 8], rtol=1e-15)
    np.testing.assert_allclose(log_softmax_forward(np.log([1.0, 2.0, 5.0]))[0], np.log([1 / 8, 2 / 8, 5 / 8]), rtol=1e-15)


def test_rows_sum_to_one_and_a_common_shift_changes_nothing():
    p, _ = softmax_forward(z)
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-15)
    np.testing.assert_allclose(softmax_forward(z + 100)[0], p, rtol=1e-13)


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_scores_that_overflow_a_plain_exponential(dtype):
    wild = np.array([1e4, 0.0, -1e4], dtype)
    with np.errstate(over="raise", invalid="raise"):
        assert softmax_forward(wild)[0].tolist() == [1, 0, 0]
        assert log_softmax_forward(wild)[0].tolist() == [0, -1e4, -2e4]


def test_a_masked_score_gets_probability_and_gradient_zero():
    p, cache = softmax_forward(np.array([0.0, -np.inf, 0.0]))
    assert p.tolist() == [0.5, 0, 0.5]
    assert softmax_backward(np.array([1.0, 100.0, 3.0]), cache).tolist() == [-0.5, 0, 0.5]


def test_the_gradient_of_a_row_sums_to_zero():
    _, cache = softmax_forward(z)
    dz = softmax_backward(np.random.default_rng(1).standard_normal(z.shape), cache)
    np.testing.assert_allclose(dz.sum(-1), 0, atol=1e-15)


def test_log_softmax_is_the_logarithm_of_softmax():
    np.testing.assert_allclose(log_softmax_forward(z)[0], np.log(softmax_forward(z)[0]), rtol=1e-13)
