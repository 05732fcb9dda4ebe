import numpy as np
import pytest

from minideepseek.moe.bias_balance import expert_counts, max_violation, update_bias
from minideepseek.moe.router import router_forward

rng = np.random.default_rng(0)


def test_counts_by_hand_with_any_leading_axes():
    chosen = np.array([[[0, 3], [2, 0]], [[3, 0], [0, 2]]])
    for ids in (chosen, chosen.reshape(-1, 2), chosen.reshape(-1), chosen.astype(np.int16), chosen.astype(np.uint8)):
        counts = expert_counts(ids, 5)
        assert counts.dtype == np.int64 and counts.tolist() == [4, 0, 2, 2, 0]


def test_no_token_no_count():
    assert expert_counts(np.zeros((0, 2), int), 3).tolist() == [0, 0, 0]


def test_a_router_hands_out_top_k_places_per_token():
    (_, chosen), _ = router_forward(rng.standard_normal((2, 7, 5)), rng.standard_normal((5, 6)), top_k=3)
    counts = expert_counts(chosen, 6)
    assert counts.sum() == 2 * 7 * 3 and counts.mean() == 2 * 7 * 3 / 6 and counts.max() <= 2 * 7


def test_the_overloaded_goes_down_and_the_idle_one_up():
    """Counts 5, 3, 1, 3: the mean is 3. Sign 0 stays."""
    b = np.array([0.5, 0.5, 0.5, -0.25])
    np.testing.assert_allclose(update_bias(b, np.array([5, 3, 1, 3]), 0.001) - b, [-0.001, 0, 0.001, 0], atol=1e-16)


def test_the_step_is_gamma_however_large_the_violation():
    assert update_bias(np.zeros(3), np.array([1000, 0, 0]), 0.25).tolist() == [-0.25, 0.25, 0.25]
    assert update_bias(np.zeros(3), np.array([2, 1, 1]), 0.25).tolist() == [-0.25, 0.25, 0.25]


@pytest.mark.parametrize("n", (1, 3, 1000))
def test_a_balanced_batch_moves_nothing(n):
    """The load is compared with the mean load, in the same unit: otherwise all biases drift together."""
    b = rng.standard_normal(6)
    assert (update_bias(b, np.full(6, n), 0.001) == b).all()


def test_as_many_above_as_below_leave_the_mean_of_the_biases_alone():
    b = np.array([0.25, -0.5, 0.125, 0.5])
    assert update_bias(b, np.array([9, 1, 7, 3]), 0.125).mean() == b.mean()


def test_gamma_zero_changes_nothing_and_makes_a_new_array():
    b = rng.standard_normal(4).astype(np.float32)
    after = update_bias(b, np.array([9, 0, 0, 0]), 0.0)
    assert (after == b).all() and not np.shares_memory(after, b)


def test_the_array_that_was_handed_in_stays_as_it_was():
    b = np.zeros(2)
    b.flags.writeable = False
    update_bias(b, np.array([3, 1]), 0.1)
    assert not b.any()


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
@pytest.mark.parametrize("gamma", (0.001, np.float64(0.001), 0))
def test_dtype_is_kept(dtype, gamma):
    assert update_bias(np.zeros(3, dtype), np.array([5, 3, 1]), gamma).dtype == dtype


def test_the_counts_of_the_whole_batch_decide():
    """Two micro-batches, each lopsided, together balanced: added up they move nothing; one by one, in vain, twice."""
    first, second = expert_counts(np.array([[0], [0], [1]]), 2), expert_counts(np.array([[1], [1], [0]]), 2)
    assert first.tolist() == [2, 1] and second.tolist() == [1, 2]
    assert not update_bias(np.zeros(2), first + second, 0.001).any()
    assert update_bias(np.zeros(2), first, 0.001).any()
    # the sum of two signs is not the sign of the sum: (3, 0) and (1, 2) are (4, 2), one step and not none
    assert update_bias(np.zeros(2), np.array([3, 0]) + np.array([1, 2]), 0.25).tolist() == [-0.25, 0.25]
    assert not update_bias(update_bias(np.zeros(2), np.array([3, 0]), 0.25), np.array([1, 2]), 0.25).any()


def test_max_violation_by_hand():
    assert max_violation(np.array([5, 3, 1])) == pytest.approx(2 / 3, rel=1e-15)
    assert max_violation(np.array([4, 4, 4])) == 0
    assert max_violation([8, 0, 0, 0]) == 3                       # all on one of E experts: E - 1
    assert type(max_violation(np.array([1, 2]))) is float


def test_the_rule_alone_balances_a_skewed_router_and_no_gate_ever_sees_the_bias():
    x, W = rng.standard_normal((256, 8)), rng.standard_normal((8, 6)) / 3
    x[:, 0], W[0] = 1, [1.5, 1, 0, 0, -1, -1.5]
    b, violations = np.zeros(6), []
    for _ in range(150):
        (gate, chosen), _ = router_forward(x, W, top_k=2, b_select=b)
        counts = expert_counts(chosen, 6)
        violations.append(max_violation(counts))
        b = update_bias(b, counts, 0.01)
    assert violations[0] > 1 and max(violations[-20:]) < 0.3
    assert b[0] < 0 < b[5]
    picked = np.take_along_axis(1 / (1 + np.exp(-x @ W)), chosen, -1)
    np.testing.assert_allclose(gate, picked / picked.sum(-1, keepdims=True), rtol=1e-13)


@pytest.mark.parametrize("call, message", [
    (lambda: expert_counts(np.array([[0, 4]]), 4), "the id 4, which is not in 0 .. 3: n_routed = 4"),
    (lambda: expert_counts(np.array([[-1, 2]]), 4), "the id -1, which is not in 0 .. 3"),
    (lambda: expert_counts(np.array([[0.0, 2.0]]), 4), "chosen has dtype float64"),
    (lambda: update_bias(np.zeros(3), np.ones(4), 0.001), r"b_select has shape \(3,\), counts has shape \(4,\)"),
    (lambda: update_bias(np.zeros((2, 3)), np.ones((2, 3)), 0.001), r"counts has shape \(2, 3\), expected \(E,\)"),
    (lambda: update_bias(None, np.ones(4), 0.001), r"b_select has shape \(\)"),
    (lambda: update_bias(np.zeros(3, int), np.ones(3), 0.001), "b_select has dtype int64"),
    (lambda: update_bias(np.zeros(3), np.ones(3), -0.001), "gamma = -0.001"),
    (lambda: update_bias(np.zeros(3), np.ones(3), float("nan")), "gamma = nan"),
    (lambda: update_bias(np.zeros(3), np.array([1, 2, -1]), 0.001), r"counts\[2\] = -1"),
    (lambda: update_bias(np.zeros(2), np.array([1, np.inf]), 0.001), r"counts\[1\] = inf"),
    (lambda: max_violation(np.array([1, -2])), r"counts\[1\] = -2"),
    (lambda: max_violation(np.array([1, np.nan])), r"counts\[1\] = nan"),
    (lambda: max_violation(np.zeros(3, int)), r"counts = \[0, 0, 0\]: nothing was counted"),
    (lambda: max_violation(np.ones((2, 3))), r"counts has shape \(2, 3\)"),
    (lambda: max_violation(np.zeros(0)), r"counts has shape \(0,\)"),
])
def test_what_cannot_be_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
