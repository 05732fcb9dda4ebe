"""DeepSeekMoE: a few routed experts of many, and a shared one that serves every token.

Derivation: whiteboard/moe/deepseek_moe.md     Source: DeepSeek-V3, arXiv:2412.19437, sec. 2.1.2
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from minideepseek.autograd.gradcheck import report
from minideepseek.autograd.tape import op
from minideepseek.basics.linear import matmul
from minideepseek.basics.swiglu import swiglu_backward, swiglu_forward
from minideepseek.moe.experts import experts_backward, experts_forward
from minideepseek.moe.router import router_backward, router_forward, wide_gaps


class MoEWeights(NamedTuple):
    """The weights in the order of deepseek_moe's arguments. n_shared experts are one of n_shared times the width."""
    W_router: np.ndarray                  # (D, E)
    W_gate: np.ndarray                    # (E, D, F)
    W_up: np.ndarray                      # (E, D, F)
    W_down: np.ndarray                    # (E, F, D)
    W_shared_gate: np.ndarray | None      # (D, L)    None: no shared expert
    W_shared_up: np.ndarray | None        # (D, L)
    W_shared_down: np.ndarray | None      # (L, D)


def deepseek_moe_forward(x, W_router, W_gate, W_up, W_down, W_shared_gate, W_shared_up, W_shared_down, *,
                         top_k, gemm=matmul, **routing):
    """Route every token to top_k experts and let the shared expert see it too: y = sum_i gate_i expert_i(x) + shared(x).

    x: (..., D)   W_router: (D, E)   W_gate: (E, D, F)   W_up: (E, D, F)   W_down: (E, F, D)
    W_shared_gate: (D, L) or None   W_shared_up: (D, L) or None   W_shared_down: (L, D) or None
    top_k: K   ->   y: (..., D)   chosen: (..., K)

    routing: the router's other options. The residual is not added here: the block adds it, once.
    Source: DeepSeek-V3, arXiv:2412.19437, eq. 12 without its u_t; the shared output is not scaled.
    """
    cache = SimpleNamespace()
    (gate, chosen), cache.router = router_forward(x, W_router, top_k=top_k, **routing)                  # eq. 1
    y_routed, cache.experts = experts_forward(x, gate, chosen, W_gate, W_up, W_down, gemm=gemm)         # (..., D)   # eq. 2
    y = y_routed
    if W_shared_gate is not None:
        y_shared, cache.shared = swiglu_forward(x, W_shared_gate, W_shared_up, W_shared_down, gemm=gemm)    # (..., D)   # eq. 3
        y = y_routed + y_shared                                                                         # (..., D)   # eq. 4
    return (y, chosen), cache


def deepseek_moe_backward(dy, cache):
    """The forward read from the bottom up. x fed the experts, the router and the shared expert: three roads meet in dx."""
    dx_experts, dgate, _, dW_gate, dW_up, dW_down = experts_backward(dy, cache.experts)                 # (..., D)   # eq. 5
    dx_router, dW_router = router_backward(dgate, cache.router)                                         # (..., D) (D, E)   # eq. 6
    dx_routed = dx_experts + dx_router                 # x fed both: add                                # (..., D)   # eq. 7
    dx = dx_routed
    dW_shared_gate = dW_shared_up = dW_shared_down = None
    if hasattr(cache, "shared"):
        dx_shared, dW_shared_gate, dW_shared_up, dW_shared_down = swiglu_backward(dy, cache.shared)     # (..., D) (D, L) (D, L) (L, D)   # eq. 8
        dx = dx_routed + dx_shared                     # and the shared expert                          # (..., D)   # eq. 9
    return dx, dW_router, dW_gate, dW_up, dW_down, dW_shared_gate, dW_shared_up, dW_shared_down


deepseek_moe = op(deepseek_moe_forward, deepseek_moe_backward)


def deepseek_moe_examples(rng):
    def case(x_shape, shared, **config):
        D, E, F, L = x_shape[-1], 6, 3, 7
        x, W_router = wide_gaps(lambda: (rng.standard_normal(x_shape), rng.standard_normal((D, E))), config)
        shapes = [(E, D, F), (E, D, F), (E, F, D)] + [(D, L), (D, L), (L, D)] * shared
        return (x, W_router, *[rng.standard_normal(s) / s[-2] ** 0.5 for s in shapes], *[None] * (3 - 3 * shared)), config

    bias = np.array([0.2, -0.1, 0.0, 0.15, -0.3, 0.1])
    return {
        "V3": case((4, 5), True, top_k=2, b_select=bias, n_groups=3, n_groups_kept=2, scaling=2.5),
        "V2, a batch": case((2, 3, 5), True, top_k=3, scoring="softmax", normalise=False),
        "no shared expert": case((3, 5), False, top_k=2),
    }


def demo():
    """Shapes, an expert layer that must equal a dense one, the gradients."""
    args, config = deepseek_moe_examples(np.random.default_rng(0))["V3"]
    (y, chosen), _ = deepseek_moe_forward(*args, **config)
    print("shapes    x", args[0].shape, " ".join(f"{name} {w.shape}" for name, w in zip(MoEWeights._fields, args[1:])), "-> y", y.shape)
    print("by hand   the experts chosen for each token:", *chosen.tolist())
    report(deepseek_moe_forward, deepseek_moe_backward, deepseek_moe_examples)

    rng = np.random.default_rng(1)
    x, W_router, W = rng.standard_normal((6, 5)), rng.standard_normal((5, 4)), [rng.standard_normal(s) for s in [(5, 3), (5, 3), (3, 5)]]
    (y, _), _ = deepseek_moe_forward(x, W_router, *[np.stack([w] * 4) for w in W], None, None, None, top_k=2)
    difference = np.abs(y - swiglu_forward(x, *W)[0]).max()
    print(f"claim     four equal experts, gates that sum to 1: the same as one dense layer, max difference {difference:.0e}")
    assert difference < 1e-13


if __name__ == "__main__":
    from minideepseek.moe.deepseek_moe import demo  # the imported copy, so that every name exists once
    demo()
