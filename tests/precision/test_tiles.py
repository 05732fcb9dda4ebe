import inspect

import ml_dtypes
import numpy as np
import pytest

from minideepseek.precision import formats
from minideepseek.precision.tiles import (FLOAT32_MAX, FLOAT8, SIZES, NotFinite, dequantise_blocks, error_beside, fake_quantise, quantise, quantise_blocks,
                                          relative_error, scales, spread_blocks)


def test_scale_is_the_multiplier():
    """Bug 30: public checkpoints call it weight_scale_inv, and it is multiplied."""
    q = np.array([[1.0, 2.0], [4.0, 8.0]]).astype(FLOAT8)
    np.testing.assert_array_equal(dequantise_blocks(q, np.array([[0.5]]), (2, 2)), [[0.5, 1], [2, 4]])


@pytest.mark.parametrize("shape", [(256, 128), (130, 257), (1, 1), (128, 5), (3, 300)])
def test_every_block_has_its_own_scale_also_at_the_ragged_edge(shape):
    x = np.random.default_rng(0).standard_normal(shape) * np.arange(1, shape[1] + 1)
    q, scale = quantise_blocks(x)
    assert q.dtype == FLOAT8 and scale.dtype == np.float32 and scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
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
    assert dequantise_blocks(np.array([[2.0]]).astype(FLOAT8), scale)[0, 0] == 0.5


@pytest.mark.parametrize("x", [np.array([[np.nan]]), np.array([[np.inf]]), np.array([[1e300]])])
def test_what_cannot_be_quantised(x):
    with pytest.raises(NotFinite, match="x holds nan, inf, or numbers that float32 cannot hold"):
        quantise_blocks(x)


def test_a_wrong_argument_is_not_called_a_wrong_number():
    with pytest.raises(ValueError, match="must be a matrix of numbers that float32 can hold") as error:
        quantise_blocks(np.zeros(3))
    assert issubclass(NotFinite, ValueError) and not isinstance(error.value, NotFinite)


