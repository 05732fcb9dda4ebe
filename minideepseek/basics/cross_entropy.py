"""Cross entropy: how many nats the model needs, on average, to write down the right token; fused with softmax.

Derivation: whiteboard/basics/cross_entropy.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import math

import numpy as np

from minideepseek.autograd.gradcheck import report
from minideepseek.autograd.tape import op
from minideepseek.basics.softmax import log_softmax_forward


def cross_entropy_forward(logits, targets, *, ignore_index=-100):
    """Minus the log-probability of the target token, in nats, averaged over the valid targets.

    logits: (..., U)   targets: (...) int < U or ignore_index   ->   loss: ()

    ignore_index: a target of this value (padding, a prompt) does not count. With no valid target the loss is 0.
    """
    log_p, _ = log_softmax_forward(logits.reshape(-1, logits.shape[-1]))        # (M, U)   # eq. 1
    flat = targets.reshape(-1)                                                  # (M,)
    rows = np.flatnonzero(flat != ignore_index)                                 # the positions that count
    n_valid = max(len(rows), 1)
    loss = -log_p[rows, flat[rows]].sum() / n_valid                             # ()       # eq. 2
    return loss, (log_p, flat, rows, n_valid, logits.shape)


def cross_entropy_backward(dloss, cache):
    """Probability minus one-hot, shared out over the valid targets; ignored positions get exactly zero."""
    log_p, targets, rows, n_valid, shape = cache
    difference = np.exp(log_p)                                                  # (M, U)     p ...
    difference[rows, targets[rows]] -= 1                                        # ... - onehot
    share = np.zeros((log_p.shape[0], 1), log_p.dtype)                          # (M, 1)     of each position in the mean
    share[rows] = dloss / n_valid
    dlogits = (difference * share).reshape(shape)                               # (..., U)   # eq. 3
    return dlogits, None


cross_entropy = op(cross_entropy_forward, cross_entropy_backward)


def cross_entropy_examples(rng):
    return {
        "tokens": ((rng.standard_normal((4, 5)), rng.integers(0, 5, 4)), {}),
        "batch, some ignored": ((rng.standard_normal((2, 3, 5)), np.array([[1, -100, 4], [-100, 0, 1]])), {}),
        "ignore_index 0": ((rng.standard_normal((4, 3)), np.array([2, 0, 1, 1])), {"ignore_index": 0}),
    }


def demo():
    """One token by hand, the gradient, and the loss of a model that knows nothing."""
    loss, cache = cross_entropy_forward(np.log([[1.0, 2.0, 5.0]]), np.array([2]))
    print("shapes    logits (1, 3), targets (1,) -> loss ()")
    print(f"by hand   the target has probability 5/8: loss = -log(5/8) = {loss:.4f} nats")
    report(cross_entropy_forward, cross_entropy_backward, cross_entropy_examples)

    U = 129_280
    loss, _ = cross_entropy_forward(np.zeros((1, U)), np.array([7]))
    print(f"claim     equal logits over {U:,} tokens: loss {loss:.6f} = log({U:,}) {math.log(U):.6f}")
    assert abs(loss - math.log(U)) < 1e-12


if __name__ == "__main__":
    from minideepseek.basics.cross_entropy import demo  # the imported copy, so that every name exists once
    demo()
