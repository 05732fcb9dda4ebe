"""A prompt in pieces: read in one go it is understood, read in two it is not.

    python examples/bugs/05_a_prompt_in_pieces.py            # the symptom
    python examples/bugs/05_a_prompt_in_pieces.py --fix      # without the bug

Eight tokens go through one attention head, first all at once, then four and four, with the keys of the first four in a
cache. The first piece agrees. In the second piece every token is wrong, though training, which never uses a cache, was
fine. What do the tokens of the second piece see?

A path to the cause, at the prompt:

    $ python -m pdb examples/bugs/05_a_prompt_in_pieces.py
    b masked_forward
    c                          all at once
    c                          the first piece
    c                          the second piece: 4 queries, 8 keys
    n
    n
    p sees.astype(int)         row i, key j: the first token of this piece is token 4, and sees ...

Derivation: whiteboard/attention/causal.md     Bug 16 of the museum
"""
import os
import sys

sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]   # run as a script: take the package from this repository

import numpy as np

from minideepseek.basics.softmax import softmax_forward


def masked_forward(q, k):
    """Attention with the keys as values: q (T, K), k (S, K) -> (T, K)."""
    T, S = len(q), len(k)
    sees = np.arange(S) <= np.arange(T)[:, None]                                            # (T, S)
    scores = q @ k.T + np.where(sees, 0, -np.inf)                                           # (T, S)
    p, _ = softmax_forward(scores)
    return p @ k


def main():
    x = np.random.default_rng(0).standard_normal((8, 5))
    at_once = masked_forward(x, x)
    pieces = np.concatenate([masked_forward(x[:4], x[:4]), masked_forward(x[4:], x)])
    worst = np.abs(pieces - at_once).max(axis=1)
    print("token     " + "".join(f"{i:9d}" for i in range(8)))
    print("difference" + "".join(f"{w:9.0e}" for w in worst))
    print("symptom:", "here" if worst.max() > 1e-12 else "gone")


if __name__ == "__main__":
    if "--fix" in sys.argv:                            # the answer: find your own first
        def masked_forward(q, k):
            T, S = len(q), len(k)
            sees = np.arange(S) <= np.arange(T)[:, None] + S - T
            scores = q @ k.T + np.where(sees, 0, -np.inf)
            p, _ = softmax_forward(scores)
            return p @ k
    main()
