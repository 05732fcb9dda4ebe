"""RMSNorm: rescale each vector to root-mean-square 1, then by a learned gain.

Derivation: whiteboard/basics/rmsnorm.md     Source: Zhang & Sennrich 2019, arXiv:1910.07467
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import numpy as np

from minideepseek.autograd.gradcheck import report
from minideepseek.autograd.tape import op


def rmsnorm_forward(x, g, *, eps=1e-6):
    """Divide each vector by its root mean square, multiply by the gain: y = g x / sqrt(mean(x^2) + eps).

    x: (..., D)   g: (D,)   ->   y: (..., D)

    eps: keeps a vector of zeros finite; 1e-6 in every released DeepSeek model.
    """
    r = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)                               # (..., 1)   # eq. 1
    x_hat = x / r                                                                           # (..., D)   # eq. 2
    y = g * x_hat                                                                           # (..., D)   # eq. 3
    return y, (g, r, x_hat)


def rmsnorm_backward(dy, cache):
    """Read the forward from the bottom up: the gain, then the division, whose r depends on every x."""
    g, r, x_hat = cache
    dg = (dy * x_hat).reshape(-1, g.size).sum(axis=0)                                       # (D,)       # eq. 4
    dx_hat = dy * g                                                                         # (..., D)   # eq. 5
    dx = (dx_hat - x_hat * np.mean(dx_hat * x_hat, axis=-1, keepdims=True)) / r             # (..., D)   # eq. 6
    return dx, dg


rmsnorm = op(rmsnorm_forward, rmsnorm_backward)


def rmsnorm_examples(rng):
    return {
        "tokens": ((rng.standard_normal((3, 4)), rng.standard_normal(4)), {}),
        "batch": ((rng.standard_normal((2, 3, 5)), rng.standard_normal(5)), {}),
        "large eps": ((rng.standard_normal((3, 4)), rng.standard_normal(4)), {"eps": 0.5}),
    }


def demo():
    """Normalise (3, 4) by hand, check the gradients, and show that the output forgets the input's scale."""
    y, cache = rmsnorm_forward(np.array([[3.0, 4.0]]), np.array([1.0, 2.0]))
    print("shapes    x (1, 2), g (2,) -> y (1, 2)")
    print("by hand   rms of (3, 4) is sqrt(12.5) = 3.5355; y = (1 * 3, 2 * 4) / 3.5355 =", y[0].round(4))
    report(rmsnorm_forward, rmsnorm_backward, rmsnorm_examples)

    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((8, 64)), rng.standard_normal(64)
    y, _ = rmsnorm_forward(x, g, eps=0.0)
    y_scaled, _ = rmsnorm_forward(1000 * x, g, eps=0.0)
    difference = np.abs(y_scaled - y).max()
    print(f"claim     1000 times the input gives the same output: max difference {difference:.0e}")
    assert difference < 1e-14


if __name__ == "__main__":
    from minideepseek.basics.rmsnorm import demo  # the imported copy, so that every name exists once
    demo()
