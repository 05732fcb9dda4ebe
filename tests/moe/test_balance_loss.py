import numpy as np
import pytest

from minideepseek.autograd.shapes import ShapeError
from minideepseek.autograd.tape import Tape, Tensor
from minideepseek.moe.balance_loss import (COUNTED_BY, batch_balance, batch_balance_backward, batch_balance_examples,
                                           batch_balance_forward, sequence_balance, sequence_balance_backward,
                                           sequence_balance_examples, sequence_balance_forward)
from minideepseek.moe.bias_balance import expert_counts, max_violation
from minideepseek.moe.router import router_forward

rng = np.random.default_rng(0)
CASES = sequence_balance_examples(rng)
BATCH_CASES = batch_balance_examples(rng)
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


# --- the losses by batch -------------------------------------------------------------------------------------------

DEVICES = {"top_k": 2, "n_groups": 3, "n_groups_kept": 2}            # for six experts: two on a device


def batch_loss_of(logits, count, top_k=2, **devices):
    """The loss of given logits: the router is the identity."""
    return batch_balance_forward(np.asarray(logits, float), np.eye(np.shape(logits)[-1]), count=count, top_k=top_k, **devices)[0]


def batch_gradient_of(x, W, dloss=1.0, **config):
    _, cache = batch_balance_forward(x, W, **config)
    return batch_balance_backward(dloss, cache)


def wants(pairs, E):
    """Logits of tokens that are sure: each wants the first expert of its pair most, the second next, the others not at all."""
    z = np.zeros((len(pairs), E))
    for token, (first, second) in enumerate(pairs):
        z[token, first], z[token, second] = 60, 30
    return z


