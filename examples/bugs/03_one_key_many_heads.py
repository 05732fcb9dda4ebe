"""One key, many heads: a step down the gradient goes down less than it should.

    python examples/bugs/03_one_key_many_heads.py            # the symptom
    python examples/bugs/03_one_key_many_heads.py --fix      # without the bug

Latent attention has one key with position, read by every head. A small step against its gradient must lower the loss by
the step times the squared norm of the gradient. It does not. Which line of the backward is wrong?

A path to the cause, at the prompt:

    $ python -m pdb examples/bugs/03_one_key_many_heads.py
    tbreak decrease            by now the tape has been replayed
    c
    from minideepseek.debug.explain import explain
    wrong = explain(tape, k_rope)      who sent this gradient, is he right, and where is that derived?
    debug tape.records[0].backward(scores.grad, tape.records[0].cache)
    tbreak shared_scores_backward
    c                          once more, slowly
    n
    n
    n
    n
    p np.abs(dk).max(axis=(0, 2, 3))      every head has something to say ...
    p np.abs(dk_rope - dk[:, 0]).max()    ... and only head 0 is heard

Derivation: whiteboard/attention/mla.md     Bug 8 of the museum
"""
import os
import sys

sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]   # run as a script: take the package from this repository

import numpy as np

from minideepseek.autograd.tape import Tape, Tensor, op


def shared_scores_forward(q_rope, k_rope):
    """Every head's queries against the one key.

    q_rope: (B, H, T, R)   k_rope: (B, T, R)   ->   scores: (B, H, T, T)
    """
    scores = q_rope @ k_rope[:, None].swapaxes(-1, -2)                  # (B, H, T, T)
    return scores, (q_rope, k_rope)


def shared_scores_backward(dscores, cache):
    q_rope, k_rope = cache
    dq_rope = dscores @ k_rope[:, None]                                 # (B, H, T, R)
    dk = dscores.swapaxes(-1, -2) @ q_rope                              # (B, H, T, R)
    dk_rope = dk[:, 0].copy()                                           # (B, T, R)   # eq. 18
    return dq_rope, dk_rope


shared_scores = op(shared_scores_forward, shared_scores_backward)


def decrease(loss_of, tape, k_rope, scores):
    """How much the loss falls in a step of 1e-4 against the gradient, and by how much it should."""
    slope = (k_rope.grad ** 2).sum()
    return (loss_of(k_rope.data) - loss_of(k_rope.data - 1e-4 * k_rope.grad)) / 1e-4, slope


def main():
    rng = np.random.default_rng(0)
    q, k_rope, dscores = rng.standard_normal((2, 3, 4, 6)), Tensor(rng.standard_normal((2, 4, 6)), "k_rope"), rng.standard_normal((2, 3, 4, 4))
    with Tape() as tape:
        scores = shared_scores(q, k_rope)
    tape.backward({scores: dscores}, keep=True)
    falls, should = decrease(lambda k: (dscores * shared_scores_forward(q, k)[0]).sum(), tape, k_rope, scores)
    print(f"a step down the gradient lowers the loss by {falls:.2f} times its length; the squared norm says {should:.2f}")
    print("symptom:", "here" if abs(falls / should - 1) > 0.01 else "gone")


if __name__ == "__main__":
    if "--fix" in sys.argv:                            # the answer: find your own first
        def shared_scores_backward(dscores, cache):
            q_rope, k_rope = cache
            dq_rope = dscores @ k_rope[:, None]
            dk = dscores.swapaxes(-1, -2) @ q_rope
            dk_rope = dk.sum(axis=1)
            return dq_rope, dk_rope

        shared_scores = op(shared_scores_forward, shared_scores_backward)
    main()
