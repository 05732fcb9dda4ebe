import numpy as np
import pytest

from minideepseek.basics.deepnorm import deepnorm_alpha, deepnorm_backward, deepnorm_beta, deepnorm_forward, first_over_last
from minideepseek.basics.layernorm import layernorm_forward

rng = np.random.default_rng(0)
x, f, dy = (rng.standard_normal((3, 8)) for _ in range(3))
g, b = rng.standard_normal(8), rng.standard_normal(8)


def test_by_hand():
    y, _ = deepnorm_forward(np.array([1.0, 2.0]), np.zeros(2), np.ones(2), np.array([0.0, 10.0]), alpha=2.0, eps=0.0)
    assert y.tolist() == [-1, 11]


def test_the_constants():
    assert deepnorm_alpha(8) == 2 and deepnorm_beta(2) == 0.5
    for n_layers in (1, 18, 61):
        assert deepnorm_alpha(n_layers) ** 4 == pytest.approx(2 * n_layers)
        assert deepnorm_beta(n_layers) ** -4 == pytest.approx(8 * n_layers)
        assert deepnorm_alpha(n_layers) * deepnorm_beta(n_layers) == pytest.approx(0.5 ** 0.5)


def test_alpha_one_is_post_norm():
    assert (deepnorm_forward(x, f, g, b, alpha=1.0)[0] == layernorm_forward(x + f, g, b)[0]).all()


def test_dx_is_alpha_times_df_in_memory_of_its_own():
    for alpha in (1.0, 2.5):
        dx, df, dg, db = deepnorm_backward(dy, deepnorm_forward(x, f, g, b, alpha=alpha)[1])
        assert (dx == alpha * df).all()
        assert not np.shares_memory(dx, df)


def test_only_the_ratio_of_stream_to_branch_matters():
    """LayerNorm forgets size: alpha x + f and x + f / alpha give one output."""
    large, _ = deepnorm_forward(x, f, g, b, alpha=4.0, eps=0.0)
    small, _ = deepnorm_forward(x, f / 4, g, b, alpha=1.0, eps=0.0)
    np.testing.assert_allclose(large, small, rtol=1e-12)


def test_float32_stays_float32():
    args = [a.astype(np.float32) for a in (x, f, g, b)]
    y, cache = deepnorm_forward(*args, alpha=deepnorm_alpha(18))
    assert {a.dtype for a in (y, *deepnorm_backward(y, cache))} == {np.dtype(np.float32)}


@pytest.mark.parametrize("seed", (1, 2))
def test_the_gradient_is_even_over_the_depth_and_pre_norm_is_not(seed):
    deep, pre = (first_over_last(kind, 32, np.random.default_rng(seed)) for kind in ("deep", "pre"))
    assert 0.9 < deep < 1.1 and pre > 2