def batch_by_definition(x, W, count, top_k, n_groups=1, n_groups_kept=1):
    """The papers' sums, one token, choice, expert and device at a time."""
    score = [np.exp(z) / sum(np.exp(z)) for z in x.reshape(-1, x.shape[-1]) @ W]
    T, E = len(score), W.shape[1]
    device_of = [e * n_groups // E for e in range(E)]
    choices = []
    for s in score:
        strength = [max(s[e] for e in range(E) if device_of[e] == d) for d in range(n_groups)]
        open_devices = sorted(range(n_groups), key=lambda d: -strength[d])[:n_groups_kept]
        choices.append(sorted((e for e in range(E) if device_of[e] in open_devices), key=lambda e: -s[e])[:top_k])
    P = [sum(s[e] for s in score) / T for e in range(E)]
    firsts = [sum(chosen[0] == e for chosen in choices) for e in range(E)]
    served = [sum(e in chosen for chosen in choices) for e in range(E)]
    if count == "switch":                                               # N sum_i f_i P_i, f_i the part of the tokens
        return E * sum(firsts[e] / T * P[e] for e in range(E))
    if count == "gshard":                                               # 1/E sum_e c_e/S m_e
        return sum(firsts[e] / T * P[e] for e in range(E)) / E
    f = [E / (top_k * T) * served[e] for e in range(E)]
    if count == "expert":
        return sum(f[e] * P[e] for e in range(E))
    loss = 0
    for d in range(n_groups):                                           # sum over devices of f' P', P' the sum of P
        own = [e for e in range(E) if device_of[e] == d]
        visits = sum(any(device_of[e] == d for e in chosen) for chosen in choices)
        f_device = {"device": sum(f[e] for e in own) / len(own), "communication": n_groups / (n_groups_kept * T) * visits}[count]
        loss += f_device * sum(P[e] for e in own)
    return loss


def test_each_count_by_hand():
    """Six experts, two on a device. Token 0 stays on device 0, tokens 1 and 2 both go to devices 1 and 2."""
    chosen = np.array([[0, 1], [2, 4], [3, 5]])
    f = {name: counted(chosen, 6, 3, 2).tolist() for name, counted in COUNTED_BY.items()}
    assert f["switch"] == [2, 0, 2, 2, 0, 0]                            # three first choices: 6/3 each
    np.testing.assert_allclose(f["gshard"], [1 / 18, 0, 1 / 18, 1 / 18, 0, 0], rtol=1e-15)
    assert f["expert"] == [1] * 6                                       # each expert serves one token
    assert f["device"] == [1] * 6                                       # so each device does the same work
    assert f["communication"] == [0.5, 0.5, 1, 1, 1, 1]                 # but receives 1, 2, 2 tokens: times 3 / (2 * 3)


def test_only_choices_count_and_their_order_counts_for_the_first_alone():
    chosen = np.array([[0, 1], [2, 4], [3, 5], [3, 2]])
    for name, counted in COUNTED_BY.items():
        same = (counted(chosen, 6, 3, 2) == counted(chosen[:, ::-1], 6, 3, 2)).all()
        assert same == (name not in ("switch", "gshard")), name


def test_a_device_may_be_even_inside_of_which_nothing_is():
    """Experts 0, 2 and 4 do all the work, one on each device: the devices are even, their experts are not."""
    chosen = np.array([[0, 2], [2, 4], [4, 0]])
    assert COUNTED_BY["expert"](chosen, 6, 3, 2).tolist() == [2, 0, 2, 0, 2, 0]
    assert COUNTED_BY["device"](chosen, 6, 3, 2).tolist() == [1] * 6


@pytest.mark.parametrize("case", BATCH_CASES)
def test_by_batch_against_the_definition(case):
    (x, W), config = BATCH_CASES[case]
    assert batch_balance_forward(x, W, **config)[0] == pytest.approx(batch_by_definition(x, W, **config), rel=1e-12)


@pytest.mark.parametrize("count", COUNTED_BY)
@pytest.mark.parametrize("top_k, n_groups, n_groups_kept", [(1, 3, 1), (2, 3, 3), (3, 3, 2), (3, 2, 1), (5, 1, 1)])
def test_by_batch_against_the_definition_for_other_sizes(count, top_k, n_groups, n_groups_kept):
    x, W = rng.standard_normal((3, 7, 4)), rng.standard_normal((4, 6))
    config = {"count": count, "top_k": top_k, "n_groups": n_groups, "n_groups_kept": n_groups_kept}
    assert batch_balance_forward(x, W, **config)[0] == pytest.approx(batch_by_definition(x, W, **config), rel=1e-12)


def test_by_batch_by_hand():
    """Scores (3/4, 1/4) and (3/5, 2/5): both tokens choose expert 0, so f = (2, 0), and P_0 = 0.675."""
    logits = np.log([[3.0, 1.0], [3.0, 2.0]])
    for count, f in (("switch", 2), ("expert", 2), ("gshard", 1 / 2)):
        assert batch_loss_of(logits, count, top_k=1) == pytest.approx(f * 0.675, rel=1e-14)
        dx, dW = batch_gradient_of(logits, np.eye(2), count=count, top_k=1)
        expected = f / 2 * np.array([[3 / 16, -3 / 16], [6 / 25, -6 / 25]])     # dscore (f/2, 0): p_0 p_1, both ways
        np.testing.assert_allclose(dx, expected, rtol=1e-13)
        np.testing.assert_allclose(dW, logits.T @ expected, rtol=1e-13)


FAIR = [(e, (e + 2) % 6) for e in range(6)]              # first choices, choices, devices and visits are all even


@pytest.mark.parametrize("count, value", [("switch", 1), ("gshard", 1 / 36), ("expert", 1), ("device", 1), ("communication", 1)])
def test_at_perfect_balance(count, value):
    """Whatever the shares are: if all f are equal, their weighted sum is that f."""
    sure, unsure = wants(FAIR, 6), wants(FAIR, 6) / 60 + 0.1 * rng.random((6, 6))
    for logits in (sure, unsure):
        assert batch_loss_of(logits, count, n_groups=3, n_groups_kept=2) == pytest.approx(value, rel=1e-15)
        dx, dW = batch_gradient_of(logits, np.eye(6), count=count, **DEVICES)
        assert np.abs(dx).max() < 1e-16 and np.abs(dW).max() < 1e-14


def test_communication_at_balance_is_the_mean_number_of_devices_a_token_uses_over_what_it_may():
    at_home = [(0, 1), (2, 3), (4, 5)]                   # each token stays on one device of the two allowed
    assert batch_loss_of(wants(at_home, 6), "communication", n_groups=3, n_groups_kept=2) == pytest.approx(1 / 2, rel=1e-14)
    both = at_home + [(0, 2), (2, 4), (4, 0)]            # and these use two: 1.5 on average
    assert batch_loss_of(wants(both, 6), "communication", n_groups=3, n_groups_kept=2) == pytest.approx(3 / 4, rel=1e-14)


@pytest.mark.parametrize("count, value", [("switch", 6), ("gshard", 1 / 6), ("expert", 3), ("device", 3), ("communication", 3 / 2)])
def test_the_worst_value(count, value):
    """All tokens want experts 0 and 1, on one device: E, 1/E, E/K, the devices J, and J over those a token may use."""
    assert batch_loss_of(wants([(0, 1)] * 5, 6), count, n_groups=3, n_groups_kept=2) == pytest.approx(value, rel=1e-12)
    for _ in range(200):                                 # and no batch is dearer: f is at most that, and shares sum to 1
        logits = 5 * rng.standard_normal((3, 6)) + 5 * rng.standard_normal(6)
        assert batch_loss_of(logits, count, n_groups=3, n_groups_kept=2) <= value * (1 + 1e-12)


def test_the_worst_of_the_devices_is_less_when_a_device_cannot_hold_all_choices():
    """Three choices on devices of two experts: the busiest device serves two of three places, E/K = 2 and not J = 3."""
    logits = wants([(0, 1)] * 5, 6) + np.eye(6)[2]
    assert batch_loss_of(logits, "device", top_k=3, n_groups=3, n_groups_kept=2) == pytest.approx(2, rel=1e-12)


def test_gshard_is_switch_over_the_square_of_the_number_of_experts():
    (x, W), _ = BATCH_CASES["GShard"]
    switch, gshard = ({"count": count, "top_k": 2} for count in ("switch", "gshard"))
    assert 36 * batch_balance_forward(x, W, **gshard)[0] == pytest.approx(batch_balance_forward(x, W, **switch)[0], rel=1e-14)
    for one, other in zip(batch_gradient_of(x, W, 36.0, **gshard), batch_gradient_of(x, W, **switch)):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_switch_is_the_expert_level_loss_of_one_choice():
    x, W = rng.standard_normal((9, 5)), rng.standard_normal((5, 6))
    values = [batch_balance_forward(x, W, count=count, top_k=1)[0] for count in ("switch", "expert")]
    assert values[0] == values[1]


def test_by_expert_on_one_sequence_is_the_sequence_wise_loss_with_a_softmax():
    x, W = rng.standard_normal((1, 7, 5)), rng.standard_normal((5, 6))
    by_batch, by_sequence = {"count": "expert", "top_k": 3}, {"scoring": "softmax", "top_k": 3}
    assert batch_balance_forward(x, W, **by_batch)[0] == pytest.approx(sequence_balance_forward(x, W, **by_sequence)[0], rel=1e-14)
    for one, other in zip(batch_gradient_of(x, W, **by_batch), gradient_of(x, W, **by_sequence)):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-16)


