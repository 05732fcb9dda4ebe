import numpy as np
import pytest

from minideepseek.moe.bias_balance import choose_multiplied, expert_counts, max_violation, max_violations, update_bias
from minideepseek.moe.router import choose, router_forward

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


def test_the_rules_by_hand():
    """Counts 5, 3, 1, 3: the mean is 3, the errors are -2, 0, 2, 0, and relative to the mean two thirds."""
    b, counts = np.array([0.5, 0.5, 0.5, -0.25]), np.array([5, 3, 1, 3])
    assert (update_bias(b, counts, 0.25) == update_bias(b, counts, 0.25, "sign")).all()
    assert (update_bias(b, counts, 0.25, rule="proportional") - b).tolist() == [-0.5, 0, 0.5, 0]
    np.testing.assert_allclose(update_bias(b, counts, 0.25, rule="relative") - b, [-1 / 6, 0, 1 / 6, 0], atol=1e-16)


@pytest.mark.parametrize("rule", ("sign", "proportional", "relative"))
def test_what_all_rules_share(rule):
    b = rng.standard_normal(5).astype(np.float32)
    b.flags.writeable = False
    assert (update_bias(b, np.full(5, 7), 0.01, rule) == b).all()                        # balanced: nothing moves
    assert (update_bias(b, np.array([9, 0, 0, 1, 0]), 0.0, rule) == b).all()             # gamma 0: nothing moves
    after = update_bias(b, np.array([9, 0, 3, 1, 2]), 0.01, rule)                        # the mean is 3
    assert after.dtype == np.float32 and after[0] < b[0] and after[2] == b[2] and (after[[1, 3, 4]] > b[[1, 3, 4]]).all()


