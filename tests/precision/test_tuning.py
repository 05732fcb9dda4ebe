import math
import sys

import ml_dtypes
import numpy as np
import pytest

from minideepseek.precision import formats, tuning
from minideepseek.precision.formats import E4M3, exmy
from minideepseek.precision.tiles import SIZES, fake_quantise, relative_error
from minideepseek.precision.tuning import DRAWS, Fit, best, crest, expected, reach, smaller_half, splits, sweep

TAME = [name for name in DRAWS if name != "Cauchy"]


def drawn(name, shape=(128, 512), seed=0):
    return DRAWS[name](np.random.default_rng(seed), shape).astype(np.float32)


def test_every_split_of_eight_bits():
    assert list(splits()) == ["E2M5", "E3M4", "E4M3", "E5M2", "E6M1"] and list(splits(4)) == ["E2M1"] and list(splits(16))[-1] == "E7M8"
    assert splits()["E4M3"][1:] == E4M3[1:] and splits(top="ieee")["E5M2"][1:] == formats.E5M2[1:]
    for bits in range(4, 17):
        assert all(fmt.bits == bits and name == f"E{fmt.exponent_bits}M{fmt.mantissa_bits}" for name, fmt in splits(bits).items())


def test_what_an_ieee_top_wastes():
    assert [fmt.n_numbers for fmt in splits(top="ieee").values()] == [192, 224, 240, 248, 252]
    assert {fmt.n_numbers for fmt in splits().values()} == {254} and {fmt.n_numbers for fmt in splits(top="none").values()} == {256}
    for fn, ieee in zip(splits().values(), splits(top="ieee").values()):                     # the last power of two, of which fn misses one number
        step = 2.0 ** -fn.mantissa_bits
        assert reach(fn) / reach(ieee) == pytest.approx(2 * (2 - 2 * step) / (2 - step), rel=1e-12)
    x = drawn("Gaussian")
    fn, ieee = sweep(x, SIZES["tile"]), sweep(x, SIZES["tile"], top="ieee")
    assert ieee["E2M5"].small > 1.7 * fn["E2M5"].small and ieee["E5M2"].small < 1.1 * fn["E5M2"].small


@pytest.mark.parametrize("name, top, dtype", [("E4M3", "fn", ml_dtypes.float8_e4m3fn), ("E4M3", "ieee", ml_dtypes.float8_e4m3),
                                              ("E3M4", "ieee", ml_dtypes.float8_e3m4), ("E5M2", "ieee", ml_dtypes.float8_e5m2)])
def test_a_fit_is_what_a_loop_over_tiles_with_ml_dtypes_finds(name, top, dtype):
    x = np.random.default_rng(0).lognormal(0, 5, (20, 33)).astype(np.float32)
    x[3, :5], fmt = 0, splits(top=top)[name]
    x_hat, codes = np.zeros(x.shape), np.zeros(x.shape)
    for rows, columns in ((4, 16), (20, 33)):
        for i in range(0, 20, rows):
            for j in range(0, 33, columns):
                here = np.s_[i:i + rows, j:j + columns]
                scale = max(np.abs(x[here]).max(), np.float32(1e-4)) / np.float32(fmt.max)
                codes[here] = np.clip(x[here] / scale, -fmt.max, fmt.max).astype(dtype).astype(float)
                x_hat[here] = (codes[here] * scale).astype(np.float32)
        fit = sweep(x, (rows, columns) if rows == 4 else (None, None), top=top)[name]
        entries = np.abs(x[x != 0].astype(float))
        small = (np.abs(x) <= np.median(entries)) & (x != 0)
        assert small.sum() == 328 and entries.size == 655                                    # the zeros are in neither
        assert fit.error == pytest.approx(relative_error(x, x_hat), rel=1e-6) and fit.small == pytest.approx(relative_error(x[small], x_hat[small]), rel=1e-6)
        assert fit.flushed == ((codes == 0) & (x != 0)).sum() / 655
        assert fit.subnormal == ((codes != 0) & (np.abs(codes) < fmt.smallest_normal)).sum() / 655 > 0


@pytest.mark.parametrize("options", [{}, {"power_of_two": True}, {"top": "ieee"}, {"bits": 6}], ids=str)
def test_every_error_is_that_of_fake_quantise(options):
    x = drawn("Laplace", (40, 60))
    fits = sweep(x, (3, 7), **options)
    for name, fmt in splits(options.get("bits", 8), options.get("top", "fn")).items():
        x_hat = fake_quantise(x, (3, 7), fmt, power_of_two=options.get("power_of_two", False))
        assert fits[name].error == relative_error(x, x_hat)
    assert fits.keys() == splits(options.get("bits", 8)).keys()