def test_two_one_sided_sequences_may_be_a_balanced_batch():
    """All of text 0 wants experts 0 and 1, all of text 1 the others: by sequence it costs E/K, by batch nothing."""
    texts = np.stack([wants([(0, 1), (1, 0)], 4), wants([(2, 3), (3, 2)], 4)])
    assert loss_of(texts, 2, "softmax") == pytest.approx(2, rel=1e-9)
    assert batch_loss_of(texts, "expert") == batch_loss_of(texts.reshape(4, 4), "expert") == 1


def test_switch_does_not_see_the_second_choices():
    """First choices take turns, every second choice is expert 5 (and its own for the rest): 1 by Switch, more by expert."""
    logits = wants([(e, 5) for e in range(5)] + [(5, 0)], 6) / 30        # unsure enough that expert 5 has a real share
    assert batch_loss_of(logits, "switch") == pytest.approx(1, rel=1e-15)
    assert batch_loss_of(logits, "expert") > 1.05


@pytest.mark.parametrize("count", COUNTED_BY)
def test_the_loss_jumps_where_a_choice_flips_and_the_gradient_is_the_slope_between_jumps(count):
    """Token 0 stands between experts 0 and 2. A hair to either side f, and so the loss, differs by a step, and a slope of
    that step would be infinite. On each side f stands still: there the gradient is what a finite difference finds."""
    def loss_at(z):
        logits = np.zeros((3, 6))
        logits[0, 0], logits[0, 2], logits[1, 4], logits[2, 5] = 1, 1 + z, 1, 2
        return batch_balance_forward(logits, np.eye(6), count=count, top_k=1, n_groups=3, n_groups_kept=1)

    (below, (*_, score, f_below)), (above, (*_, f_above)) = loss_at(-1e-9), loss_at(1e-9)
    step = (f_above - f_below) @ score.mean(axis=0)
    assert (f_above != f_below).any() and above - below == pytest.approx(step, abs=1e-8)
    for z in (-1e-4, 1e-4):
        slope = (loss_at(z + 1e-5)[0] - loss_at(z - 1e-5)[0]) / 2e-5                # no flip in between
        dlogits, _ = batch_balance_backward(1.0, loss_at(z)[1])
        assert dlogits[0, 2] == pytest.approx(slope, rel=1e-6)


