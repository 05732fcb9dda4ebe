"""Balance without learning: experts by a fixed table of words, or in turns. The baselines that a learned router has to beat.

Derivation: whiteboard/moe/uniform.md     Source: Roller et al. 2021, arXiv:2106.04426
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import numpy as np

from minideepseek.autograd.gradcheck import report
from minideepseek.autograd.tape import op
from minideepseek.basics.linear import linear_forward
from minideepseek.basics.softmax import softmax_forward
from minideepseek.basics.swiglu import sigmoid
from minideepseek.moe.bias_balance import expert_counts, max_violation
from minideepseek.moe.router import router_backward


def hash_table(vocab_size, n_routed, top_k, rng):
    """Deal every word its experts, once and for all: (U, K) ids, all different within a row. rng: numpy.random.Generator.

    Like cards: shuffle a pack of all experts, deal top_k to a word, take a new pack when one is used up. So no expert
    has more than one entry more than another. Raises ValueError unless 1 <= top_k <= n_routed and vocab_size >= 1.
    """
    _door(n_routed, top_k)
    if vocab_size < 1:
        raise ValueError(f"vocab_size = {vocab_size} must be positive")
    packs, begun = [], np.empty(0, int)                     # begun: the cards of a hand that a pack could not complete
    while len(packs) * n_routed < vocab_size * top_k:
        pack = rng.permutation(n_routed)
        in_hand = np.isin(pack, begun)
        packs.append(np.concatenate([pack[~in_hand], pack[in_hand]]))       # nobody twice in one hand: those go to the back
        begun = packs[-1][n_routed - (len(packs) * n_routed) % top_k:]
    hands = np.concatenate(packs)[:vocab_size * top_k].reshape(vocab_size, top_k)
    return rng.permutation(hands)                           # which word gets which hand                        # eq. 1


def hash_chosen(ids, table):
    """The experts of each word, whatever stands around it: ids (...), table (U, K) -> chosen (..., K).

    Raises ValueError for ids that are not whole numbers of the table, and for a row that names an expert twice.
    """
    ids, table = np.asarray(ids), np.asarray(table)
    if table.ndim != 2 or table.dtype.kind not in "iu":
        raise ValueError(f"table has shape {table.shape} and dtype {table.dtype}, expected (U, K) integer ids")
    if ids.dtype.kind not in "iu":
        raise ValueError(f"ids has dtype {ids.dtype}, expected integer ids")
    if ids.size and not (ids.min() >= 0 and ids.max() < len(table)):
        worst = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(f"ids has the id {worst}, which is not in 0 .. {len(table) - 1}: the table has {len(table)} rows")
    chosen = table[ids]                                                                                         # eq. 2
    twice = (np.diff(np.sort(chosen, axis=-1), axis=-1) == 0).any(axis=-1)
    if twice.any():
        word = int(ids[twice].flat[0])
        raise ValueError(f"table[{word}] = {table[word].tolist()} names an expert twice")
    return chosen


def round_robin(n_tokens, n_routed, top_k):
    """Token m gets the experts m*K .. m*K + K-1, counted round and round: chosen (M, K).

    Raises ValueError unless 1 <= top_k <= n_routed and n_tokens >= 0.
    """
    _door(n_routed, top_k)
    if n_tokens < 0:
        raise ValueError(f"n_tokens = {n_tokens} must not be negative")
    return (np.arange(n_tokens * top_k) % n_routed).reshape(n_tokens, top_k)                                    # eq. 3


def fixed_router_forward(x, W_router, chosen, *, scoring="sigmoid", normalise=True, scaling=1.0):
    """The gates of experts that somebody else chose, from learned scores: the router's second half.

    x: (..., D)   W_router: (D, E)   chosen: (..., K) int < E   ->   gate: (..., K)

    The experts of a token are all different. scoring, normalise, scaling: see router.
    """
    logits, linear_cache = linear_forward(x.reshape(-1, x.shape[-1]), W_router)                         # (M, E)   # eq. 4
    score = sigmoid(logits) if scoring == "sigmoid" else softmax_forward(logits)[0]                     # (M, E)   # eq. 5
    places = chosen.reshape(-1, chosen.shape[-1])                                                       # (M, K)
    picked = np.take_along_axis(score, places, axis=-1)                                                 # (M, K)   # eq. 6
    total = picked.sum(axis=-1, keepdims=True) + 1e-20 if normalise else np.ones_like(picked[:, :1])    # (M, 1)   # eq. 7
    share = picked / total                                                                              # (M, K)   # eq. 8
    gate = (share * scaling).reshape(chosen.shape)                                                      # (..., K)   # eq. 9
    return gate, (linear_cache, x.shape, score, places, share, total, scoring, normalise, scaling)


def fixed_router_backward(dgate, cache):
    """The router's own: it never went through the choice, so it cannot matter who made it."""
    dx, dW_router = router_backward(dgate, cache)                                                       # (..., D) (D, E)   # eq. 10
    return dx, dW_router, None


