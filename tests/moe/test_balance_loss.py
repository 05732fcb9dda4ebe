import numpy as np
import pytest

from minideepseek.autograd.shapes import ShapeError
from minideepseek.autograd.tape import Tape, Tensor
from minideepseek.moe.balance_loss import (sequence_balance, sequence_balance_backward, sequence_balance_examples,
                                           sequence_balance_forward)
from minideepseek.moe.bias_balance import expert_counts, max_violation
from minideepseek.moe.router import router_forward

rng = np.random.default_rng(0)
CASES = sequence_balance_examples(rng)
BY_HAND = np.log([[[3.0, 1 / 3], [3.0, 1.0]]])           # sigmoid: (3/4, 1/4) and (3/4, 1/2)


def loss_of(logits, top_k, scoring="sigmoid"):
    """The loss of given logits: the router is the identity."""
    return sequence_balance_forward(np.asarray(logits, float), np.eye(np.shape(logits)[-1]), top_k=top_k, scoring=scoring)[0]


def gradient_of(x, W, dloss=1.0, **config):
    _, cache = sequence_balance_forward(x, W, **config)
    return sequence_balance_backward(dloss, cache)


def by_definition(x, W, top_k, scoring):
    """Eq. 17 to 20 one sequence, token and expert at a time: (loss, f of each sequence, scores)."""
    B, T, E = *x.shape[:2], W.shape[1]
    score = 1 / (1 + np.exp(-(x @ W))) if scoring == "sigmoid" else np.exp(x @ W) / np.exp(x @ W).sum(-1, keepdims=True)
    values, f = [], np.zeros((B, E))
    for b in range(B):
        P = np.zeros(E)
        for s in score[b]:
            P += s / s.sum() / T
            for e in sorted(range(E), key=lambda e: -s[e])[:top_k]:
                f[b, e] += E / (top_k * T)
        values.append(sum(f[b] * P))
    return sum(values) / B, f, score


def collapsed(*experts, T=4, E=4):
    """The logits of a sequence whose every token wants these experts, and sees next to nothing in the others: (T, E)."""
    return np.where(np.isin(np.arange(E), experts), 30.0, -30.0) * np.ones((T, 1))


def test_by_hand():
    """Both tokens want expert 0: f = (2, 0). Its shares are 3/4 and 3/5: P_0 = 0.675."""
    assert loss_of(BY_HAND, 1) == pytest.approx(1.35, rel=1e-14)
    # token 0: dshare (1, 0) - 3/4, over 1, times 3/16 each; token 1: (1, 0) - 3/5, over 5/4, times 3/16 and 1/4
    dx, dW = gradient_of(BY_HAND, np.eye(2), top_k=1)
    expected = np.array([[[3 / 64, -9 / 64], [0.06, -0.12]]])
    np.testing.assert_allclose(dx, expected, rtol=1e-13)
    np.testing.assert_allclose(dW, BY_HAND[0].T @ expected[0], rtol=1e-13)


def test_by_hand_with_a_softmax():
    """Scores (3/4, 1/4) and (1/2, 1/2), of which the first of the equal two: f = (2, 0), P_0 = 5/8."""
    logits = np.log([[[3.0, 1.0], [1.0, 1.0]]])
    assert loss_of(logits, 1, "softmax") == pytest.approx(1.25, rel=1e-14)
    dx, _ = gradient_of(logits, np.eye(2), top_k=1, scoring="softmax")
    np.testing.assert_allclose(dx, [[[3 / 16, -3 / 16], [1 / 4, -1 / 4]]], rtol=1e-13)      # dshare (1, 0): p_0 p_1, both ways


@pytest.mark.parametrize("case", CASES)
def test_against_the_definition(case):
    (x, W), config = CASES[case]
    expected, _, _ = by_definition(x, W, **{"scoring": "sigmoid"} | config)
    assert sequence_balance_forward(x, W, **config)[0] == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("scoring", ("sigmoid", "softmax"))
def test_exactly_one_at_perfect_balance(scoring):
    turns = np.zeros((1, 4, 8))
    turns[0, np.arange(4)[:, None], np.arange(8).reshape(4, 2)] = rng.random((4, 2)) + 0.1      # token t wants 2t and 2t + 1
    assert loss_of(turns, 2, scoring) == pytest.approx(1, rel=1e-15)
    assert float(loss_of(np.log([[[3.0, 1.0], [1.0, 3.0]]]), 1, "softmax")) == 1


def test_at_perfect_balance_nothing_is_pushed():
    dx, dW = gradient_of(np.log([[[3.0, 1.0], [1.0, 3.0]]]), np.eye(2), top_k=1)
    assert np.abs(dx).max() < 1e-16 and np.abs(dW).max() < 1e-16


@pytest.mark.parametrize("top_k", (1, 2, 4))
def test_a_collapsed_router_pays_experts_over_top_k(top_k):
    assert loss_of(collapsed(*range(top_k), E=8)[None], top_k) == pytest.approx(8 / top_k, rel=1e-9)


def test_the_mean_is_over_sequences_not_over_the_batch():
    """Each sequence wants one expert only, but another one: as one batch they are balanced, and their loss would be 1."""
    two = np.stack([collapsed(0, E=2), collapsed(1, E=2)])
    assert loss_of(two, 1) == pytest.approx(2, rel=1e-9)
    assert loss_of(two.reshape(1, 8, 2), 1) == pytest.approx(1, rel=1e-9)


