import numpy as np
import pytest

from minideepseek.attention.kv_cache import LatentCache, cached_floats

V3 = dict(n_heads=128, d_key=192, d_value=128, n_kv_heads=8, kv_rank=512, d_rope=64)


def test_what_each_kind_keeps():
    assert [cached_floats(kind, **V3) for kind in ("mha", "gqa", "mqa", "mla")] == [40_960, 2_560, 320, 576]
    same = V3 | {"n_kv_heads": 128}
    assert cached_floats("gqa", **same) == cached_floats("mha", **V3)
    for kind, given in (("linear", V3), ("mla", V3 | {"kv_rank": None}), ("gqa", V3 | {"n_kv_heads": None})):
        with pytest.raises(ValueError, match=f"attention = '{kind}'"):
            cached_floats(kind, **given)


def test_the_cache_holds_what_the_formula_says_and_nothing_else():
    """Bug 12: no keys, no values."""
    cache = LatentCache(batch=1, capacity=10, kv_rank=512, d_rope=64, dtype=np.float32)
    held = sum(array.nbytes for array in vars(cache).values() if isinstance(array, np.ndarray))
    assert held == 10 * 4 * cached_floats("mla", **V3)


def test_append_and_truncate():
    cache, rng = LatentCache(2, 5, 3, 2, np.float64), np.random.default_rng(0)
    c, k = rng.standard_normal((2, 5, 3)), rng.standard_normal((2, 5, 2))
    cache.append(c[:, :2], k[:, :2])
    seen_c, seen_k = cache.append(c[:, 2:], k[:, 2:])
    assert np.array_equal(seen_c, c) and np.array_equal(seen_k, k) and np.shares_memory(seen_c, cache.c_kv)
    cache.truncate(1)
    again, _ = cache.append(c[:, :1], k[:, :1])
    assert np.array_equal(again, np.concatenate([c[:, :1], c[:, :1]], axis=1))


def test_what_does_not_fit_is_refused_and_changes_nothing():
    cache = LatentCache(1, 2, 3, 2)
    cache.append(np.ones((1, 2, 3)), np.ones((1, 2, 2)))
    before = cache.c_kv.copy()
    with pytest.raises(ValueError, match="the cache holds 1 sequences of 2 tokens, 2 are filled: 1 more of 1 sequences do not fit"):
        cache.append(np.zeros((1, 1, 3)), np.zeros((1, 1, 2)))
    with pytest.raises(ValueError, match="2 more of 3 sequences do not fit"):
        LatentCache(1, 2, 3, 2).append(np.zeros((3, 2, 3)), np.zeros((3, 2, 2)))
    for c_shape, k_shape in (((1, 1, 3), (1, 2, 2)), ((1, 1, 1), (1, 1, 2)), ((1, 1, 3), (2, 1, 2))):
        with pytest.raises(ValueError, match="must be \\(B, T, 3\\) and \\(B, T, 2\\)"):
            LatentCache(1, 2, 3, 2).append(np.zeros(c_shape), np.zeros(k_shape))
    for length in (-1, 3):
        with pytest.raises(ValueError, match=f"length = {length}: the cache holds 2 tokens"):
            cache.truncate(length)
    assert cache.length == 2 and np.array_equal(cache.c_kv, before)
