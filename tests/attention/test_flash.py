import numpy as np
import pytest

from minideepseek.attention import flash
from minideepseek.attention.causal import causal_attention, causal_attention_backward, causal_attention_forward
from minideepseek.attention.flash import (flash_attention, flash_attention_backward, flash_attention_forward, merge_partial,
                                          peak_bytes, tiles)
from minideepseek.autograd.tape import Tape, Tensor

rng = np.random.default_rng(0)
SIZES = [(1, 1), (1, 7), (5, 5), (4, 9), (9, 4), (16, 16), (13, 29), (29, 13)]


def draw(B, H, T, S, K, V):
    return [rng.standard_normal(shape) for shape in [(B, H, T, K), (B, H, S, K), (B, H, S, V)]]


def keys_without_mask(q, k, v, scale):
    """Attention of every query to all these keys, and L: one part of a merge."""
    scores = scale * q @ k.swapaxes(-1, -2)
    L = np.log(np.exp(scores).sum(axis=-1))
    return np.exp(scores - L[..., None]) @ v, L


@pytest.mark.parametrize("T, S", SIZES)
@pytest.mark.parametrize("tile", (1, 2, 3, 5, 8, 16, 64))
def test_equal_to_dense_attention(T, S, tile):
    q, k, v = draw(2, 3, T, S, 5, 6)
    do = rng.standard_normal((2, 3, T, 6))
    dense, dense_cache = causal_attention_forward(q, k, v, scale=0.4)
    o, cache = flash_attention_forward(q, k, v, scale=0.4, tile=tile)
    pairs = [(o, dense), *zip(flash_attention_backward(do, cache), causal_attention_backward(do, dense_cache), strict=True)]
    for ours, theirs in pairs:
        assert np.abs(ours - theirs).max() < 1e-12


def test_it_keeps_the_output_and_one_number_per_query():
    q, k, v = draw(2, 3, 6, 9, 4, 5)
    o, cache = flash_attention_forward(q, k, v, scale=0.5, tile=4)
    assert vars(cache).keys() == {"q", "k", "v", "o", "L", "scale", "tile"}
    assert cache.q is q and cache.k is k and cache.v is v and cache.o is o and cache.L.shape == (2, 3, 6)
    for b, h, i in np.ndindex(2, 3, 6):
        np.testing.assert_allclose(cache.L[b, h, i], np.log(np.exp(0.5 * k[b, h, :i + 4] @ q[b, h, i]).sum()), rtol=1e-13)


def test_two_keys_by_hand():
    q, k, v = np.ones((1, 1, 1, 1)), np.log([1.0, 3.0]).reshape(1, 1, 2, 1), np.array([2.0, 4.0]).reshape(1, 1, 2, 1)
    o, cache = flash_attention_forward(q, k, v, scale=1.0, tile=1)
    dq, dk, dv = flash_attention_backward(np.ones((1, 1, 1, 1)), cache)
    np.testing.assert_allclose([o.item(), np.exp(cache.L.item())], [3.5, 4])
    np.testing.assert_allclose(dv.ravel(), [1 / 4, 3 / 4])
    np.testing.assert_allclose(dk.ravel(), [-3 / 8, 3 / 8])                  # p (v - o) = 1/4 * -3/2, 3/4 * 1/2
    np.testing.assert_allclose(dq.item(), 3 / 8 * np.log(3))


def test_tiles_cover_everything_once():
    for stop, size in ((7, 3), (6, 3), (2, 5), (1, 1)):
        assert [i for tile in tiles(0, stop, size) for i in range(stop)[tile]] == list(range(stop))
    assert tiles(4, 4, 2) == [] == tiles(0, -3, 2)


@pytest.mark.parametrize("T, S, forward, backward", [(64, 64, 36, 36), (32, 64, 26, 26), (64, 32, 10, 10), (1, 64, 8, 8), (60, 64, 43, 36)])
def test_tiles_above_the_diagonal_are_never_computed(monkeypatch, T, S, forward, backward):
    """In tiles of 8: 8 * 9 / 2 = 36 of 64. Of 60 queries and 64 keys the corners lie askew; the backward begins its rows at them."""
    counted = []

    def counting(rows, keys, cache, real=flash.tile_scores):
        scores = real(rows, keys, cache)
        counted.append(scores.max() > -np.inf)                              # at least one key is seen
        return scores

    monkeypatch.setattr(flash, "tile_scores", counting)
    q, k, v = draw(1, 1, T, S, 4, 4)
    o, cache = flash_attention_forward(q, k, v, scale=0.5, tile=8)
    assert len(counted) == forward and all(counted)
    flash_attention_backward(o, cache)
    assert len(counted) == forward + backward and all(counted)


def test_what_lies_beyond_the_last_tile_is_not_even_read():
    q, k, v = draw(1, 2, 8, 8, 4, 5)
    before, _ = flash_attention_forward(q, k, v, scale=0.5, tile=4)
    k[:, :, 4:], v[:, :, 4:] = np.nan, np.inf
    after, _ = flash_attention_forward(q, k, v, scale=0.5, tile=4)
    assert (after[:, :, :4] == before[:, :, :4]).all()


@pytest.mark.parametrize("tile", (3, 64))
def test_the_future_changes_nothing_bit_for_bit(tile):
    q, k, v = draw(1, 2, 16, 16, 8, 8)
    before, _ = flash_attention_forward(q, k, v, scale=0.3, tile=tile)
    for j in (3, 9, 15):
        k2, v2 = k.copy(), v.copy()
        k2[:, :, j], v2[:, :, j] = rng.standard_normal((2, 8)), 1e6
        after, _ = flash_attention_forward(q, k2, v2, scale=0.3, tile=tile)
        assert (after[:, :, :j] == before[:, :, :j]).all() and (after[:, :, j:] != before[:, :, j:]).any()


