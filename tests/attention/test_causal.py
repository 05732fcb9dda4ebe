import numpy as np
import pytest

from minideepseek.attention.causal import causal_attention_backward, causal_attention_forward, visible

rng = np.random.default_rng(0)


def draw(B, H, T, S, K, V):
    return [rng.standard_normal(shape) for shape in [(B, H, T, K), (B, H, S, K), (B, H, S, V)]]


def test_visible_keys_with_and_without_a_cache():
    assert visible(3, 3).tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert visible(2, 4).tolist() == [[True, True, True, False], [True, True, True, True]]
    assert visible(3, 1).tolist() == [[False], [False], [True]]


def test_equal_to_the_sum_written_out():
    q, k, v = draw(2, 3, 4, 6, 5, 7)
    o, _ = causal_attention_forward(q, k, v, scale=0.3)
    for b, h, i in np.ndindex(2, 3, 4):
        seen = i + 6 - 4 + 1
        weights = np.exp(0.3 * k[b, h, :seen] @ q[b, h, i])
        np.testing.assert_allclose(o[b, h, i], weights @ v[b, h, :seen] / weights.sum(), rtol=1e-12)


def test_the_future_changes_nothing_bit_for_bit():
    q, k, v = draw(1, 2, 16, 16, 8, 8)
    before, _ = causal_attention_forward(q, k, v, scale=0.3)
    for j in (3, 9, 15):
        k2, v2 = k.copy(), v.copy()
        k2[:, :, j], v2[:, :, j] = rng.standard_normal((2, 8)), 1e6
        after, _ = causal_attention_forward(q, k2, v2, scale=0.3)
        assert (after[:, :, :j] == before[:, :, :j]).all() and (after[:, :, j:] != before[:, :, j:]).any()


def test_queries_in_chunks_equal_queries_at_once():
    q, k, v = draw(1, 2, 7, 7, 4, 5)
    whole, _ = causal_attention_forward(q, k, v, scale=0.5)
    for t, n in ((0, 3), (3, 2), (5, 2)):
        part, _ = causal_attention_forward(q[:, :, t:t + n], k[:, :, :t + n], v[:, :, :t + n], scale=0.5)
        np.testing.assert_allclose(part, whole[:, :, t:t + n], rtol=0, atol=1e-12)


def test_a_query_that_sees_nothing_gives_zeros_and_gets_zeros():
    q, k, v = draw(1, 1, 5, 2, 4, 3)
    with np.errstate(all="raise"):
        o, cache = causal_attention_forward(q, k, v, scale=0.5)
        dq, dk, dv = causal_attention_backward(np.ones_like(o), cache)
    assert not o[:, :, :3].any() and not dq[:, :, :3].any() and o[:, :, 3:].all()
    assert np.isfinite(dk).all() and np.isfinite(dv).all()


def test_huge_scores_stay_finite():
    q, k, v = draw(1, 1, 3, 3, 4, 3)
    o, _ = causal_attention_forward(1e4 * q, k, v, scale=1.0)
    assert np.isfinite(o).all()


def test_heads_and_batches_do_not_mix():
    q, k, v = draw(2, 3, 4, 4, 5, 6)
    whole, _ = causal_attention_forward(q, k, v, scale=0.3)
    one, _ = causal_attention_forward(q[1:, 2:], k[1:, 2:], v[1:, 2:], scale=0.3)
    assert np.abs(one - whole[1:, 2:]).max() < 1e-14


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_dtype_is_kept(dtype):
    assert causal_attention_forward(*[a.astype(dtype) for a in draw(1, 1, 2, 2, 3, 3)], scale=0.5)[0].dtype == dtype