fixed_router = op(fixed_router_forward, fixed_router_backward)


def fixed_router_examples(rng):
    def case(x_shape, top_k, **config):
        table = hash_table(11, 8, top_k, rng)
        chosen = hash_chosen(rng.integers(0, 11, x_shape[:-1]), table)
        return (rng.standard_normal(x_shape), rng.standard_normal((x_shape[-1], 8)), chosen), config

    return {
        "sigmoid, normalised, scaled": case((2, 3, 5), 3, scaling=1.5),
        "sigmoid, one expert": case((3, 5), 1, normalise=False),
        "softmax": case((4, 5), 2, scoring="softmax", normalise=False),
        "softmax, normalised": case((4, 5), 3, scoring="softmax"),
    }


def _door(n_routed, top_k):
    """Can a token have top_k different experts?"""
    if not 1 <= top_k <= n_routed:
        raise ValueError(f"top_k = {top_k} must be from 1 to n_routed = {n_routed}: a token's experts are all different")


def demo():
    """Turns by hand, the gradients, and how balanced a table is on a text in which words are not equally frequent."""
    print("shapes    table (U, K), ids (M,) -> chosen (M, K); x (M, D), W_router (D, E), chosen (M, K) -> gate (M, K)")
    print("by hand   round robin, 4 experts, 3 a token:", *round_robin(4, 4, 3).tolist())
    report(fixed_router_forward, fixed_router_backward, fixed_router_examples)

    rng = np.random.default_rng(0)
    U, E, K, M = 1000, 16, 2, 4096
    table = hash_table(U, E, K, rng)
    zipf = 1 / np.arange(1, U + 1)                      # the second word half as frequent as the first, and so on
    ids = rng.choice(U, size=M, p=zipf / zipf.sum())
    by_hash, in_turns = hash_chosen(ids, table), round_robin(M, E, K)
    of_table, of_hash, of_turns = [max_violation(expert_counts(chosen, E)) for chosen in (table, by_hash, in_turns)]
    print(f"claim     MaxVio of {M} tokens by Zipf, {K} of {E} experts: in turns {of_turns:.2f}; by hash {of_hash:.2f}, of its table {of_table:.3f}")

    word = np.flatnonzero(ids == 0)                     # the most frequent word, wherever it stands
    same_hash, same_turns = [(np.sort(c[word]) == np.sort(c[word[0]])).all(axis=-1).mean() for c in (by_hash, in_turns)]
    print(f"claim     the commonest word meets the same experts, whatever the sentence: by hash {same_hash:.0%}, in turns {same_turns:.0%}")
    assert of_turns == 0 and of_table < 0.01 and of_hash > 0.5 and same_hash == 1 and same_turns < 0.25


if __name__ == "__main__":
    from minideepseek.moe.uniform import demo  # the imported copy, so that every name exists once
    demo()
