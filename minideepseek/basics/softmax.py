"""Softmax and log-softmax: scores to probabilities, over the last axis.

Derivation: whiteboard/basics/softmax.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import numpy as np

from minideepseek.autograd.gradcheck import report
from minideepseek.autograd.tape import op


def softmax_forward(z):
    """Exponentiate and normalise: p = exp(z) / sum(exp(z)), computed after subtracting the largest score.

    z: (..., S)   ->   p: (..., S)
    """
    e = np.exp(z - np.max(z, axis=-1, keepdims=True))                   # (..., S)   # eq. 1
    p = e / np.sum(e, axis=-1, keepdims=True)                           # (..., S)   # eq. 2
    return p, p


def softmax_backward(dp, cache):
    """Every probability pays for the ones that rise: subtract the average of dp under p."""
    p = cache
    mean_dp = np.vecdot(p, dp)[..., None]                               # (..., 1)   # eq. 3
    dz = p * (dp - mean_dp)                                             # (..., S)   # eq. 4
    return dz


def log_softmax_forward(z):
    """The logarithm of softmax, without ever computing a probability that underflows: l = z - log(sum(exp(z))).

    z: (..., S)   ->   l: (..., S)
    """
    m = np.max(z, axis=-1, keepdims=True)                               # (..., 1)
    lse = m + np.log(np.sum(np.exp(z - m), axis=-1, keepdims=True))     # (..., 1)   # eq. 5
    l = z - lse                                                         # (..., S)   # eq. 6
    return l, l


def log_softmax_backward(dl, cache):
    """The identity, minus what the normaliser takes back."""
    l = cache
    dz = dl - np.exp(l) * np.sum(dl, axis=-1, keepdims=True)            # (..., S)   # eq. 7
    return dz


softmax = op(softmax_forward, softmax_backward)
log_softmax = op(log_softmax_forward, log_softmax_backward)


def softmax_examples(rng):
    return {
        "rows": ((rng.standard_normal((3, 4)),), {}),
        "batch": ((rng.standard_normal((2, 3, 5)),), {}),
    }


log_softmax_examples = softmax_examples


def demo():
    """Three scores by hand, the gradients, and scores that would overflow a plain exponential."""
    p, _ = softmax_forward(np.log([[1.0, 2.0, 5.0]]))
    print("shapes    z (1, 3) -> p (1, 3)")
    print("by hand   softmax(log 1, log 2, log 5) = (1, 2, 5) / 8 =", p[0].round(4))
    report(softmax_forward, softmax_backward, softmax_examples)
    report(log_softmax_forward, log_softmax_backward, log_softmax_examples)

    z = np.array([1000.0, 999.0, -1000.0])
    p, l = softmax_forward(z)[0], log_softmax_forward(z)[0]
    print("claim     z = (1000, 999, -1000): p =", p.round(4), "and log p =", l.round(4), "stay finite")
    assert np.isfinite(p).all() and np.isfinite(l).all() and l[2] < -1999


if __name__ == "__main__":
    from minideepseek.basics.softmax import demo  # the imported copy, so that every name exists once
    demo()
