"""Tied head: score every token with the row that embeds it. NOT part of DeepSeek-V3, whose head is a matrix of its own.

Derivation: whiteboard/basics/tied_head.md     Source: Press & Wolf 2017, arXiv:1608.05859
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import numpy as np

from minideepseek.autograd.gradcheck import report
from minideepseek.autograd.tape import Tape, Tensor, op
from minideepseek.basics.embedding import embedding, embedding_backward


def tied_head_forward(h, E):
    """Compare every vector with every row of the embedding table: logits = h E^T.

    h: (..., D)   E: (U, D)   ->   logits: (..., U)
    """
    logits = h @ E.T                                                # (..., U)   # eq. 1
    return logits, (h, E)


def tied_head_backward(dlogits, cache):
    """The rows that scored high pull h towards them or push it away, and h does the same to every row."""
    h, E = cache
    U, D = E.shape
    dh = dlogits @ E                                                # (..., D)   # eq. 2
    dE = dlogits.reshape(-1, U).T @ h.reshape(-1, D)                # (U, D)     # eq. 3
    return dh, dE


tied_head = op(tied_head_forward, tied_head_backward)


def tied_head_examples(rng):
    return {
        "tokens": ((rng.standard_normal((3, 4)), rng.standard_normal((6, 4))), {}),
        "batch": ((rng.standard_normal((2, 3, 4)), rng.standard_normal((5, 4))), {}),
        "one vector": ((rng.standard_normal(3), rng.standard_normal((5, 3))), {}),
    }


def demo():
    """Three rows by hand, the gradients, and one table that is used twice on one tape."""
    table = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    logits, _ = tied_head_forward(np.array([2.0, 3.0]), table)
    print("shapes    h (2,), E (3, 2) -> logits (3,)")
    print("by hand   (2, 3) against the rows (1, 0), (0, 1), (1, 1): logits =", logits)
    report(tied_head_forward, tied_head_backward, tied_head_examples)

    rng = np.random.default_rng(0)
    ids, E, dlogits = np.array([4, 1, 4]), Tensor(rng.standard_normal((6, 3)), "E"), rng.standard_normal((3, 6))
    with Tape() as tape:
        h = embedding(ids, E)
        logits = tied_head(h, E)
    tape.backward({logits: dlogits})
    dh, dense = tied_head_backward(dlogits, (h.data, E.data))
    _, sparse = embedding_backward(dh, (ids, E.data.shape))
    off, U, D = np.abs(E.grad - (sparse + dense)).max(), 129_280, 7_168
    touched = [int((np.abs(part).sum(axis=-1) > 0).sum()) for part in (sparse, dense)]
    print(f"claim     one table, two uses: rows touched {touched[0]} (input) and {touched[1]} (output) of 6; tape minus sum {off:.0e}; "
          f"V3 would save {U * D:,} weights")
    assert off < 1e-14 and touched == [2, 6] and U * D == 926_679_040


if __name__ == "__main__":
    from minideepseek.basics.tied_head import demo  # the imported copy, so that every name exists once
    demo()
