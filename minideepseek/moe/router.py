"""The router: which experts serve a token, and with what weight. DeepSeek-V3's, and V2's before it.

Derivation: whiteboard/moe/router.md     Source: DeepSeek-V3, arXiv:2412.19437, sec. 2.1.2
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import numpy as np

from minideepseek.autograd.gradcheck import report
from minideepseek.autograd.tape import op
from minideepseek.basics.linear import linear_backward, linear_forward
from minideepseek.basics.softmax import softmax_backward, softmax_forward
from minideepseek.basics.swiglu import sigmoid


def best(values, k):
    """The places of the k largest values of the last axis, largest first; of equal ones the lowest place."""
    return np.argsort(-values, axis=-1, kind="stable")[..., :k]


def group_scores(biased, n_groups, scoring):
    """What each group of experts counts: (M, E) -> (M, J). V3 adds up its two best biased scores, V2 takes the best."""
    ranked = np.sort(biased.reshape(len(biased), n_groups, -1), axis=-1)        # (M, J, E/J)
    n_best = 2 if scoring == "sigmoid" else 1
    return ranked[:, :, -n_best:].sum(axis=-1)                                  # eq. 4


def choose(score, b_select, *, top_k, n_groups, n_groups_kept, scoring):
    """Pick top_k experts of the kept groups by biased score. A choice has no gradient: everything here is a constant.

    score: (M, E)   b_select: (E,) or None   ->   chosen: int (M, top_k), best first
    """
    biased = score if b_select is None else score + b_select                    # (M, E)      # eq. 3
    reachable = biased                                                          # (M, E)
    if n_groups > 1:
        M, E = score.shape
        groups = biased.reshape(M, n_groups, E // n_groups)                     # (M, J, E/J)
        group_score = group_scores(biased, n_groups, scoring)                   # (M, J)
        kept = np.zeros(group_score.shape, bool)                                # (M, J)
        np.put_along_axis(kept, best(group_score, n_groups_kept), True, axis=-1)
        reachable = np.where(kept[:, :, None], groups, -np.inf).reshape(M, E)   # (M, E)      # eq. 5
    return best(reachable, top_k)                                               # eq. 6


def router_forward(x, W_router, *, top_k, b_select=None, scoring="sigmoid", n_groups=1, n_groups_kept=1,
                   normalise=True, scaling=1.0):
    """Score every expert, choose by biased score, weigh by unbiased score.

    x: (..., D)   W_router: (D, E)   top_k: K   b_select: (E,)   n_groups: J   ->   gate: (..., K)   chosen: (..., K)

    scoring: "sigmoid" is V3's, a group counts as the sum of its two best biased scores; "softmax" is V2's, a group
    counts as its best one. b_select only selects, and is never differentiated. n_groups_kept: groups a token may
    use. normalise: the gates of a token sum to 1 before scaling multiplies them. Runs in the precision of x: no gemm.
    Source: DeepSeek-V3, arXiv:2412.19437, eq. 13, 15, 16; the groups and scaling are those of its released code.
    """
    logits, linear_cache = linear_forward(x.reshape(-1, x.shape[-1]), W_router)                         # (M, E)   # eq. 1
    score = sigmoid(logits) if scoring == "sigmoid" else softmax_forward(logits)[0]                     # (M, E)   # eq. 2
    chosen = choose(score, b_select, top_k=top_k, n_groups=n_groups, n_groups_kept=n_groups_kept, scoring=scoring)   # (M, K)
    picked = np.take_along_axis(score, chosen, axis=-1)                                                 # (M, K)   # eq. 7
    total = picked.sum(axis=-1, keepdims=True) + 1e-20 if normalise else np.ones_like(picked[:, :1])    # (M, 1)   # eq. 8
    share = picked / total                                                                              # (M, K)   # eq. 9
    gate = share * scaling                                                                              # (M, K)   # eq. 10
    shape = (*x.shape[:-1], top_k)
    return (gate.reshape(shape), chosen.reshape(shape)), (linear_cache, x.shape, score, chosen, share, total, scoring, normalise, scaling)


def router_backward(dgate, cache):
    """Through the weights, never through the choice: an expert that was not chosen hears nothing from a sigmoid."""
    linear_cache, x_shape, score, chosen, share, total, scoring, normalise, scaling = cache
    dshare = dgate.reshape(share.shape) * scaling                                                       # (M, K)   # eq. 11
    common = np.sum(dshare * share, axis=-1, keepdims=True) if normalise else 0.0                       # (M, 1)   # eq. 12
    dpicked = (dshare - common) / total     # as numerator, and through the total                      # (M, K)   # eq. 13
    dscore = np.zeros_like(score)                                                                       # (M, E)
    np.put_along_axis(dscore, chosen, dpicked, axis=-1)                                                 # eq. 14
    if scoring == "sigmoid":
        dlogits = dscore * score * (1 - score)                                                          # (M, E)   # eq. 15
    else:
        dlogits = softmax_backward(dscore, score)                                                       # (M, E)   # eq. 16
    dx, dW_router = linear_backward(dlogits, linear_cache)                                              # (M, D) (D, E)   # eq. 17
    return dx.reshape(x_shape), dW_router


router = op(router_forward, router_backward)


def wide_gaps(draw, config, least=0.005):
    """Draw (x, W_router) until every choice is clear by `least`: between neighbours among the best top_k + 1 experts,
    and between the last group kept and the first one dropped.

    A finite difference must not flip a choice: this is what freezes the selection.
    """
    options = {"b_select": None, "n_groups": 1, "n_groups_kept": 1, "scoring": "sigmoid"}
    options = {name: config.get(name, default) for name, default in options.items()}
    while True:
        x, W_router = draw()
        logits = x.reshape(-1, x.shape[-1]) @ W_router
        score = sigmoid(logits) if options["scoring"] == "sigmoid" else softmax_forward(logits)[0]
        biased = score if options["b_select"] is None else score + options["b_select"]
        leaders = np.take_along_axis(biased, choose(score, **options, top_k=config["top_k"] + 1), axis=-1)
        group_score = np.sort(group_scores(biased, options["n_groups"], options["scoring"]), axis=-1)[:, ::-1]
        border = group_score[:, options["n_groups_kept"] - 1:options["n_groups_kept"] + 1]
        if min(np.abs(np.diff(values, axis=-1)).min(initial=1) for values in (leaders, border)) > least:
            return x, W_router


def router_examples(rng):
    def case(*shape, **config):
        draw = lambda: (rng.standard_normal(shape), rng.standard_normal((shape[-1], 8)))
        return wide_gaps(draw, config), config

    bias = np.array([0.3, -0.2, 0.1, 0.0, -0.4, 0.25, -0.1, 0.05])
    groups = {"n_groups": 4, "n_groups_kept": 2}
    return {
        "V3: groups, normalised, scaled": case(2, 3, 5, top_k=3, b_select=bias, **groups, scaling=2.5),
        "V3: not normalised": case(3, 5, top_k=2, b_select=bias, normalise=False),
        "V2: greedy": case(3, 5, top_k=3, scoring="softmax", normalise=False, scaling=16.0),
        "V2: groups": case(3, 5, top_k=2, scoring="softmax", normalise=False, **groups),
    }


def demo():
    """Four experts by hand, the gradients, and a bias that selects without weighing."""
    logit = np.log([[1.0, 3.0, 1 / 3, 1.0]])                       # sigmoid: 1/2, 3/4, 1/4, 1/2
    (gate, chosen), _ = router_forward(logit, np.eye(4), top_k=2)
    print("shapes    x (1, 4), W_router (4, 4) -> gate (1, 2), chosen (1, 2)")
    print("by hand   scores 1/2, 3/4, 1/4, 1/2: chosen", chosen[0], "with gates", gate[0], "(of the equal two, the first)")
    report(router_forward, router_backward, router_examples)

    (gate, chosen), _ = router_forward(logit, np.eye(4), top_k=2, b_select=np.array([0, 0, 0.6, 0]))
    print(f"claim     a bias of 0.6 brings expert 2 in, at its own weight 0.25 / (0.25 + 0.75) = {gate[0][chosen[0] == 2][0]:.2f}")
    from minideepseek.plots.canvas import plot_path
    from minideepseek.plots.experts import routing_map
    if path := plot_path():            # V3's rule for a random batch: each token keeps two of four groups, and picks four experts there
        x, W_router = np.random.default_rng(0).standard_normal((2, 12, 12))
        (weight, picks), (_, _, score, *_) = router_forward(x, W_router / 3, top_k=4, n_groups=4, n_groups_kept=2)
        kept = np.zeros((12, 4), bool)
        np.put_along_axis(kept, best(group_scores(score, 4, "sigmoid"), 2), True, axis=-1)
        routing_map(score, picks, gate=weight, n_groups=4, kept=kept, path=path)
    assert sorted(chosen[0]) == [1, 2] and abs(gate[0][chosen[0] == 2][0] - 0.25) < 1e-15


if __name__ == "__main__":
    from minideepseek.moe.router import demo  # the imported copy, so that every name exists once
    demo()
