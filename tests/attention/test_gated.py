import numpy as np
import pytest

from minideepseek.attention.gated import (GatedWeights, gated_attention, gated_attention_backward, gated_attention_examples,
                                          gated_attention_forward, relu2_attention, relu2_attention_backward, relu2_attention_forward)
from minideepseek.autograd.gradcheck import gradcheck
from minideepseek.autograd.tape import Tape, Tensor, op
from minideepseek.basics.linear import linear
from minideepseek.basics.swiglu import silu_mul
from tests.house import spy_on_gemm

rng = np.random.default_rng(0)


def draw(B, T, S, K, F):
    return [rng.standard_normal(shape) for shape in [(B, T, K), (B, S, K), (B, S, F)]]


def example(seed=0):
    (x, *weights), config = gated_attention_examples(np.random.default_rng(seed))["one head"]
    return x, GatedWeights(*weights), config


def silu(a):
    return a / (1 + np.exp(-a))


@pytest.mark.parametrize("T, S", [(5, 5), (3, 6), (1, 4)])
def test_the_core_is_the_sum_written_out(T, S):
    q, k, v = draw(2, T, S, 4, 7)
    o, _ = relu2_attention_forward(q, k, v, scale=0.5)
    for b, i in np.ndindex(2, T):
        seen = i + S - T + 1
        expected = sum(max(0.5 * q[b, i] @ k[b, j], 0) ** 2 * v[b, j] for j in range(seen)) / seen
        np.testing.assert_allclose(o[b, i], expected, rtol=1e-12, atol=1e-14)


def test_the_unit_is_its_formula_token_by_token():
    x, w, config = example()
    y, _ = gated_attention_forward(x, *w, **config)
    for b, i in np.ndindex(x.shape[:2]):
        q = silu(x[b, i] @ w.W_z) * w.g_q + w.b_q
        read = 0
        for j in range(i + 1):
            k = silu(x[b, j] @ w.W_z) * w.g_k + w.b_k
            read = read + max(config["scale"] * q @ k, 0) ** 2 / (i + 1) * silu(x[b, j] @ w.W_v)
        np.testing.assert_allclose(y[b, i], (silu(x[b, i] @ w.W_u) * read) @ w.W_o, rtol=1e-12, atol=1e-13)


def affine_forward(z, g, b):
    """Scale and shift each channel.

    z: (B, T, K)   g: (K,)   b: (K,)   ->   y: (B, T, K)
    """
    return z * g + b, (z, g)


def affine_backward(dy, cache):
    z, g = cache
    return dy * g, (dy * z).sum(axis=(0, 1)), dy.sum(axis=(0, 1))


affine = op(affine_forward, affine_backward)


def test_three_ways_to_the_same_gradient():
    """Fused backward = the same network op by op on the tape = finite differences."""
    x, w, config = example()
    y, cache = gated_attention_forward(x, *w, **config)
    dy = rng.standard_normal(y.shape)
    fused = gated_attention_backward(dy, cache)

    leaves = [Tensor(a) for a in (x, *w)]
    t = GatedWeights(*leaves[1:])
    one = {n: Tensor(np.ones((*x.shape[:2], n))) for n in (w.W_v.shape[1], w.W_z.shape[1])}
    with Tape() as tape:
        v, z = [silu_mul(linear(leaves[0], W), one[W.data.shape[1]]) for W in (t.W_v, t.W_z)]
        o = relu2_attention(affine(z, t.g_q, t.b_q), affine(z, t.g_k, t.b_k), v, **config)
        out = linear(silu_mul(linear(leaves[0], t.W_u), o), t.W_o)
    tape.backward({out: dy})
    assert np.abs(out.data - y).max() <= 1e-12
    for leaf, gradient in zip(leaves, fused, strict=True):
        assert np.abs(leaf.grad - gradient).max() <= 1e-12
    gradcheck(gated_attention_forward, gated_attention_backward, (x, *w), config)


