import numpy as np
import pytest

from minideepseek.attention.causal import causal_attention_forward
from minideepseek.attention.self_attention import self_attention_backward, self_attention_examples, self_attention_forward
from minideepseek.autograd.gradcheck import gradcheck
from minideepseek.autograd.tape import Tape, Tensor, op
from minideepseek.basics.linear import linear
from minideepseek.basics.softmax import softmax
from tests.house import spy_on_gemm

CASES = ("1 / sqrt(K)", "another scale")


def example(case="1 / sqrt(K)", seed=0):
    return self_attention_examples(np.random.default_rng(seed))[case]


def compare_forward(q, k, *, scale):
    """Scores.

    q: (B, T, K)   k: (B, S, K)   ->   scores: (B, T, S)
    """
    return scale * (q @ k.swapaxes(1, 2)), (q, k, scale)


def compare_backward(dscores, cache):
    q, k, scale = cache
    return scale * (dscores @ k), scale * (dscores.swapaxes(1, 2) @ q)


def average_forward(p, v):
    """Averages.

    p: (B, T, S)   v: (B, S, V)   ->   o: (B, T, V)
    """
    return p @ v, (p, v)


def average_backward(do, cache):
    p, v = cache
    return do @ v.swapaxes(1, 2), p.swapaxes(1, 2) @ do


compare = op(compare_forward, compare_backward)
average = op(average_forward, average_backward)


@pytest.mark.parametrize("case", CASES)
def test_three_ways_to_the_same_gradient(case):
    """Fused backward = the same network op by op on the tape = finite differences."""
    args, config = example(case)
    o, cache = self_attention_forward(*args, **config)
    do = np.random.default_rng(1).standard_normal(o.shape)
    fused = self_attention_backward(do, cache)

    x, W_Q, W_K, W_V = leaves = [Tensor(a) for a in args]
    with Tape() as tape:
        scores = compare(linear(x, W_Q), linear(x, W_K), scale=config.get("scale", args[1].shape[1] ** -0.5))
        out = average(softmax(scores), linear(x, W_V))
    tape.backward({out: do})
    assert np.abs(out.data - o).max() <= 1e-12
    for leaf, gradient in zip(leaves, fused, strict=True):
        assert np.abs(leaf.grad - gradient).max() <= 1e-12
    gradcheck(self_attention_forward, self_attention_backward, args, config)


def test_equal_to_the_sum_written_out():
    (x, W_Q, W_K, W_V), _ = example()
    o, _ = self_attention_forward(x, W_Q, W_K, W_V)
    for b, i in np.ndindex(x.shape[:2]):
        weights = np.exp([(x[b, i] @ W_Q) @ (x[b, j] @ W_K) / np.sqrt(W_Q.shape[1]) for j in range(x.shape[1])])
        np.testing.assert_allclose(o[b, i], sum(w * (x[b, j] @ W_V) for j, w in enumerate(weights)) / weights.sum(), rtol=0, atol=1e-13)


def test_a_scale_that_is_given_replaces_the_default():
    args, _ = example()
    usual, _ = self_attention_forward(*args)
    assert (self_attention_forward(*args, scale=args[1].shape[1] ** -0.5)[0] == usual).all()
    flat, _ = self_attention_forward(*args, scale=0.0)                  # 0 is a scale, not an absent one
    np.testing.assert_allclose(flat, np.broadcast_to((args[0] @ args[3]).mean(axis=1, keepdims=True), flat.shape), rtol=0, atol=1e-14)


def test_shuffled_tokens_give_shuffled_outputs_and_gradients():
    (x, *weights), _ = example()
    order, do = np.array([2, 0, 3, 1]), np.random.default_rng(1).standard_normal((2, 4, 6))
    o, cache = self_attention_forward(x, *weights)
    shuffled, shuffled_cache = self_attention_forward(x[:, order], *weights)
    np.testing.assert_allclose(shuffled, o[:, order], rtol=0, atol=1e-14)
    dx, *dweights = self_attention_backward(do, cache)
    dx_shuffled, *dweights_shuffled = self_attention_backward(do[:, order], shuffled_cache)
    np.testing.assert_allclose(dx_shuffled, dx[:, order], rtol=0, atol=1e-13)
    for a, b in zip(dweights, dweights_shuffled, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-13)


def test_the_first_token_sees_the_last_and_the_last_sees_what_causal_attention_sees():
    (x, W_Q, W_K, W_V), _ = example()
    o, _ = self_attention_forward(x, W_Q, W_K, W_V)
    moved = x.copy()
    moved[:, -1] += 1
    assert (self_attention_forward(moved, W_Q, W_K, W_V)[0][:, 0] != o[:, 0]).all()
    causal, _ = causal_attention_forward(*[(x @ W)[:, None] for W in (W_Q, W_K, W_V)], scale=W_Q.shape[1] ** -0.5)
    np.testing.assert_allclose(o[:, -1], causal[:, 0, -1], rtol=0, atol=1e-14)
    assert np.abs(o[:, :-1] - causal[:, 0, :-1]).max() > 0.01


def test_sequences_of_a_batch_do_not_mix():
    (x, *weights), _ = example()
    whole, _ = self_attention_forward(x, *weights)
    np.testing.assert_allclose(self_attention_forward(x[1:], *weights)[0], whole[1:], rtol=0, atol=1e-14)


def test_one_token_reads_its_own_value_and_huge_scores_stay_finite():
    (x, W_Q, W_K, W_V), _ = example()
    np.testing.assert_allclose(self_attention_forward(x[:, :1], W_Q, W_K, W_V)[0], x[:, :1] @ W_V, rtol=0, atol=1e-14)
    o, cache = self_attention_forward(x, 1e6 * W_Q, W_K, W_V)
    assert np.isfinite(o).all() and all(np.isfinite(g).all() for g in self_attention_backward(o, cache))


def test_every_projection_passes_through_the_gemm_door():
    gemm, roles = spy_on_gemm()
    args, _ = example()
    o, cache = self_attention_forward(*args, gemm=gemm)
    assert roles == ["forward"] * 3
    self_attention_backward(o, cache)
    assert roles.count("dx") == roles.count("dW") == 3