def test_a_batch_is_the_mean_of_its_sequences_in_value_and_gradient():
    (x, W), config = CASES["V3"]
    alone = [sequence_balance_forward(x[b:b + 1], W, **config)[0] for b in range(len(x))]
    assert sequence_balance_forward(x, W, **config)[0] == pytest.approx(np.mean(alone), rel=1e-14)
    dx, dW = gradient_of(x, W, **config)
    parts = [gradient_of(x[b:b + 1], W, 1 / len(x), **config) for b in range(len(x))]
    np.testing.assert_allclose(dx, np.concatenate([part[0] for part in parts]), rtol=1e-13)
    np.testing.assert_allclose(dW, sum(part[1] for part in parts), rtol=1e-12)


@pytest.mark.parametrize("case", [case for case in CASES if "V3" in case])
def test_the_gradient_is_the_closed_form_with_f_constant(case):
    """dL/ds_i = (f_i - sum_j f_j s'_j) / (B T sum_j s_j): f is there as a number, and has no slope of its own."""
    (x, W), config = CASES[case]
    B, T, _ = x.shape
    _, f, s = by_definition(x, W, config["top_k"], "sigmoid")
    total = s.sum(-1, keepdims=True)
    ds = (f[:, None] - (f[:, None] * s / total).sum(-1, keepdims=True)) / (B * T * total)
    dlogits = ds * s * (1 - s)
    dx, dW = gradient_of(x, W, **config)
    np.testing.assert_allclose(dx, dlogits @ W.T, rtol=1e-11, atol=1e-16)
    np.testing.assert_allclose(dW, np.einsum("btd,bte->de", x, dlogits), rtol=1e-11, atol=1e-16)


def test_the_unwanted_hear_too_and_everyone_moves_towards_balance():
    """Downhill the logit of the wanted expert falls, and those of the others rise: nobody is left out."""
    dx, dW = gradient_of(np.log([[[4.0, 2.0, 1.5, 0.5]] * 3]), np.eye(4), top_k=1)
    assert (dx[..., 0] > 0).all() and (dx[..., 1:] < 0).all()
    assert dW.all()


def test_going_downhill_balances_a_skewed_router():
    x, W = rng.standard_normal((4, 32, 6)), rng.standard_normal((6, 4)) / 3
    x[..., 0], W[0] = 1, [1.5, 0.5, -0.5, -1.5]          # a constant channel that favours the first experts

    def violation():
        (_, chosen), _ = router_forward(x, W, top_k=1, normalise=False)
        return max_violation(expert_counts(chosen, 4))

    before = violation(), float(sequence_balance_forward(x, W, top_k=1)[0])
    for _ in range(200):
        W -= 1.0 * gradient_of(x, W, top_k=1)[1]
    after = violation(), float(sequence_balance_forward(x, W, top_k=1)[0])
    assert before[0] > 1.5 and before[1] > 1.2
    assert after[0] < 0.5 and after[1] < 1.05


def test_the_value_alone_does_not_prove_balance():
    """1 is not the least value: two tokens lean a little to expert 0, one wants expert 1 with all its might."""
    p = np.array([[0.51, 0.49], [0.51, 0.49], [0.01, 0.99]])
    assert loss_of([np.log(p / (1 - p))], 1) == pytest.approx(4 / 3 * 1.03 / 3 + 2 / 3 * 1.97 / 3, rel=1e-12)      # 0.896
    assert loss_of(np.zeros((1, 3, 4)), 1) == 1          # a router that knows nothing: equal shares, whatever is counted


def test_scores_that_underflow_give_no_nan():
    x, W = np.full((1, 2, 3), -200, np.float32), np.eye(3, dtype=np.float32)
    dx, dW = gradient_of(x, W, top_k=1)
    assert sequence_balance_forward(x, W, top_k=1)[0] == 0
    assert not dx.any() and not dW.any()


def test_on_the_tape_beside_another_loss():
    """The caller multiplies by alpha, as the seed of this loss."""
    (x, W), config = CASES["V3"]
    x_leaf, W_leaf = Tensor(x), Tensor(W)
    with Tape() as tape:
        other, balance = sequence_balance(x_leaf, W_leaf, **config), sequence_balance(x_leaf, W_leaf, **config)
    tape.backward({other: 1.0, balance: 1e-4})
    np.testing.assert_allclose(W_leaf.grad, 1.0001 * gradient_of(x, W, **config)[1], rtol=1e-12)


def test_tokens_without_sequences_are_refused():
    with pytest.raises(ShapeError, match=r"sequence_balance: x has shape \(8, 5\), which has 2 axes"):
        sequence_balance(np.zeros((8, 5)), np.zeros((5, 6)), top_k=3)


@pytest.mark.parametrize("scoring", ("sigmoid", "softmax"))
def test_float32_stays_float32(scoring):
    (x, W), config = CASES["V3"]
    x, W = Tensor(x.astype(np.float32)), Tensor(W.astype(np.float32))
    with Tape() as tape:
        loss = sequence_balance(x, W, top_k=3, scoring=scoring)
    tape.backward({loss: 1e-4})
    assert loss.data.dtype == x.grad.dtype == W.grad.dtype == np.float32
