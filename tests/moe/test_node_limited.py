from itertools import combinations

import numpy as np
import pytest

from minideepseek.basics.swiglu import sigmoid
from minideepseek.moe.node_limited import choose_within, expected_nodes, nodes_touched, overlap, score_kept, transfers
from minideepseek.moe.router import choose, router_forward

rng = np.random.default_rng(0)
BOTH = pytest.mark.parametrize("scoring", ("sigmoid", "softmax"))
V3 = dict(top_k=8, n_nodes=8)


def chosen_by(score, n_nodes_kept, scoring, top_k=2, n_nodes=3):
    return sorted(choose_within(np.array([score]), top_k=top_k, n_nodes=n_nodes, n_nodes_kept=n_nodes_kept, scoring=scoring)[0].tolist())


@BOTH
def test_it_is_the_choice_of_the_router(scoring):
    x, W, b = rng.standard_normal((9, 5)), rng.standard_normal((5, 12)), 0.3 * rng.standard_normal(12)
    (_, chosen), cache = router_forward(x, W, top_k=3, b_select=b, scoring=scoring, n_groups=4, n_groups_kept=2)
    score = cache[2]
    assert (choose_within(score, b, top_k=3, n_nodes=4, n_nodes_kept=2, scoring=scoring) == chosen).all()


@BOTH
def test_all_nodes_kept_is_no_limit(scoring):
    score = rng.random((50, 12))
    free = choose(score, None, top_k=3, n_groups=1, n_groups_kept=1, scoring=scoring)
    assert (choose_within(score, top_k=3, n_nodes=4, n_nodes_kept=4, scoring=scoring) == free).all()