def test_f_made_of_shares_would_be_another_loss_with_another_gradient():
    """E sum P**2 has the slope 2 E P; the right one is f. For a batch whose choices are even but whose shares are not,
    the right gradient is zero and that one is not."""
    logits = wants(FAIR, 6) / 60 + np.linspace(0, 0.01, 6)
    dx, _ = batch_gradient_of(logits, np.eye(6), count="switch", top_k=2)
    share = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    dshare = 2 * 6 * share.mean(axis=0) / 6
    wrong = share * (dshare - (share * dshare).sum(axis=1, keepdims=True))
    assert np.abs(dx).max() < 1e-16 < 1e-5 < np.abs(wrong).max()


@pytest.mark.parametrize("count", ("device", "communication"))
def test_the_experts_of_one_device_are_pushed_alike(count):
    (x, W), config = BATCH_CASES["V2, by device"]
    *_, f = batch_balance_forward(x, W, **config | {"count": count})[1]
    assert (f[0::2] == f[1::2]).all() and len(set(f)) > 1


@pytest.mark.parametrize("count", ("device", "communication"))
def test_one_device_alone_has_nothing_to_balance(count):
    (x, W), _ = BATCH_CASES["V2, by device"]
    assert batch_balance_forward(x, W, count=count, top_k=2)[0] == pytest.approx(1, rel=1e-14)
    dx, dW = batch_gradient_of(x, W, count=count, top_k=2)
    assert np.abs(dx).max() < 1e-15 and np.abs(dW).max() < 1e-15


@pytest.mark.parametrize("count", COUNTED_BY)
def test_going_downhill_evens_out_what_is_counted(count):
    x, W = rng.standard_normal((64, 5)), rng.standard_normal((5, 6)) / 3
    x[:, 0], W[0] = 1, [2, 2, 0, 0, -2, -2]              # a constant channel that favours the first device
    config, counted = {"count": count, **DEVICES}, lambda: batch_balance_forward(x, W, count=count, **DEVICES)[1][-1]

    before, rate = counted().max() / counted().mean(), 36 if count == "gshard" else 1
    for _ in range(100):
        W -= rate * batch_gradient_of(x, W, **config)[1]
    assert before > 2.2 and counted().max() / counted().mean() < 2


@pytest.mark.parametrize("top_k", (1, 2, 4))
def test_a_loss_without_the_one_over_k_is_k_at_balance(top_k):
    """As in the Mixtral of transformers: E sum_e P_e sum_k mean_t [choice k of token t is e]."""
    turns = [[(e + k) % 8 for k in range(top_k)] for e in range(8)]
    logits = np.zeros((8, 8))
    np.put_along_axis(logits, np.array(turns), 9.0 - np.arange(top_k), axis=1)
    share = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    mask = np.array(turns)[:, :, None] == np.arange(8)                   # (M, K, E)
    public = 8 * (mask.mean(axis=0) * share.mean(axis=0)).sum()
    assert public == pytest.approx(top_k, rel=1e-14)
    assert public == pytest.approx(top_k * batch_loss_of(logits, "expert", top_k=top_k), rel=1e-14)


def test_leading_axes_do_not_matter():
    (x, W), config = BATCH_CASES["V2, by device"]
    assert batch_balance_forward(x, W, **config)[0] == batch_balance_forward(x.reshape(6, 5), W, **config)[0]
    np.testing.assert_array_equal(batch_gradient_of(x, W, **config)[0].reshape(6, 5), batch_gradient_of(x.reshape(6, 5), W, **config)[0])


def test_an_unknown_count_is_an_error_and_not_another_loss():
    with pytest.raises(KeyError, match="swich"):
        batch_loss_of(np.zeros((2, 4)), "swich")


@pytest.mark.parametrize("count", COUNTED_BY)
def test_several_losses_on_one_tape_in_float32(count):
    (x, W), config = BATCH_CASES["V2, by device"]
    x_leaf, W_leaf = Tensor(x.astype(np.float32)), Tensor(W.astype(np.float32))
    with Tape() as tape:
        expert, other = (batch_balance(x_leaf, W_leaf, **config | {"count": name}) for name in ("expert", count))
    tape.backward({expert: 0.003, other: 0.05})
    assert other.data.dtype == x_leaf.grad.dtype == W_leaf.grad.dtype == np.float32
    parts = [batch_gradient_of(x, W, alpha, **config | {"count": name})[1] for name, alpha in (("expert", 0.003), (count, 0.05))]
    np.testing.assert_allclose(W_leaf.grad, sum(parts), rtol=1e-4, atol=1e-8)
