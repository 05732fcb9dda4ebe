import numpy as np
import pytest

from minideepseek.autograd.shapes import ShapeError
from minideepseek.autograd.tape import Tape, Tensor
from minideepseek.basics.swiglu import swiglu_forward
from minideepseek.moe.experts import experts, experts_backward, experts_examples, experts_forward

rng = np.random.default_rng(0)


@pytest.mark.parametrize("case", experts_examples(rng))
def test_equal_to_a_loop_over_tokens_and_experts(case):
    x, gate, chosen, *W = args = experts_examples(rng)[case][0]
    y, _ = experts_forward(*args)
    plain = np.zeros_like(y)
    for place in np.ndindex(chosen.shape):
        plain[place[:-1]] += gate[place] * swiglu_forward(x[place[:-1]], *[w[chosen[place]] for w in W])[0]
    np.testing.assert_allclose(y, plain, atol=1e-12)


def test_an_idle_expert_has_a_gradient_of_exactly_zero():
    args, _ = experts_examples(rng)["batch, expert 1 idle"]
    y, cache = experts_forward(*args)
    *_, dW_gate, dW_up, dW_down = experts_backward(np.ones_like(y), cache)
    for dW in (dW_gate, dW_up, dW_down):
        assert not dW[1].any() and dW[[0, 2, 3]].any(axis=(1, 2)).all()


def test_the_order_in_which_a_token_names_its_experts_does_not_matter():
    x, gate, chosen, *W = experts_examples(rng)["tokens"][0]
    y, _ = experts_forward(x, gate, chosen, *W)
    y_flipped, _ = experts_forward(x, gate[:, ::-1], chosen[:, ::-1], *W)
    np.testing.assert_allclose(y_flipped, y, atol=1e-13)


def test_the_gradient_of_a_gate_is_what_its_expert_answered():
    x, gate, chosen, *W = experts_examples(rng)["tokens"][0]
    y, cache = experts_forward(x, gate, chosen, *W)
    dy = rng.standard_normal(y.shape)
    _, dgate, dchosen, *_ = experts_backward(dy, cache)
    assert dchosen is None
    for m, k in np.ndindex(chosen.shape):
        answer, _ = swiglu_forward(x[m], *[w[chosen[m, k]] for w in W])
        assert dgate[m, k] == pytest.approx(dy[m] @ answer, rel=1e-12)


def test_each_expert_runs_once_on_its_own_tokens_only():
    sizes = []

    def gemm(A, B, *, role):
        sizes.append(len(A))
        return A @ B

    args, _ = experts_examples(rng)["tokens"]
    experts_forward(*args, gemm=gemm)
    assert sizes == [2, 2, 2, 1, 1, 1, 2, 2, 2, 1, 1, 1]      # three products for each of four experts


def test_more_experts_than_a_byte_can_count():
    E = 300
    W = [rng.standard_normal(shape) for shape in [(E, 2, 1), (E, 2, 1), (E, 1, 2)]]
    chosen = rng.integers(0, E, (40, 3))
    x, gate = rng.standard_normal((40, 2)), rng.random((40, 3))
    y, _ = experts_forward(x, gate, chosen, *W)
    m = 17
    expected = sum(gate[m, k] * swiglu_forward(x[m], *[w[chosen[m, k]] for w in W])[0] for k in range(3))
    np.testing.assert_allclose(y[m], expected, atol=1e-12)


def test_an_expert_that_does_not_exist_is_named():
    x, gate, chosen, *W = experts_examples(rng)["tokens"][0]
    chosen[1, 0] = 4
    with pytest.raises(ShapeError, match=r"experts: chosen\[1, 0\] = 4 is not in 0 .. 3"):
        experts(x, gate, chosen, *W)


def test_on_the_tape():
    x, gate, chosen, *W = experts_examples(rng)["tokens"][0]
    leaves = [Tensor(x), Tensor(gate), chosen, *map(Tensor, W)]
    with Tape() as tape:
        y = experts(*leaves)
    tape.backward({y: np.ones(y.data.shape)})
    assert all(leaf.grad is not None for leaf in leaves if isinstance(leaf, Tensor))
