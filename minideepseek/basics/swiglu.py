"""SwiGLU: the feed-forward layer of every DeepSeek model and of each of its experts.

Derivation: whiteboard/basics/swiglu.md     Source: Shazeer 2020, arXiv:2002.05202
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from minideepseek.autograd.gradcheck import report
from minideepseek.autograd.tape import op
from minideepseek.basics.linear import linear_backward, linear_forward, matmul


class SwiGLUWeights(NamedTuple):
    """The weights in the order of swiglu's arguments."""
    W_gate: np.ndarray   # (D, F)
    W_up: np.ndarray     # (D, F)
    W_down: np.ndarray   # (F, D)


def sigmoid(a):
    """1 / (1 + exp(-a)). Where exp overflows the answer is the 0 it should be. A third of the time of scipy's expit."""
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-a))


def silu_mul_forward(a, b):
    """Let one half open and close the other: h = silu(a) b, with silu(a) = a sigmoid(a).

    a: (...)   b: (...)   ->   h: (...)
    """
    s = sigmoid(a)                                                              # (...)   # eq. 1
    h = a * s * b                                                               # (...)   # eq. 2
    return h, (a, b, s)


def silu_mul_backward(dh, cache):
    """The product rule; sigmoid' = s (1 - s)."""
    a, b, s = cache
    da = dh * b * (s + a * s * (1 - s))                                         # (...)   # eq. 3
    db = dh * (a * s)                                                           # (...)   # eq. 4
    return da, db


def swiglu_forward(x, W_gate, W_up, W_down, *, gemm=matmul):
    """Widen twice, let one gate the other, narrow again: y = (silu(x W_gate) * (x W_up)) W_down.

    x: (..., D)   W_gate: (D, F)   W_up: (D, F)   W_down: (F, D)   ->   y: (..., D)

    gemm: does the matrix products, see linear.
    Source: DeepSeek-V3, arXiv:2412.19437, the FFN of its sec. 2.1.2; no biases.
    """
    cache = SimpleNamespace()
    a, cache.gate = linear_forward(x, W_gate, gemm=gemm)                        # (..., F)   # eq. 5
    b, cache.up = linear_forward(x, W_up, gemm=gemm)                            # (..., F)   # eq. 6
    h, cache.silu_mul = silu_mul_forward(a, b)                                  # (..., F)   # eq. 7
    y, cache.down = linear_forward(h, W_down, gemm=gemm)                        # (..., D)   # eq. 8
    return y, cache


def swiglu_backward(dy, cache):
    """The forward read from the bottom up."""
    dh, dW_down = linear_backward(dy, cache.down)                               # (..., F) (F, D)   # eq. 9
    da, db = silu_mul_backward(dh, cache.silu_mul)                              # (..., F) (..., F)   # eq. 10
    dx_up, dW_up = linear_backward(db, cache.up)                                # (..., D) (D, F)   # eq. 11
    dx_gate, dW_gate = linear_backward(da, cache.gate)                          # (..., D) (D, F)   # eq. 12
    dx = dx_gate + dx_up    # x fed both: add                                   # (..., D)   # eq. 13
    return dx, dW_gate, dW_up, dW_down


silu_mul = op(silu_mul_forward, silu_mul_backward)
swiglu = op(swiglu_forward, swiglu_backward)


def silu_mul_examples(rng):
    return {"vectors": ((rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 3, 4))), {})}


def swiglu_examples(rng):
    def weights(D, F):
        return tuple(rng.standard_normal(shape) for shape in [(D, F), (D, F), (F, D)])

    return {
        "tokens": ((rng.standard_normal((3, 4)), *weights(4, 5)), {}),
        "batch": ((rng.standard_normal((2, 3, 4)), *weights(4, 5)), {}),
    }


def demo():
    """One number by hand, the gradients, and what the gate does to large inputs of either sign."""
    h, _ = silu_mul_forward(np.array([2.0]), np.array([3.0]))
    print("shapes    x (..., D), W_gate (D, F), W_up (D, F), W_down (F, D) -> y (..., D)")
    print(f"by hand   silu(2) * 3 = 2 * 0.8808 * 3 = {h[0]:.4f}")
    report(silu_mul_forward, silu_mul_backward, silu_mul_examples)
    report(swiglu_forward, swiglu_backward, swiglu_examples)

    opened, shut = silu_mul_forward(np.array([20.0, -20.0]), np.array([1.0, 1.0]))[0]
    print(f"claim     the gate passes 20 as {opened:.6f} and -20 as {shut:.1e}")
    assert abs(opened - 20) < 1e-6 and abs(shut) < 1e-6


if __name__ == "__main__":
    from minideepseek.basics.swiglu import demo  # the imported copy, so that every name exists once
    demo()