@pytest.mark.parametrize("fmt", [formats.E4M3, formats.E5M2, formats.E2M1, formats.E5M6, formats.exmy(2, 5, "fn")], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_near_the_end_of_float32_it_is_finite_or_refused(fmt, power_of_two):
    """3.297e38 in E4M3: the scale 2^120, q = 248 and rounds to 256, and 2^128 is inf."""
    returned = 0
    for largest in np.linspace(2.5e38, FLOAT32_MAX, 200):
        try:
            x_hat = fake_quantise(np.array([[largest, 1.0]]), (1, 2), fmt, power_of_two=power_of_two)
        except NotFinite as error:
            assert "is a number that float32 cannot hold" in str(error)
        else:
            returned += 1
            assert np.isfinite(x_hat).all()
    assert returned > 100 or power_of_two
    assert np.isfinite(fake_quantise(np.array([[1.6e38, 1.0]]), (1, 2), fmt, power_of_two=power_of_two)).all()


def test_scales_that_do_not_fit():
    with pytest.raises(ValueError, match=r"q has shape \(3,\): blocks are those of a matrix"):
        dequantise_blocks(np.zeros(3, FLOAT8), np.ones(1))
    with pytest.raises(ValueError, match=r"a matrix \(130, 5\) in blocks of \(128, 128\) needs scales \(2, 1\), got \(1, 1\)"):
        dequantise_blocks(np.zeros((130, 5), FLOAT8), np.ones((1, 1)))


SHAPES = [(256, 256), (130, 257), (1, 1), (3, 300), (200, 5)]
BLOCKS = {**SIZES, "column": (None, 1), "tile across": (128, 1), "small": (3, 7)}


def in_a_loop(x, block, fmt, power_of_two):
    """Tile by tile, with the cast of ml_dtypes: (q, scale, x_hat)."""
    rows, columns = [size or n for size, n in zip(block, x.shape)]
    q, x_hat = np.zeros(x.shape, np.float32), np.zeros(x.shape, np.float32)
    scale = np.zeros((-(-x.shape[0] // rows), -(-x.shape[1] // columns)), np.float32)
    for i, j in np.ndindex(scale.shape):
        here = np.s_[i * rows:(i + 1) * rows, j * columns:(j + 1) * columns]
        amax = np.float32(np.abs(x[here]).max())
        scale[i, j] = max(amax, np.float32(1e-4)) / np.float32(fmt.max)
        if power_of_two:
            scale[i, j] = next(2.0 ** n for n in range(-40, 60) if 2.0 ** n >= scale[i, j])
        q[here] = np.clip(x[here] / scale[i, j], -fmt.max, fmt.max).astype(formats.ml_dtype(fmt)).astype(np.float32)
        x_hat[here] = q[here] * scale[i, j]
    return q, scale, x_hat


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_every_size_of_tile_equals_a_loop_over_tiles(name, power_of_two):
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        for fmt in (formats.E4M3, formats.E2M1):
            if fmt == formats.E2M1 and shape != (130, 257) or name == "small" and shape != (3, 300):
                continue                                                                  # a loop over many tiles is slow
            x = (rng.standard_normal(shape) * np.exp(3 * rng.standard_normal((1, shape[1])))).astype(np.float32)
            q, scale, x_hat = in_a_loop(x, BLOCKS[name], fmt, power_of_two)
            mine = quantise(x, BLOCKS[name], fmt, power_of_two=power_of_two)
            for a, b in zip((*mine, scales(x, BLOCKS[name], fmt, power_of_two=power_of_two)), (q, scale, scale)):
                assert a.dtype == np.float32
                np.testing.assert_array_equal(a, b)
            back = fake_quantise(x, BLOCKS[name], fmt, power_of_two=power_of_two)
            assert back.dtype == np.float32
            np.testing.assert_array_equal(back, x_hat)


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_with_eight_bits_and_without_agree(shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    q, scale = quantise_blocks(x)
    wide, same_scale = quantise(x, (128, 128))
    np.testing.assert_array_equal(q.astype(np.float32), wide)
    np.testing.assert_array_equal(scale, same_scale)
    np.testing.assert_array_equal(dequantise_blocks(q, scale), fake_quantise(x, (128, 128)))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("block", BLOCKS.values(), ids=str)
def test_zeros_stay_zeros_and_nothing_warns(block, power_of_two):
    x = np.zeros((5, 130), np.float32)
    x[0, 0], x[4, 129] = -0.0, 1e-30                                                      # far below the floor: it vanishes
    with np.errstate(all="raise", under="ignore"):
        x_hat = fake_quantise(x, block, power_of_two=power_of_two)
        scale = scales(x, block, power_of_two=power_of_two)
    assert not x_hat.any() and (scale == (2.0 ** -22 if power_of_two else np.float32(1e-4) / np.float32(448))).all()


@pytest.mark.parametrize("fmt", [formats.E4M3, formats.E5M2, formats.E2M1, formats.E5M6], ids=lambda fmt: fmt.name)
def test_a_power_of_two_scale_stays_or_goes_up_and_nothing_overflows(fmt):
    for exponent in range(-8 if fmt.max < 100 else -6, 60):
        amax = np.float32(fmt.max * 2.0 ** exponent)
        for size, right in ((amax, exponent), (np.nextafter(amax, np.float32(np.inf)), exponent + 1), (np.nextafter(amax, np.float32(0)), exponent)):
            if size > 1e-4:
                q, scale = quantise(np.array([[size, -size / 3]], np.float32), (1, 2), fmt, power_of_two=True)
                assert scale[0, 0] == 2.0 ** right and size / scale[0, 0] <= fmt.max and np.abs(q).max() <= fmt.max


def test_the_nearest_power_and_a_logarithm_in_float32_would_be_wrong():
    for size, nearest_power in ((300 * 2.0 ** -14, True), (np.nextafter(np.float32(448 * 2.0 ** -14), np.float32(1)), False)):
        x = np.array([[size]], np.float32)
        plain = scales(x, (1, 1))
        theirs = 2 ** (np.rint if nearest_power else np.ceil)(np.log2(plain))
        assert (x / theirs > 448).all() and (x / scales(x, (1, 1), power_of_two=True) <= 448).all()
    assert 300 * 2.0 ** -14 / 2.0 ** -15 == 600                                           # what the nearest power would ask of the format


@pytest.mark.parametrize("seed", range(3))
def test_power_of_two_scales_commute_with_tiling_anew(seed):
    """Entries within a factor of 10,000 of each other: all normal in any tile. Rounding to four bits does not ask for the scale then."""
    rng = np.random.default_rng(seed)
    x = (10.0 ** rng.uniform(-2, 2, (256, 384)) * rng.choice([-1, 1], (256, 384))).astype(np.float32)
    once = fake_quantise(x, (1, 128), power_of_two=True)
    np.testing.assert_array_equal(fake_quantise(once, (128, 1), power_of_two=True), once)
    np.testing.assert_array_equal(fake_quantise(x, (128, 1), power_of_two=True), once)
    np.testing.assert_array_equal(fake_quantise(x, (None, None), power_of_two=True), once)
    ordinary = fake_quantise(x, (1, 128))
    again = fake_quantise(ordinary, (128, 1))
    assert (again != ordinary).mean() > 0.9 and relative_error(x, again) > 1.05 * relative_error(x, ordinary)


def test_the_harm_of_one_outlier_is_bounded_by_its_tile():
    tensor, tile = [[error_beside(10.0 ** n, SIZES[name]) for n in (0, 4, 5, 6, 7)] for name in ("tensor", "tile")]
    assert max(tensor[:2]) < 0.03 and 0.1 < tensor[2] < 0.2 and tensor[3] > 0.9 and tensor[4] == 1
    assert max(tile) < ((127 / 256 ** 2) + 0.027 ** 2) ** 0.5                             # 127 of 65,535 others can vanish, no more
    assert error_beside(1e3, SIZES["tensor"], formats.E2M1) == 1 and error_beside(1e7, SIZES["tile"], formats.E2M1) < 0.13


@pytest.mark.parametrize("name", SIZES)
def test_no_entry_is_further_off_than_the_page_says(name):
    x = np.random.default_rng(0).standard_t(2, (130, 300)).astype(np.float32)
    scale = scales(x, SIZES[name])
    spread = spread_blocks(scale, x.shape, SIZES[name])
    assert (np.abs(fake_quantise(x, SIZES[name]) - x) <= np.maximum(np.abs(x) / 16, spread / 1024) * (1 + 1e-6)).all()


def test_views_and_other_dtypes():
    x = np.random.default_rng(0).standard_normal((140, 300)).astype(np.float32)
    x.flags.writeable = False
    for block in BLOCKS.values():
        np.testing.assert_array_equal(fake_quantise(x.T, block[::-1]), fake_quantise(x, block).T)
        assert not np.shares_memory(fake_quantise(x, block), x)
    half = x.astype(np.float16)
    np.testing.assert_array_equal(fake_quantise(half, (1, 128)), fake_quantise(half.astype(np.float32), (1, 128)))
    wide, narrow = [fake_quantise(x.astype(dtype), (1, 128)) for dtype in (np.float64, np.float32)]
    assert wide.dtype == np.float32 and (wide != narrow).mean() < 1e-4                    # x / scale was rounded to 53 bits, not to 24
    # 1.0625 + 2^-40 is above the middle of two numbers: quotients of float64 are rounded once
    assert quantise(np.array([[448, 1.0625 + 2.0 ** -40]]), (1, 2))[0].tolist() == [[448, 1.125]]


def test_relative_error_by_hand():
    assert relative_error(np.array([3.0, 4.0]), np.array([3.0, 4.5])) == 0.1 and relative_error(np.ones((2, 2)), np.zeros((2, 2))) == 1
    with np.errstate(all="ignore"):
        assert np.isnan(relative_error(np.zeros(2), np.zeros(2))) and relative_error(np.zeros(2), np.ones(2)) == np.inf


@pytest.mark.parametrize("x, block, fmt, message", [
    (np.zeros((0, 4)), (1, 128), formats.E4M3, r"x \(0, 4\) must be a matrix"),
    (np.zeros((2, 4, 4)), (1, 128), formats.E4M3, r"x \(2, 4, 4\) must be a matrix"),
    (np.zeros((2, 4)), (0, 128), formats.E4M3, r"tiles of at least \(1, 1\), not \(0, 128\)"),
    (np.array([[1, np.nan]]), (1, 128), formats.E4M3, "numbers that float32 cannot hold"),
    (np.array([[1, -np.inf]], np.float32), (1, 1), formats.E4M3, "numbers that float32 cannot hold"),
    (np.zeros((2, 4)), (1, 128), formats.BF16, "BF16 has the range of float32, there is nothing to scale"),
])
def test_what_has_no_scale(x, block, fmt, message):
    for call in (scales, quantise, fake_quantise):
        with pytest.raises(ValueError, match=message):
            call(x, block, fmt)


@pytest.mark.parametrize("function", [scales, quantise, fake_quantise])
def test_bug_29_whoever_names_no_format_gets_e4m3(function):
    x = np.array([[448.0, 18.0]])
    assert inspect.signature(function).parameters["fmt"].default == formats.E4M3
    assert fake_quantise(x, (1, None)).tolist() == [[448, 18]] and fake_quantise(x, (1, None), formats.E5M2).tolist() == [[448, 16]]
