"""Many narrow experts, and some that always run: what DeepSeekMoE cuts, what it sets apart, and what that costs.

Derivation: whiteboard/moe/shared.md     Source: DeepSeekMoE, arXiv:2401.06066, eq. 6-11
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import math
from typing import NamedTuple

import numpy as np

from minideepseek.basics.swiglu import swiglu_forward


class Shape(NamedTuple):
    """The shape of a mixture of experts. All experts, routed and shared, are SwiGLUs of width d_expert, without biases."""
    n_routed: int
    n_shared: int        # run for every token, ungated
    top_k: int           # routed experts that a token uses
    d_expert: int


def segment(shape, m):
    """Cut every expert into m of 1/m the width, and use m times as many: the same parameters, the same work.

    Raises ValueError unless m is positive and divides the width.
    """
    if m < 1 or shape.d_expert % m:
        raise ValueError(f"m = {m} must be positive and divide d_expert = {shape.d_expert}")
    return Shape(m * shape.n_routed, m * shape.n_shared, m * shape.top_k, shape.d_expert // m)              # eq. 1


def isolate(shape, n_shared):
    """Make n_shared of the experts that a token uses shared ones: they always run, and the router no longer sees them.

    Raises ValueError unless at least one place is left for the router to fill.
    """
    if not 0 <= n_shared < shape.top_k:
        raise ValueError(f"n_shared = {n_shared} must be from 0 to {shape.top_k - 1}: top_k = {shape.top_k} leaves the router no place otherwise")
    return Shape(shape.n_routed - n_shared, shape.n_shared + n_shared, shape.top_k - n_shared, shape.d_expert)   # eq. 2


def combinations(shape):
    """How many different sets of routed experts a token can be given (no limit to groups)."""
    return math.comb(shape.n_routed, shape.top_k)                                                           # eq. 3


def parameters(shape, d_model):
    """{"router", "routed", "shared"}: the trained numbers of one layer. An expert is three matrices, the router one."""
    expert = 3 * d_model * shape.d_expert                                                                   # eq. 4
    return {"router": d_model * shape.n_routed, "routed": shape.n_routed * expert, "shared": shape.n_shared * expert}   # eq. 5


def active_parameters(shape, d_model):
    """The same parts, as one token uses them: top_k of the routed experts, all of the rest."""
    everything = parameters(shape, d_model)
    return everything | {"routed": everything["routed"] // shape.n_routed * shape.top_k}                    # eq. 6


def flops_per_token(shape, d_model):
    """The same parts, as work of a forward pass: a multiply and an add are two flops; curves, gates, sorting not counted."""
    return {part: 2 * size for part, size in active_parameters(shape, d_model).items()}                     # eq. 7


def split_expert(W_gate, W_up, W_down, m):
    """Cut one SwiGLU along its hidden width into m narrow ones; their answers add up to the whole one's.

    (D, F), (D, F), (F, D)   ->   (m, D, F/m), (m, D, F/m), (m, F/m, D), stacked as `experts` takes them
    Raises ValueError unless m is positive and divides F.
    """
    D, F = W_gate.shape
    if m < 1 or F % m:
        raise ValueError(f"m = {m} must be positive and divide the hidden width {F}")
    return (W_gate.reshape(D, m, F // m).swapaxes(0, 1).copy(),                                             # eq. 8
            W_up.reshape(D, m, F // m).swapaxes(0, 1).copy(),                                               # eq. 9
            W_down.reshape(m, F // m, D).copy())                                                            # eq. 10


def demo():
    """From 16 wide experts to 63 narrow ones and a shared one, step by step; and the pieces against the whole."""
    D = 1024
    coarse = Shape(n_routed=16, n_shared=0, top_k=2, d_expert=4096)
    fine = segment(coarse, 4)
    steps = {"coarse": coarse, "segmented": fine, "and isolated": isolate(fine, 1)}
    print(f"shapes    {'D = 1024':14s} routed shared top_k width    combinations  in experts  used a token  router  copies sent")
    for name, shape in steps.items():
        size, used = parameters(shape, D), active_parameters(shape, D)
        print(f"          {name:14s} {shape.n_routed:6} {shape.n_shared:6} {shape.top_k:5} {shape.d_expert:5} {combinations(shape):15,} "
              f"{size['routed'] + size['shared']:11,} {used['routed'] + used['shared']:13,} {size['router']:7,} {shape.top_k:12}")
    print(f"by hand   2 of 16: 16 * 15 / 2 = {combinations(coarse)}")

    rng = np.random.default_rng(0)
    x, *W = [rng.standard_normal(s) / s[0] ** 0.5 for s in [(5, 12), (12, 24), (12, 24), (24, 12)]]
    whole, _ = swiglu_forward(x, *W)
    pieces = sum(swiglu_forward(x, *piece)[0] for piece in zip(*split_expert(*W, 4)))
    difference = np.abs(pieces - whole).max() / np.abs(whole).max()
    print(f"claim     four narrow experts add up to the wide one: max difference {difference:.0e} of its largest answer")

    experts = {name: parameters(shape, D)["routed"] + parameters(shape, D)["shared"] for name, shape in steps.items()}
    work = {name: flops_per_token(shape, D) for name, shape in steps.items()}
    light = work["segmented"]["router"] / work["segmented"]["routed"]
    print(f"claim     the same numbers in all three, the same used; a router 4 times as wide, still {light:.1%} of the experts' work")
    assert difference < 1e-15 and len(set(experts.values())) == 1
    assert len({sum(flops.values()) - flops["router"] for flops in work.values()}) == 1
    assert [combinations(shape) for shape in steps.values()] == [120, 4_426_165_368, 553_270_671]


if __name__ == "__main__":
    from minideepseek.moe.shared import demo  # the imported copy, so that every name exists once
    demo()
