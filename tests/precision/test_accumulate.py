import sys

import ml_dtypes
import numpy as np
import pytest

from minideepseek.precision import accumulate
from minideepseek.precision.accumulate import cut, leading_bit, measure, narrow_dot, narrow_matmul

CODES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
E4M3 = CODES[np.isfinite(CODES)]                                    # all 254: 0 and -0, 14 subnormals, exponents -6 to 8
rng = np.random.default_rng(0)


def whole(x):
    """A number of E4M3, counted in its smallest, 2^-9: a Python integer."""
    return int(round(float(x) * 512))


def kept(n, bits_below):
    """n without its lowest bits, toward zero."""
    return (abs(n) >> bits_below << bits_below) * (1 if n > 0 else -1)


def to_24_bits(n):
    """n rounded to the 24 bits of float32, half to even."""
    drop = max(abs(n).bit_length() - 24, 0)
    down, rest = abs(n) >> drop, abs(n) & ((1 << drop) - 1)
    half = 1 << drop >> 1
    return ((down + (drop > 0 and (rest > half or (rest == half and down & 1)))) << drop) * (1 if n > 0 else -1)


def reference(a, b, bits=14, group=32, promote=128):
    """The same dot product in Python's integers, exact: products and sums are counted in 2^-18."""
    total, chunk = 0, promote or len(a)
    for start in range(0, len(a), chunk):
        register = 0
        for first in range(start, min(start + chunk, len(a)), group):
            pairs = list(zip(a, b))[first:min(first + group, start + chunk)]
            tops = [x.bit_length() + y.bit_length() - 1 for x, y in pairs if x and y] + [register.bit_length()]
            below = max(max(tops) - bits, 0)
            register = sum(kept(x * y, below) for x, y in pairs) + kept(register, below)
            register = kept(register, max(register.bit_length() - bits, 0))
        total = to_24_bits(total + to_24_bits(register))
    return total


def same(A, B, **options):
    y = narrow_matmul(A, B, **options)
    rows, columns = [[whole(x) for x in row] for row in A], [[whole(x) for x in column] for column in B.T]
    expected = np.array([[reference(a, b, **options) / 2**18 for b in columns] for a in rows])       # exact: 24 bits
    assert y.dtype == np.float32 and y.astype(np.float64).tobytes() == (expected + 0.0).tobytes()
    return y.size


def test_ten_thousand_dot_products_are_those_of_exact_integers():
    """Codes drawn alike: half of the products lie below 1, subnormals and zeros among them."""
    count = 0
    for K in (1, 2, 31, 32, 33, 45, 64, 77, 130):
        A, B = rng.choice(E4M3, (34, K)), rng.choice(E4M3, (K, 33))
        count += same(A, B)
    assert count > 10_000


@pytest.mark.parametrize("options", [
    {"promote": None}, {"bits": 4}, {"bits": 1, "promote": None}, {"group": 8, "promote": 20}, {"bits": 30, "promote": None},
    {"group": 1, "promote": None}, {"group": 200}, {"promote": 32}, {"bits": 46}], ids=str)
def test_other_accumulators_too(options):
    same(rng.choice(E4M3, (6, 150)), rng.choice(E4M3, (150, 5)), **options)


@pytest.mark.parametrize("values", [E4M3[np.abs(E4M3) < 2**-6], E4M3[np.abs(E4M3) >= 256], E4M3[E4M3 > 0],
                                    np.array([448, -448, 2**-9, -(2**-9), 0], np.float32)], ids=["subnormal", "large", "one sign", "extremes"])
def test_extreme_exponents(values):
    same(rng.choice(values, (8, 300)), rng.choice(values, (300, 7)))
    same(rng.choice(values, (8, 300)), rng.choice(values, (300, 7)), promote=None)