def test_the_future_changes_nothing_bit_for_bit():
    x, w, config = example()
    x = rng.standard_normal((2, 12, 3))
    before, _ = gated_attention_forward(x, *w, **config)
    for j in (3, 7, 11):
        x2 = x.copy()
        x2[:, j] = 5.0
        after, _ = gated_attention_forward(x2, *w, **config)
        assert (after[:, :j] == before[:, :j]).all() and (after[:, j:] != before[:, j:]).any()


def test_the_length_of_the_text_changes_nothing_before_its_end():
    """Dividing by T, not by the number of visible keys, would fail here."""
    x, w, config = example()
    x = rng.standard_normal((2, 12, 3))
    whole, _ = gated_attention_forward(x, *w, **config)
    for T in (1, 5, 11):
        part, _ = gated_attention_forward(x[:, :T], *w, **config)
        np.testing.assert_allclose(part, whole[:, :T], rtol=0, atol=1e-12)


def test_queries_in_chunks_equal_queries_at_once():
    q, k, v = draw(2, 7, 7, 4, 5)
    whole, _ = relu2_attention_forward(q, k, v, scale=0.5)
    for t, n in ((0, 3), (3, 2), (5, 2)):
        part, _ = relu2_attention_forward(q[:, t:t + n], k[:, :t + n], v[:, :t + n], scale=0.5)
        np.testing.assert_allclose(part, whole[:, t:t + n], rtol=0, atol=1e-12)


def test_no_score_competes_with_another():
    """Twice the query, four times the output; and moving one key moves nothing but its own term."""
    q, k, v = draw(1, 4, 4, 3, 5)
    o, (*_, a, _) = relu2_attention_forward(q, k, v, scale=0.5)
    np.testing.assert_allclose(relu2_attention_forward(2 * q, k, v, scale=0.5)[0], 4 * o, rtol=1e-13)
    k[:, 1] += 1
    *_, moved, _ = relu2_attention_forward(q, k, v, scale=0.5)[1]
    assert (moved[..., [0, 2, 3]] == a[..., [0, 2, 3]]).all() and (moved[..., 1] != a[..., 1]).any()


def test_at_a_score_of_zero_the_slope_is_zero():
    q, k, v = np.zeros((1, 2, 3)), rng.standard_normal((1, 2, 3)), rng.standard_normal((1, 2, 4))
    o, cache = relu2_attention_forward(q, k, v, scale=1.0)
    assert not o.any() and not any(d.any() for d in relu2_attention_backward(np.ones_like(o), cache))
    x, h = 0.0, 1e-3                                                        # but the slope has a corner, as is said in away_from_zero
    square = lambda s: max(s, 0) ** 2
    near, far = (square(x + h) - square(x - h)) / (2 * h), (square(x + 2 * h) - square(x - 2 * h)) / (4 * h)
    assert np.isclose((4 * near - far) / 3, h / 3)


def test_a_query_that_sees_nothing_gives_zeros_and_gets_zeros():
    q, k, v = draw(1, 5, 2, 4, 3)
    with np.errstate(all="raise"):
        o, cache = relu2_attention_forward(np.abs(q), np.abs(k), v, scale=0.5)
        dq, dk, dv = relu2_attention_backward(np.ones_like(o), cache)
    assert not o[:, :3].any() and not dq[:, :3].any() and o[:, 3:].all() and np.isfinite(dk).all() and np.isfinite(dv).all()


def test_every_projection_passes_through_the_gemm_door():
    gemm, roles = spy_on_gemm()
    x, w, config = example()
    y, cache = gated_attention_forward(x, *w, **config, gemm=gemm)
    gated_attention_backward(y, cache)
    assert roles == ["forward"] * 4 + ["dx", "dW"] * 4


def test_it_is_one_record_on_the_tape():
    x, w, config = example()
    with Tape() as tape:
        gated_attention(x, *w, **config)
    assert [record.name for record in tape.records] == ["gated_attention"]


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_dtype_is_kept(dtype):
    x, w, config = example()
    y, cache = gated_attention_forward(*[a.astype(dtype) for a in (x, *w)], **config)
    assert all(a.dtype == dtype for a in (y, *gated_attention_backward(y, cache)))
