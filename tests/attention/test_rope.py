import numpy as np
import pytest

from minideepseek.attention.rope import frequencies, rope_backward, rope_forward, rope_tables

rng = np.random.default_rng(0)


def turn(x, positions, interleaved=True, R=None):
    cos, sin = rope_tables(positions, frequencies(x.shape[-1]))
    return rope_forward(x, cos=cos, sin=sin, interleaved=interleaved)


def test_equal_to_complex_multiplication():
    x = rng.standard_normal((2, 5, 3, 8))
    y, _ = turn(x, np.arange(5))
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * np.arange(5)[:, None] * 10_000.0 ** (-np.arange(4) / 4))[:, None]
    np.testing.assert_allclose(y[..., 0::2] + 1j * y[..., 1::2], z, atol=1e-14)


def test_position_zero_changes_nothing_and_every_position_keeps_the_norm():
    x = rng.standard_normal((1, 3, 2, 8))
    y, _ = turn(x, [0, 17, 100_000])
    assert (y[:, 0] == x[:, 0]).all()
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-14)


@pytest.mark.parametrize("interleaved", (True, False))
def test_scores_know_only_the_distance(interleaved):
    q, k = rng.standard_normal((2, 1, 1, 1, 8))
    scores = [np.vdot(turn(q, [t], interleaved)[0], turn(k, [t - 5], interleaved)[0]) for t in (5, 50, 5000)]
    np.testing.assert_allclose(scores, scores[0], rtol=1e-10)


def test_the_layouts_are_equal_up_to_one_permutation_of_the_channels():
    x = rng.standard_normal((2, 4, 3, 8))
    order = np.concatenate([np.arange(0, 8, 2), np.arange(1, 8, 2)])
    split, _ = turn(x[..., order], np.arange(4), interleaved=False)
    assert (split == turn(x, np.arange(4))[0][..., order]).all()
    assert np.abs(turn(x, np.arange(4), interleaved=False)[0] - turn(x, np.arange(4))[0]).max() > 0.1


def test_the_backward_undoes_the_forward():
    x = rng.standard_normal((2, 4, 3, 8))
    y, cache = turn(x, np.arange(4))
    np.testing.assert_allclose(rope_backward(y, cache), x, atol=1e-14)


def test_known_frequencies_and_exact_tables_far_out():
    np.testing.assert_allclose(frequencies(4), [1, 0.01], rtol=1e-15)
    cos, _ = rope_tables([163_839], frequencies(64), np.float32)
    assert cos.dtype == np.float32 and abs(cos[0, 0] - np.cos(163_839.0)) < 1e-7


@pytest.mark.parametrize("R", (0, -2, 7))
def test_channels_that_make_no_pairs(R):
    with pytest.raises(ValueError, match=f"R = {R} "):
        frequencies(R)