@pytest.mark.parametrize("tile", (1, 2, 4, 64))
def test_a_query_that_sees_nothing_gives_zeros_and_gets_zeros(tile):
    q, k, v = draw(1, 1, 5, 2, 4, 3)
    with np.errstate(all="raise"):
        o, cache = flash_attention_forward(q, k, v, scale=0.5, tile=tile)
        dq, dk, dv = flash_attention_backward(np.ones_like(o), cache)
    assert not o[:, :, :3].any() and not dq[:, :, :3].any() and o[:, :, 3:].all()
    assert np.isneginf(cache.L[:, :, :3]).all() and np.isfinite(cache.L[:, :, 3:]).all()
    assert np.isfinite(dk).all() and np.isfinite(dv).all()


def test_huge_scores_stay_finite_whatever_their_order():
    q, k, v = draw(1, 2, 9, 9, 4, 3)
    for factor in (1e4, -1e4):
        o, cache = flash_attention_forward(factor * q, k, v, scale=1.0, tile=2)
        dense, _ = causal_attention_forward(factor * q, k, v, scale=1.0)
        np.testing.assert_allclose(o, dense, atol=1e-12)
        assert all(np.isfinite(d).all() for d in flash_attention_backward(np.ones_like(o), cache))


def test_memory_grows_with_T_not_with_its_square():
    dense = [peak_bytes(causal_attention_forward, causal_attention_backward, T) for T in (512, 1024)]
    flat = [peak_bytes(flash_attention_forward, flash_attention_backward, T) for T in (512, 1024, 2048)]
    assert 3.8 < dense[1] / dense[0] < 4.1
    assert flat[1] < 2.1 * flat[0] and flat[2] < 2.1 * flat[1] and flat[1] < dense[1] / 15
    assert flat[2] < 2048 * 2 * (4 * 32 + 4) * 8 + 20 * 2 * 64 * 64 * 8     # o, dq, dk, dv and a few numbers per query; tiles


def test_on_the_tape_it_is_causal_attention():
    arrays = draw(1, 2, 6, 6, 4, 5)
    gradients = []
    for attend, config in ((causal_attention, {}), (flash_attention, {"tile": 4})):
        leaves = [Tensor(a) for a in arrays]
        with Tape() as tape:
            o = attend(*leaves, scale=0.5, **config)
        assert len(tape.records) == 1
        tape.backward({o: np.ones_like(o.data)})
        gradients.append([leaf.grad for leaf in leaves])
    assert all(np.abs(a - b).max() < 1e-12 for a, b in zip(*gradients, strict=True))


def test_split_keys_merge_to_the_whole():
    """One new token, 37 keys in four uneven parts: what split-KV decoding does."""
    q, k, v = draw(2, 3, 1, 37, 4, 5)
    whole, cache = flash_attention_forward(q, k, v, scale=0.5)
    parts = []
    for part in (slice(0, 1), slice(1, 16), slice(16, 30), slice(30, 37)):
        o, part_cache = flash_attention_forward(q, k[:, :, part], v[:, :, part], scale=0.5)
        parts.append((o, part_cache.L))
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        o, L = parts[order[0]]
        for n in order[1:]:
            o, L = merge_partial(o, L, *parts[n])
        assert np.abs(o - whole).max() < 1e-12 and np.abs(L - cache.L).max() < 1e-12


def test_several_queries_merge_too():
    q, k, v = draw(2, 3, 6, 10, 4, 5)
    whole, cache = flash_attention_forward(q, k, v, scale=0.5)
    old = keys_without_mask(q, k[:, :, :4], v[:, :, :4], 0.5)
    new, new_cache = flash_attention_forward(q, k[:, :, 4:], v[:, :, 4:], scale=0.5)
    o, L = merge_partial(*old, new, new_cache.L)
    assert np.abs(o - whole).max() < 1e-12 and np.abs(L - cache.L).max() < 1e-12


def test_merging_is_associative_and_commutative():
    a, b, c = [(rng.standard_normal((1, 2, 3, 4)), 20 * rng.standard_normal((1, 2, 3))) for _ in range(3)]
    left, right = merge_partial(*merge_partial(*a, *b), *c), merge_partial(*a, *merge_partial(*b, *c))
    assert all(np.abs(x - y).max() < 1e-12 for x, y in zip(left, right))
    assert all((x == y).all() for x, y in zip(merge_partial(*a, *b), merge_partial(*b, *a)))


def test_a_part_without_keys_changes_nothing():
    o, L = rng.standard_normal((1, 2, 3, 4)), np.array([[[1e3, -1e3, 0.0], [-np.inf, 2.0, 3.0]]])
    o[0, 1, 0] = 0
    with np.errstate(all="raise"):
        merged = merge_partial(o, L, np.zeros_like(o), np.full_like(L, -np.inf))
    assert (merged[0] == o).all() and (merged[1] == L).all()


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_dtype_is_kept(dtype):
    q, k, v = [a.astype(dtype) for a in draw(1, 1, 3, 2, 3, 3)]
    o, cache = flash_attention_forward(q, k, v, scale=0.5, tile=2)
    arrays = o, cache.L, *flash_attention_backward(o, cache), *merge_partial(o, cache.L, o, cache.L)
    assert all(a.dtype == dtype for a in arrays)
