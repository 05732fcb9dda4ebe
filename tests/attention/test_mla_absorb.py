import numpy as np
import pytest

from minideepseek.attention.kv_cache import LatentCache
from minideepseek.attention.mla import MLAWeights, mla_examples, mla_forward
from minideepseek.attention.mla_absorb import mla_decode
from minideepseek.basics.rmsnorm import rmsnorm_forward


def big_example(query_latent, interleaved, T=7):
    """Sizes that all differ, more heads than two."""
    from minideepseek.attention.rope import frequencies, rope_tables

    rng = np.random.default_rng(0)
    B, D, Q, C, H, N, R, V = 2, 20, 9, 11, 5, 3, 4, 6
    L = Q if query_latent else D
    shapes = MLAWeights((D, Q), (Q,), (L, H * N), (L, H * R), (D, C), (D, R), (C,), (C, H * N), (C, H * V), (H * V, D))
    weights = [rng.standard_normal(shape) / max(shape) ** 0.5 for shape in shapes]
    weights[:2] = weights[:2] if query_latent else [None, None]
    cos, sin = rope_tables(np.arange(T), frequencies(R))
    return rng.standard_normal((B, T, D)), MLAWeights(*weights), {"n_heads": H, "cos": cos, "sin": sin, "scale": 0.37, "interleaved": interleaved}


def in_pieces(x, weights, config, cuts):
    cache, rows, start = LatentCache(len(x), x.shape[1], weights.W_DKV.shape[1], weights.W_KR.shape[1], x.dtype), [], 0
    for n in cuts:
        piece = slice(start, start + n)
        rows.append(mla_decode(x[:, piece], *weights, cache=cache, **config | {"cos": config["cos"][piece], "sin": config["sin"][piece]}))
        start += n
    return np.concatenate(rows, axis=1), cache


@pytest.mark.parametrize("query_latent, interleaved", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("cuts", [[7], [1] * 7, [3, 4], [6, 1], [1, 2, 3, 1]], ids=str)
def test_absorbed_is_naive_at_every_chunking(query_latent, interleaved, cuts):
    x, weights, config = big_example(query_latent, interleaved)
    naive, _ = mla_forward(x, *weights, **config)
    absorbed, _ = in_pieces(x, weights, config, cuts)
    assert np.abs(absorbed - naive).max() < 1e-12


def test_the_cache_holds_the_latent_after_its_norm_and_the_turned_key():
    x, weights, config = big_example(True, True)
    _, cache = in_pieces(x, weights, config, [7])
    np.testing.assert_allclose(cache.c_kv, rmsnorm_forward(x @ weights.W_DKV, weights.g_kv)[0])
    np.testing.assert_allclose(cache.k_rope[:, 0], (x @ weights.W_KR)[:, 0])           # position 0 is not turned
    assert np.abs(cache.k_rope[:, 1] - (x @ weights.W_KR)[:, 1]).max() > 0.01


def test_one_flat_matrix_for_all_heads_is_something_else():
    """Bug 10, in numbers: W_UQ W_UK^T as one product sums over heads what each head must keep for itself."""
    x, weights, config = big_example(False, True)
    H, C = config["n_heads"], weights.W_UK.shape[0]
    flat = x @ (weights.W_UQ @ weights.W_UK.T)                                          # (B, T, C): one query for all heads
    q = (x @ weights.W_UQ).reshape(*x.shape[:2], H, -1)
    per_head = np.stack([q[:, :, h] @ weights.W_UK.reshape(C, H, -1)[:, h].T for h in range(H)])
    np.testing.assert_allclose(per_head.sum(axis=0), flat, atol=1e-12)
    assert np.abs(per_head[0] - flat).max() > 0.1


def test_examples_of_mla_too():
    for (x, *weights), options in mla_examples(np.random.default_rng(3)).values():
        config = {name: value for name, value in options.items() if name != "tile"}
        absorbed, _ = in_pieces(x, MLAWeights(*weights), config, [1, 2])
        assert np.abs(absorbed - mla_forward(x, *weights, **config)[0]).max() < 1e-12
