import numpy as np
import pytest

from minideepseek.attention.causal import causal_attention
from minideepseek.attention.mla import MLAWeights, heads_first, heads_last, mla_backward, mla_examples, mla_forward
from minideepseek.attention.rope import rope, rope_forward
from minideepseek.autograd.gradcheck import gradcheck
from minideepseek.autograd.tape import Tape, Tensor, op
from minideepseek.basics.linear import linear
from minideepseek.basics.rmsnorm import rmsnorm, rmsnorm_forward
from tests.house import spy_on_gemm

CASES = ("query latent", "no query latent", "half-split", "in tiles")


def example(case, seed=0):
    args, config = mla_examples(np.random.default_rng(seed))[case]
    return args[0], MLAWeights(*args[1:]), config


def join_forward(q_nope, q_rope, k_nope, k_rope, v):
    """Lay out queries, keys and values for the core; the key with position is copied to every head.

    q_nope: (B, T, H, N)   q_rope: (B, T, H, R)   k_nope: (B, T, H, N)   k_rope: (B, T, 1, R)   v: (B, T, H, V)
    ->   q: (B, H, T, N+R)   k: (B, H, T, N+R)   v_first: (B, H, T, V)
    """
    first = [a.swapaxes(1, 2) for a in (q_nope, q_rope, k_nope, k_rope, v)]
    H = q_nope.shape[2]
    q = np.concatenate(first[:2], axis=-1)
    k = np.concatenate([first[2], np.repeat(first[3], H, axis=1)], axis=-1)
    return (q, k, first[4].copy()), q_nope.shape[-1]


def join_backward(dys, N):
    dq, dk, dv = [d.swapaxes(1, 2) for d in dys]
    parts = dq[..., :N], dq[..., N:], dk[..., :N], dk[..., N:].sum(axis=2, keepdims=True), dv
    return tuple(part.copy() for part in parts)


def split_forward(x, *, n_heads):
    """Split the last axis into heads.

    x: (B, T, H*K)   n_heads: H   ->   y: (B, T, H, K)
    """
    return x.reshape(*x.shape[:2], n_heads, -1).copy(), x.shape


def merge_forward(o):
    """Heads last.

    o: (B, H, T, V)   ->   y: (B, T, H*V)
    """
    return heads_last(o), o.shape[1]


join = op(join_forward, join_backward)
split = op(split_forward, lambda dy, shape: dy.reshape(shape).copy())
merge = op(merge_forward, lambda dy, H: heads_first(dy, H).copy())


def op_by_op(x, w, *, n_heads, cos, sin, scale, interleaved=True, tile=None):      # tiles change the way, not the numbers
    c_q = x if w.W_DQ is None else rmsnorm(linear(x, w.W_DQ), w.g_q)
    c_kv = rmsnorm(linear(x, w.W_DKV), w.g_kv)
    turn = dict(cos=cos, sin=sin, interleaved=interleaved)
    q_nope, q_rope = split(linear(c_q, w.W_UQ), n_heads=n_heads), rope(split(linear(c_q, w.W_QR), n_heads=n_heads), **turn)
    k_nope, v = split(linear(c_kv, w.W_UK), n_heads=n_heads), split(linear(c_kv, w.W_UV), n_heads=n_heads)
    k_rope = rope(split(linear(x, w.W_KR), n_heads=1), **turn)
    q, k, v = join(q_nope, q_rope, k_nope, k_rope, v)
    return linear(merge(causal_attention(q, k, v, scale=scale)), w.W_O)


@pytest.mark.parametrize("case", CASES)
def test_three_ways_to_the_same_gradient(case):
    """Fused backward = the same network op by op on the tape = finite differences."""
    x, w, config = example(case)
    y, cache = mla_forward(x, *w, **config)
    dy = np.random.default_rng(1).standard_normal(y.shape)
    fused = mla_backward(dy, cache)

    leaves = [None if a is None else Tensor(a) for a in (x, *w)]
    with Tape() as tape:
        out = op_by_op(leaves[0], MLAWeights(*leaves[1:]), **config)
    tape.backward({out: dy})
    assert np.abs(out.data - y).max() <= 1e-12
    for leaf, gradient in zip(leaves, fused, strict=True):
        assert (leaf is None and gradient is None) or np.abs(leaf.grad - gradient).max() <= 1e-12
    gradcheck(mla_forward, mla_backward, (x, *w), config)


@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_papers_sums_written_out(case):
    """Equations 1 to 11 of the report, token by token and head by head."""
    x, w, config = example(case)
    y, _ = mla_forward(x, *w, **config)
    B, T, D = x.shape
    H, R = config["n_heads"], w.W_KR.shape[1]
    N, V = w.W_UK.shape[1] // H, w.W_UV.shape[1] // H
    norm = lambda c, g: rmsnorm_forward(c, g)[0]
    turn = lambda a, t: rope_forward(a.reshape(1, 1, 1, R), cos=config["cos"][t:t + 1], sin=config["sin"][t:t + 1],
                                     interleaved=config["interleaved"])[0].ravel()
    for b in range(B):
        c_kv = [norm(x[b, t] @ w.W_DKV, w.g_kv) for t in range(T)]
        k_rope = [turn(x[b, t] @ w.W_KR, t) for t in range(T)]
        for t in range(T):
            c_q = x[b, t] if w.W_DQ is None else norm(x[b, t] @ w.W_DQ, w.g_q)
            heads = []
            for h in range(H):
                n, r, v = slice(h * N, h * N + N), slice(h * R, h * R + R), slice(h * V, h * V + V)
                q = np.concatenate([c_q @ w.W_UQ[:, n], turn(c_q @ w.W_QR[:, r], t)])
                keys = [np.concatenate([c_kv[j] @ w.W_UK[:, n], k_rope[j]]) for j in range(t + 1)]
                weights = np.exp([q @ key / np.sqrt(N + R) for key in keys])
                heads.append(sum(a * (c_kv[j] @ w.W_UV[:, v]) for j, a in enumerate(weights)) / weights.sum())
            np.testing.assert_allclose(y[b, t], np.concatenate(heads) @ w.W_O, atol=1e-13)


def test_the_future_changes_nothing_bit_for_bit():
    x, w, config = example("query latent")
    before, _ = mla_forward(x, *w, **config)
    x[:, 2] += 1
    after, _ = mla_forward(x, *w, **config)
    assert (after[:, :2] == before[:, :2]).all() and (after[:, 2] != before[:, 2]).all()


def test_a_permuted_batch_gives_a_permuted_output():
    x, w, config = example("query latent")
    assert (mla_forward(x[::-1], *w, **config)[0] == mla_forward(x, *w, **config)[0][::-1]).all()


def test_a_common_shift_of_all_positions_changes_nothing():
    from minideepseek.attention.rope import frequencies, rope_tables

    x, w, config = example("query latent")
    cos, sin = rope_tables(np.arange(3) + 1000, frequencies(4))
    shifted, _ = mla_forward(x, *w, **config | {"cos": cos, "sin": sin})
    np.testing.assert_allclose(shifted, mla_forward(x, *w, **config)[0], atol=1e-12)


def test_every_projection_passes_through_the_gemm_door():
    gemm, roles = spy_on_gemm()
    x, w, config = example("query latent")
    y, cache = mla_forward(x, *w, **config, gemm=gemm)
    assert roles == ["forward"] * 8
    mla_backward(y, cache)
    assert roles.count("dx") == roles.count("dW") == 8
