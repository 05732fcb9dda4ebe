import numpy as np
import pytest

from minideepseek.attention.causal import causal_attention_backward, causal_attention_forward
from minideepseek.attention.flash import flash_attention_forward, merge_partial
from minideepseek.attention.sink import sink_attention_backward, sink_attention_forward

rng = np.random.default_rng(0)


def draw(B, H, T, S, K, V):
    return [rng.standard_normal(shape) for shape in [(B, H, T, K), (B, H, S, K), (B, H, S, V), (H,)]]


def test_equal_to_the_sum_written_out():
    q, k, v, sink = draw(2, 3, 4, 6, 5, 7)
    o, _ = sink_attention_forward(q, k, v, sink, scale=0.3)
    for b, h, i in np.ndindex(2, 3, 4):
        weights = np.exp(0.3 * k[b, h, :i + 3] @ q[b, h, i])
        np.testing.assert_allclose(o[b, h, i], weights @ v[b, h, :i + 3] / (weights.sum() + np.exp(sink[h])), rtol=1e-12)


@pytest.mark.parametrize("T, S", [(5, 5), (3, 7), (6, 4)])
def test_a_sink_far_below_every_score_is_causal_attention(T, S):
    q, k, v, _ = draw(2, 3, T, S, 4, 5)
    do = rng.standard_normal((2, 3, T, 5))
    plain, plain_cache = causal_attention_forward(q, k, v, scale=0.5)
    o, cache = sink_attention_forward(q, k, v, np.full(3, -1e4), scale=0.5)
    *gradients, dsink = sink_attention_backward(do, cache)
    pairs = [(o, plain), *zip(gradients, causal_attention_backward(do, plain_cache), strict=True)]
    assert all(np.abs(a - b).max() < 1e-14 for a, b in pairs) and not dsink.any()


def test_it_is_one_more_key_of_that_score_with_value_zero():
    """A channel that is 1 in every query, and sink / scale in one extra key at the start, which everyone sees."""
    q, k, v, sink = draw(2, 3, 4, 6, 5, 7)
    do, scale = rng.standard_normal((2, 3, 4, 7)), 0.3
    extra = np.zeros((2, 3, 1, 6))
    extra[..., -1] = sink[:, None] / scale
    wide_q = np.concatenate([q, np.ones((2, 3, 4, 1))], axis=-1)
    wide_k = np.concatenate([extra, np.concatenate([k, np.zeros((2, 3, 6, 1))], axis=-1)], axis=2)
    wide_v = np.concatenate([np.zeros((2, 3, 1, 7)), v], axis=2)

    plain, plain_cache = causal_attention_forward(wide_q, wide_k, wide_v, scale=scale)
    o, cache = sink_attention_forward(q, k, v, sink, scale=scale)
    dq, dk, dv = causal_attention_backward(do, plain_cache)
    expected = plain, dq[..., :-1], dk[:, :, 1:, :-1], dv[:, :, 1:], dk[:, :, 0, -1].sum(axis=0) / scale
    for ours, theirs in zip((o, *sink_attention_backward(do, cache)), expected, strict=True):
        assert np.abs(ours - theirs).max() < 1e-13


@pytest.mark.parametrize("T, S", [(5, 5), (3, 7), (6, 4)])
def test_it_is_a_part_merged_into_flash_attention(T, S):
    """Value 0 and log-sum-exp `sink`, added once at the end: how a kernel does it."""
    q, k, v, sink = draw(2, 3, T, S, 4, 5)
    flash, cache = flash_attention_forward(q, k, v, scale=0.5, tile=2)
    merged, _ = merge_partial(flash, cache.L, 0.0, np.broadcast_to(sink[:, None], cache.L.shape))
    o, _ = sink_attention_forward(q, k, v, sink, scale=0.5)
    assert np.abs(merged - o).max() < 1e-14


def test_the_gradient_of_the_sink_is_what_the_rows_lose():
    """dsink = - sum_i exp(sink - L_i) <do_i, o_i>, L_i with the sink in it: no p is needed."""
    q, k, v, sink = draw(2, 3, 4, 6, 5, 7)
    do = rng.standard_normal((2, 3, 4, 7))
    o, cache = sink_attention_forward(q, k, v, sink, scale=0.3)
    _, flash_cache = flash_attention_forward(q, k, v, scale=0.3)
    L = np.logaddexp(flash_cache.L, sink[:, None])
    expected = -(np.exp(sink[:, None] - L) * (do * o).sum(axis=-1)).sum(axis=(0, 2))
    np.testing.assert_allclose(sink_attention_backward(do, cache)[3], expected, rtol=1e-12)


def test_the_weights_of_the_keys_sum_to_less_than_one():
    q, k, v, sink = draw(2, 3, 4, 4, 5, 1)
    o, (*_, p, _) = sink_attention_forward(q, k, np.ones_like(v), sink, scale=0.3)
    np.testing.assert_allclose(o[..., 0], 1 - p[..., -1])
    assert (o > 0).all() and (o < 1).all()


def test_each_head_has_its_own_sink():
    q, k, v, sink = draw(2, 3, 4, 4, 5, 6)
    before, _ = sink_attention_forward(q, k, v, sink, scale=0.3)
    sink[1] += 1
    after, _ = sink_attention_forward(q, k, v, sink, scale=0.3)
    assert (after[:, [0, 2]] == before[:, [0, 2]]).all() and (np.abs(after[:, 1]) < np.abs(before[:, 1])).all()


def test_the_future_changes_nothing_bit_for_bit():
    q, k, v, sink = draw(1, 2, 8, 8, 4, 4)
    before, _ = sink_attention_forward(q, k, v, sink, scale=0.3)
    k[:, :, 5], v[:, :, 5] = 9.0, 1e6
    after, _ = sink_attention_forward(q, k, v, sink, scale=0.3)
    assert (after[:, :, :5] == before[:, :, :5]).all() and (after[:, :, 5:] != before[:, :, 5:]).any()


def test_a_query_that_sees_nothing_gives_zeros_and_gets_zeros():
    q, k, v, sink = draw(1, 2, 5, 2, 4, 3)
    with np.errstate(all="raise"):
        o, cache = sink_attention_forward(q, k, v, sink, scale=0.5)
        dq, dk, dv, dsink = sink_attention_backward(np.ones_like(o), cache)
    assert not o[:, :, :3].any() and not dq[:, :, :3].any() and o[:, :, 3:].all()
    assert all(np.isfinite(d).all() for d in (dk, dv, dsink)) and dsink.all()


@pytest.mark.parametrize("height", (1e4, -1e4))
def test_huge_scores_and_huge_sinks_stay_finite(height):
    q, k, v, _ = draw(1, 2, 3, 3, 4, 3)
    for factor, sink in ((1.0, height), (height, 0.0), (height, height)):
        o, cache = sink_attention_forward(factor * q, k, v, np.full(2, sink), scale=1.0)
        assert all(np.isfinite(a).all() for a in (o, *sink_attention_backward(np.ones_like(o), cache)))


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_dtype_is_kept(dtype):
    o, cache = sink_attention_forward(*[a.astype(dtype) for a in draw(1, 2, 3, 3, 4, 5)], scale=0.5)
    assert all(a.dtype == dtype for a in (o, *sink_attention_backward(o, cache)))
