"""Linear: a matrix product, and the two products of its backward.

Derivation: whiteboard/basics/linear.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import numpy as np

from minideepseek.autograd.gradcheck import report
from minideepseek.autograd.tape import op


def matmul(A, B, *, role):
    """The default `gemm`: A @ B at full precision. role: forward | dx | dW, which a quantised gemm tells apart."""
    return A @ B


def linear_forward(x, W, *, gemm=matmul):
    """Multiply every vector by a matrix: y = x W.

    x: (..., D)   W: (D, F)   ->   y: (..., F)

    gemm: does the three matrix products, gemm(A, B, role="forward" | "dx" | "dW"); FP8 enters here.
    """
    D, F = W.shape
    y = gemm(x.reshape(-1, D), W, role="forward").reshape(*x.shape[:-1], F)     # (..., F)   # eq. 1
    return y, (x, W, gemm)


def linear_backward(dy, cache):
    """Each product of the backward contracts another axis: dx over F, dW over the tokens."""
    x, W, gemm = cache
    D, F = W.shape
    x2d, dy2d = x.reshape(-1, D), dy.reshape(-1, F)                             # all leading axes become tokens
    dx = gemm(dy2d, W.T, role="dx").reshape(x.shape)                            # (..., D)   # eq. 2
    dW = gemm(x2d.T, dy2d, role="dW")                                           # (D, F)     # eq. 3
    return dx, dW


linear = op(linear_forward, linear_backward)


def linear_examples(rng):
    return {
        "tokens": ((rng.standard_normal((5, 4)), rng.standard_normal((4, 3))), {}),
        "batch": ((rng.standard_normal((2, 5, 4)), rng.standard_normal((4, 3))), {}),
        "one vector": ((rng.standard_normal(4), rng.standard_normal((4, 3))), {}),
    }


def demo():
    """Two tokens by hand, the gradients, and the three products as the gemm door sees them."""
    x, W = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.0, 0.0, -1.0], [0.0, 1.0, 1.0]])
    y, cache = linear_forward(x, W)
    print("shapes    x (2, 2) @ W (2, 3) -> y (2, 3)")
    print("by hand   y =", *y)
    report(linear_forward, linear_backward, linear_examples)

    seen = []

    def spy(A, B, *, role):
        seen.append(f"{role} {A.shape} @ {B.shape}")
        return A @ B

    x, W = np.ones((2, 5, 4)), np.ones((4, 3))
    y, cache = linear_forward(x, W, gemm=spy)
    linear_backward(y, cache)
    print("claim     one linear layer is three products:", ", ".join(seen))
    assert seen == ["forward (10, 4) @ (4, 3)", "dx (10, 3) @ (3, 4)", "dW (4, 10) @ (10, 3)"]


if __name__ == "__main__":
    from minideepseek.basics.linear import demo  # the imported copy, so that every name exists once
    demo()