def test_a_mantissa_bit_halves_the_error_and_bounds_it():
    x = drawn("Gaussian")
    errors = {bits: sweep(x, SIZES["tile"], bits)[f"E4M{bits - 5}"].error for bits in range(6, 13)}
    for bits in range(6, 12):
        assert 1.9 < errors[bits] / errors[bits + 1] < 2.1
    for fmt in splits().values():
        error = np.abs(fake_quantise(x, SIZES["tensor"], fmt) - x) / np.abs(x)
        normal = np.abs(x) > np.abs(x).max() * fmt.smallest_normal / fmt.max
        half = 2.0 ** -(fmt.mantissa_bits + 1)
        assert 0.9 * half / (1 + half) < error[normal].max() <= half / (1 + half) * (1 + 1e-4)


def test_a_crest_by_hand():
    x = np.array([[4, 2, 2, 1], [40, 20, 20, 10]], np.float32)
    assert crest(x, (1, 4)) == pytest.approx(4 / 2.5, rel=1e-6)                              # each row by itself
    assert crest(x, (None, None)) == pytest.approx(40 / math.sqrt((2.5**2 + 25**2) / 2), rel=1e-6)
    assert crest(x, (1, 1)) == pytest.approx(1, rel=1e-6) and crest(np.array([[-3.0, 3, 3]]), (None, None)) == pytest.approx(1, rel=1e-6)
    assert crest(x, (1, 4), x == 1) == pytest.approx(4, rel=1e-6) and crest(x, (None, None), x == 1) == pytest.approx(40, rel=1e-6)
    assert crest(x, (1, 4), np.ones(x.shape, bool)) == crest(x, (1, 4))


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("block", [(1, 128), (1, 16), (16, 16), (None, None)], ids=str)
def test_no_tile_has_a_crest_above_the_root_of_its_entries(name, block):
    x = drawn(name)
    entries = math.prod(size or whole for size, whole in zip(block, x.shape))
    assert 1 < crest(x, block) <= math.sqrt(entries) * (1 + 1e-6) and crest(x, block, smaller_half(x)) > crest(x, block)
    spike = np.zeros((1, 64), np.float32)
    spike[0, 5] = 3
    assert crest(spike, (1, 64)) == pytest.approx(8, rel=1e-6)                               # one entry alone: exactly the root


def test_the_floor_counts_as_an_entry():
    x = 1e-6 * drawn("Gaussian")
    rms = float(np.sqrt((x.astype(float)**2).mean()))
    assert crest(x, SIZES["tile"]) == pytest.approx(1e-4 / rms, rel=1e-6) and crest(2.0**10 * x, SIZES["tile"]) < 3
    quiet, loud = sweep(x, SIZES["tile"]), sweep(2.0**20 * x, SIZES["tile"])
    assert best(quiet) == "E3M4" and best(quiet, "small") == "E4M3" and best(loud) == best(loud, "small") == "E2M5"
    assert quiet["E4M3"].small < 0.03 and quiet["E2M5"].error > 0.1


def test_the_estimate_by_hand():
    """E4M3: 2^-3 sqrt(ln 2 / 18) = 0.02453; a crest of 4480 puts subnormals 10/512 of the root mean square apart."""
    assert expected(1, E4M3) == pytest.approx(0.024530, abs=1e-6)
    assert expected(4480, E4M3) == pytest.approx(math.hypot(0.0245296, 10 / 512 / math.sqrt(12)), rel=1e-5)
    assert expected(1e9, E4M3) == 1 and expected(1, exmy(6, 1, "fn")) == pytest.approx(4 * expected(1, E4M3), rel=1e-6)
    x = 2.0 ** np.random.default_rng(0).uniform(-8, 0, (300, 300))                          # every place between two powers alike
    x[0, 0], part = 1 - 1e-6, x > 2.0 ** -2                                                  # two whole powers of two, normal in all formats
    for fmt in splits().values():
        x_hat = fake_quantise(x, (None, None), fmt, power_of_two=True)
        assert relative_error(x[part], x_hat[part]) == pytest.approx(expected(1, fmt), rel=0.03 if fmt.mantissa_bits > 1 else 0.1)


def test_the_reach_is_where_two_neighbours_are_equal():
    neighbours = list(splits().values())
    assert [round(math.log2(reach(fmt)), 1) for fmt in neighbours] == [3.2, 7.1, 15.0, 30.8, 62.2]
    for fmt, wider in zip(neighbours, neighbours[1:]):
        assert expected(reach(fmt), fmt) == pytest.approx(expected(reach(fmt), wider), rel=0.01)
        assert expected(reach(fmt) / 1.1, fmt) < expected(reach(fmt) / 1.1, wider) and expected(1.1 * reach(fmt), fmt) > expected(1.1 * reach(fmt), wider)


