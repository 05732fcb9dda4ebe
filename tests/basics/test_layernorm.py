import numpy as np

from minideepseek.basics.layernorm import layernorm_backward, layernorm_forward

rng = np.random.default_rng(0)
x, g, b = rng.standard_normal((3, 8)), rng.standard_normal(8), rng.standard_normal(8)


def test_by_hand():
    y, _ = layernorm_forward(np.array([[1.0, 3.0]]), np.array([1.0, 2.0]), np.array([0.0, 10.0]), eps=0.0)
    assert y.tolist() == [[-1, 12]]


def test_mean_zero_variance_one():
    y, _ = layernorm_forward(3 * x + 7, np.ones(8), np.zeros(8), eps=0.0)
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-14)
    np.testing.assert_allclose(y.var(-1), 1, rtol=1e-13)


def test_a_constant_vector_gives_the_bias():
    y, _ = layernorm_forward(np.full((1, 8), 5.0), g, b)
    assert (y == b).all()


def test_the_gradient_has_no_mean_and_no_part_along_x_hat():
    y, cache = layernorm_forward(x, g, b, eps=0.0)
    dx, _, _ = layernorm_backward(rng.standard_normal(x.shape), cache)
    np.testing.assert_allclose(dx.sum(-1), 0, atol=1e-13)
    np.testing.assert_allclose((dx * x).sum(-1), 0, atol=1e-13)
