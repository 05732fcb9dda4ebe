"""Embedding: look up one row per token id; the backward adds each row's gradients together.

Derivation: whiteboard/basics/embedding.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import numpy as np
from scipy.sparse import csr_array

from minideepseek.autograd.gradcheck import report
from minideepseek.autograd.tape import op


def embedding_forward(ids, E):
    """Take row ids[i] of the table: y[i] = E[ids[i]].

    ids: (...) int < U   E: (U, D)   ->   y: (..., D)
    """
    y = E[ids]                                                                  # (..., D)   # eq. 1
    return y, (ids, E.shape)


def embedding_backward(dy, cache):
    """A token that occurs twice gets the sum of both gradients. `dE[ids] += dy` would keep only the last one."""
    ids, (U, D) = cache
    M = ids.size
    P = csr_array((np.ones(M, dy.dtype), (np.arange(M), ids.reshape(-1))), shape=(M, U))     # P[i, ids[i]] = 1: y = P @ E
    dE = P.T @ dy.reshape(M, D)                                                 # (U, D)     # eq. 2
    return None, dE


embedding = op(embedding_forward, embedding_backward)


def embedding_examples(rng):
    return {
        "tokens": ((np.array([2, 0, 2, 5]), rng.standard_normal((6, 3))), {}),
        "batch": ((np.array([[1, 1, 4], [3, 1, 0]]), rng.standard_normal((5, 4))), {}),
    }


def demo():
    """A repeated token by hand, the gradient, and what the tempting one-liner loses."""
    ids, dy = np.array([1, 0, 1]), np.array([[1.0], [10.0], [100.0]])
    _, cache = embedding_forward(ids, np.zeros((3, 1)))
    _, dE = embedding_backward(dy, cache)
    print("shapes    ids (3,), E (3, 1) -> y (3, 1)")
    print("by hand   token 1 occurs twice, with gradients 1 and 100: dE =", dE.ravel())
    report(embedding_forward, embedding_backward, embedding_examples)

    wrong = np.zeros((3, 1))
    wrong[ids] += dy
    print(f"claim     row 1 gets {dE[1, 0]:g}; `dE[ids] += dy` gives it {wrong[1, 0]:g}")
    assert dE[1, 0] == 101 and wrong[1, 0] == 100


if __name__ == "__main__":
    from minideepseek.basics.embedding import demo  # the imported copy, so that every name exists once
    demo()
