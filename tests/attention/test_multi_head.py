import numpy as np
import pytest

from minideepseek.attention.causal import causal_attention
from minideepseek.attention.mla import heads_first, heads_last
from minideepseek.attention.multi_head import MHAWeights, multi_head_backward, multi_head_examples, multi_head_forward
from minideepseek.attention.rope import frequencies, rope, rope_forward, rope_tables
from minideepseek.autograd.gradcheck import gradcheck
from minideepseek.autograd.tape import Tape, Tensor, op
from minideepseek.basics.linear import linear
from tests.house import spy_on_gemm

CASES = ("no positions", "turned", "turned, half-split")


def example(case, seed=0):
    (x, *weights), config = multi_head_examples(np.random.default_rng(seed))[case]
    return x, MHAWeights(*weights), config


def split_forward(x, *, n_heads):
    """Heads first.

    x: (B, T, H*K)   n_heads: H   ->   y: (B, H, T, K)
    """
    return heads_first(x, n_heads).copy(), None


def merge_forward(o):
    """Heads last.

    o: (B, H, T, V)   ->   y: (B, T, H*V)
    """
    return heads_last(o), o.shape[1]


def swap_forward(x):
    """Swap the axes of heads and tokens.

    x: (B, H, T, K)   ->   y: (B, T, H, K)
    """
    return x.swapaxes(1, 2).copy(), None


split = op(split_forward, lambda dy, _: heads_last(dy))
merge = op(merge_forward, lambda dy, H: heads_first(dy, H).copy())
swap = op(swap_forward, lambda dy, _: dy.swapaxes(1, 2).copy())


def op_by_op(x, w, *, n_heads, scale=None, cos=None, sin=None, interleaved=True):
    q, k, v = [split(linear(x, W), n_heads=n_heads) for W in (w.W_Q, w.W_K, w.W_V)]
    if cos is not None:
        q, k = [swap(rope(swap(a), cos=cos, sin=sin, interleaved=interleaved)) for a in (q, k)]
    return linear(merge(causal_attention(q, k, v, scale=scale or q.data.shape[-1] ** -0.5)), w.W_O)


@pytest.mark.parametrize("case", CASES)
def test_three_ways_to_the_same_gradient(case):
    """Fused backward = the same network op by op on the tape = finite differences."""
    x, w, config = example(case)
    y, cache = multi_head_forward(x, *w, **config)
    dy = np.random.default_rng(1).standard_normal(y.shape)
    fused = multi_head_backward(dy, cache)

    leaves = [Tensor(a) for a in (x, *w)]
    with Tape() as tape:
        out = op_by_op(leaves[0], MHAWeights(*leaves[1:]), **config)
    tape.backward({out: dy})
    assert np.abs(out.data - y).max() <= 1e-12
    for leaf, gradient in zip(leaves, fused, strict=True):
        assert np.abs(leaf.grad - gradient).max() <= 1e-12
    gradcheck(multi_head_forward, multi_head_backward, (x, *w), config)


@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_papers_sums_written_out(case):
    """Equations 1 to 8 of the V2 report, token by token and head by head."""
    x, w, config = example(case)
    y, _ = multi_head_forward(x, *w, **config)
    (B, T, _), H = x.shape, config["n_heads"]
    K, V = w.W_Q.shape[1] // H, w.W_V.shape[1] // H
    scale = config.get("scale", K ** -0.5)

    def turn(a, t):
        if "cos" not in config:
            return a
        return rope_forward(a.reshape(1, 1, 1, K), cos=config["cos"][t:t + 1], sin=config["sin"][t:t + 1],
                            interleaved=config.get("interleaved", True))[0].ravel()

    for b, t in np.ndindex(B, T):
        heads = []
        for h in range(H):
            own, own_v = slice(h * K, h * K + K), slice(h * V, h * V + V)
            q = turn(x[b, t] @ w.W_Q[:, own], t)
            weights = np.exp([scale * q @ turn(x[b, j] @ w.W_K[:, own], j) for j in range(t + 1)])
            heads.append(sum(a * (x[b, j] @ w.W_V[:, own_v]) for j, a in enumerate(weights)) / weights.sum())
        np.testing.assert_allclose(y[b, t], np.concatenate(heads) @ w.W_O, rtol=0, atol=1e-13)


@pytest.mark.parametrize("case", CASES)
def test_equal_to_its_heads_one_by_one(case):
    x, w, config = example(case)
    H = config["n_heads"]
    slices = zip(*[np.split(W, H, axis=1) for W in w[:3]], np.split(w.W_O, H))
    alone = [multi_head_forward(x, *one, **config | {"n_heads": 1})[0] for one in slices]
    assert len(alone) == H
    np.testing.assert_allclose(sum(alone), multi_head_forward(x, *w, **config)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_the_future_changes_nothing_bit_for_bit(case):
    x, w, config = example(case)
    before, _ = multi_head_forward(x, *w, **config)
    for j in range(1, x.shape[1]):
        moved = x.copy()
        moved[:, j] += 1
        after, _ = multi_head_forward(moved, *w, **config)
        assert (after[:, :j] == before[:, :j]).all() and (after[:, j] != before[:, j]).all()


def test_renumbered_heads_change_nothing():
    x, w, config = example("no positions")
    order = [2, 0, 1]
    columns = [np.concatenate([np.split(W, 3, axis=1)[h] for h in order], axis=1) for W in w[:3]]
    rows = np.concatenate([np.split(w.W_O, 3)[h] for h in order])
    np.testing.assert_allclose(multi_head_forward(x, *columns, rows, **config)[0], multi_head_forward(x, *w, **config)[0], rtol=0, atol=1e-13)


def test_without_positions_the_last_token_sees_a_bag_and_with_them_an_order():
    x, w, config = example("turned")
    shuffled = x[:, [1, 0, 2]]
    bag = {"n_heads": config["n_heads"]}
    np.testing.assert_allclose(multi_head_forward(shuffled, *w, **bag)[0][:, 2], multi_head_forward(x, *w, **bag)[0][:, 2], rtol=0, atol=1e-13)
    assert np.abs(multi_head_forward(shuffled, *w, **config)[0][:, 2] - multi_head_forward(x, *w, **config)[0][:, 2]).max() > 1e-3


@pytest.mark.parametrize("interleaved", (True, False))
def test_a_common_shift_of_all_positions_changes_nothing(interleaved):
    x, w, config = example("turned")
    cos, sin = rope_tables(np.arange(3) + 1000, frequencies(4))
    config["interleaved"] = interleaved
    shifted, _ = multi_head_forward(x, *w, **config | {"cos": cos, "sin": sin})
    np.testing.assert_allclose(shifted, multi_head_forward(x, *w, **config)[0], rtol=0, atol=1e-12)


def test_the_default_scale_is_that_of_one_head():
    x, w, config = example("no positions")
    usual, _ = multi_head_forward(x, *w, **config)
    assert (multi_head_forward(x, *w, **config, scale=(w.W_Q.shape[1] // 3) ** -0.5)[0] == usual).all()
    means = np.cumsum(x @ w.W_V, axis=1) / np.arange(1, 5)[:, None]
    np.testing.assert_allclose(multi_head_forward(x, *w, **config, scale=0.0)[0], means @ w.W_O, rtol=0, atol=1e-13)


def test_every_projection_passes_through_the_gemm_door():
    gemm, roles = spy_on_gemm()
    x, w, config = example("turned")
    y, cache = multi_head_forward(x, *w, **config, gemm=gemm)
    assert roles == ["forward"] * 4
    multi_head_backward(y, cache)
    assert roles.count("dx") == roles.count("dW") == 4
