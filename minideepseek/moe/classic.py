"""The classic layer: a softmax gate keeps the best few experts of a token, and the dense reference runs all of them anyway.

Derivation: whiteboard/moe/classic.md     Source: Shazeer et al. 2017, arXiv:1701.06538
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

from types import SimpleNamespace

import numpy as np

from minideepseek.autograd.gradcheck import report
from minideepseek.autograd.tape import op
from minideepseek.basics.swiglu import swiglu_backward, swiglu_forward
from minideepseek.moe.router import router_backward, router_forward, wide_gaps


def dense_moe_forward(x, W_router, W_gate, W_up, W_down, *, top_k, normalise=True):
    """Ask every expert about every token, and weigh the answers with gates that are 0 outside the best K.

    x: (..., D)   W_router: (D, E)   W_gate: (E, D, F)   W_up: (E, D, F)   W_down: (E, F, D)   top_k: K   ->   y: (..., D)

    Nothing is sorted: the plainest way to the true answer, at E / K times the price. normalise: the K gates of a token
    sum to 1. Not with top_k = 1: the gate is then the constant 1, and the router never learns.
    """
    E, D, _ = W_gate.shape
    tokens = x.reshape(-1, D)                                                               # (M, D)
    (gate, chosen), router_cache = router_forward(tokens, W_router, top_k=top_k, scoring="softmax", normalise=normalise)  # eq. 1
    gate_matrix = np.zeros((len(tokens), E), gate.dtype)                                    # (M, E)
    np.put_along_axis(gate_matrix, chosen, gate, axis=-1)                                   # eq. 2
    answers = np.empty((E, *tokens.shape), x.dtype)                                         # (E, M, D)
    caches = [None] * E
    for e in range(E):
        answers[e], caches[e] = swiglu_forward(tokens, W_gate[e], W_up[e], W_down[e])       # eq. 3
    y = (gate_matrix.T[:, :, None] * answers).sum(axis=0).reshape(x.shape)                  # (..., D)   # eq. 4
    return y, SimpleNamespace(router=router_cache, chosen=chosen, gate_matrix=gate_matrix, answers=answers, caches=caches,
                              weights=(W_gate, W_up, W_down))


def dense_moe_backward(dy, cache):
    """The forward read from the bottom up. A gate that was not chosen is a constant 0: what it hears is dropped."""
    dy_token = dy.reshape(-1, dy.shape[-1])                                                 # (M, D)
    dgate_matrix = np.vecdot(cache.answers, dy_token).T                                     # (M, E)   # eq. 5
    dgate = np.take_along_axis(dgate_matrix, cache.chosen, axis=-1)                         # (M, K)   # eq. 6
    danswers = cache.gate_matrix.T[:, :, None] * dy_token                                   # (E, M, D)   # eq. 7
    dx_each = np.empty_like(danswers)                                                       # (E, M, D)
    dW_gate, dW_up, dW_down = [np.empty_like(W) for W in cache.weights]
    for e, expert_cache in enumerate(cache.caches):
        dx_each[e], dW_gate[e], dW_up[e], dW_down[e] = swiglu_backward(danswers[e], expert_cache)  # eq. 8
    dx_experts = dx_each.sum(axis=0)                       # a token fed all experts: add    # (M, D)   # eq. 9
    dx_router, dW_router = router_backward(dgate, cache.router)                             # (M, D) (D, E)   # eq. 10
    dx = (dx_experts + dx_router).reshape(dy.shape)        # and the router: add            # (..., D)   # eq. 11
    return dx, dW_router, dW_gate, dW_up, dW_down


dense_moe = op(dense_moe_forward, dense_moe_backward)


def dense_moe_examples(rng):
    def case(x_shape, **config):
        D, E, F = x_shape[-1], 5, 3
        draw = lambda: (rng.standard_normal(x_shape), rng.standard_normal((D, E)))
        x, W_router = wide_gaps(draw, {"top_k": config["top_k"], "scoring": "softmax"})
        return (x, W_router, *[rng.standard_normal(s) / s[-2] ** 0.5 for s in [(E, D, F), (E, D, F), (E, F, D)]]), config

    return {
        "normalised": case((6, 4), top_k=2),
        "a batch, not normalised": case((2, 3, 4), top_k=3, normalise=False),
        "Switch: one expert, its probability": case((2, 4), top_k=1, normalise=False),
    }


def demo():
    """Three experts by hand, the gradients, the same layer by sorted dispatch, and a router that cannot learn."""
    from minideepseek.moe.deepseek_moe import deepseek_moe_backward, deepseek_moe_forward

    nothing = np.zeros((3, 3, 1)), np.zeros((3, 3, 1)), np.zeros((3, 1, 3))
    _, cache = dense_moe_forward(np.log([[3.0, 2.0, 1.0]]), np.eye(3), *nothing, top_k=2)
    print("shapes    x (1, 3), W_router (3, 3), W_gate (3, 3, 1), W_up (3, 3, 1), W_down (3, 1, 3) -> y (1, 3)")
    print("by hand   logits ln 3, ln 2, ln 1: scores 1/2, 1/3, 1/6; of the best two, shares of 5/6: gates", cache.gate_matrix[0].round(4))
    report(dense_moe_forward, dense_moe_backward, dense_moe_examples)

    rng = np.random.default_rng(0)
    args, config = dense_moe_examples(rng)["normalised"]
    y, cache = dense_moe_forward(*args, **config)
    (y_sorted, _), cache_sorted = deepseek_moe_forward(*args, None, None, None, scoring="softmax", **config)
    dy = rng.standard_normal(y.shape)
    pairs = zip((y, *dense_moe_backward(dy, cache)), (y_sorted, *deepseek_moe_backward(dy, cache_sorted)))
    difference = max(np.abs(dense - by_sorting).max() for dense, by_sorting in pairs)
    asked, needed = cache.gate_matrix.size, np.count_nonzero(cache.gate_matrix)
    print(f"claim     dense = sorted, the value and every gradient: max difference {difference:.0e}; {asked} answers computed, {needed} needed")

    args, _ = dense_moe_examples(rng)["Switch: one expert, its probability"]
    largest = {}
    for normalise in (True, False):
        y, cache = dense_moe_forward(*args, top_k=1, normalise=normalise)
        largest[normalise] = np.abs(dense_moe_backward(np.ones_like(y), cache)[1]).max()
    print(f"claim     one expert a token: max |dW_router| is {largest[True]} when the one gate is normalised, {largest[False]:.2f} when it is not")
    assert difference < 1e-12 and largest[True] == 0 < largest[False]


if __name__ == "__main__":
    from minideepseek.moe.classic import demo  # the imported copy, so that every name exists once
    demo()
