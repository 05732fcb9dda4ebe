"""Step through a backward pass: two layers on the tape, forwards and then in reverse.

    python examples/step_through_backward.py            # prints the tape
    python -m pdb examples/step_through_backward.py     # step through it

The recipe, at the (Pdb) prompt:

    tbreak main                run to `main`, so that every name below exists
    c
    b rmsnorm_backward         stop where the norm's backward begins
    c                          go there: the tape is being replayed, the loss is already behind you
    w                          this script, tape.backward, one engine frame, the math
    p dy.shape                 what came down from the layer above
    n                          one line, one equation of whiteboard/basics/rmsnorm.md (three times)
    p dg                       the gradient of the gain, before anyone adds it up
    up 2                       the tape's frame
    p record.name, record.line     which call this undoes
    q

Questions to answer while stepping: why is the record of the *last* op the first one replayed? Where does x get the
sum of its two gradients, and who adds them? (whiteboard/autograd/tape.md)
"""
import os
import sys

sys.path[0:1] = [os.path.abspath(__file__ + "/../..")]   # run as a script: take the package from this repository

import numpy as np

from minideepseek.autograd.tape import Tape, Tensor
from minideepseek.basics.cross_entropy import cross_entropy
from minideepseek.basics.linear import linear
from minideepseek.basics.residual import add
from minideepseek.basics.rmsnorm import rmsnorm, rmsnorm_backward  # the second name is for `b rmsnorm_backward`
from minideepseek.basics.swiglu import swiglu


def main():
    rng = np.random.default_rng(0)
    B, D, F, U = 4, 6, 8, 5
    x = Tensor(rng.standard_normal((B, D)), "x")
    g = Tensor(np.ones(D), "g")
    W_gate, W_up = [Tensor(rng.standard_normal((D, F)) / D**0.5, name) for name in ("W_gate", "W_up")]
    W_down = Tensor(rng.standard_normal((F, D)) / F**0.5, "W_down")
    W_head = Tensor(rng.standard_normal((D, U)) / D**0.5, "W_head")
    targets = np.array([0, 3, 3, 1])

    with Tape() as tape:
        h = swiglu(rmsnorm(x, g), W_gate, W_up, W_down)   # layer one, with its norm
        h = add(h, x)                                     # x has two roads to the loss
        loss = cross_entropy(linear(h, W_head), targets)  # layer two, and what it costs

    tape.backward(loss, keep=True)                        # keep: so that the tape can still be printed
    print(tape)
    print(f"\nloss {loss.data:.4f} nats")
    for tensor in (x, g, W_gate, W_up, W_down, W_head):
        print(f"|d{tensor.name}| = {np.linalg.norm(tensor.grad):.4f}   {tensor.grad.shape}")


if __name__ == "__main__":
    main()
