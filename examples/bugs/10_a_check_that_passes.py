"""A check that passes: a backward that returns zeros, and a gradient check that finds it perfect.

    python examples/bugs/10_a_check_that_passes.py            # the symptom
    python examples/bugs/10_a_check_that_passes.py --fix      # without the bug

Somebody forgot to write the backward of softmax: it returns zeros. The gradient check below, of the kind found in many
tutorials, compares it with finite differences of sum(p) and reports agreement to ten digits. What is sum(p)?

A path to the cause, at the prompt:

    $ python -m pdb examples/bugs/10_a_check_that_passes.py
    tbreak compare
    c
    p np.abs(numeric).max()    the true slopes, as measured: why are they nothing?
    up
    p dp                       each is multiplied by this, and added up
    p (dp * softmax_forward(z)[0]).sum(axis=-1)

Derivation: whiteboard/autograd/gradcheck.md     Bug 36 of the museum
"""
import os
import sys

sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]   # run as a script: take the package from this repository

import numpy as np

from minideepseek.autograd.finite_differences import finite_differences
from minideepseek.basics.softmax import softmax_forward


def forgotten_backward(dp, cache):
    return np.zeros_like(dp)


def compare(analytic, numeric):
    """The largest difference."""
    return np.abs(analytic - numeric).max()


def check(backward, z, rng):
    """Compare backward with finite differences, for one dp."""
    dp = np.ones(z.shape)
    p, cache = softmax_forward(z)
    numeric = (finite_differences(softmax_forward, (z,))[0].rows @ dp.reshape(-1)).reshape(z.shape)
    return compare(backward(dp, cache), numeric)


def main():
    rng = np.random.default_rng(0)
    error = check(forgotten_backward, rng.standard_normal((3, 4)), rng)
    print(f"largest error {error:.0e}: the backward that returns zeros {'passes' if error < 1e-7 else 'is found out'}")
    print("symptom:", "here" if error < 1e-7 else "gone")


if __name__ == "__main__":
    if "--fix" in sys.argv:                            # the answer: find your own first
        def check(backward, z, rng):
            dp = rng.standard_normal(z.shape)
            p, cache = softmax_forward(z)
            numeric = (finite_differences(softmax_forward, (z,))[0].rows @ dp.reshape(-1)).reshape(z.shape)
            return compare(backward(dp, cache), numeric)
    main()
