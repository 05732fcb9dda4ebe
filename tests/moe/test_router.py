import numpy as np
import pytest

from minideepseek.moe.router import best, choose, router_backward, router_forward

rng = np.random.default_rng(0)
V3 = dict(n_groups=4, n_groups_kept=2, scaling=2.5)


def draw(M=7, D=5, E=8):
    return rng.standard_normal((M, D)), rng.standard_normal((D, E)), 0.3 * rng.standard_normal(E)


def choice(biased, **options):
    """The set of experts chosen for one token with these biased scores (score 0, all in the bias)."""
    config = dict(top_k=2, n_groups=1, n_groups_kept=1, scoring="sigmoid") | options
    return set(choose(np.zeros((1, len(biased))), np.array(biased, float), **config)[0].tolist())


def test_ties_go_to_the_lowest_index():
    assert best(np.array([[1.0, 3.0, 3.0, 1.0, 3.0]]), 2).tolist() == [[1, 2]]
    assert best(np.zeros((1, 50)), 3).tolist() == [[0, 1, 2]]


def test_against_the_definition_token_by_token():
    x, W, b = draw()
    (gate, chosen), _ = router_forward(x, W, top_k=3, b_select=b, **V3)
    for m in range(len(x)):
        s = 1 / (1 + np.exp(-x[m] @ W))
        sums = [sum(sorted((s + b)[j * 2:j * 2 + 2])[-2:]) for j in range(4)]
        kept = sorted(range(4), key=lambda j: -sums[j])[:2]
        allowed = [e for e in range(8) if e // 2 in kept]
        expected = sorted(allowed, key=lambda e: -(s + b)[e])[:3]
        assert chosen[m].tolist() == expected
        np.testing.assert_allclose(gate[m], 2.5 * s[expected] / s[expected].sum(), rtol=1e-13)


def test_the_bias_selects_and_never_weighs():
    x, W, b = draw()
    (gate, chosen), _ = router_forward(x, W, top_k=3, b_select=b)
    score = 1 / (1 + np.exp(-x @ W))
    picked = np.take_along_axis(score, chosen, -1)
    np.testing.assert_allclose(gate, picked / picked.sum(-1, keepdims=True), rtol=1e-13)
    (shifted, same), _ = router_forward(x, W, top_k=3, b_select=b + 100)
    assert (same == chosen).all() and (shifted == gate).all()


def test_a_group_counts_as_its_two_best_in_v3_and_as_its_best_one_in_v2():
    biased = [0.9, 0.0, 0.6, 0.6]
    assert choice(biased, n_groups=2) == {2, 3}
    assert choice(biased, n_groups=2, scoring="softmax") == {0, 1}


def test_negative_biased_scores_do_not_lose_to_a_masked_group():
    """Masking with 0 would let experts of a dropped group win against negative scores."""
    assert choice([-0.1, -0.2, -0.3, -0.4], n_groups=2) == {0, 1}


def test_gates_sum_to_the_scaling_when_normalised_and_are_scores_when_not():
    x, W, b = draw()
    (gate, _), _ = router_forward(x, W, top_k=3, b_select=b, **V3)
    np.testing.assert_allclose(gate.sum(-1), 2.5, rtol=1e-13)
    (gate, chosen), _ = router_forward(x, W, top_k=3, scoring="softmax", normalise=False, scaling=16.0)
    p = np.exp(x @ W)
    np.testing.assert_allclose(gate, 16 * np.take_along_axis(p / p.sum(-1, keepdims=True), chosen, -1), rtol=1e-12)


def test_an_unchosen_expert_hears_nothing_from_a_sigmoid_and_something_from_a_softmax():
    x, W, _ = draw(M=1)
    for scoring, silent in (("sigmoid", True), ("softmax", False)):
        (gate, chosen), cache = router_forward(x, W, top_k=3, scoring=scoring, normalise=False)
        _, dW = router_backward(rng.standard_normal(gate.shape), cache)
        unchosen = np.setdiff1d(np.arange(8), chosen)
        assert (not dW[:, unchosen].any()) is silent and dW[:, chosen[0]].all()


def test_one_normalised_gate_is_a_constant():
    """top_k = 1 with normalisation: the gate is 1 whatever the score, and the router gets no gradient."""
    x, W, _ = draw()
    (gate, _), cache = router_forward(x, W, top_k=1)
    assert np.abs(gate - 1).max() < 1e-15
    dx, dW = router_backward(rng.standard_normal(gate.shape), cache)
    assert np.abs(dx).max() < 1e-15 and np.abs(dW).max() < 1e-15


def test_a_permuted_batch_is_routed_alike():
    x, W, b = draw()
    order = rng.permutation(len(x))
    (gate, chosen), _ = router_forward(x, W, top_k=3, b_select=b, **V3)
    (gate_p, chosen_p), _ = router_forward(x[order], W, top_k=3, b_select=b, **V3)
    assert (chosen_p == chosen[order]).all()
    np.testing.assert_allclose(gate_p, gate[order], rtol=1e-13)


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_dtypes(dtype):
    x, W, b = [a.astype(dtype) for a in draw()]
    (gate, chosen), _ = router_forward(x, W, top_k=3, b_select=b, **V3)
    assert gate.dtype == dtype and chosen.dtype.kind == "i"
