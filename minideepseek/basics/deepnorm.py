"""DeepNorm: normalise after the addition, with the old stream made louder first. NOT part of DeepSeek-V3, whatever the name suggests.

Derivation: whiteboard/basics/deepnorm.md     Source: Wang et al. 2022 (DeepNet), arXiv:2203.00555
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import math

import numpy as np

from minideepseek.autograd.gradcheck import report
from minideepseek.autograd.tape import op
from minideepseek.basics.layernorm import layernorm_backward, layernorm_forward
from minideepseek.basics.linear import linear_backward, linear_forward


def deepnorm_alpha(n_layers):
    """How loud the stream is made in a decoder-only model of n_layers: (2 n_layers)^(1/4)."""
    return (2 * n_layers) ** 0.25


def deepnorm_beta(n_layers):
    """What multiplies the Xavier gain of value, output and FFN weights (not of query and key): (8 n_layers)^(-1/4)."""
    return (8 * n_layers) ** -0.25


def deepnorm_forward(x, f, g, b, *, alpha, eps=1e-5):
    """Add what a layer computed to alpha times what went in, then normalise the sum: y = LayerNorm(alpha x + f).

    x: (..., D)   f: (..., D)   g: (D,)   b: (D,)   ->   y: (..., D)

    alpha: from `deepnorm_alpha`; 1 gives the plain post-norm. eps: as in layernorm.
    """
    u = alpha * x + f                                   # (..., D)   # eq. 1
    y, normed = layernorm_forward(u, g, b, eps=eps)     # (..., D)   # eq. 2
    return y, (alpha, normed)


def deepnorm_backward(dy, cache):
    """Through the norm, then along both roads of the sum; the road of x is alpha times as loud."""
    alpha, normed = cache
    du, dg, db = layernorm_backward(dy, normed)         # (..., D)  (D,)  (D,)   # eq. 3
    dx = alpha * du                                     # (..., D)   # eq. 4
    df = du                                             # (..., D)   # eq. 5
    return dx, df, dg, db


deepnorm = op(deepnorm_forward, deepnorm_backward)


def deepnorm_examples(rng):
    def draw(*shape, alpha, eps):
        x, f = rng.standard_normal(shape), rng.standard_normal(shape)
        return (x, f, rng.standard_normal(shape[-1]), rng.standard_normal(shape[-1])), {"alpha": alpha, "eps": eps}

    return {"tokens": draw(3, 4, alpha=deepnorm_alpha(8), eps=1e-5), "batch": draw(2, 3, 5, alpha=0.6, eps=0.5)}


def first_over_last(kind, depth, rng, D=64, T=16):
    """|dW| of the first layer divided by |dW| of the last, in a stack of random linear layers. kind: post | deep | pre"""
    alpha, gain = (deepnorm_alpha(depth), deepnorm_beta(depth)) if kind == "deep" else (1.0, 1.0)
    x, g, b, kept = rng.standard_normal((T, D)), np.ones(D), np.zeros(D), []
    for _ in range(depth):
        W = gain * math.sqrt(2 / (D + D)) * rng.standard_normal((D, D))     # Xavier
        h, normed = layernorm_forward(x, g, b) if kind == "pre" else (x, None)
        f, product = linear_forward(h, W)
        x, joined = (x + f, None) if kind == "pre" else deepnorm_forward(x, f, g, b, alpha=alpha)
        kept.append((normed, product, joined))
    dx, norms = rng.standard_normal((T, D)), []
    for normed, product, joined in reversed(kept):
        dskip, df = (dx, dx) if kind == "pre" else deepnorm_backward(dx, joined)[:2]
        dh, dW = linear_backward(df, product)
        dx = dskip + (layernorm_backward(dh, normed)[0] if kind == "pre" else dh)    # x went both ways: add
        norms.append(np.linalg.norm(dW))
    return norms[-1] / norms[0]


def demo():
    """Two entries by hand, the gradients, and how evenly three ways to normalise spread the gradient over the depth."""
    y, _ = deepnorm_forward(np.array([1.0, 2.0]), np.array([0.0, 0.0]), np.ones(2), np.array([0.0, 10.0]), alpha=2.0, eps=0.0)
    print("shapes    x (2,), f (2,), g (2,), b (2,) -> y (2,)")
    print("by hand   2 (1, 2) + (0, 0) has mean 3 and deviation 1: y = (-1, 1) + (0, 10) =", y)
    report(deepnorm_forward, deepnorm_backward, deepnorm_examples)

    depths = (4, 16, 64)
    ratios = {kind: [first_over_last(kind, depth, np.random.default_rng(0)) for depth in depths] for kind in ("post", "deep", "pre")}
    print("depth    ", *(f"{depth:6d}" for depth in depths), "   |dW first| / |dW last|")
    for kind, row in ratios.items():
        print(f"{kind:9s}", *(f"{ratio:6.2f}" for ratio in row))
    off = max(abs(ratio - 1) for ratio in ratios["deep"])
    print(f"claim     DeepNorm stays within {off:.0%} of even; pre-norm leans on the first layer, {ratios['pre'][-1]:.1f} times at depth 64")
    assert off < 0.1 and ratios["pre"][0] > 1.2 and ratios["pre"][-1] > 2 * ratios["pre"][0]


if __name__ == "__main__":
    from minideepseek.basics.deepnorm import demo  # the imported copy, so that every name exists once
    demo()
