"""Dropout: silence a random share of the entries, and scale up the rest so that the mean stays. Not used by DeepSeek.

Derivation: whiteboard/basics/dropout.md     Source: Srivastava et al. 2014, JMLR 15:1929-1958
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import numpy as np

from minideepseek.autograd.gradcheck import report
from minideepseek.autograd.tape import op


def dropout_forward(x, *, mask, p):
    """Keep the entries where the mask is True, scaled by 1 / (1 - p): y = x mask / (1 - p).

    x: (...)   mask: (...)   ->   y: (...)

    mask: True where an entry survives; drawn outside, by `dropout_mask`, so that forward and backward see the same
    one and a run can be repeated. p: the share that is dropped, in [0, 1). In evaluation do not call this at all.
    """
    scale = 1 / (1 - p)
    y = np.where(mask, x * scale, 0)                            # (...)   # eq. 1
    return y, (mask, scale)


def dropout_backward(dy, cache):
    """What was silenced gets no gradient; the rest is scaled as the forward was."""
    mask, scale = cache
    dx = np.where(mask, dy * scale, 0)                          # (...)   # eq. 2
    return dx


dropout = op(dropout_forward, dropout_backward)


def dropout_mask(shape, p, rng):
    """Draw a mask: True with probability 1 - p, independently for every entry.

    shape: tuple of sizes   p: the share dropped, in [0, 1)   rng: numpy Generator   ->   bool array
    Raises ValueError when p is outside [0, 1).
    """
    if not 0 <= p < 1:
        raise ValueError(f"p = {p} is not in [0, 1): it is the share of entries that are dropped")
    return rng.random(shape) >= p


def dropout_examples(rng):
    mask = np.array([[True, False, True], [True, True, False]])
    return {"a third dropped": ((rng.standard_normal((2, 3)),), {"mask": mask, "p": 1 / 3})}


def demo():
    """Three entries by hand, the gradient, and the mean over many masks."""
    y, _ = dropout_forward(np.array([1.0, 2.0, 3.0]), mask=np.array([True, False, True]), p=0.5)
    print("shapes    x (3,), mask (3,) -> y (3,)")
    print("by hand   (1, 2, 3) with the middle dropped at p = 0.5: y =", y)
    report(dropout_forward, dropout_backward, dropout_examples)

    rng = np.random.default_rng(0)
    x = np.ones(1_000_000)
    y, _ = dropout_forward(x, mask=dropout_mask(x.shape, 0.2, rng), p=0.2)
    print(f"claim     p = 0.2 over a million ones: {np.mean(y == 0):.3f} are dropped, the mean stays {y.mean():.3f}")
    assert abs(np.mean(y == 0) - 0.2) < 0.002 and abs(y.mean() - 1) < 0.002


if __name__ == "__main__":
    from minideepseek.basics.dropout import demo  # the imported copy, so that every name exists once
    demo()
