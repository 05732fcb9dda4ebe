"""The experts: each token visits the few that were chosen for it, and their answers are added up by gate.

Derivation: whiteboard/moe/experts.md     Source: DeepSeek-V3, arXiv:2412.19437, eq. 12
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

from types import SimpleNamespace

import numpy as np
from scipy.sparse import csr_array

from minideepseek.autograd.gradcheck import report
from minideepseek.autograd.tape import op
from minideepseek.basics.linear import matmul
from minideepseek.basics.swiglu import swiglu_backward, swiglu_forward


def experts_forward(x, gate, chosen, W_gate, W_up, W_down, *, gemm=matmul):
    """Sort the assignments by expert, run each expert once on all its tokens, add up the answers by gate.

    x: (..., D)   gate: (..., K)   chosen: (..., K) int < E   W_gate: (E, D, F)   W_up: (E, D, F)   W_down: (E, F, D)
    ->   y: (..., D)

    One product per expert, on its own tokens only: nothing is padded and nothing is dropped. gemm: see linear.
    """
    E, D, _ = W_gate.shape
    M, K = gate.size // gate.shape[-1], gate.shape[-1]
    A = M * K
    order = np.argsort(chosen.reshape(A).astype(np.int16), kind="stable")           # (A,)     # eq. 1
    token = order // K                                                              # (A,)     # eq. 2
    counts = np.bincount(chosen.reshape(A), minlength=E)                            # (E,)
    rows = [slice(end - n, end) for n, end in zip(counts, counts.cumsum())]         # the assignments of each expert
    x_sorted = x.reshape(M, D)[token]                                               # (A, D)   # eq. 3
    gate_sorted = gate.reshape(A)[order]                                            # (A,)     # eq. 4
    y_sorted = np.empty_like(x_sorted)                                              # (A, D)
    caches = [None] * E
    for e in np.flatnonzero(counts):
        y_sorted[rows[e]], caches[e] = swiglu_forward(x_sorted[rows[e]], W_gate[e], W_up[e], W_down[e], gemm=gemm)    # eq. 5
    combine = csr_array((gate_sorted, (token, np.arange(A))), shape=(M, A))         # row: a token, column: an assignment
    y = (combine @ y_sorted).reshape(x.shape)                                       # (..., D)   # eq. 6
    return y, SimpleNamespace(shape=x.shape, gate_shape=gate.shape, order=order, token=token, counts=counts, rows=rows,
                              gate_sorted=gate_sorted, y_sorted=y_sorted, caches=caches, weights=(W_gate, W_up, W_down))


def experts_backward(dy, cache):
    """Dispatch and combine exchange their places: what was added up is handed out, what was handed out is added up."""
    order, token, rows = cache.order, cache.token, cache.rows
    A, D = cache.y_sorted.shape
    M = A // cache.gate_shape[-1]
    dy_sorted = dy.reshape(M, D)[token]                                             # (A, D)   # eq. 7
    dgate = np.empty(A, dy.dtype)                                                   # (A,)
    dgate[order] = np.vecdot(dy_sorted, cache.y_sorted)                             # eq. 8
    dy_expert = dy_sorted * cache.gate_sorted[:, None]                              # (A, D)   # eq. 9
    dW_gate, dW_up, dW_down = [np.zeros_like(W) for W in cache.weights]             # an expert nobody chose keeps its zeros
    dx_sorted = np.empty_like(dy_sorted)                                            # (A, D)
    for e in np.flatnonzero(cache.counts):
        dx_sorted[rows[e]], dW_gate[e], dW_up[e], dW_down[e] = swiglu_backward(dy_expert[rows[e]], cache.caches[e])   # eq. 10
    collect = csr_array((np.ones(A, dy.dtype), (token, np.arange(A))), shape=(M, A))
    dx = (collect @ dx_sorted).reshape(cache.shape)    # a token fed K experts: add # (..., D)   # eq. 11
    return dx, dgate.reshape(cache.gate_shape), None, dW_gate, dW_up, dW_down


experts = op(experts_forward, experts_backward)


def experts_examples(rng):
    def case(x_shape, chosen):
        D, E, F = x_shape[-1], 4, 3
        weights = [rng.standard_normal(shape) for shape in [(E, D, F), (E, D, F), (E, F, D)]]
        return (rng.standard_normal(x_shape), rng.random(chosen.shape) + 0.5, chosen, *weights), {}

    return {
        "tokens": case((3, 5), np.array([[2, 0], [3, 1], [0, 2]])),
        "batch, expert 1 idle": case((2, 3, 5), np.array([[[0, 3], [2, 0], [3, 2]], [[0, 2], [0, 3], [2, 3]]])),
        "one expert each": case((3, 5), np.array([[1], [1], [3]])),
    }


def demo():
    """One number by hand, the gradients, and the sorted dispatch against the plainest loop."""
    ones = np.ones((2, 1, 1))
    y, _ = experts_forward(np.array([[2.0]]), np.array([[0.25, 0.75]]), np.array([[1, 0]]), ones, ones, ones * [[[4.0]], [[8.0]]])
    print("shapes    x (1, 1), gate (1, 2), chosen (1, 2), W_gate (2, 1, 1), W_up (2, 1, 1), W_down (2, 1, 1) -> y (1, 1)")
    print(f"by hand   silu(2) 2 = 3.5232; expert 1 answers 8 times that, expert 0 4 times: y = 3.5232 (0.25 * 8 + 0.75 * 4) = {y.item():.4f}")
    report(experts_forward, experts_backward, experts_examples)

    args, _ = experts_examples(np.random.default_rng(0))["batch, expert 1 idle"]
    x, gate, chosen, *W = args
    y, _ = experts_forward(*args)
    plain = np.zeros_like(y)
    for place in np.ndindex(chosen.shape):
        e = chosen[place]
        plain[place[:-1]] += gate[place] * swiglu_forward(x[place[:-1]], *[w[e] for w in W])[0]
    difference = np.abs(plain - y).max()
    print(f"claim     sorted dispatch = a loop over tokens and experts: max difference {difference:.0e}")
    assert difference < 1e-13


if __name__ == "__main__":
    from minideepseek.moe.experts import demo  # the imported copy, so that every name exists once
    demo()
