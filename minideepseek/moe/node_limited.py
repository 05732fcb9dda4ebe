"""Node-limited routing: a token may use experts of a few machines only, so that few copies of it travel.

Derivation: whiteboard/moe/node_limited.md     Source: DeepSeek-V2, arXiv:2405.04434, sec. 2.2; DeepSeek-V3, arXiv:2412.19437, sec. 2.1.2
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import math

import numpy as np

from minideepseek.basics.swiglu import sigmoid
from minideepseek.moe.bias_balance import expert_counts
from minideepseek.moe.router import choose


def choose_within(score, b_select=None, *, top_k, n_nodes, n_nodes_kept, scoring="sigmoid"):
    """The router's own choice, a group being the experts of one node: at most n_nodes_kept nodes for each token.

    score: (M, E)   b_select: (E,) or None   ->   chosen: int (M, top_k), best first
    scoring: which rule ranks the nodes. "sigmoid" is V3's, the sum of a node's two best biased scores (8 nodes, 4
    kept); "softmax" is V2's, its best one (8 devices, 3 kept). n_nodes_kept = n_nodes: no limit.
    Raises ValueError for scores that are not finite, nodes that do not divide the experts, or more than can be reached.
    """
    score = np.asarray(score)
    _rule(score.ndim == 2 and score.size, f"score has shape {score.shape}, expected (M, E), not empty")
    _rule(np.isfinite(score).all(), f"score holds {score[~np.isfinite(score)][:1]}: it must be finite")
    E = score.shape[1]
    size = _experts_per_node(E, n_nodes)
    _rule(b_select is None or np.shape(b_select) == (E,), f"b_select has shape {np.shape(b_select)}, expected ({E},)")
    _rule(0 < n_nodes_kept <= n_nodes, f"n_nodes_kept = {n_nodes_kept} is not in 1 .. {n_nodes}: n_nodes = {n_nodes}")
    _rule(0 < top_k <= size * n_nodes_kept, f"top_k = {top_k} is not in 1 .. {size * n_nodes_kept}: {n_nodes_kept} nodes of {size} experts")
    _rule(scoring in ("sigmoid", "softmax"), f"scoring = {scoring!r} must be 'sigmoid' or 'softmax'")
    return choose(score, b_select, top_k=top_k, n_groups=n_nodes, n_groups_kept=n_nodes_kept, scoring=scoring)


def nodes_touched(chosen, n_routed, n_nodes):
    """How many nodes serve each token: chosen (..., K) -> int (...). Neighbouring experts share a node.

    Raises ValueError for ids that are no experts, or nodes that do not divide them.
    """
    return _reached(chosen, n_routed, n_nodes).sum(axis=-1)                             # eq. 3


def transfers(chosen, home, n_routed, n_nodes, *, fan_out=True):
    """How many copies of each token cross from its home node to another: chosen (..., K), home (...) -> int (...).

    fan_out: one copy per node, however many of its experts want it; inside the node it is handed on over the faster
    links, as in V3. False: one copy per expert elsewhere.
    Raises ValueError as nodes_touched does, and for a home that is no node or does not fit chosen.
    """
    reached, home = _reached(chosen, n_routed, n_nodes), np.asarray(home)
    _rule(home.shape == reached.shape[:-1], f"home has shape {home.shape}, chosen has {reached.shape[:-1]} tokens")
    _rule(home.dtype.kind in "iu" and ((home >= 0) & (home < n_nodes)).all(), f"home must hold integers of 0 .. {n_nodes - 1}, the nodes")
    if fan_out:
        away = np.arange(n_nodes) != home[..., None]
        return (reached & away).sum(axis=-1)                                            # eq. 4
    node = np.asarray(chosen) // (n_routed // n_nodes)
    return (node != home[..., None]).sum(axis=-1)                                       # eq. 5


def expected_nodes(n_routed, n_nodes, top_k):
    """The mean of nodes_touched when every set of top_k experts is equally likely: J (1 - C(E - E/J, K) / C(E, K)).

    Raises ValueError for nodes that do not divide the experts, or a top_k that is not in 1 .. n_routed.
    """
    size = _experts_per_node(n_routed, n_nodes)
    _rule(0 < top_k <= n_routed, f"top_k = {top_k} is not in 1 .. {n_routed}: n_routed = {n_routed}")
    missed = math.comb(n_routed - size, top_k) / math.comb(n_routed, top_k)             # eq. 6
    return n_nodes * (1 - missed)                                                       # eq. 7


def overlap(free, limited):
    """How much of the unrestricted choice survives the limit: free, limited (..., K) -> the share, (...).

    Raises ValueError when the shapes differ.
    """
    free, limited = np.asarray(free), np.asarray(limited)
    _rule(free.shape == limited.shape, f"free has shape {free.shape}, limited has shape {limited.shape}")
    survives = (free[..., :, None] == limited[..., None, :]).any(axis=-1)
    return survives.mean(axis=-1)                                                       # eq. 8


def score_kept(score, free, limited):
    """How much of the score the limit leaves: the sum over limited, divided by the sum over free -> (...).

    score: (..., E)   free, limited: (..., K). Without a bias at most 1, since free is then the best there is.
    Raises ValueError when the shapes differ.
    """
    free, limited = np.asarray(free), np.asarray(limited)
    _rule(free.shape == limited.shape, f"free has shape {free.shape}, limited has shape {limited.shape}")
    total_free = np.take_along_axis(score, free, axis=-1).sum(axis=-1)
    total_limited = np.take_along_axis(score, limited, axis=-1).sum(axis=-1)
    return total_limited / total_free                                                   # eq. 9


def _reached(chosen, n_routed, n_nodes):
    """chosen (..., K) -> bool (..., J): which nodes hold an expert of the token."""
    size = _experts_per_node(n_routed, n_nodes)
    chosen = np.asarray(chosen)
    expert_counts(chosen, n_routed)                             # its door: integers of 0 .. n_routed - 1
    node = chosen // size                                                               # eq. 1
    reached = np.zeros((*chosen.shape[:-1], n_nodes), bool)
    np.put_along_axis(reached, node, True, axis=-1)                                     # eq. 2
    return reached


def _experts_per_node(n_routed, n_nodes):
    _rule(n_nodes > 0 and n_routed % n_nodes == 0, f"n_nodes = {n_nodes} must be positive and divide n_routed = {n_routed}")
    return n_routed // n_nodes


def _rule(holds, message):
    if not holds:
        raise ValueError(message)


def demo():
    """Two rules that disagree, by hand; then V3's sizes with random scores."""
    score = np.array([[0.9, 0.1, 0.6, 0.6, 0.5, 0.55]])            # three nodes of two experts, two nodes kept
    print("shapes    score (M, E) -> chosen (M, K) -> nodes touched (M,), copies between nodes (M,)")
    for name, scoring in (("V2, the best one of a node:   ", "softmax"), ("V3, the best two, added up:   ", "sigmoid")):
        chosen = choose_within(score, top_k=4, n_nodes=3, n_nodes_kept=2, scoring=scoring)
        total = np.take_along_axis(score, chosen, axis=-1).sum()
        print(f"by hand   {name} experts {sorted(chosen[0].tolist())}, total score {total:.2f}")

    rng = np.random.default_rng(0)
    M, E, J, K = 2_000, 256, 8, 8
    score, home = sigmoid(rng.standard_normal((M, E))), rng.integers(0, J, M)
    free = choose_within(score, top_k=K, n_nodes=J, n_nodes_kept=J)
    limited = choose_within(score, top_k=K, n_nodes=J, n_nodes_kept=4)
    touched = nodes_touched(free, E, J).mean(), nodes_touched(limited, E, J).max()
    copies = [transfers(c, home, E, J, fan_out=f).mean() for c, f in ((free, False), (free, True), (limited, True))]
    print(f"claim     {E} experts on {J} nodes, {K} a token, random scores: {touched[0]:.2f} nodes touched ({expected_nodes(E, J, K):.2f} expected), with the limit at most {touched[1]}")
    print(f"          copies between nodes: {copies[0]:.2f} one per expert, {copies[1]:.2f} one per node, {copies[2]:.2f} with the limit")
    print(f"          of the free choice {overlap(free, limited).mean():.0%} survives, of its score {score_kept(score, free, limited).mean():.1%}")
    assert abs(touched[0] - expected_nodes(E, J, K)) < 0.1 and touched[1] == 4 and copies[0] > copies[1] > copies[2]


if __name__ == "__main__":
    from minideepseek.moe.node_limited import demo  # the imported copy, so that every name exists once
    demo()