@pytest.mark.parametrize("scoring, n_best", (("sigmoid", 2), ("softmax", 1)))
def test_against_the_definition_token_by_token(scoring, n_best):
    score = rng.random((60, 12))
    chosen = choose_within(score, top_k=4, n_nodes=4, n_nodes_kept=2, scoring=scoring)
    for s, c in zip(score, chosen):
        worth = [sum(sorted(s[3 * j:3 * j + 3])[-n_best:]) for j in range(4)]
        kept = sorted(range(4), key=lambda j: -worth[j])[:2]
        allowed = [e for e in range(12) if e // 3 in kept]
        assert c.tolist() == sorted(allowed, key=lambda e: -s[e])[:4]


def test_the_two_rules_disagree_by_hand():
    """Best ones .9 .6 .55: V2 takes nodes 0 and 1. Best pairs 1.0 1.2 1.05: V3 takes nodes 1 and 2."""
    score = [0.9, 0.1, 0.6, 0.6, 0.5, 0.55]
    assert chosen_by(score, 2, "softmax", top_k=4) == [0, 1, 2, 3]          # 2.20 in all
    assert chosen_by(score, 2, "sigmoid", top_k=4) == [2, 3, 4, 5]          # 2.25: the pairs were the better question
    assert chosen_by(score, 2, "softmax", top_k=2) in ([0, 2], [0, 3])      # 1.50
    assert chosen_by(score, 2, "sigmoid", top_k=2) == [2, 3]                # 1.20: with one expert a node, they were not


@BOTH
@pytest.mark.parametrize("shift", (0, -1, -5))
def test_no_token_touches_more_nodes_than_the_limit(scoring, shift):
    """Also when every biased score is negative: a shut node set to 0 instead of -inf would then win (bug 21)."""
    score = sigmoid(rng.standard_normal((300, 32)))
    for kept in range(1, 9):
        chosen = choose_within(score, np.full(32, shift), top_k=4, n_nodes=8, n_nodes_kept=kept, scoring=scoring)
        assert nodes_touched(chosen, 32, 8).max() == min(kept, 4)


@BOTH
def test_one_node_more_never_costs_score(scoring):
    score = rng.random((200, 32))
    totals = [np.take_along_axis(score, choose_within(score, top_k=4, n_nodes=8, n_nodes_kept=kept, scoring=scoring), -1).sum(-1)
              for kept in range(1, 9)]
    assert (np.diff(totals, axis=0) >= 0).all()


def test_v2s_rule_leaves_a_token_alone_that_needs_no_more_nodes_and_v3s_may_not():
    score = rng.random((500, 32))
    free = choose_within(score, top_k=4, n_nodes=8, n_nodes_kept=8)
    for kept in (2, 3):
        modest = nodes_touched(free, 32, 8) <= kept
        same = {scoring: overlap(free, choose_within(score, top_k=4, n_nodes=8, n_nodes_kept=kept, scoring=scoring)) == 1
                for scoring in ("sigmoid", "softmax")}
        assert (same["softmax"] == modest).all() and modest.any() and not modest.all()
        assert not same["sigmoid"][~modest].any() and not same["sigmoid"][modest].all()
    assert chosen_by([0.9, 0.0, 0.8, 0.0, 0.5, 0.5], 2, "softmax") == [0, 2]
    assert chosen_by([0.9, 0.0, 0.8, 0.0, 0.5, 0.5], 2, "sigmoid") == [0, 4]    # sums .9 .8 1.0: node 1 is shut


def test_nodes_by_hand_with_any_leading_axes():
    chosen = np.array([[[0, 1, 5], [2, 3, 5]], [[4, 0, 2], [5, 4, 4]]])         # nodes 0 0 2, 1 1 2, 2 0 1, 2 2 2
    for ids in (chosen, chosen.astype(np.uint8), chosen.tolist()):
        assert nodes_touched(ids, 6, 3).tolist() == [[2, 2], [3, 1]]
    assert nodes_touched(chosen.reshape(4, 3), 6, 3).tolist() == [2, 2, 3, 1]
    assert nodes_touched(chosen[0, 0], 6, 3) == 2
    assert nodes_touched(chosen, 6, 1).tolist() == [[1, 1], [1, 1]] and nodes_touched(chosen, 6, 6).tolist() == [[3, 3], [3, 2]]


def test_copies_by_hand():
    chosen = np.array([[0, 1, 5], [2, 3, 5], [4, 0, 2], [5, 4, 4]])             # nodes 0 0 2, 1 1 2, 2 0 1, 2 2 2
    assert transfers(chosen, np.array([0, 0, 0, 0]), 6, 3).tolist() == [1, 2, 2, 1]
    assert transfers(chosen, np.array([0, 0, 0, 0]), 6, 3, fan_out=False).tolist() == [1, 3, 2, 3]
    assert transfers(chosen, np.array([2, 0, 1, 2]), 6, 3).tolist() == [1, 2, 2, 0]
    assert transfers(chosen.reshape(2, 2, 3), np.array([[2, 0], [1, 2]]), 6, 3, fan_out=False).tolist() == [[2, 3], [2, 0]]


def test_copies_against_sets():
    chosen, home = np.argsort(rng.random((40, 12)))[:, :4], rng.integers(0, 4, 40)
    nodes = [[e // 3 for e in c] for c in chosen]
    assert transfers(chosen, home, 12, 4).tolist() == [len(set(n) - {h}) for n, h in zip(nodes, home)]
    assert transfers(chosen, home, 12, 4, fan_out=False).tolist() == [sum(j != h for j in n) for n, h in zip(nodes, home)]


@pytest.mark.parametrize("E, J, K", ((4, 2, 2), (6, 3, 2), (8, 4, 3), (9, 3, 5), (6, 6, 4), (6, 1, 3), (6, 2, 6)))
def test_the_expectation_is_the_mean_over_all_choices(E, J, K):
    every = np.array(list(combinations(range(E), K)))
    assert expected_nodes(E, J, K) == pytest.approx(nodes_touched(every, E, J).mean(), rel=1e-14)


def test_v3s_sizes():
    """256 experts on 8 nodes, 8 a token: about 5.3 nodes without the limit, at most 4 with it."""
    assert expected_nodes(256, 8, 8) == pytest.approx(5.2947, abs=5e-5)
    score, home = sigmoid(rng.standard_normal((2_000, 256))), rng.integers(0, 8, 2_000)
    free, limited = [choose_within(score, **V3, n_nodes_kept=kept) for kept in (8, 4)]
    assert nodes_touched(free, 256, 8).mean() == pytest.approx(expected_nodes(256, 8, 8), abs=0.1)
    assert nodes_touched(limited, 256, 8).max() == 4
    assert transfers(free, home, 256, 8, fan_out=False).mean() == pytest.approx(8 * 7 / 8, abs=0.1)
    assert transfers(free, home, 256, 8).mean() == pytest.approx(expected_nodes(256, 8, 8) * 7 / 8, abs=0.1)
    assert transfers(limited, home, 256, 8).mean() < 3.5 + 0.05
    assert 0.8 < overlap(free, limited).mean() < 0.85 and 0.99 < score_kept(score, free, limited).mean() < 1


def test_overlap_and_score_by_hand():
    score = np.array([[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4]])
    free, limited = np.array([[0, 1], [3, 2]]), np.array([[2, 0], [2, 3]])
    assert overlap(free, limited).tolist() == [0.5, 1.0]                        # the order does not count
    assert score_kept(score, free, limited).tolist() == [0.625 / 0.75, 1.0]
    assert overlap(free, free[:, ::-1]).tolist() == [1, 1] and overlap([[0, 1]], [[2, 3]]).tolist() == [0]
    assert overlap(free.reshape(1, 2, 2), limited.reshape(1, 2, 2)).tolist() == [[0.5, 1.0]]


def test_without_a_bias_the_limit_never_gains_and_with_one_it_may():
    score = rng.random((300, 16))
    free, limited = [choose_within(score, top_k=3, n_nodes=4, n_nodes_kept=kept) for kept in (4, 1)]
    kept = score_kept(score, free, limited)
    assert kept.max() <= 1 and (kept < 1).any() and ((kept == 1) == (overlap(free, limited) == 1)).all()
    # biased .9 0 | .5 .5: the free choice is expert 0, of score .1; the limit shuts its node and leaves one of .5
    score, bias = np.array([[0.1, 0.0, 0.5, 0.5]]), np.array([0.8, 0, 0, 0])
    free, limited = [choose_within(score, bias, top_k=1, n_nodes=2, n_nodes_kept=kept) for kept in (2, 1)]
    assert score_kept(score, free, limited) == pytest.approx(5)


@pytest.mark.parametrize("call, message", [
    (lambda: choose_within(np.zeros(8), top_k=2, n_nodes=2, n_nodes_kept=1), r"score has shape \(8,\), expected \(M, E\)"),
    (lambda: choose_within(np.zeros((0, 8)), top_k=2, n_nodes=2, n_nodes_kept=1), r"score has shape \(0, 8\), .* not empty"),
    (lambda: choose_within(np.array([[0, np.nan]]), top_k=1, n_nodes=1, n_nodes_kept=1), r"score holds \[nan\]"),
    (lambda: choose_within(np.zeros((3, 8)), top_k=2, n_nodes=3, n_nodes_kept=1), "n_nodes = 3 must be positive and divide n_routed = 8"),
    (lambda: choose_within(np.zeros((3, 8)), top_k=2, n_nodes=0, n_nodes_kept=1), "n_nodes = 0"),
    (lambda: choose_within(np.zeros((3, 8)), np.zeros(4), top_k=2, n_nodes=2, n_nodes_kept=1), r"b_select has shape \(4,\), expected \(8,\)"),
    (lambda: choose_within(np.zeros((3, 8)), top_k=2, n_nodes=4, n_nodes_kept=5), r"n_nodes_kept = 5 is not in 1 .. 4"),
    (lambda: choose_within(np.zeros((3, 8)), top_k=2, n_nodes=4, n_nodes_kept=0), r"n_nodes_kept = 0"),
    (lambda: choose_within(np.zeros((3, 8)), top_k=5, n_nodes=4, n_nodes_kept=2), r"top_k = 5 is not in 1 .. 4: 2 nodes of 2 experts"),
    (lambda: choose_within(np.zeros((3, 8)), top_k=0, n_nodes=4, n_nodes_kept=2), r"top_k = 0"),
    (lambda: choose_within(np.zeros((3, 8)), top_k=2, n_nodes=4, n_nodes_kept=2, scoring="max"), "scoring = 'max' must be"),
    (lambda: nodes_touched(np.array([[0, 8]]), 8, 2), "the id 8, which is not in 0 .. 7"),
    (lambda: nodes_touched(np.array([[0.0, 1.0]]), 8, 2), "chosen has dtype float64"),
    (lambda: nodes_touched(np.array([[0, 1]]), 8, 3), "n_nodes = 3"),
    (lambda: transfers(np.array([[0, 1]]), np.array([0, 1]), 8, 2), r"home has shape \(2,\), chosen has \(1,\) tokens"),
    (lambda: transfers(np.array([[0, 1]]), np.array([2]), 8, 2), "home must hold integers of 0 .. 1, the nodes"),
    (lambda: transfers(np.array([[0, 1]]), np.array([-1]), 8, 2), "home must hold"),
    (lambda: transfers(np.array([[0, 1]]), np.array([0.0]), 8, 2), "home must hold"),
    (lambda: expected_nodes(8, 3, 2), "n_nodes = 3"),
    (lambda: expected_nodes(8, 2, 9), "top_k = 9 is not in 1 .. 8"),
    (lambda: overlap(np.zeros((2, 3), int), np.zeros((2, 2), int)), r"free has shape \(2, 3\), limited has shape \(2, 2\)"),
    (lambda: score_kept(np.ones((2, 4)), np.zeros((2, 3), int), np.zeros((2, 2), int)), r"free has shape \(2, 3\)"),
])
def test_what_cannot_be_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
