"""A number too large: for a hundred steps all is well, then everything is nan.

    python examples/bugs/13_a_number_too_large.py            # the symptom
    python examples/bugs/13_a_number_too_large.py --fix      # without the bug

A layer rounds its input to FP8 (E4M3) before a product. Its activations grow by 4 % a step, its weights shrink as much, and
the loss falls. At some step it is nan, and from then on so is every weight. By the time you look, it is everywhere. Where did
it begin?

A path to the cause, at the prompt:

    $ python -m pdb examples/bugs/13_a_number_too_large.py
    tbreak main
    c
    from minideepseek.debug.nan_hunt import nan_hunt
    hunt = nan_hunt()          from now on every op looks at what it made
    c                          it stops where the first nan is: read the error, line by line
    p np.abs(arrays[0]).max()      the largest number that went in; E4M3 ends at 448

Derivation: whiteboard/precision/tiles.md     Bug 27 of the museum
"""
import os
import sys

sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]   # run as a script: take the package from this repository

import ml_dtypes
import numpy as np

from minideepseek.autograd.tape import Tape, Tensor, op
from minideepseek.basics.cross_entropy import cross_entropy
from minideepseek.basics.linear import linear


def to_fp8_forward(x):
    """Round to the nearest number of E4M3.

    x: (..., D)   ->   q: (..., D)
    """
    q = x.astype(ml_dtypes.float8_e4m3fn).astype(x.dtype)
    return q, None


def to_fp8_backward(dq, cache):
    return dq.copy()                                   # as if nothing had been rounded


to_fp8 = op(to_fp8_forward, to_fp8_backward)


def main():
    rng = np.random.default_rng(0)
    x, targets = rng.standard_normal((32, 8)), rng.integers(0, 4, 32)
    W, first = Tensor(rng.standard_normal((8, 4)) / 8, "W"), None
    for step in range(160):
        with Tape() as tape:
            loss = cross_entropy(linear(to_fp8(x * 1.04 ** step), W), targets)
        tape.backward(loss)
        W.data, W.grad = (W.data - 0.1 / 1.04 ** (2 * step) * W.grad) / 1.04, None
        first = step if first is None and not np.isfinite(loss.data) else first
        if step % 40 == 39:
            print(f"step {step:3d}   largest activation {np.abs(x).max() * 1.04 ** step:6.1f}   loss {loss.data:.3f}")
    print(f"first nan at step {first}")
    print("symptom:", "here" if first is not None else "gone")


if __name__ == "__main__":
    if "--fix" in sys.argv:                            # the answer: find your own first
        def to_fp8_forward(x):
            """x: (..., D)   ->   q: (..., D)"""
            q = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(x.dtype)
            return q, None

        to_fp8 = op(to_fp8_forward, to_fp8_backward)
    main()