@pytest.mark.parametrize("rule, factor", [("sign", 1), ("proportional", 10), ("relative", 1)])
def test_ten_times_the_batch_is_ten_times_the_step_of_the_proportional_rule_alone(rule, factor):
    counts = rng.integers(0, 50, 6)
    step, larger = (update_bias(np.zeros(6), n * counts, 0.001, rule) for n in (1, 10))
    np.testing.assert_allclose(larger, factor * step, rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("rule", ("proportional", "relative"))
def test_steps_in_proportion_leave_the_mean_of_the_biases_alone(rule):
    """The errors sum to 0. Signs do not: three experts a little above, one far below."""
    counts = np.array([4, 4, 4, 0])
    assert update_bias(np.zeros(4), counts, 0.25, rule).sum() == pytest.approx(0, abs=1e-15)
    assert update_bias(np.zeros(4), counts, 0.25).sum() == -0.5


def test_the_relative_step_is_bounded_by_gamma_upwards_and_by_max_violation_downwards():
    for counts in rng.integers(0, 9, (50, 6)) + np.eye(6, dtype=int)[0]:
        step = update_bias(np.zeros(6), counts, 0.1, "relative")
        assert step.max() <= 0.1 and step.min() == pytest.approx(-0.1 * max_violation(counts), abs=1e-15)


def test_max_violations_by_hand():
    """(6, 0) and (1, 5): violations 1 and 2/3, and together (7, 5): 1/6. Thrashing looks balanced from afar."""
    assert max_violations([[6, 0], [1, 5]]) == pytest.approx((1 / 6, 5 / 6), rel=1e-14)
    assert max_violations([[8, 0], [0, 8]]) == (0, 1)
    assert max_violations([[3, 1]] * 4) == (0.5, 0.5)                        # always the same expert: no difference
    assert max_violations([[5, 3, 1]]) == (max_violation([5, 3, 1]),) * 2


def test_together_is_never_worse_than_the_mean_of_batches_of_one_size():
    for _ in range(200):
        batches = rng.multinomial(30, rng.dirichlet(np.ones(5)), size=4)     # 30 choices each
        together, each = max_violations(batches)
        assert together <= each + 1e-14
        assert each <= max(map(max_violation, batches)) + 1e-14


def test_for_batches_of_different_sizes_it_may_be_worse():
    """A large lopsided batch and a small even one: weighed by their sizes 8/9, unweighed 1/2; together (17, 1): 8/9."""
    assert max_violations([[16, 0], [1, 1]]) == pytest.approx((8 / 9, 1 / 2), rel=1e-14)


def test_choose_multiplied_by_hand():
    """0.6 and 0.5 become 0.3 and 0.5: the factor brings expert 1 forward. A score of 0 no factor can help."""
    score = np.array([[0.6, 0.5, 0.1]])
    assert choose_multiplied(score, np.ones(3), top_k=2).tolist() == [[0, 1]]
    assert choose_multiplied(score, np.array([0.5, 1, 1]), top_k=2).tolist() == [[1, 0]]
    assert choose_multiplied(score, np.array([0.5, 1, 4]), top_k=2).tolist() == [[1, 2]]
    assert choose_multiplied(np.array([[0.6, 0.5, 0.0]]), np.array([1, 1, 1e6]), top_k=2).tolist() == [[0, 1]]


def test_factors_of_one_are_no_bias():
    score = rng.random((20, 8))
    options = {"top_k": 3, "n_groups": 4, "n_groups_kept": 2, "scoring": "sigmoid"}
    assert (choose_multiplied(score, np.ones(8), **options) == choose(score, None, **options)).all()


@pytest.mark.parametrize("scoring", ("sigmoid", "softmax"))
def test_only_ratios_of_factors_matter(scoring):
    score, b = rng.random((20, 8)), rng.random(8) + 0.5
    options = {"top_k": 3, "n_groups": 4, "n_groups_kept": 2, "scoring": scoring}
    assert (choose_multiplied(score, b, **options) == choose_multiplied(score, 4 * b, **options)).all()
    assert (choose_multiplied(score, b, **options) != choose_multiplied(score, np.ones(8), **options)).any()


def test_a_factor_on_the_score_is_a_bias_on_its_logarithm():
    score, b = rng.random((50, 6)) + 0.01, rng.random(6) + 0.5
    options = {"top_k": 3, "n_groups": 1, "n_groups_kept": 1, "scoring": "sigmoid"}
    assert (choose_multiplied(score, b, top_k=3) == choose(np.log(score), np.log(b), **options)).all()


def simulate(rule, gamma, tokens, factor=False, steps=200):
    """MaxVio (before, after: together, each) of a skewed router that stands still while the rule moves the biases."""
    rng = np.random.default_rng(0)
    W = rng.standard_normal((8, 6)) / 3
    W[0] = [1.5, 1, 0, 0, -1, -1.5]
    b, history = np.full(6, float(factor)), []
    for _ in range(steps):
        x = rng.standard_normal((tokens, 8))
        x[:, 0] = 1
        score = 1 / (1 + np.exp(-x @ W))
        chosen = choose_multiplied(score, b, top_k=2) if factor else choose(score, b, top_k=2, n_groups=1, n_groups_kept=1, scoring="sigmoid")
        history.append(expert_counts(chosen, 6))
        b = update_bias(b, history[-1], gamma, rule)
    return max_violation(history[0]), *max_violations(history[-50:])


@pytest.mark.parametrize("rule, gamma, factor", [
    ("sign", 0.005, False), ("sign", 0.01, True), ("proportional", 0.0005, False), ("proportional", 0.001, True),
    ("relative", 0.05, False), ("relative", 0.05, True)])
def test_each_rule_balances_a_router_that_stands_still(rule, gamma, factor):
    before, together, each = simulate(rule, gamma, tokens=256, factor=factor)
    assert before > 1 and together < 0.05 and each < 0.25


def test_a_step_too_large_thrashes_and_all_batches_together_do_not_show_it():
    """One gamma, proportional, batches of 64 and of 1,024 tokens: the second steps sixteen times as far."""
    _, together, each = simulate("proportional", 0.001, tokens=64)
    assert together < 0.1 and each < 0.5
    _, together, each = simulate("proportional", 0.001, tokens=1024, steps=120)
    assert together < 0.1 and each > 1
    _, _, each = simulate("relative", 0.02, tokens=1024, steps=120)
    assert each < 0.2


@pytest.mark.parametrize("call, message", [
    (lambda: update_bias(np.zeros(3), np.ones(3), 0.1, rule="Sign"), "rule = 'Sign', expected 'sign', 'proportional' or 'relative'"),
    (lambda: update_bias(np.zeros(3), np.zeros(3, int), 0.1, rule="relative"), r"counts = \[0, 0, 0\]: nothing was counted"),
    (lambda: choose_multiplied(np.ones((2, 3)), np.array([1, 0.5, 0]), top_k=1), r"b_factor\[2\] = 0.0: a factor is finite and above 0"),
    (lambda: choose_multiplied(np.ones((2, 3)), np.array([-1, 1, 1]), top_k=1), r"b_factor\[0\] = -1"),
    (lambda: choose_multiplied(np.ones((2, 3)), np.array([1, np.nan, 1]), top_k=1), r"b_factor\[1\] = nan"),
    (lambda: max_violations([5, 3, 1]), r"batches has shape \(3,\), expected \(n, E\)"),
    (lambda: max_violations(np.zeros((0, 3))), r"batches has shape \(0, 3\)"),
    (lambda: max_violations([[1, 2], [0, 0]]), r"counts = \[0, 0\]: nothing was counted"),
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
