import re
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from minideepseek.precision.formats import (BF16, E2M1, E2M3, E3M2, E4M3, E5M2, E5M6, E8M0, FORMATS, decode, encode, exmy, ml_dtype, round_to,
                                            round_within, spacing)
from tests.house import read

NAMED = [fmt for fmt in FORMATS if ml_dtype(fmt)] + [exmy(4, 3), exmy(3, 4), exmy(5, 10)]
SWEEP = [E5M6, exmy(2, 1), exmy(2, 5, "none"), exmy(3, 4, "fn"), exmy(4, 2), exmy(5, 6, "none"), exmy(6, 3), exmy(7, 2, "fn"), exmy(8, 4), exmy(8, 7)]
SIGNED = [fmt for fmt in NAMED + SWEEP if fmt.signed]
BITS = np.arange(2 ** 16, dtype=np.uint16)
with np.errstate(invalid="ignore"):                  # float16 and bfloat16 have signalling nan among their codes
    SIXTEEN = {"float16": BITS.view(np.float16).astype(np.float32), "bfloat16": BITS.view(ml_dtypes.bfloat16).astype(np.float32)}
name = lambda fmt: fmt.name


def codes_of(fmt):
    return np.arange(fmt.n_codes, dtype=np.uint8 if fmt.bits <= 8 else np.uint16)


def cast(x, fmt):
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(ml_dtype(fmt))


def same(a, b):
    """Equal, dtype and the sign of zero included; nan equals nan."""
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(np.signbit(a)[a == 0], np.signbit(b)[b == 0])


def likely(fmt):
    """The way of overflow that ml_dtypes has: nan (or inf) where there is one, else the largest number."""
    return "saturate" if fmt.top == "none" else "nan"


def nearest(x, fmt):
    """The plainest reference: among all codes the one whose number is nearest, of two the even one. Numbers beyond become inf."""
    grid = decode(np.arange(fmt.last + 1), fmt)
    grid = np.append(grid, 2 * grid[-1] - grid[-2])                                      # the number that would come next
    middles = (grid[1:] + grid[:-1]) / 2                                                 # exact: one bit more
    size = np.abs(x.astype(np.float64))
    code = np.searchsorted(middles, size, side="left")                                   # how many middles lie below
    tie = size == middles[np.minimum(code, len(middles) - 1)]
    code = code + (tie & (code % 2 == 1))
    return np.copysign(np.append(grid[:-1], np.inf)[np.minimum(code, len(grid) - 1)], x).astype(x.dtype)


def corners(fmt, dtype):
    """Every middle between neighbours, the middle beyond the largest, all numbers, and what lies next to each of them."""
    grid = decode(np.arange(fmt.last + 1), fmt)
    grid = np.append(grid, 2 * grid[-1] - grid[-2])
    with np.errstate(over="ignore"):
        at = np.concatenate([(grid[1:] + grid[:-1]) / 2, grid]).astype(dtype)
        x = np.concatenate([at, np.nextafter(at, dtype(0)), np.nextafter(at, dtype(np.inf))])
    return np.concatenate([x, -x])


@pytest.mark.parametrize("fmt", NAMED, ids=name)
def test_every_code_decodes_as_ml_dtypes_says(fmt):
    codes = codes_of(fmt)
    with np.errstate(invalid="ignore"):
        same(decode(codes, fmt), codes.view(ml_dtype(fmt)).astype(np.float64))


@pytest.mark.parametrize("fmt", [f for f in SIGNED if f.bits <= 12], ids=name)
def test_every_code_decodes_by_the_rule(fmt):
    m = fmt.mantissa_bits
    for code, value in zip(range(fmt.last + 1), decode(np.arange(fmt.last + 1), fmt)):
        e, f = code >> m, code & (1 << m) - 1
        by_hand = Fraction(2) ** (e - fmt.bias) * (1 + Fraction(f, 1 << m)) if e else Fraction(2) ** (1 - fmt.bias) * Fraction(f, 1 << m)
        assert Fraction(value) == by_hand


@pytest.mark.parametrize("fmt", NAMED + SWEEP, ids=name)
def test_encode_undoes_decode(fmt):
    codes = codes_of(fmt)
    values = decode(codes, fmt)
    codes, values = codes[np.isfinite(values)], values[np.isfinite(values)]
    assert len(codes) == fmt.n_numbers
    same(encode(values, fmt, overflow="error"), codes)
    same(round_to(values, fmt, overflow="error"), values)
    same(round_to(values.astype(np.float32), fmt, overflow="saturate"), values.astype(np.float32))


