"""Too good to be true: a module that foretells pure chance.

    python examples/bugs/01_too_good_to_be_true.py            # the symptom
    python examples/bugs/01_too_good_to_be_true.py --fix      # without the bug

The text is drawn at random, every token with probability 1/16: nobody can predict it better than ln 16 = 2.77 nats.
A multi-token-prediction module is trained on it, on new text in every step, and gets far below. What does it know?

A path to the cause, at the prompt:

    $ MINIDEEPSEEK_BREAK=cross_entropy.forward python examples/bugs/01_too_good_to_be_true.py
    p targets[0, :6]           what it has to predict
    up 2                       past the op, to the script that called it
    p ahead[0, :6]             what it is shown

Derivation: whiteboard/model/mtp.md     Bug 1 of the museum
"""
import os
import sys

sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]   # run as a script: take the package from this repository

import numpy as np

from minideepseek.autograd.tape import Tape, Tensor
from minideepseek.basics.cross_entropy import cross_entropy
from minideepseek.basics.embedding import embedding
from minideepseek.basics.linear import linear
from minideepseek.model.mtp import mtp_projection

B, T, D, U = 16, 12, 16, 16


def module_loss(ids, E, g_hidden, g_embedding, W_merge, W_head):
    """Position i knows token i, is shown one more, and predicts token i + 2."""
    ahead = ids[:, 2:]
    hidden = embedding(ids[:, :-2], E)
    merged = mtp_projection(hidden, embedding(ahead, E), g_hidden, g_embedding, W_merge)
    return cross_entropy(linear(merged, W_head), ids[:, 2:])


def main():
    rng = np.random.default_rng(0)
    weights = [Tensor(w) for w in (rng.standard_normal((U, D)), np.ones(D), np.ones(D),
                                   rng.standard_normal((2 * D, D)) / D, rng.standard_normal((D, U)) / D)]
    for step in range(151):
        with Tape() as tape:
            loss = module_loss(rng.integers(0, U, (B, T)), *weights)
        tape.backward(loss)
        for w in weights:
            w.data, w.grad = w.data - 0.5 * w.grad, None
        if step % 50 == 0:
            print(f"step {step:3d}   loss {loss.data:.3f} nats")
    print(f"floor      {np.log(U):.3f} nats")
    print("symptom:", "here" if loss.data < 0.5 * np.log(U) else "gone")


if __name__ == "__main__":
    if "--fix" in sys.argv:                            # the answer: find your own first
        def module_loss(ids, E, g_hidden, g_embedding, W_merge, W_head):
            ahead = ids[:, 1:-1]
            hidden = embedding(ids[:, :-2], E)
            merged = mtp_projection(hidden, embedding(ahead, E), g_hidden, g_embedding, W_merge)
            return cross_entropy(linear(merged, W_head), ids[:, 2:])
    main()
