import numpy as np
import pytest

from minideepseek.autograd.shapes import ShapeError
from minideepseek.basics.linear import linear, linear_backward, linear_forward

rng = np.random.default_rng(0)


def test_by_hand():
    y, cache = linear_forward(np.array([[1.0, 2.0]]), np.array([[3.0, 0.0], [0.0, 5.0]]))
    assert y.tolist() == [[3, 10]]
    dx, dW = linear_backward(np.array([[1.0, 10.0]]), cache)
    assert dx.tolist() == [[3, 50]] and dW.tolist() == [[1, 10], [2, 20]]


def test_leading_axes_are_tokens_like_any_other():
    x, W = rng.standard_normal((2, 3, 4)), rng.standard_normal((4, 5))
    y, cache = linear_forward(x, W)
    flat, flat_cache = linear_forward(x.reshape(6, 4), W)
    assert (y.reshape(6, 5) == flat).all()
    dy = rng.standard_normal(y.shape)
    assert (linear_backward(dy, cache)[1] == linear_backward(dy.reshape(6, 5), flat_cache)[1]).all()


def test_the_gemm_does_all_three_products_on_two_axes_with_their_roles():
    """FP8 scales each product along its own contraction axis: it must see which one it does, and only matrices."""
    seen = {}

    def gemm(A, B, *, role):
        seen[role] = (A.shape, B.shape)
        return A @ B

    y, cache = linear_forward(np.ones((2, 3, 4)), np.ones((4, 5)), gemm=gemm)
    linear_backward(y, cache)
    assert seen == {"forward": ((6, 4), (4, 5)), "dx": ((6, 5), (5, 4)), "dW": ((4, 6), (6, 5))}


def test_a_transposed_weight_is_refused():
    with pytest.raises(ShapeError, match="linear: W has D = 5"):
        linear(np.ones((2, 4)), np.ones((5, 4)))
