"""Balance without a loss: after each step, lower the selection bias of busy experts, raise that of idle ones.

Derivation: whiteboard/moe/bias_balance.md     Source: Wang et al. 2024, arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437, sec. 2.1.2
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import math

import numpy as np

from minideepseek.basics.swiglu import sigmoid
from minideepseek.moe.router import choose
from minideepseek.plots.canvas import panels, plot_path
from minideepseek.plots.experts import bias_trajectories, load_over_training, violation_curves


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


def update_bias(b_select, counts, gamma, rule="sign"):
    """The rule: b + gamma sign(mean(counts) - counts), a new array; an overloaded expert goes DOWN by gamma.

    b_select, counts: (E,), of one layer   gamma: the step, 0.001 in V3 and 0 for its last 500B tokens
    rule: "sign" is V3's; "proportional" steps by gamma (mean - count), in choices, so ten times the batch is ten times
    the step; "relative" divides that by the mean, which is ours and in no paper
    -> b_select of the next step, same dtype

    Call it after the optimiser's step with the counts of the whole batch, never in evaluation: a bias knows past
    batches only. It is no weight: no gradient, no optimiser, no decay. It returns an array and changes none.
    Raises ValueError when the shapes differ, a count is negative, gamma is negative or not finite, b_select not floating,
    the rule unknown, or nothing was counted and the rule is relative.
    """
    b_select, counts = np.asarray(b_select), _door(counts, some=rule == "relative")
    if b_select.shape != counts.shape:
        raise ValueError(f"b_select has shape {b_select.shape}, counts has shape {counts.shape}: one number per expert each")
    if b_select.dtype.kind != "f":
        raise ValueError(f"b_select has dtype {b_select.dtype}, expected floating point: a step of {gamma} would be lost")
    if not (gamma >= 0 and math.isfinite(gamma)):
        raise ValueError(f"gamma = {gamma} must be finite and not negative")
    if rule == "sign":
        move = np.sign(counts.mean() - counts)                                                          # eq. 2
    elif rule == "proportional":
        move = counts.mean() - counts                                                                   # eq. 7
    elif rule == "relative":
        move = 1 - counts / counts.mean()                                                               # eq. 8
    else:
        raise ValueError(f"rule = {rule!r}, expected 'sign', 'proportional' or 'relative'")
    return b_select + float(gamma) * move.astype(b_select.dtype)                                        # eq. 3


def choose_multiplied(score, b_factor, *, top_k, n_groups=1, n_groups_kept=1, scoring="sigmoid"):
    """The bias as a factor: choose by score * b instead of score + b. A neutral b is 1; `update_bias` moves this one too.

    score: (M, E), not negative   b_factor: (E,)   ->   chosen: int (M, top_k), best first; gates still come from score
    The router's own choice, handed a score that is multiplied already: its groups and its top_k see nothing but that.
    Raises ValueError unless every factor is finite and above 0: a negative one would turn the order of the tokens around.
    Source: Wang et al. 2024, arXiv:2408.15664, tried beside the added bias; its form here is from memory.
    """
    b_factor = np.asarray(b_factor)
    wrong = ~((b_factor > 0) & np.isfinite(b_factor))               # written this way round: nan must fail
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ValueError(f"b_factor[{i}] = {b_factor[i]}: a factor is finite and above 0")
    product = score * b_factor                                                                          # eq. 9
    return choose(product, None, top_k=top_k, n_groups=n_groups, n_groups_kept=n_groups_kept, scoring=scoring)


def max_violation(counts):
    """MaxVio = (max - mean) / mean: by how much the busiest expert exceeds its due; 0 at perfect balance.

    Raises ValueError when nothing was counted, or a count is negative.
    Source: Wang et al. 2024, arXiv:2408.15664.
    """
    counts = _door(counts, some=True)
    return float((counts.max() - counts.mean()) / counts.mean())                                        # eq. 4


def max_violations(batches):
    """MaxVio of all batches together, and the mean of the batches' own: (global, batch).

    batches: (n, E), the counts of n batches of one layer
    For batches of one size the first never exceeds the second. It can be 0 while every single batch is lopsided.
    Raises ValueError for another number of axes, and where `max_violation` does.
    """
    batches = np.asarray(batches)
    if batches.ndim != 2 or not batches.size:
        raise ValueError(f"batches has shape {batches.shape}, expected (n, E): the counts of n batches")
    together = max_violation(batches.sum(axis=0))                                                       # eq. 5
    each = float(np.mean([max_violation(counts) for counts in batches]))                                # eq. 6
    return together, each


def _door(counts, some=False):
    """The counts of one layer as an array. Raises ValueError unless it has one axis, and finite entries that are not negative;
    with `some`, not all of them 0."""
    counts = np.asarray(counts)
    if counts.ndim != 1 or not counts.size:
        raise ValueError(f"counts has shape {counts.shape}, expected (E,): the experts of one layer")
    wrong = ~((counts >= 0) & np.isfinite(counts))                  # written this way round: nan must fail
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ValueError(f"counts[{i}] = {counts[i]}: a count is finite and not negative")
    if some and not counts.any():
        raise ValueError(f"counts = {counts.tolist()}: nothing was counted, so there is no mean to compare with")
    return counts


def demo():
    """Three experts by hand, and a skewed router that each rule balances alone, or fails to. --plot FILE.png draws it."""
    b = update_bias(np.zeros(3), np.array([5, 3, 1]), gamma=0.001)
    print("shapes    chosen (..., top_k) -> counts (E,); b_select (E,), counts (E,) -> b_select (E,)")
    print("by hand   counts (5, 3, 1), mean 3: the biases move by", *b, f"and MaxVio = (5 - 3) / 3 = {max_violation([5, 3, 1]):.4f}")

    E, D, K, M, steps, last = 8, 16, 2, 512, 200, 50
    ways = {"sign": ("sign", 0.005, False), "sign, b a factor": ("sign", 0.005, True), "relative": ("relative", 0.02, False),
            "proportional": ("proportional", 0.0002, False), "proportional, too fast": ("proportional", 0.005, False)}
    print(f"          MaxVio, each of the last {last} of {steps} batches | all {last} together")
    found, pictured = {}, {}
    for name, (rule, gamma, factor) in ways.items():
        rng = np.random.default_rng(0)
        W_router = rng.standard_normal((D, E)) / D**0.5
        W_router[0] = np.linspace(-1.5, 1.5, E)                     # the first channel is always 1: a favour for the last experts
        b, history, biases = np.full(E, float(factor)), [], []
        for _ in range(steps):                                      # a training loop without the training: W_router stays
            x = rng.standard_normal((M, D))
            x[:, 0] = 1
            score = sigmoid(x @ W_router)
            chosen = choose_multiplied(score, b, top_k=K) if factor else choose(score, b, top_k=K, n_groups=1, n_groups_kept=1, scoring="sigmoid")
            history.append(expert_counts(chosen, E))
            biases.append(b)
            b = update_bias(b, history[-1], gamma, rule)            # after the step, for the next batch
        before, (together, each) = max_violation(history[0]), max_violations(history[-last:])
        found[name], pictured[name] = (each, together), (np.array(history), np.array(biases))
        print(f"          {name:22s} gamma {gamma:<7g} {each:.2f} | {together:.3f}")
    print(f"claim     MaxVio {before:.2f} -> {found['sign'][0]:.2f}, no gradient, the router unchanged; "
          f"too fast {found['proportional, too fast'][0]:.2f}, which all batches together hide: {found['proportional, too fast'][1]:.3f}")
    assert before > 1 and all(each < 0.25 for each, _ in list(found.values())[:4])
    assert found["proportional, too fast"][0] > 1 and found["proportional, too fast"][1] < 0.1
    if path := plot_path():
        at, (loads, biases) = np.arange(steps), pictured["sign"]
        curves = {name: [max_violation(counts) for counts in history] for name, (history, _) in pictured.items()}
        panels(path, lambda ax: violation_curves(at, curves, ax=ax), lambda ax: load_over_training(at, loads, ax=ax),
               lambda ax: bias_trajectories(at, biases, ax=ax))


if __name__ == "__main__":
    from minideepseek.moe.bias_balance import demo  # the imported copy, so that every name exists once
    demo()
