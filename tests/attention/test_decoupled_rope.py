import numpy as np
import pytest

from minideepseek.attention.decoupled_rope import fit_one_matrix, matrix_between, scores_rope_inside, scores_split, turned
from minideepseek.attention.mla import MLAWeights, mla_forward
from minideepseek.attention.rope import frequencies, rope_tables

T, D, Q, C, H, N, R = 64, 12, 6, 5, 3, 4, 2
DISTANCES = (0, 1, 2, 4, 8, 16)


@pytest.fixture
def latents():
    rng = np.random.default_rng(1)
    return [rng.standard_normal((T, width)) for width in (D, Q, C)]


@pytest.fixture
def weights():
    rng = np.random.default_rng(2)
    return [rng.standard_normal(shape) for shape in ((Q, H * N), (Q, H * R), (C, H * N), (D, R))]


def test_inside_every_distance_has_a_matrix_of_its_own(latents, weights):
    _, c_q, c_kv = latents
    W_UQ, W_UK, theta = weights[0][:, :N], weights[2][:, :N], frequencies(N)
    score = scores_rope_inside(c_q, c_kv, W_UQ, W_UK, theta=theta)
    for i, j in ((0, 0), (7, 7), (7, 3), (63, 0), (3, 7)):
        assert np.isclose(score[i, j], c_q[i] @ matrix_between(i - j, W_UQ, W_UK, theta=theta) @ c_kv[j])
    for d in DISTANCES:
        M, left = fit_one_matrix(c_q, c_kv, score, [d])
        assert left < 1e-12
        np.testing.assert_allclose(M, matrix_between(d, W_UQ, W_UK, theta=theta), atol=1e-12)


def test_inside_no_single_matrix_serves_two_distances(latents, weights):
    _, c_q, c_kv = latents
    W_UQ, W_UK, theta = weights[0][:, :N], weights[2][:, :N], frequencies(N)
    score = scores_rope_inside(c_q, c_kv, W_UQ, W_UK, theta=theta)
    still, _ = fit_one_matrix(c_q, c_kv, score, [0])
    np.testing.assert_allclose(still, W_UQ @ W_UK.T, atol=1e-12)                        # distance 0: plain absorption
    for d in DISTANCES[1:]:
        M = matrix_between(d, W_UQ, W_UK, theta=theta)
        assert np.linalg.norm(still - M) > 0.2 * np.linalg.norm(M)
        assert fit_one_matrix(c_q, c_kv, score, [0, d])[1] > 0.1                        # not even the best for these two
    assert fit_one_matrix(c_q, c_kv, score, DISTANCES)[1] > 0.3


def test_without_turning_one_matrix_is_enough(latents, weights):
    """The control: it is the turn, not the fit, that leaves something over."""
    _, c_q, c_kv = latents
    score = scores_rope_inside(c_q, c_kv, weights[0][:, :N], weights[2][:, :N], theta=np.zeros(N // 2))
    assert fit_one_matrix(c_q, c_kv, score, DISTANCES)[1] < 1e-12


def test_the_matrices_of_all_distances_are_mixtures_of_n(weights):
    W_UQ, W_UK = weights[0][:, :N], weights[2][:, :N]
    family = np.stack([matrix_between(d, W_UQ, W_UK, theta=frequencies(N)).ravel() for d in range(40)])
    assert np.linalg.matrix_rank(family, tol=1e-8) == N


def test_split_absorbed_is_naive(latents, weights):
    naive, absorbed = (scores_split(*latents, *weights, n_heads=H, theta=frequencies(R), absorb=way) for way in (False, True))
    assert naive.shape == (H, T, T) and np.abs(naive - absorbed).max() < 1e-12


def test_split_knows_the_distance_and_only_the_distance(weights):
    x, c_q, c_kv = (np.ones((T, 1)) * np.random.default_rng(3).standard_normal(width) for width in (D, Q, C))
    score = scores_split(x, c_q, c_kv, *weights, n_heads=H, theta=frequencies(R), absorb=True)      # the same token everywhere
    np.testing.assert_allclose(score[:, 9, 2], score[:, 60, 53], atol=1e-12)
    assert np.abs(score[:, 9, 2] - score[:, 9, 5]).min() > 1e-3


def test_these_are_the_scores_of_mla(latents, weights):
    """Values that name their token, and two tokens: the softmax of our scores comes out of mla_forward."""
    rng, n = np.random.default_rng(4), 2
    x, (W_UQ, _, W_UK, W_KR) = latents[0][:n], weights
    W_UQ, W_QR, W_DKV, W_UV = (rng.standard_normal(s) / 4 for s in ((D, H * N), (D, H * R), (D, C), (C, H * 2)))
    cos, sin = rope_tables(np.arange(n), frequencies(R))
    y, _ = mla_forward(x[None], *MLAWeights(None, None, W_UQ, W_QR, W_DKV, W_KR, np.ones(C), W_UK, W_UV, np.eye(H * 2)),
                       n_heads=H, cos=cos, sin=sin, scale=0.3, eps=0.0)
    c_kv = x @ W_DKV
    c_kv /= np.sqrt((c_kv ** 2).mean(axis=1, keepdims=True))
    score = 0.3 * scores_split(x, x, c_kv, W_UQ, W_QR, W_UK, W_KR, n_heads=H, theta=frequencies(R), absorb=True)[:, 1]
    p = np.exp(score) / np.exp(score).sum(axis=1, keepdims=True)                        # (H, 2): the last token sees both
    v = (c_kv @ W_UV).reshape(n, H, 2)
    np.testing.assert_allclose(y[0, 1].reshape(H, 2), np.einsum("hj,jhv->hv", p, v), atol=1e-12)


def test_turned_is_rope_at_any_position():
    x = np.array([3.0, 4.0]).reshape(1, 1, 2)
    np.testing.assert_allclose(turned(x, np.array([np.pi / 2]), [1]).ravel(), [-4, 3], atol=1e-12)
    np.testing.assert_array_equal(turned(x, np.array([np.pi / 2])), x)                  # position 0
