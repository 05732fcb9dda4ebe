import numpy as np
import pytest

from minideepseek.autograd.shapes import ShapeError
from minideepseek.autograd.tape import Tape, Tensor
from minideepseek.basics.swiglu import swiglu_forward
from minideepseek.moe.classic import dense_moe, dense_moe_backward, dense_moe_examples, dense_moe_forward
from minideepseek.moe.deepseek_moe import deepseek_moe_backward, deepseek_moe_forward
from minideepseek.moe.experts import experts
from minideepseek.moe.router import router, router_backward, router_forward

CASES = ("normalised", "a batch, not normalised", "Switch: one expert, its probability")
ONE = "Switch: one expert, its probability"
GATES = "normalised"


def draw(case, seed=0):
    return dense_moe_examples(np.random.default_rng(seed))[case]


def probabilities(x, W_router):
    e = np.exp(x @ W_router)
    return e / e.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("case", CASES)
def test_against_the_definition_token_by_token(case):
    (x, W_router, *W), config = draw(case)
    y, _ = dense_moe_forward(x, W_router, *W, **config)
    for place in np.ndindex(x.shape[:-1]):
        p = probabilities(x[place], W_router)
        kept = sorted(range(len(p)), key=lambda e: -p[e])[:config["top_k"]]
        total = p[kept].sum() if config.get("normalise", True) else 1
        expected = sum(p[e] / total * swiglu_forward(x[place], *[w[e] for w in W])[0] for e in kept)
        np.testing.assert_allclose(y[place], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("seed", (0, 1, 2))
@pytest.mark.parametrize("case", CASES)
def test_dense_is_sorted_in_the_value_and_in_every_gradient(case, seed):
    args, config = draw(case, seed)
    y, cache = dense_moe_forward(*args, **config)
    (y_sorted, chosen), cache_sorted = deepseek_moe_forward(*args, None, None, None, scoring="softmax", **config)
    dy = np.random.default_rng(seed + 10).standard_normal(y.shape)
    dense, by_sorting = dense_moe_backward(dy, cache), deepseek_moe_backward(dy, cache_sorted)
    assert len(dense) == 5 and by_sorting[5:] == (None, None, None)
    assert (cache.chosen == chosen.reshape(cache.chosen.shape)).all()
    for one, other in zip((y, *dense), (y_sorted, *by_sorting)):
        assert np.abs(one).max() > 0.01 and np.abs(one - other).max() <= 1e-12


@pytest.mark.parametrize("case", CASES)
def test_fused_is_router_and_experts_on_the_tape(case):
    args, config = draw(case)
    y, cache = dense_moe_forward(*args, **config)
    dy = np.random.default_rng(1).standard_normal(y.shape)
    leaves = [Tensor(a) for a in args]
    with Tape() as tape:
        gate, chosen = router(leaves[0], leaves[1], scoring="softmax", **config)
        out = experts(leaves[0], gate, chosen, *leaves[2:])
    tape.backward({out: dy})
    for leaf, gradient in zip(leaves, dense_moe_backward(dy, cache), strict=True):
        assert np.abs(leaf.grad - gradient).max() <= 1e-12


@pytest.mark.parametrize("case", CASES)
def test_the_gate_matrix_is_zero_outside_the_best_k(case):
    (x, W_router, *W), config = draw(case)
    _, cache = dense_moe_forward(x, W_router, *W, **config)
    p = probabilities(x.reshape(-1, x.shape[-1]), W_router)
    assert cache.gate_matrix.shape == p.shape and ((cache.gate_matrix > 0).sum(axis=1) == config["top_k"]).all()
    kept = cache.gate_matrix > 0
    assert (np.where(kept, p, 1).min(axis=1) > np.where(kept, 0, p).max(axis=1)).all()
    sums = np.where(kept, p, 0).sum(axis=1) if not config.get("normalise", True) else 1
    np.testing.assert_allclose(cache.gate_matrix.sum(axis=1), sums, rtol=1e-13)


def test_normalised_gates_are_a_softmax_over_the_chosen_logits():
    """Softmax over all, keep, divide = keep, softmax: what was not chosen cancels out."""
    (x, W_router, *W), _ = draw(GATES)
    _, cache = dense_moe_forward(x, W_router, *W, top_k=2)
    logits = np.take_along_axis(x @ W_router, cache.chosen, axis=-1)
    expected = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(np.take_along_axis(cache.gate_matrix, cache.chosen, axis=-1), expected, rtol=1e-13)


@pytest.mark.parametrize("normalise", (True, False))
def test_the_unchosen_hear_of_it_only_when_the_gates_are_not_normalised(normalise):
    (x, W_router, *W), _ = draw(GATES)
    y, cache = dense_moe_forward(x[:1], W_router, *W, top_k=2, normalise=normalise)
    _, dW_router, *_ = dense_moe_backward(np.random.default_rng(1).standard_normal(y.shape), cache)
    unchosen = np.setdiff1d(np.arange(W_router.shape[1]), cache.chosen)
    assert np.abs(dW_router[:, cache.chosen[0]]).max() > 1e-3
    assert bool(np.abs(dW_router[:, unchosen]).max() < 1e-15) is normalise


def test_one_normalised_gate_is_the_constant_one_and_the_router_gets_exactly_nothing():
    args, _ = draw(ONE)
    y, cache = dense_moe_forward(*args, top_k=1)
    assert (cache.gate_matrix.max(axis=1) == 1).all() and (cache.gate_matrix.sum(axis=1) == 1).all()
    dx, dW_router, *rest = dense_moe_backward(np.random.default_rng(1).standard_normal(y.shape), cache)
    assert not dW_router.any() and all(d.any() for d in (dx, *rest))        # all others learn


def test_switch_multiplies_by_the_probability_and_its_router_learns():
    (x, W_router, *W), config = draw(ONE)
    y, cache = dense_moe_forward(x, W_router, *W, **config)
    normalised, _ = dense_moe_forward(x, W_router, *W, top_k=1)
    largest = probabilities(x, W_router).max(axis=-1, keepdims=True)
    np.testing.assert_allclose(y, largest * normalised, rtol=1e-13)
    _, dW_router, *_ = dense_moe_backward(np.ones_like(y), cache)
    assert np.abs(dW_router).max() > 1e-3


def test_the_other_way_out_of_the_trap_is_a_sigmoid_that_is_not_normalised():
    (x, W_router, *_), _ = draw(ONE)
    for scoring, normalise, learns in (("sigmoid", False, True), ("sigmoid", True, False), ("softmax", True, False)):
        (gate, _), cache = router_forward(x, W_router, top_k=1, scoring=scoring, normalise=normalise)
        _, dW_router = router_backward(np.ones_like(gate), cache)
        assert bool(dW_router.any()) is learns


def test_with_all_experts_kept_normalising_changes_nothing():
    (x, W_router, *W), _ = draw(GATES)
    soft, _ = dense_moe_forward(x, W_router, *W, top_k=5)
    plain, cache = dense_moe_forward(x, W_router, *W, top_k=5, normalise=False)
    np.testing.assert_allclose(cache.gate_matrix, probabilities(x, W_router), rtol=1e-13)
    np.testing.assert_allclose(soft, plain, rtol=0, atol=1e-14)


def test_an_expert_that_nobody_chose_ran_in_vain():
    """It was asked about every token, its answers stand in the cache, and its gradients are exactly zero."""
    (x, W_router, *W), config = draw(ONE)
    y, cache = dense_moe_forward(x, W_router, *W, **config)
    _, _, *dW = dense_moe_backward(np.ones_like(y), cache)
    idle = np.setdiff1d(np.arange(5), cache.chosen)
    assert len(idle) >= 3 and cache.answers[idle].all()
    assert not any(d[idle].any() for d in dW) and all(d[cache.chosen[0, 0]].any() for d in dW)


def test_the_dense_layer_computes_e_over_k_times_as_many_answers():
    args, config = draw(GATES)
    _, dense = dense_moe_forward(*args, **config)
    _, by_sorting = deepseek_moe_forward(*args, None, None, None, scoring="softmax", **config)
    assert dense.answers.size * config["top_k"] == by_sorting.experts.y_sorted.size * 5


def test_on_the_tape_it_is_one_record_and_its_door_knows_the_shapes():
    args, config = draw("a batch, not normalised")
    leaves = [Tensor(a) for a in args]
    with Tape() as tape:
        y = dense_moe(*leaves, **config)
    assert len(tape.records) == 1
    tape.backward({y: np.ones(y.data.shape)})
    assert all(leaf.grad is not None for leaf in leaves)
    with pytest.raises(ShapeError, match="dense_moe: W_gate has E = 4, but the other arguments give E = 5"):
        dense_moe(*args[:2], args[2][:4], *args[3:], **config)