@pytest.mark.parametrize("source", SIXTEEN)
@pytest.mark.parametrize("fmt", NAMED, ids=name)
def test_every_sixteen_bit_number_is_rounded_as_ml_dtypes_does(fmt, source):
    x = SIXTEEN[source]
    if fmt.top == "none":
        x = x[~np.isnan(x)]
    if fmt == E8M0:
        x = x[~((x > 2.0 ** -127) & (x < 1.5 * 2.0 ** -127))]                            # see the test of E8M0
    with np.errstate(invalid="ignore"):
        both = x, x.astype(np.float64)
    for x in both:
        theirs = cast(x, fmt)
        codes = encode(x, fmt, overflow=likely(fmt))
        same(round_to(x, fmt, overflow=likely(fmt)), theirs.astype(x.dtype))
        np.testing.assert_array_equal(codes[~np.isnan(x)], theirs.view(codes.dtype)[~np.isnan(x)])


@pytest.mark.parametrize("fmt", [f for f in NAMED if f.signed], ids=name)
def test_every_middle_and_its_neighbours_in_float32_are_rounded_as_ml_dtypes_does(fmt):
    x = corners(fmt, np.float32)
    x = x[np.isfinite(x)]
    same(round_to(x, fmt, overflow=likely(fmt)), cast(x, fmt).astype(np.float32))
    np.testing.assert_array_equal(encode(x, fmt, overflow=likely(fmt)), cast(x, fmt).view(codes_of(fmt).dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("fmt", SIGNED, ids=name)
def test_every_middle_and_its_neighbours_go_to_the_nearest_number_the_even_one_if_two_are(fmt, dtype):
    """float64 too, where ml_dtypes is no reference: it rounds to float32 first."""
    x = corners(fmt, dtype)
    x = np.concatenate([x[np.isfinite(x)], (fmt.max / 40 * np.random.default_rng(0).standard_normal(2000)).astype(dtype)])
    right = nearest(x, fmt)
    beyond = np.isinf(right)
    assert beyond.any() and not beyond.all()
    same(round_to(x, fmt, overflow="saturate"), np.clip(right, -fmt.max, fmt.max))
    same(round_to(x[~beyond], fmt, overflow="error"), right[~beyond])
    if fmt.top != "none":
        same(np.abs(round_to(x[beyond], fmt, overflow="nan")), np.full(beyond.sum(), np.inf if fmt.top == "ieee" else np.nan, dtype))
    for value in x[beyond][:5]:
        with pytest.raises(ValueError, match=f"{re.escape(fmt.name)} ends at"):
            round_to(np.array([0, value], dtype), fmt, overflow="error")


def test_e8m0_has_powers_of_two_only():
    """ml_dtypes: middles go up, always; 0 and negative numbers are nan; whatever is smaller than 2^-127 becomes it."""
    powers = 2.0 ** np.arange(-127, 128)
    middles = 1.5 * powers
    for dtype in (np.float32, np.float64):
        x = np.concatenate([(base * wiggle).astype(dtype) for base in (powers, middles) for wiggle in (1, 1 - 2.0 ** -20, 1 + 2.0 ** -20)])
        strange = (x > 2.0 ** -127) & (x < 1.5 * 2.0 ** -127)
        same(round_to(x[~strange], E8M0, overflow="nan"), cast(x[~strange], E8M0).astype(dtype))
        # there, ml_dtypes 0.6.0 gives 2^-126 even for what is next to 2^-127. We take the nearest
        assert (round_to(x[strange], E8M0, overflow="nan") == 2.0 ** -127).all() and strange.sum() == 2
    assert round_to(np.array([1.5, 3, 6, 12]), E8M0, overflow="error").tolist() == [2, 4, 8, 16]
    assert round_to(np.array([1e-45, 1e-300, 2.0 ** -128]), E8M0, overflow="error").tolist() == [2.0 ** -127] * 3
    x = np.array([0.0, -0.0, -1.0, np.inf, -np.inf, np.nan, 1.5 * 2.0 ** 127])
    assert np.isnan(round_to(x, E8M0, overflow="nan")).all() and (encode(x, E8M0, overflow="nan") == 255).all()
    assert np.isnan(cast(x.astype(np.float32), E8M0).astype(np.float32)).all()
    assert round_to(x[-1:], E8M0, overflow="saturate") == 2.0 ** 127
    for bad in (0.0, -1.0):
        with pytest.raises(ValueError, match=f"x holds {bad}, E8M0 only numbers above 0"):
            round_to(np.array([1, bad]), E8M0, overflow="saturate")


def test_bug_26_e4m3_is_no_grid_of_integers():
    positive = decode(np.arange(127), E4M3)
    assert decode([], E4M3).shape == (0,) and decode(np.zeros((0, 2), np.uint8), E4M3).shape == (0, 2)
    assert len(set(positive)) == 127 and positive[1] == 2.0 ** -9 and positive[-1] == 448
    x = np.array([0.3, 0.001, 17.0, 19.0, 433.0])
    assert round_to(x, E4M3, overflow="saturate").tolist() == [0.3125, 2.0 ** -9, 16, 20, 448]


@pytest.mark.parametrize("fmt", [E4M3, E5M2, E2M1, E5M6], ids=name)
def test_bug_27_saturating_never_gives_nan_or_inf(fmt):
    with np.errstate(over="ignore"):
        x = np.concatenate([np.geomspace(fmt.max, 1e300, 500), [np.inf]]).astype(np.float32)
    for sign in (1, -1):
        assert (round_to(sign * x, fmt, overflow="saturate") == sign * fmt.max).all()
        assert (decode(encode(sign * x, fmt, overflow="saturate"), fmt) == sign * fmt.max).all()


def test_overflow_is_chosen_and_the_three_ways_differ():
    """448 and 480 have their middle at 464, 57,344 and 65,536 at 61,440. 448 has an even code, 57,344 an odd one."""
    x = np.array([464.0, np.nextafter(464, 500), -1e9, np.inf])
    assert round_to(x, E4M3, overflow="saturate").tolist() == [448, 448, -448, 448]
    same(round_to(x, E4M3, overflow="nan"), np.array([448, np.nan, np.nan, np.nan]))
    x = np.array([np.nextafter(61_440, 0), 61_440, -1e9, np.inf])
    assert round_to(x, E5M2, overflow="nan").tolist() == [57_344, np.inf, -np.inf, np.inf]
    assert round_to(x, E5M2, overflow="saturate").tolist() == [57_344, 57_344, -57_344, 57_344]
    for beyond in (464.5, np.inf):
        with pytest.raises(ValueError, match=f"x holds {beyond}, E4M3 ends at 448"):
            round_to(np.array([1, beyond]), E4M3, overflow="error")
    with pytest.raises(TypeError, match="overflow"):
        round_to(x, E4M3)                                                                # there is no default
    with pytest.raises(TypeError, match="overflow"):
        encode(x, E4M3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("overflow", ["saturate", "nan", "error"])
def test_minus_zero_and_nan_stay(overflow, dtype):
    x = np.array([-0.0, 0.0, -1e-9, 1e-9, np.nan], dtype)
    for fmt in (E4M3, E5M2, E5M6):
        y = round_to(x, fmt, overflow=overflow)
        assert y[:4].tolist() == [0, 0, 0, 0] and np.signbit(y[:4]).tolist() == [True, False, True, False] and np.isnan(y[4])
        codes = encode(x, fmt, overflow=overflow)
        assert codes[:4].tolist() == [fmt.n_codes // 2, 0, fmt.n_codes // 2, 0] and np.isnan(decode(codes, fmt)[4])
    if overflow != "nan":
        assert encode(x[:4], E2M1, overflow=overflow).tolist() == [8, 0, 8, 0]


def test_rounding_twice_is_not_rounding_once():
    once = lambda x, fmt=E4M3: round_to(np.array([x]), fmt, overflow="error")[0]
    middle = 1.0625                                                                      # of 1 and 1.125; the even code is that of 1
    assert once(middle) == 1 and once(middle + 2.0 ** -20) == 1.125 and once(middle + 2.0 ** -40) == 1.125
    assert once(once(middle + 2.0 ** -20, BF16)) == 1 and once(float(np.float16(middle + 2.0 ** -20))) == 1
    assert once(float(np.float32(middle + 2.0 ** -40))) == 1
    assert once(once(1.1875 - 2.0 ** -20, BF16)) == 1.25 and once(1.1875 - 2.0 ** -20) == 1.125      # and upward, at the middle of 1.125 and 1.25


def test_shapes_dtypes_and_inputs_are_left_alone():
    x = np.random.default_rng(0).standard_normal((6, 8, 4)).astype(np.float32) * 100
    x.flags.writeable = False
    expected = round_to(x, E4M3, overflow="saturate")
    assert expected.dtype == np.float32 and not np.shares_memory(expected, x)
    for view in (np.s_[::2], np.s_[:, ::-1, 1], np.s_[:0], np.s_[3, 4, 1]):
        same(np.asarray(round_to(x[view], E4M3, overflow="saturate")), np.asarray(expected[view]))
    same(round_to(x.T, E4M3, overflow="saturate"), expected.T)
    assert encode(x.T, E4M3, overflow="saturate").shape == (4, 8, 6)
    assert round_to(0.3, E4M3, overflow="error") == 0.3125 and encode([0.3, 0.4], E4M3, overflow="error").tolist() == [42, 45]


def test_the_spacing():
    x = np.array([0.0, 2.0 ** -9, 2.0 ** -6, 0.3, 1, 1.99, -2, 448])
    assert spacing(x, E4M3).tolist() == [2.0 ** -9, 2.0 ** -9, 2.0 ** -9, 1 / 32, 1 / 8, 1 / 8, 1 / 4, 32]
    assert spacing(x.astype(np.float32), E4M3).dtype == np.float32


def test_what_equals_what():
    assert ml_dtype(E5M6) is None and ml_dtype(exmy(2, 1)) is None
    assert ml_dtype(exmy(4, 3, "fn")) == ml_dtypes.float8_e4m3fn == ml_dtype(E4M3)
    assert ml_dtype(exmy(4, 3)) == ml_dtypes.float8_e4m3 and exmy(4, 3).max == 240       # the namesake
    assert exmy(8, 7)[1:] == BF16[1:] and exmy(5, 6)[1:] == E5M6[1:] and exmy(2, 1, "none")[1:] == E2M1[1:]
    for fmt in NAMED:
        info = ml_dtypes.finfo(ml_dtype(fmt))
        smallest = info.tiny if fmt == E8M0 else info.smallest_subnormal
        assert (fmt.bits, fmt.max, fmt.smallest_normal, fmt.smallest) == (info.bits, float(info.max), float(info.tiny), float(smallest))


def test_the_table_of_the_page_is_computed():
    rows = {}
    for line in read("whiteboard/precision/formats.md").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[0] in {fmt.name for fmt in FORMATS}:
            rows[cells[0]] = cells[1:]
    value = lambda text: float(eval(text.replace(",", "").replace("^", "**"), {}))
    assert rows.keys() == {fmt.name for fmt in FORMATS}
    for fmt in FORMATS:
        layout, bias, largest, normal, smallest, numbers, special = rows[fmt.name]
        assert layout == f"{int(fmt.signed)}/{fmt.exponent_bits}/{fmt.mantissa_bits}" and value(bias) == fmt.bias
        assert value(largest) == pytest.approx(fmt.max, rel=2e-3 if fmt == BF16 else 0) and value(normal) == fmt.smallest_normal
        assert value(smallest) == fmt.smallest and value(numbers) == fmt.n_numbers
        values = decode(codes_of(fmt), fmt)
        words = [f"{count} {word}" for word, count in (("inf", np.isinf(values).sum()), ("nan", np.isnan(values).sum())) if count]
        assert special == (", ".join(words) or "none")


@pytest.mark.parametrize("call, message", [
    (lambda: round_to(np.arange(3), E4M3, overflow="nan"), "x has dtype int64"),
    (lambda: round_to(np.zeros(3, np.float16), E4M3, overflow="nan"), "x has dtype float16"),
    (lambda: round_to(np.zeros(3), E4M3, overflow="clip"), "overflow = 'clip'"),
    (lambda: round_to(np.zeros(3), E2M1, overflow="nan"), "E2M1 has no nan: overflow = 'nan'"),
    (lambda: encode(np.array([1, np.nan]), E3M2, overflow="saturate"), "E3M2 has no nan: .* x holds 1 of them"),
    (lambda: encode(np.array([8.0]), E2M3, overflow="error"), "x holds 8.0, E2M3 ends at 7.5"),
    (lambda: decode(np.array([0, 16]), E2M1), "codes .* from 0 to 15"),
    (lambda: decode(np.array([-1]), E4M3), "codes .* from 0 to 255"),
    (lambda: decode(np.array([1.0]), E4M3), r"codes \(float64\)"),
    (lambda: exmy(1, 3), r"exmy\(1, 3, 'ieee'\)"),
    (lambda: exmy(9, 3), r"exmy\(9, 3"),
    (lambda: exmy(4, 0), r"exmy\(4, 0"),
    (lambda: exmy(8, 8), r"exmy\(8, 8"),
    (lambda: exmy(8, 3, "none"), "numbers that float32 holds"),
    (lambda: exmy(4, 3, "fnuz"), "'fnuz'"),
])
def test_what_cannot_be_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt.signed and fmt.exponent_bits < 8], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_round_within_is_round_to_where_nothing_is_lost(fmt, dtype):
    """Every float16, every midpoint and its neighbours, as far as the format reaches."""
    numbers = decode(np.arange(fmt.last + 1), fmt)
    middles = (numbers[1:] + numbers[:-1]) / 2
    x = np.concatenate([np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float64), numbers, middles])
    x = x[np.abs(x) <= fmt.max].astype(dtype)                       # nan fails too
    x = np.concatenate([x, np.nextafter(x, dtype(0)), -np.nextafter(x, dtype(0)), np.nextafter(x, dtype(1))])
    rounded = round_within(x, fmt)
    assert rounded.dtype == dtype and np.array_equal(rounded, round_to(x, fmt, overflow="error")) and x.size > 1000