def test_by_hand():
    """8 + 1 + 1.5 - 0.75 with 4 bits: units of 1. 0.75 is lost toward zero, not down."""
    a = np.array([8, 1, 1.5, -0.75])
    assert narrow_dot(a, np.ones(4), bits=4) == 10 and narrow_dot(-a, np.ones(4), bits=4) == -10
    assert narrow_dot(a, np.ones(4), bits=5) == 10 and narrow_dot(a, np.ones(4), bits=6) == 9.75
    assert narrow_dot(a, np.ones(4), bits=4, group=1) == 8 + 1 + 1 and type(narrow_dot(a, a)) is np.float32


def test_the_exponent_of_a_product_is_the_sum_of_those_of_its_factors():
    """1.5 * 1.5 = 2.25 counts as exponent 0: with 3 bits the unit is 1/4, and 2.25 stays."""
    assert narrow_dot([1.5, 0.25], [1.5, 1.0], bits=3) == 2.5
    assert narrow_dot([2.25, 0.25], [1.0, 1.0], bits=3) == 2.0       # 2.25 itself has exponent 1: the unit is 1/2


def test_the_register_keeps_as_many_bits_as_the_products():
    """7 + 7 with 3 bits: 14 = 1110 in binary is kept, 7 + 7 + 1 = 1111 is cut to 1110."""
    assert narrow_dot([7, 7], [1, 1], bits=3) == 14 and narrow_dot([7, 7, 1], [1, 1, 1], bits=3) == 14


def test_a_sum_of_ones_stands_still_at_two_to_the_bits():
    ones = np.ones(20_000)
    assert narrow_dot(ones, ones, promote=None) == 2**14 and narrow_dot(ones, ones) == 20_000
    assert narrow_dot(ones[:300], ones[:300], bits=7, promote=None) == 128


def test_promotion_adds_in_float32():
    """2^24 + 1 is not in float32; the register alone would not notice."""
    a = np.zeros(64)
    a[0], a[32] = 2**24, 1
    assert narrow_dot(a, np.ones(64), bits=40, promote=32) == 2**24
    assert narrow_dot(a, np.ones(64), bits=14, promote=None) == 2**24


def test_zeros_and_nothing_at_all():
    assert narrow_matmul(np.zeros((2, 40)), np.zeros((40, 3))).tobytes() == np.zeros((2, 3), np.float32).tobytes()
    for promote in (None, 128):
        assert narrow_matmul(np.zeros((2, 0)), np.zeros((0, 3)), promote=promote).tolist() == [[0, 0, 0]] * 2


@pytest.mark.parametrize("promote", (None, 128))
def test_with_bits_enough_it_is_the_exact_sum_rounded_once(promote):
    A, B = rng.choice(E4M3, (20, 100)), rng.choice(E4M3, (100, 20))
    exact = A.astype(np.float64) @ B.astype(np.float64)                                 # multiples of 2^-18 below 2^27: exact
    assert (narrow_matmul(A, B, bits=46, promote=promote) == exact.astype(np.float32)).all()


def test_how_many_bits_32_products_of_e4m3_need():
    """34 below the leading bit of the largest: 448 * 448 beside 2^-9 * 2^-9. One less loses the smallest product."""
    a, b = np.array([448, 448, 2.0**-9]), np.array([448, -448, 2.0**-9])
    assert narrow_dot(a, b, bits=35) == 2.0**-18 and narrow_dot(a, b, bits=34) == 0
    A, B = rng.choice(E4M3, (60, 32)), rng.choice(E4M3, (32, 60))
    A[:, 0], B[0] = 448, 448
    A[:, 1], B[1] = 448, -448
    exact = A.astype(np.float64) @ B.astype(np.float64)
    worst = [np.abs(narrow_matmul(A, B, bits=bits) - exact).max() / np.abs(exact).max() for bits in (14, 35)]
    assert worst[0] > 1e-4 and worst[1] < 2**-23


