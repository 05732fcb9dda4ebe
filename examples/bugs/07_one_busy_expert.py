"""One busy expert: the balancing rule runs, and the load collapses.

    python examples/bugs/07_one_busy_expert.py            # the symptom
    python examples/bugs/07_one_busy_expert.py --fix      # without the bug

Eight experts, two for each of 1024 new tokens a step; two experts are a little more liked than the others. After each step
every selection bias moves by 0.01. MaxVio, by how much the busiest expert exceeds its due, should fall to what chance leaves.
It rises to 3, the most there can be: two experts serve everyone. Which way do the biases go?

A path to the cause, at the prompt:

    $ python -m pdb examples/bugs/07_one_busy_expert.py
    tbreak move_bias
    c
    n
    p counts - counts.mean()   above 0: too busy
    p move                     should be the other way round

Derivation: whiteboard/moe/bias_balance.md     Bug 20 of the museum
"""
import os
import sys

sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]   # run as a script: take the package from this repository

import numpy as np

from minideepseek.basics.swiglu import sigmoid
from minideepseek.moe.bias_balance import expert_counts, max_violation
from minideepseek.moe.router import choose


def move_bias(b_select, counts):
    """One step of the rule: b_select, counts (E,) -> b_select of the next step."""
    move = np.sign(counts - counts.mean())
    return b_select + 0.01 * move


def main():
    rng, b_select = np.random.default_rng(0), np.zeros(8)
    liked = np.array([1.0, 0.5, 0, 0, 0, 0, 0, 0])
    for step in range(121):
        score = sigmoid(rng.standard_normal((1024, 8)) + liked)
        counts = expert_counts(choose(score, b_select, top_k=2, n_groups=1, n_groups_kept=1, scoring="sigmoid"), 8)
        if step % 40 == 0:
            print(f"step {step:3d}   MaxVio {max_violation(counts):.2f}   tokens per expert {counts}")
        b_select = move_bias(b_select, counts)
    print("symptom:", "here" if max_violation(counts) > 0.5 else "gone")


if __name__ == "__main__":
    if "--fix" in sys.argv:                            # the answer: find your own first
        def move_bias(b_select, counts):
            move = np.sign(counts.mean() - counts)
            return b_select + 0.01 * move
    main()
