"""Residual addition: the one place where two roads meet, and their gradients part again.

Derivation: whiteboard/basics/residual.md     Source: He et al. 2015, arXiv:1512.03385
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import numpy as np

from minideepseek.autograd.gradcheck import report
from minideepseek.autograd.tape import Tape, Tensor, op


def add_forward(x, r):
    """Add what a layer computed to what went in: y = x + r.

    x: (...)   r: (...)   ->   y: (...)
    """
    y = x + r                                   # (...)   # eq. 1
    return y, None


def add_backward(dy, cache):
    """Both roads get all of dy. Each its own copy: an array that two owners share is written by one of them one day."""
    dx = dy.copy()                              # (...)   # eq. 2
    dr = dy.copy()                              # (...)   # eq. 3
    return dx, dr


add = op(add_forward, add_backward)


def add_examples(rng):
    return {"vectors": ((rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 3, 4))), {})}


def demo():
    """y = (x + r) + x: x has two roads to y, so its gradient is 2."""
    y, cache = add_forward(np.array([1.0, 2.0]), np.array([10.0, 20.0]))
    print("shapes    x (2,) + r (2,) -> y (2,)")
    print("by hand   [1, 2] + [10, 20] =", y)
    report(add_forward, add_backward, add_examples)

    x, r = Tensor(np.array([1.0, 2.0]), "x"), Tensor(np.array([10.0, 20.0]), "r")
    with Tape() as tape:
        y = add(add(x, r), x)
    tape.backward({y: np.ones(2)})
    print(f"claim     y = (x + r) + x: dy/dx = {x.grad[0]:g}, dy/dr = {r.grad[0]:g}")
    assert (x.grad == 2).all() and (r.grad == 1).all()


if __name__ == "__main__":
    from minideepseek.basics.residual import demo  # the imported copy, so that every name exists once
    demo()
