import numpy as np
import pytest

from minideepseek.autograd.gradcheck import gradcheck
from minideepseek.autograd.tape import Tape, Tensor
from minideepseek.basics.residual import add
from minideepseek.basics.swiglu import swiglu, swiglu_forward
from minideepseek.moe.deepseek_moe import MoEWeights, deepseek_moe, deepseek_moe_backward, deepseek_moe_examples, deepseek_moe_forward
from minideepseek.moe.experts import experts
from minideepseek.moe.router import router

CASES = ("V3", "V2, a batch", "no shared expert")


@pytest.mark.parametrize("case", CASES)
def test_three_ways_to_the_same_gradient(case):
    """Fused backward = the same network op by op on the tape = finite differences."""
    args, config = deepseek_moe_examples(np.random.default_rng(0))[case]
    (y, chosen), cache = deepseek_moe_forward(*args, **config)
    dy = np.random.default_rng(1).standard_normal(y.shape)
    fused = deepseek_moe_backward(dy, cache)

    leaves = [None if a is None else Tensor(a) for a in args]
    x, w = leaves[0], MoEWeights(*leaves[1:])
    with Tape() as tape:
        gate, picked = router(x, w.W_router, **config)
        out = experts(x, gate, picked, w.W_gate, w.W_up, w.W_down)
        if w.W_shared_gate is not None:
            out = add(out, swiglu(x, w.W_shared_gate, w.W_shared_up, w.W_shared_down))
    tape.backward({out: dy})
    assert (picked.data == chosen).all() and np.abs(out.data - y).max() <= 1e-12
    for leaf, gradient in zip(leaves, fused, strict=True):
        assert (leaf is None and gradient is None) or np.abs(leaf.grad - gradient).max() <= 1e-12
    gradcheck(deepseek_moe_forward, deepseek_moe_backward, args, config)


def test_the_residual_is_not_added_here():
    """With experts that answer zero the layer answers zero: x + f(x) belongs to the block."""
    args, config = deepseek_moe_examples(np.random.default_rng(0))["V3"]
    w = MoEWeights(*args[1:])
    silent = w._replace(W_down=0 * w.W_down, W_shared_down=0 * w.W_shared_down)
    (y, _), _ = deepseek_moe_forward(args[0], *silent, **config)
    assert not y.any()


def test_the_shared_expert_serves_every_token_and_is_not_scaled():
    args, config = deepseek_moe_examples(np.random.default_rng(0))["V3"]
    w = MoEWeights(*args[1:])
    (y, _), _ = deepseek_moe_forward(args[0], *w._replace(W_down=0 * w.W_down), **config)
    np.testing.assert_allclose(y, swiglu_forward(args[0], w.W_shared_gate, w.W_shared_up, w.W_shared_down)[0], atol=1e-14)


def test_other_tokens_change_nothing_but_the_rounding():
    args, config = deepseek_moe_examples(np.random.default_rng(0))["V3"]
    (whole, _), _ = deepseek_moe_forward(*args, **config)
    (alone, _), _ = deepseek_moe_forward(args[0][2:3], *args[1:], **config)
    np.testing.assert_allclose(alone, whole[2:3], rtol=0, atol=1e-12)


def test_on_the_tape_it_is_one_record_with_an_integer_output():
    args, config = deepseek_moe_examples(np.random.default_rng(0))["V2, a batch"]
    with Tape() as tape:
        y, chosen = deepseek_moe(*[Tensor(a) for a in args], **config)
    assert len(tape.records) == 1 and chosen.data.shape == (2, 3, 3)
    tape.backward({y: np.ones(y.data.shape)})
