import numpy as np
import pytest

from minideepseek.attention.causal import causal_attention
from minideepseek.attention.grouped_query import grouped_query_backward, grouped_query_examples, grouped_query_forward
from minideepseek.attention.kv_cache import cached_floats
from minideepseek.attention.multi_head import MHAWeights, multi_head_backward, multi_head_examples, multi_head_forward
from minideepseek.attention.rope import rope
from minideepseek.autograd.gradcheck import gradcheck
from minideepseek.autograd.tape import Tape, Tensor, op
from minideepseek.basics.linear import linear
from tests.attention.test_multi_head import merge, split, swap

CASES = ("two groups of three heads", "two groups of two heads, turned", "one group, half-split")


def example(case, seed=0):
    (x, *weights), config = grouped_query_examples(np.random.default_rng(seed))[case]
    return x, MHAWeights(*weights), config


def repeated(W, G, read):
    """W (D, G*K) -> (D, H*K): block h of the columns is a copy of block read[h]."""
    blocks = np.split(W, G, axis=1)
    return np.concatenate([blocks[g] for g in read], axis=1)


def readers(config):
    """The group that each head reads."""
    share = config["n_heads"] // config["n_kv_heads"]
    return [h // share for h in range(config["n_heads"])]


def as_multi_head(w, config, read):
    """The weights of the multi-head attention in which every head has a copy of what it reads."""
    G = config["n_kv_heads"]
    return w._replace(W_K=repeated(w.W_K, G, read), W_V=repeated(w.W_V, G, read)), {k: v for k, v in config.items() if k != "n_kv_heads"}


def share_forward(x, *, n_heads):
    """One copy of a group for each of its heads.

    x: (B, G, T, K)   n_heads: H   ->   y: (B, H, T, K)
    """
    G = x.shape[1]
    return np.stack([x[:, h // (n_heads // G)] for h in range(n_heads)], axis=1), (G, n_heads)


def share_backward(dy, cache):
    G, H = cache
    dx = [sum(dy[:, h] for h in range(H) if h // (H // G) == g) for g in range(G)]
    return np.stack(dx, axis=1)


share = op(share_forward, share_backward)


def op_by_op(x, w, *, n_heads, n_kv_heads, scale=None, cos=None, sin=None, interleaved=True):
    q, k, v = [split(linear(x, W), n_heads=n) for W, n in ((w.W_Q, n_heads), (w.W_K, n_kv_heads), (w.W_V, n_kv_heads))]
    if cos is not None:
        q, k = [swap(rope(swap(a), cos=cos, sin=sin, interleaved=interleaved)) for a in (q, k)]
    k, v = share(k, n_heads=n_heads), share(v, n_heads=n_heads)
    return linear(merge(causal_attention(q, k, v, scale=scale or q.data.shape[-1] ** -0.5)), w.W_O)


@pytest.mark.parametrize("case", CASES)
def test_three_ways_to_the_same_gradient(case):
    """Fused backward = the same network op by op on the tape = finite differences."""
    x, w, config = example(case)
    y, cache = grouped_query_forward(x, *w, **config)
    dy = np.random.default_rng(1).standard_normal(y.shape)
    fused = grouped_query_backward(dy, cache)

    leaves = [Tensor(a) for a in (x, *w)]
    with Tape() as tape:
        out = op_by_op(leaves[0], MHAWeights(*leaves[1:]), **config)
    tape.backward({out: dy})
    assert np.abs(out.data - y).max() <= 1e-12
    for leaf, gradient in zip(leaves, fused, strict=True):
        assert np.abs(leaf.grad - gradient).max() <= 1e-12
    gradcheck(grouped_query_forward, grouped_query_backward, (x, *w), config)


@pytest.mark.parametrize("case", CASES)
def test_equal_to_multi_head_on_copies_and_the_gradient_is_the_sum_over_the_copies(case):
    x, w, config = example(case)
    copies, plain = as_multi_head(w, config, readers(config))
    y, cache = grouped_query_forward(x, *w, **config)
    expected, expected_cache = multi_head_forward(x, *copies, **plain)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12)

    dy = np.random.default_rng(1).standard_normal(y.shape)
    dx, *dw = grouped_query_backward(dy, cache)
    dx_copies, *dw_copies = multi_head_backward(dy, expected_cache)
    np.testing.assert_allclose(dx, dx_copies, rtol=0, atol=1e-12)
    H, G = config["n_heads"], config["n_kv_heads"]
    for name, gradient, of_copies in zip(MHAWeights._fields, dw, dw_copies, strict=True):
        if name in ("W_K", "W_V"):
            of_copies = of_copies.reshape(len(of_copies), G, H // G, -1).sum(axis=2).reshape(gradient.shape)
        np.testing.assert_allclose(gradient, of_copies, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES[:2])
def test_repeat_not_tile(case):
    """Bug 17: with (0, 1, 0, 1) the shapes fit and the gradients check; only the values are another model's."""
    x, w, config = example(case)
    H, G = config["n_heads"], config["n_kv_heads"]
    tiled, plain = as_multi_head(w, config, [h % G for h in range(H)])
    assert np.abs(grouped_query_forward(x, *w, **config)[0] - multi_head_forward(x, *tiled, **plain)[0]).max() > 0.01

    values = np.arange(1.0, G + 1)                      # one token sees only itself: head h reads the number of its group
    y, _ = grouped_query_forward(np.ones((1, 1, 1)), np.ones((1, H)), np.ones((1, G)), values[None], 10.0 ** np.arange(H)[:, None],
                                 n_heads=H, n_kv_heads=G)
    assert y.item() == {6: 222111, 4: 2211}[H]


@pytest.mark.parametrize("case", ("no positions", "turned", "turned, half-split"))
def test_as_many_groups_as_heads_is_multi_head(case):
    (x, *w), config = multi_head_examples(np.random.default_rng(0))[case]
    y, cache = grouped_query_forward(x, *w, **config, n_kv_heads=config["n_heads"])
    expected, expected_cache = multi_head_forward(x, *w, **config)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(grouped_query_backward(y, cache), multi_head_backward(y, expected_cache), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


def test_one_group_is_multi_query_written_out():
    x, w, config = example("one group, half-split")
    plain = {"n_heads": 3, "n_kv_heads": 1}
    y, _ = grouped_query_forward(x, *w, **plain)
    (B, T, _), K = x.shape, w.W_K.shape[1]
    k, v = x @ w.W_K, x @ w.W_V                             # one key and one value per token, for all heads
    for b, t in np.ndindex(B, T):
        heads = []
        for h in range(3):
            weights = np.exp(k[b, :t + 1] @ (x[b, t] @ w.W_Q[:, h * K:h * K + K]) / np.sqrt(K))
            heads.append(weights @ v[b, :t + 1] / weights.sum())
        np.testing.assert_allclose(y[b, t], np.concatenate(heads) @ w.W_O, rtol=0, atol=1e-13)


@pytest.mark.parametrize("case", CASES)
def test_the_future_changes_nothing_bit_for_bit(case):
    x, w, config = example(case)
    before, _ = grouped_query_forward(x, *w, **config)
    for j in range(1, x.shape[1]):
        moved = x.copy()
        moved[:, j] += 1
        after, _ = grouped_query_forward(moved, *w, **config)
        assert (after[:, :j] == before[:, :j]).all() and (after[:, j] != before[:, j]).all()


def test_what_a_token_leaves_in_the_cache():
    """The columns of W_K and W_V are the numbers that the functions of the cache count."""
    _, w, config = example("two groups of three heads")
    sizes = {"n_heads": 6, "d_key": 4, "d_value": 3}
    assert w.W_K.shape[1] + w.W_V.shape[1] == cached_floats("gqa", n_kv_heads=2, **sizes) == 14
    assert cached_floats("gqa", n_kv_heads=6, **sizes) == cached_floats("mha", **sizes) == 3 * 14
    assert cached_floats("gqa", n_kv_heads=1, **sizes) == cached_floats("mqa", **sizes) == 14 / 2


def test_every_projection_passes_through_the_gemm_door():
    seen = []

    def gemm(A, B, *, role):
        assert A.ndim == B.ndim == 2
        seen.append((role, B.shape))
        return A @ B

    x, w, config = example("two groups of two heads, turned")
    y, cache = grouped_query_forward(x, *w, **config, gemm=gemm)
    assert seen == [("forward", W.shape) for W in w]        # narrow keys and values: the copies come after the product
    grouped_query_backward(y, cache)
    roles = [role for role, _ in seen]
    assert roles.count("dx") == roles.count("dW") == 4
