"""Gates that drift: nobody trained the router, and its gates change.

    python examples/bugs/06_gates_that_drift.py            # the symptom
    python examples/bugs/06_gates_that_drift.py --fix      # without the bug

A token has chosen two experts. For 500 steps their selection biases move apart, as load balancing moves them, and nothing
else changes: same token, same weights, same two experts. Their gates must stay as they were. The gradient check is content
all the same, since the biases are constants to it. What is a gate made of?

A path to the cause, at the prompt:

    $ python -m pdb examples/bugs/06_gates_that_drift.py
    tbreak gates_forward, b_select is not None
    c
    from minideepseek.debug.equations import equations
    rows = equations(gates_forward, logits, b_select)
    p rows[2].value            eq. 7: these were picked from eq. 2. Were they?

Derivation: whiteboard/moe/router.md     Bug 18 of the museum
"""
import os
import sys

sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]   # run as a script: take the package from this repository

import numpy as np

from minideepseek.basics.swiglu import sigmoid
from minideepseek.moe.router import best


def gates_forward(logits, b_select=None):
    """The gates of the two experts a token chooses, in the order of their numbers: logits (E,) -> gate (2,)."""
    score = sigmoid(logits)                                         # (E,)   # eq. 2
    biased = score if b_select is None else score + b_select        # (E,)   # eq. 3
    chosen = np.sort(best(biased, 2))
    picked = biased[chosen]                                         # (2,)   # eq. 7
    share = picked / picked.sum()                                   # (2,)   # eq. 9
    return share


def main():
    logits = np.array([2.0, 1.0, -3.0, -4.0])
    before = gates_forward(logits)
    after = gates_forward(logits, b_select=500 * 0.001 * np.array([-1.0, 1.0, 0.0, 0.0]))
    print(f"gates before   {before.round(3)}")
    print(f"gates after    {after.round(3)}, 500 steps of the bias later")
    print("symptom:", "here" if np.abs(after - before).max() > 1e-12 else "gone")


if __name__ == "__main__":
    if "--fix" in sys.argv:                            # the answer: find your own first
        def gates_forward(logits, b_select=None):
            score = sigmoid(logits)
            biased = score if b_select is None else score + b_select
            chosen = np.sort(best(biased, 2))
            picked = score[chosen]
            return picked / picked.sum()
    main()
