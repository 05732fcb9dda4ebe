import math

import numpy as np

from minideepseek.autograd.gradcheck import gradcheck
from minideepseek.autograd.tape import Tape, Tensor
from minideepseek.basics.linear import linear
from minideepseek.basics.swiglu import sigmoid, silu_mul, silu_mul_forward, swiglu, swiglu_backward, swiglu_examples, swiglu_forward
from tests.house import spy_on_gemm

rng = np.random.default_rng(0)


def test_silu_by_hand():
    h, _ = silu_mul_forward(np.array([0.0, math.log(3), -math.log(3)]), np.array([9.0, 4.0, 4.0]))
    np.testing.assert_allclose(h, [0, 3 * math.log(3), -math.log(3)], rtol=1e-15)      # sigmoid(log 3) = 3/4


def test_the_layer_by_hand():
    one = np.ones((1, 1))
    y, _ = swiglu_forward(np.array([[2.0]]), one, 3 * one, 5 * one)
    np.testing.assert_allclose(y, [[5 * 2 / (1 + math.exp(-2)) * 6]], rtol=1e-15)


def test_the_gate_is_the_one_that_passes_through_silu():
    """Gate and up exchanged give the same parameter count and another function."""
    x, W_gate, W_up, W_down = swiglu_examples(rng)["tokens"][0]
    assert np.abs(swiglu_forward(x, W_gate, W_up, W_down)[0] - swiglu_forward(x, W_up, W_gate, W_down)[0]).max() > 0.1


def test_three_ways_to_the_same_gradient():
    """Fused backward = the same network op by op on the tape = finite differences."""
    for args, config in swiglu_examples(rng).values():
        y, cache = swiglu_forward(*args)
        dy = rng.standard_normal(y.shape)
        fused = swiglu_backward(dy, cache)

        x, W_gate, W_up, W_down = leaves = [Tensor(a) for a in args]
        with Tape() as tape:
            out = linear(silu_mul(linear(x, W_gate), linear(x, W_up)), W_down)
        tape.backward({out: dy})
        assert np.abs(out.data - y).max() <= 1e-12
        for leaf, gradient in zip(leaves, fused, strict=True):
            assert np.abs(leaf.grad - gradient).max() <= 1e-12
        gradcheck(swiglu_forward, swiglu_backward, args)


def test_it_is_one_record_on_the_tape():
    args, _ = swiglu_examples(rng)["batch"]
    with Tape() as tape:
        swiglu(*args)
    assert [record.name for record in tape.records] == ["swiglu"]


def test_every_projection_passes_through_the_gemm_door():
    gemm, roles = spy_on_gemm()
    args, _ = swiglu_examples(rng)["batch"]
    y, cache = swiglu_forward(*args, gemm=gemm)
    swiglu_backward(y, cache)
    assert roles == ["forward"] * 3 + ["dx", "dW"] * 3


def test_large_inputs_do_not_overflow():
    with np.errstate(over="raise"):
        h, _ = silu_mul_forward(np.array([-1e4, 1e4], np.float32), np.ones(2, np.float32))
    assert h.tolist() == [0, 1e4]


def test_sigmoid_is_right_and_quiet_at_both_ends():
    from scipy.special import expit

    for dtype, tolerance in ((np.float64, 1e-15), (np.float32, 2e-7)):
        a = np.array([-1e4, -800, -100, -20, -1, 0, 1, 20, 100, 1e4], dtype)
        with np.errstate(all="raise", under="ignore"):
            s = sigmoid(a)
        assert s.dtype == dtype and np.abs(s - expit(a)).max() <= tolerance and s[0] == 0 and s[-1] == 1
