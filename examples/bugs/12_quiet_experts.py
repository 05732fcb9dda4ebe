"""Quiet experts: the same voice at any setting.

    python examples/bugs/12_quiet_experts.py            # the symptom
    python examples/bugs/12_quiet_experts.py --fix      # without the bug

V3 multiplies the gates of the routed experts by 2.5, so the gates of a token add up to 2.5. Here they add up to 1, with
2.5 as with 16. The factor is there, the line that uses it runs. What becomes of it?

A path to the cause, at the prompt:

    $ python -m pdb examples/bugs/12_quiet_experts.py
    tbreak main
    c
    from minideepseek.debug.equations import equations
    rows = equations(gates_forward, np.ones(4), 2.5)
    rows = equations(gates_forward, np.ones(4), 16.0)    from which line on are the two tables the same?

Derivation: whiteboard/moe/router.md     Bug 22 of the museum
"""
import os
import sys

sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]   # run as a script: take the package from this repository

import numpy as np

from minideepseek.basics.swiglu import sigmoid
from minideepseek.moe.router import best


def gates_forward(logits, scaling):
    """The gates of the two experts that a token chooses: logits (E,) -> gate (2,)."""
    score = sigmoid(logits)                                         # (E,)   # eq. 2
    picked = score[best(score, 2)] * scaling                        # (2,)   # eq. 7
    total = picked.sum() + 1e-20                                    # ()     # eq. 8
    share = picked / total                                          # (2,)   # eq. 9
    return share


def main():
    logits = np.array([2.0, 1.0, -3.0, -4.0])
    sums = {scaling: gates_forward(logits, scaling).sum() for scaling in (1.0, 2.5, 16.0)}
    for scaling, total in sums.items():
        print(f"scaling {scaling:4g}: the gates of a token add up to {total:.3g}")
    print("symptom:", "here" if abs(sums[2.5] - 2.5) > 1e-12 else "gone")


if __name__ == "__main__":
    if "--fix" in sys.argv:                            # the answer: find your own first
        def gates_forward(logits, scaling):
            score = sigmoid(logits)
            picked = score[best(score, 2)]
            total = picked.sum() + 1e-20
            share = picked / total
            return share * scaling
    main()
