"""LayerNorm: subtract the mean, divide by the standard deviation, then a learned gain and bias.

Derivation: whiteboard/basics/layernorm.md     Source: Ba et al. 2016, arXiv:1607.06450
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import numpy as np

from minideepseek.autograd.gradcheck import report
from minideepseek.autograd.tape import op


def layernorm_forward(x, g, b, *, eps=1e-5):
    """Give each vector mean 0 and variance 1, then scale and shift: y = g (x - mean) / sqrt(var + eps) + b.

    x: (..., D)   g: (D,)   b: (D,)   ->   y: (..., D)

    eps: keeps a constant vector finite; 1e-6 where DeepSeek uses LayerNorm (the V3.2 indexer).
    """
    centred = x - np.mean(x, axis=-1, keepdims=True)                                        # (..., D)   # eq. 1
    r = np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + eps)                   # (..., 1)   # eq. 2
    x_hat = centred / r                                                                     # (..., D)   # eq. 3
    y = g * x_hat + b                                                                       # (..., D)   # eq. 4
    return y, (g, r, x_hat)


def layernorm_backward(dy, cache):
    """RMSNorm's backward, with the mean of the gradient removed as well."""
    g, r, x_hat = cache
    db = dy.reshape(-1, g.size).sum(axis=0)                                                 # (D,)       # eq. 5
    dg = (dy * x_hat).reshape(-1, g.size).sum(axis=0)                                       # (D,)       # eq. 6
    dx_hat = dy * g                                                                         # (..., D)   # eq. 7
    dcentred = (dx_hat - x_hat * np.mean(dx_hat * x_hat, axis=-1, keepdims=True)) / r       # (..., D)   # eq. 8
    dx = dcentred - np.mean(dcentred, axis=-1, keepdims=True)                               # (..., D)   # eq. 9
    return dx, dg, db


layernorm = op(layernorm_forward, layernorm_backward)


def layernorm_examples(rng):
    def draw(*shape, eps):
        return (rng.standard_normal(shape), rng.standard_normal(shape[-1]), rng.standard_normal(shape[-1])), {"eps": eps}

    return {"tokens": draw(3, 4, eps=1e-5), "batch": draw(2, 3, 5, eps=1e-5), "large eps": draw(3, 4, eps=0.5)}


def demo():
    """Normalise (1, 3) by hand, check the gradients, and count what LayerNorm forgets and RMSNorm keeps."""
    from minideepseek.basics.rmsnorm import rmsnorm_forward

    y, cache = layernorm_forward(np.array([[1.0, 3.0]]), np.array([1.0, 1.0]), np.array([0.0, 10.0]))
    print("shapes    x (1, 2), g (2,), b (2,) -> y (1, 2)")
    print("by hand   (1, 3) has mean 2 and deviation 1: y = (-1, 1) + (0, 10) =", y[0].round(4))
    report(layernorm_forward, layernorm_backward, layernorm_examples)

    rng = np.random.default_rng(0)
    x, g, b = rng.standard_normal((8, 64)), rng.standard_normal(64), rng.standard_normal(64)
    layer = np.abs(layernorm_forward(x + 5, g, b)[0] - layernorm_forward(x, g, b)[0]).max()
    rms = np.abs(rmsnorm_forward(x + 5, g)[0] - rmsnorm_forward(x, g)[0]).max()
    print(f"claim     adding 5 to every entry changes LayerNorm by {layer:.0e}, RMSNorm by {rms:.1f}")
    assert layer < 1e-13 and rms > 1


if __name__ == "__main__":
    from minideepseek.basics.layernorm import demo  # the imported copy, so that every name exists once
    demo()
