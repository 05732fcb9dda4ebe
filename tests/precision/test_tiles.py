import ml_dtypes
import numpy as np
import pytest

from minideepseek.precision.tiles import E4M3, dequantise_blocks, quantise_blocks


def test_scale_is_the_multiplier():
    """Bug 30: public checkpoints call it weight_scale_inv, and it is multiplied."""
    q = np.array([[1.0, 2.0], [4.0, 8.0]]).astype(E4M3)
    np.testing.assert_array_equal(dequantise_blocks(q, np.array([[0.5]]), (2, 2)), [[0.5, 1], [2, 4]])


@pytest.mark.parametrize("shape", [(256, 128), (130, 257), (1, 1), (128, 5), (3, 300)])
def test_every_block_has_its_own_scale_also_at_the_ragged_edge(shape):
    x = np.random.default_rng(0).standard_normal(shape) * np.arange(1, shape[1] + 1)
    q, scale = quantise_blocks(x)
    assert q.dtype == E4M3 and scale.dtype == np.float32 and scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    for i, j in np.ndindex(scale.shape):
        block = np.s_[i * 128:(i + 1) * 128, j * 128:(j + 1) * 128]
        assert scale[i, j] == np.float32(np.abs(x[block]).max()) / np.float32(448)
        assert np.abs(q[block].astype(np.float32)).max() == 448
        error = np.abs(dequantise_blocks(q, scale)[block] - x[block])
        assert (error <= np.maximum(np.abs(x[block]) * 2 ** -4, scale[i, j] * 2.0 ** -10) * (1 + 1e-6)).all()


def test_a_block_of_zeros_and_values_beyond_the_range():
    q, scale = quantise_blocks(np.zeros((2, 2)))
    assert not q.astype(np.float32).any() and scale[0, 0] == np.float32(1e-4) / np.float32(448)
    q, _ = quantise_blocks(np.array([[448.0, 448.0 * (1 + 2 ** -30)]]))            # rounding of the scale must not overflow
    assert np.isfinite(q.astype(np.float32)).all()


def test_power_of_two_scales_are_read_too():
    scale = np.array([[0.25]]).astype(ml_dtypes.float8_e8m0fnu)
    assert dequantise_blocks(np.array([[2.0]]).astype(E4M3), scale)[0, 0] == 0.5


@pytest.mark.parametrize("x", [np.zeros(3), np.array([[np.nan]]), np.array([[np.inf]]), np.array([[1e300]])])
def test_what_cannot_be_quantised(x):
    with pytest.raises(ValueError, match="must be a matrix of numbers that float32 can hold"):
        quantise_blocks(x)


def test_scales_that_do_not_fit():
    with pytest.raises(ValueError, match=r"q has shape \(3,\): blocks are those of a matrix"):
        dequantise_blocks(np.zeros(3, E4M3), np.ones(1))
    with pytest.raises(ValueError, match=r"a matrix \(130, 5\) in blocks of \(128, 128\) needs scales \(2, 1\), got \(1, 1\)"):
        dequantise_blocks(np.zeros((130, 5), E4M3), np.ones((1, 1)))
