"""Balance without a loss: after each step, lower the selection bias of busy experts, raise that of idle ones.

Derivation: whiteboard/moe/bias_balance.md     Source: Wang et al. 2024, arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437, sec. 2.1.2
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import math

import numpy as np

from minideepseek.moe.router import router_forward


def expert_counts(chosen, n_routed):
    """How many tokens each expert of one layer serves: chosen (..., top_k) -> counts, int64 (n_routed,).

    Counts of micro-batches, and of workers, are added up before the rule looks at them.
    Raises ValueError for ids that are not whole numbers from 0 to n_routed - 1.
    """
    chosen = np.asarray(chosen)
    if chosen.dtype.kind not in "iu":
        raise ValueError(f"chosen has dtype {chosen.dtype}, expected integer ids")
    if chosen.size and not (chosen.min() >= 0 and chosen.max() < n_routed):
        worst = chosen.min() if chosen.min() < 0 else chosen.max()
        raise ValueError(f"chosen has the id {worst}, which is not in 0 .. {n_routed - 1}: n_routed = {n_routed}")
    return np.bincount(chosen.reshape(-1).astype(np.int64), minlength=n_routed).astype(np.int64)        # eq. 1


def update_bias(b_select, counts, gamma):
    """The rule: b + gamma sign(mean(counts) - counts), a new array; an overloaded expert goes DOWN by gamma.

    b_select, counts: (E,), of one layer   gamma: the step, 0.001 in V3 and 0 for its last 500B tokens
    -> b_select of the next step, same dtype

    Call it after the optimiser's step with the counts of the whole batch, never in evaluation: a bias knows past
    batches only. It is no weight: no gradient, no optimiser, no decay. It returns an array and changes none.
    Raises ValueError when the shapes differ, a count is negative, gamma is negative or not finite, b_select not floating.
    """
    b_select, counts = np.asarray(b_select), _door(counts)
    if b_select.shape != counts.shape:
        raise ValueError(f"b_select has shape {b_select.shape}, counts has shape {counts.shape}: one number per expert each")
    if b_select.dtype.kind != "f":
        raise ValueError(f"b_select has dtype {b_select.dtype}, expected floating point: a step of {gamma} would be lost")
    if not (gamma >= 0 and math.isfinite(gamma)):
        raise ValueError(f"gamma = {gamma} must be finite and not negative")
    direction = np.sign(counts.mean() - counts).astype(b_select.dtype)                                  # eq. 2
    return b_select + float(gamma) * direction                                                          # eq. 3


def max_violation(counts):
    """MaxVio = (max - mean) / mean: by how much the busiest expert exceeds its due; 0 at perfect balance.

    Raises ValueError when nothing was counted, or a count is negative.
    Source: Wang et al. 2024, arXiv:2408.15664.
    """
    counts = _door(counts)
    if not counts.any():
        raise ValueError(f"counts = {counts.tolist()}: nothing was counted, so there is no mean to compare with")
    return float((counts.max() - counts.mean()) / counts.mean())                                        # eq. 4


def _door(counts):
    """The counts of one layer as an array. Raises ValueError unless it has one axis, and finite entries that are not negative."""
    counts = np.asarray(counts)
    if counts.ndim != 1 or not counts.size:
        raise ValueError(f"counts has shape {counts.shape}, expected (E,): the experts of one layer")
    wrong = ~((counts >= 0) & np.isfinite(counts))                  # written this way round: nan must fail
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ValueError(f"counts[{i}] = {counts[i]}: a count is finite and not negative")
    return counts


def demo():
    """Three experts by hand, and a skewed router that the rule alone balances."""
    b = update_bias(np.zeros(3), np.array([5, 3, 1]), gamma=0.001)
    print("shapes    chosen (..., top_k) -> counts (E,); b_select (E,), counts (E,) -> b_select (E,)")
    print("by hand   counts (5, 3, 1), mean 3: the biases move by", *b, f"and MaxVio = (5 - 3) / 3 = {max_violation([5, 3, 1]):.4f}")

    rng = np.random.default_rng(0)
    E, D, K, M = 8, 16, 2, 1024
    W_router = rng.standard_normal((D, E)) / D**0.5
    W_router[0] = np.linspace(-1.5, 1.5, E)                         # the first channel is always 1: a favour for the last experts

    def batch_counts(b_select):
        x = rng.standard_normal((M, D))
        x[:, 0] = 1
        (_, chosen), _ = router_forward(x, W_router, top_k=K, b_select=b_select)
        return expert_counts(chosen, E)

    b_select, steps, gamma = np.zeros(E), 200, 0.005
    before = batch_counts(b_select)
    for _ in range(steps):                                          # a training loop without the training: W_router stays
        counts = batch_counts(b_select)
        b_select = update_bias(b_select, counts, gamma)             # after the step, for the next batch
    after = batch_counts(b_select)                                  # a fresh batch, and no update: evaluation
    print("          counts before", before, " after", after)
    print(f"claim     MaxVio {max_violation(before):.2f} -> {max_violation(after):.2f} after {steps} steps of {gamma}, no gradient, the router unchanged")
    assert max_violation(before) > 1 and max_violation(after) < 0.25


if __name__ == "__main__":
    from minideepseek.moe.bias_balance import demo  # the imported copy, so that every name exists once
    demo()
