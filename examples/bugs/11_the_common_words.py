"""The common words: the rarer a word, the better it learns.

    python examples/bugs/11_the_common_words.py            # the symptom
    python examples/bugs/11_the_common_words.py --fix      # without the bug

In a batch of 100 tokens, token 0 occurs 70 times, token 3 twice. All ask for the same change of their row of the
embedding table, so row 0 must get 70 times as much as a single token asks for. It gets as much as any other. Where are the
other 69?

A path to the cause, at the prompt:

    $ python -m pdb examples/bugs/11_the_common_words.py
    tbreak show                by now the tape has been replayed
    c
    from minideepseek.debug.explain import explain
    wrong = explain(tape, E)   it recognises this one

Derivation: whiteboard/basics/embedding.md     Bug 37 of the museum
"""
import os
import sys

sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]   # run as a script: take the package from this repository

import numpy as np

from minideepseek.autograd.tape import Tape, Tensor, op
from minideepseek.basics.embedding import embedding_forward


def my_backward(dy, cache):
    """Every token's gradient goes to its row."""
    ids, shape = cache
    dE = np.zeros(shape, dy.dtype)                                  # (U, D)
    dE[ids] += dy                                                   # eq. 2
    return None, dE


my_embedding = op(embedding_forward, my_backward)


def show(tape, E, counts):
    print("token                  " + "".join(f"{i:6d}" for i in range(len(counts))))
    print("occurs                 " + "".join(f"{n:6d}" for n in counts))
    print("its row gets           " + "".join(f"{g:6.0f}" for g in E.grad[:, 0]))
    print("symptom:", "here" if not np.allclose(E.grad[:, 0], counts) else "gone")


def main():
    counts = np.array([70, 20, 7, 2, 1])
    ids, E = np.repeat(np.arange(5), counts), Tensor(np.random.default_rng(0).standard_normal((5, 3)), "E")
    with Tape() as tape:
        y = my_embedding(ids, E)
    tape.backward({y: np.ones((100, 3))}, keep=True)
    show(tape, E, counts)


if __name__ == "__main__":
    if "--fix" in sys.argv:                            # the answer: find your own first
        def my_backward(dy, cache):
            ids, shape = cache
            dE = np.zeros(shape, dy.dtype)
            np.add.at(dE, ids, dy)
            return None, dE

        my_embedding = op(embedding_forward, my_backward)
    main()