def test_more_bits_and_more_promotions_never_hurt():
    q = np.float32(rng.random((64, 1024)) * 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    A, B = q[:32], q[32:].T
    def error(**options):
        return np.linalg.norm(narrow_matmul(A, B, **options) - A @ B) / np.linalg.norm(A @ B)
    bits = [error(bits=bits, promote=None) for bits in (10, 12, 14, 16, 18, 20, 22)]
    chunks = [error(promote=chunk) for chunk in (None, 512, 256, 128, 64, 32)]
    assert (np.diff(bits) < 0).all() and (np.diff(chunks) < 0).all()


def test_the_published_table():
    """K = 4096, one scale per dot product. 64 x 64 outputs give 1.34e-3, 3.4e-4, 1.3e-4 and 7.46e-2, 5.8e-3, 5.5e-4; here are fewer."""
    normal, uniform = [[line[0] for line in measure(inputs, [4096], n_outputs=32).values()] for inputs in ("N(0,1)", "U[0,1)")]
    np.testing.assert_allclose(normal[:3], [1.3e-3, 3.4e-4, 1.3e-4], rtol=0.15)
    np.testing.assert_allclose(uniform[:3], [7.5e-2, 5.8e-3, 5.5e-4], rtol=0.02)
    assert 0.02 < normal[3] < 0.05 and uniform[3] < 1e-3            # what rounding the inputs costs, for comparison


def test_what_its_picture_shows(monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr("minideepseek.plots.accumulators.error_by_length", lambda *what, **how: drawn.append((*what, how)))
    monkeypatch.setattr("minideepseek.plots.canvas.panels", lambda path, *draws: [draw(path) for draw in draws])
    monkeypatch.setattr(sys, "argv", ["accumulate.py", "--plot", "sums.png"])
    accumulate.demo()
    assert "stands still at 2^14 = 16,384" in capsys.readouterr().out
    assert [how["title"] for _, _, how in drawn] == ["N(0,1)", "U[0,1)"]
    for lengths, errors, how in drawn:
        assert lengths[-1] == 4096 and list(errors) == list(accumulate.ACCUMULATORS) and list(how["beside"]) == ["rounding to E4M3"]
        everything = sum([*errors.values(), *how["beside"].values()], [])
        assert how["limits"][0] < min(everything) and max(everything) < how["limits"][1] and how["ax"] == "sums.png"


def test_leading_bits_and_cuts():
    assert leading_bit(np.array([-7.5, 4, 3.999, 2.0**-9, 0, -0.0])).tolist() == [4, 4, 2, 2.0**-9, 0, 0]
    assert cut(np.array([7.9, -7.9, 2, -0.5]), 2.0).tolist() == [6, -6, 2, 0]


@pytest.mark.parametrize("call, message", [
    (lambda: narrow_matmul(np.ones((2, 3)), np.ones((2, 3))), r"A \(2, 3\) and B \(2, 3\) must be \(M, K\) and \(K, N\)"),
    (lambda: narrow_matmul(np.ones(3), np.ones((3, 2))), r"A \(3,\)"),
    (lambda: narrow_dot(np.ones(3), np.ones(4)), r"B \(4, 1\)"),
    (lambda: narrow_dot([1.0], [1.0], bits=0), "bits = 0 must be at least 1"),
    (lambda: narrow_dot([1.0], [1.0], group=0), "group = 0 must be at least 1"),
    (lambda: narrow_dot([1.0], [1.0], promote=0), "promote = 0 must be at least 1"),
    (lambda: narrow_dot([1.0], [1.0], bits=47), "bits = 47 with groups of 32: their sum does not fit into the 53 bits"),
    (lambda: narrow_dot([np.nan], [1.0]), "A holds nan, inf, or a number that float32 does not"),
    (lambda: narrow_dot([1.0], [np.inf]), "B holds nan"),
    (lambda: narrow_dot([1e39], [1.0]), "A holds nan, inf, or a number"),
])
def test_what_cannot_be_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
