"""A doubled slope: the balance loss pushes harder than it was told to.

    python examples/bugs/08_a_doubled_slope.py            # the symptom
    python examples/bugs/08_a_doubled_slope.py --fix      # without the bug

The balance loss is the sum of f_e P_e over the experts: f counts choices, P is a mean probability. A small step against the
gradient of the router must lower it by the step times the squared norm of the gradient. It falls by half of that. Which of
the two factors did somebody differentiate who should not have?

A path to the cause, at the prompt:

    $ python -m pdb examples/bugs/08_a_doubled_slope.py
    tbreak show                by now the tape has been replayed
    c
    from minideepseek.debug.explain import explain
    wrong = explain(tape, W_router)      the factor, the page and the equation
    p tape.records[0].cache[3]           f: would a small step of the router change a count?

Derivation: whiteboard/moe/balance_loss.md     Bug 24 of the museum
"""
import os
import sys

sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]   # run as a script: take the package from this repository

import numpy as np

from minideepseek.autograd.tape import Tape, Tensor, op
from minideepseek.basics.linear import linear_backward
from minideepseek.basics.softmax import softmax_backward
from minideepseek.moe.balance_loss import batch_balance_examples, batch_balance_forward


def my_backward(dloss, cache):
    """Back through sum_e f_e P_e, where both f and P are means over the same tokens."""
    linear_cache, x_shape, score, f = cache
    dP = f * dloss + f * dloss
    dlogits = softmax_backward(dP / len(score), score)              # (M, E)
    dx_rows, dW_router = linear_backward(dlogits, linear_cache)     # (M, D) (D, E)   # eq. 29
    return dx_rows.reshape(x_shape), dW_router


balance = op(batch_balance_forward, my_backward)


def show(tape, W_router, loss_of):
    """How much the loss falls in a step of 1e-4 against the gradient, and by how much it should."""
    record = tape.records[0]
    slope = (W_router.grad ** 2).sum()
    falls = (loss_of(W_router.data) - loss_of(W_router.data - 1e-4 * W_router.grad)) / 1e-4
    print(f"a step down the gradient lowers {record.name} by {falls:.5f} times its length; the squared norm says {slope:.5f}")
    print("symptom:", "here" if abs(falls / slope - 1) > 0.01 else "gone")


def main():
    (x, W), config = batch_balance_examples(np.random.default_rng(0))["V2, by expert"]
    W_router = Tensor(W, "W_router")
    with Tape() as tape:
        loss = balance(x, W_router, **config)
    tape.backward(loss, keep=True)
    show(tape, W_router, lambda W: batch_balance_forward(x, W, **config)[0])


if __name__ == "__main__":
    if "--fix" in sys.argv:                            # the answer: find your own first
        def my_backward(dloss, cache):
            linear_cache, x_shape, score, f = cache
            dP = f * dloss
            dlogits = softmax_backward(dP / len(score), score)
            dx_rows, dW_router = linear_backward(dlogits, linear_cache)
            return dx_rows.reshape(x_shape), dW_router

        balance = op(batch_balance_forward, my_backward)
    main()
