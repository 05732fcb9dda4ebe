import numpy as np

from minideepseek.basics.rmsnorm import rmsnorm_backward, rmsnorm_forward

rng = np.random.default_rng(0)


def test_by_hand():
    y, _ = rmsnorm_forward(np.array([[1.0, 7.0]]), np.array([1.0, 2.0]), eps=0.0)
    np.testing.assert_allclose(y, [[0.2, 2.8]], rtol=1e-15)


def test_the_mean_square_is_one():
    y, _ = rmsnorm_forward(5 * rng.standard_normal((3, 8)), np.ones(8), eps=0.0)
    np.testing.assert_allclose(np.mean(y * y, axis=-1), 1, rtol=1e-14)


def test_eps_sits_under_the_root():
    y, _ = rmsnorm_forward(np.zeros((1, 4)), np.ones(4))
    assert (y == 0).all()
    y, _ = rmsnorm_forward(np.full((1, 4), 3.0), np.ones(4), eps=7.0)
    np.testing.assert_allclose(y, 3 / 4, rtol=1e-15)


def test_the_gradient_is_at_a_right_angle_to_the_input():
    x, g = rng.standard_normal((3, 8)), rng.standard_normal(8)
    y, cache = rmsnorm_forward(x, g, eps=0.0)
    dx, _ = rmsnorm_backward(rng.standard_normal(x.shape), cache)
    np.testing.assert_allclose(np.sum(x * dx, axis=-1), 0, atol=1e-14)


def test_tokens_do_not_mix():
    x, g = rng.standard_normal((3, 8)), rng.standard_normal(8)
    whole = rmsnorm_forward(x, g)[0]
    assert (rmsnorm_forward(x[1:2], g)[0] == whole[1:2]).all()