@pytest.mark.parametrize("name", TAME)
@pytest.mark.parametrize("size", ["tensor", "tile"])
def test_the_crest_alone_foretells_the_errors(name, size):
    for seed in range(2):
        x = drawn(name, seed=seed)
        fits, small = sweep(x, SIZES[size]), smaller_half(x)
        for fmt, fit in zip(splits().values(), fits.values()):
            assert fit.small == pytest.approx(expected(crest(x, SIZES[size], small), fmt), rel=0.25)
            assert fit.error == pytest.approx(expected(crest(x, SIZES[size]), fmt), rel=0.2)
        if abs(math.log2(crest(x, SIZES[size]) / reach(splits()["E2M5"]))) > 0.5:            # no near tie
            assert best(fits) == ("E2M5" if crest(x, SIZES[size]) < reach(splits()["E2M5"]) else "E3M4")


def test_tame_data_want_mantissa_and_heavy_tails_range():
    def winners(name, size):
        fits = sweep(drawn(name, (256, 512)), SIZES[size])
        return best(fits), best(fits, "small")

    assert winners("Gaussian", "tensor") == ("E2M5", "E3M4") and winners("Gaussian", "tile") == ("E2M5", "E2M5")
    assert winners("Laplace", "tensor")[1] == winners("Laplace", "tile")[1] == "E3M4" and winners("Laplace", "tile")[0] == "E2M5"
    assert winners("Student t, 3", "tensor")[0] == "E3M4" and winners("Student t, 3", "tile") == ("E2M5", "E3M4")


@pytest.mark.parametrize("seed", range(3))
def test_small_tiles_take_the_case_from_e5m2(seed):
    """Rows of very different loudness, as tokens of a gradient: with one scale the quiet rows need E5M2, with tiles E4M3 is ahead."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((256, 256)) * np.exp(4 * rng.standard_normal((256, 1)))
    tensor, tile = sweep(x, SIZES["tensor"]), sweep(x, SIZES["tile"])
    assert best(tensor, "small") == "E5M2" and tensor["E4M3"].flushed > 0.1 and best(tensor) not in ("E5M2", "E6M1")
    assert tile["E4M3"].small < 0.6 * tile["E5M2"].small and tile["E4M3"].error < 0.6 * tile["E5M2"].error


def test_the_largest_of_a_tile_is_exact_unless_its_scale_is_a_power_of_two():
    x = np.array([[3.3, 1e-9, 1e-9, 1e-9]])
    assert sweep(x, (1, 4))["E4M3"].error < 1e-6 and 0.01 < sweep(x, (1, 4), power_of_two=True)["E4M3"].error < 1 / 16
    assert sweep(x, (1, 4))["E4M3"] == Fit(sweep(x, (1, 4))["E4M3"].error, 1.0, 0.75, 0.0)


def test_the_best_is_the_least_and_of_equal_ones_the_one_with_fewer_exponent_bits():
    fits = {"E2M5": Fit(0.3, 0.2, 0.1, 0.0), "E3M4": Fit(0.2, 0.3, 0.1, 0.1), "E4M3": Fit(0.2, 0.1, 0.0, 0.2)}
    assert [best(fits), best(fits, "small"), best(fits, "flushed"), best(fits, "subnormal")] == ["E3M4", "E4M3", "E4M3", "E2M5"]


def test_what_its_picture_shows(monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr("minideepseek.plots.formats.error_by_split", lambda *what, **how: drawn.append((*what, how)))
    monkeypatch.setattr("minideepseek.plots.canvas.panels", lambda path, *draws: [draw(path) for draw in draws])
    monkeypatch.setattr(sys, "argv", ["tuning.py", "--plot", "splits.png"])
    tuning.demo()
    assert "crest 4 / 2.5 = 1.6" in capsys.readouterr().out
    assert [how["title"] for *_, how in drawn] == [f"{part}, a scale per {size}" for part in ("all entries", "the smaller half") for size in ("tensor", "tile")]
    for names, errors, how in drawn:
        assert names == list(splits()) and list(errors) == list(how["beside"]) == list(DRAWS) and how["ax"] == "splits.png"
        everything = np.concatenate([*errors.values(), *how["beside"].values()])
        assert how["limits"][0] < everything.min() and everything.max() < how["limits"][1]


@pytest.mark.parametrize("call, message", [
    (lambda: splits(3), "bits = 3 must be from 4"),
    (lambda: splits(17), "bits = 17 must be from 4"),
    (lambda: splits(top="IEEE"), r"exmy\(2, 5, 'IEEE'\)"),
    (lambda: sweep(np.zeros((2, 3)), (1, 3)), r"x \(2, 3\) must have an entry that is not 0"),
    (lambda: sweep(np.ones(3), (1, 3)), r"x \(3,\) must be a matrix"),
    (lambda: sweep(np.array([[1, np.nan]]), (1, 2)), "numbers that float32 cannot hold"),
    (lambda: sweep(np.ones((2, 3)), (0, 3)), r"in tiles of at least \(1, 1\)"),
])
def test_what_cannot_be_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
