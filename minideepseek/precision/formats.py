"""Small number formats: E4M3, E5M2, BF16 and their kin, decoded, encoded and rounded by hand, bit for bit as ml_dtypes.

Derivation: whiteboard/precision/formats.md     Source: Micikevicius et al. 2022, arXiv:2209.05433; Rouhani et al. 2023, arXiv:2310.10537
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import functools
import math
import time
from typing import NamedTuple

import ml_dtypes
import numpy as np


class Format(NamedTuple):
    """Sign, exponent field e, mantissa field f of m bits: (2^m + f) 2^(e - bias - m); where e = 0 the 2^m is missing.

    top: what the largest exponent field means. "ieee": inf and nan, no numbers; "fn": numbers, only the code of all ones
    is nan, and there is no inf; "none": numbers all. signed=False is E8M0: no sign, no zero, bare powers of two.
    """
    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    top: str
    signed: bool = True

    @property
    def bits(self):
        return self.signed + self.exponent_bits + self.mantissa_bits

    @property
    def n_codes(self):
        return 2 ** self.bits

    @property
    @functools.cache
    def last(self):
        """The code of the largest number: before inf, before nan, or the very last of the positive ones."""
        n, infinity = 2 ** (self.exponent_bits + self.mantissa_bits), 2 ** self.mantissa_bits
        return {"ieee": n - infinity, "fn": n - 1, "none": n}[self.top] - 1

    @property
    def n_numbers(self):
        """How many codes are finite, 0 and -0 both counted."""
        return (self.last + 1) * (1 + self.signed)

    @property
    @functools.cache
    def max(self):
        field, f = divmod(self.last, 2 ** self.mantissa_bits)
        return math.ldexp(2 ** self.mantissa_bits + f, field - self.bias - self.mantissa_bits)

    @property
    @functools.cache
    def smallest_normal(self):
        return math.ldexp(1, self.signed - self.bias)                   # E8M0 has no zero: there even e = 0 is normal

    @property
    @functools.cache
    def smallest(self):
        """The smallest number above zero, a subnormal: also the distance between neighbours down there."""
        return math.ldexp(self.smallest_normal, -self.mantissa_bits if self.signed else 0)


E4M3 = Format("E4M3", 4, 3, 7, "fn")         # DeepSeek-V3's, for weights, activations and gradients alike
E5M2 = Format("E5M2", 5, 2, 15, "ieee")
BF16 = Format("BF16", 8, 7, 127, "ieee")
E5M6 = Format("E5M6", 5, 6, 15, "ieee")      # V3's own for some cached activations: its top is not public, ieee is our guess
E3M2 = Format("E3M2", 3, 2, 3, "none")
E2M3 = Format("E2M3", 2, 3, 1, "none")
E2M1 = Format("E2M1", 2, 1, 1, "none")
E8M0 = Format("E8M0", 8, 0, 127, "fn", signed=False)
FORMATS = (E4M3, E5M2, BF16, E5M6, E3M2, E2M3, E2M1, E8M0)
OVERFLOW = ("saturate", "nan", "error")


def exmy(x, y, top="ieee"):
    """A signed format of x exponent and y mantissa bits, its bias 2^(x-1) - 1. Raises ValueError beyond 16 bits, or float32's range."""
    fmt = Format(f"E{x}M{y} {top}", x, y, 2 ** (x - 1) - 1, top) if 2 <= x <= 8 and y >= 1 else None
    if fmt is None or top not in ("ieee", "fn", "none") or fmt.bits > 16 or fmt.max > float(np.finfo(np.float32).max):
        raise ValueError(f"exmy({x}, {y}, {top!r}): 2 to 8 exponent bits, at least 1 of mantissa, 16 with the sign, numbers that float32 holds")
    return fmt


def ml_dtype(fmt):
    """The dtype of ml_dtypes (or NumPy) with exactly these codes, or None: names alone deceive, float8_e4m3 is not E4M3."""
    same = {E4M3: ml_dtypes.float8_e4m3fn, E5M2: ml_dtypes.float8_e5m2, BF16: ml_dtypes.bfloat16, E8M0: ml_dtypes.float8_e8m0fnu,
            E3M2: ml_dtypes.float6_e3m2fn, E2M3: ml_dtypes.float6_e2m3fn, E2M1: ml_dtypes.float4_e2m1fn,
            exmy(4, 3): ml_dtypes.float8_e4m3, exmy(3, 4): ml_dtypes.float8_e3m4, exmy(5, 10): np.float16}
    return {known[1:]: dtype for known, dtype in same.items()}.get(fmt[1:])


def decode(codes, fmt):
    """What codes stand for: integers from 0 to fmt.n_codes - 1 -> float64, exact.

    Raises ValueError for anything else than such integers.
    """
    codes = np.asarray(codes)
    if codes.size and not (codes.dtype.kind in "iu" and 0 <= codes.min() and codes.max() < fmt.n_codes):
        raise ValueError(f"codes ({codes.dtype}) must be integers from 0 to {fmt.n_codes - 1}, those of {fmt.name}")
    m, n = fmt.mantissa_bits, 2 ** (fmt.exponent_bits + fmt.mantissa_bits)
    sign, code = np.divmod(codes.astype(np.int64), n)
    field, f = np.divmod(code, 2 ** m)
    normal = field >= fmt.signed                                        # the 1 before the point, not stored
    value = np.ldexp(np.float64(f + normal * 2 ** m), np.maximum(field, fmt.signed) - fmt.bias - m)     # eq. 1
    infinite = code == fmt.last + 1 if fmt.top == "ieee" else False
    value = np.where(code <= fmt.last, value, np.where(infinite, np.inf, np.nan))
    return np.where(sign, -value, value)


def spacing(x, fmt):
    """The distance between the format's numbers around x: the power of two at or below |x|, at least the smallest normal, times 2^-m.

    x: float32 or float64   ->   the same shape and dtype. The power of two is x with its mantissa bits erased.
    """
    unsigned, exponent = (np.uint32, 0x7F80_0000) if x.dtype == np.float32 else (np.uint64, 0x7FF0_0000_0000_0000)
    quantum = np.empty_like(x)                                          # memory taken once: fresh pages cost more than arithmetic
    np.bitwise_and(x.view(unsigned), unsigned(exponent), out=quantum.view(unsigned))
    np.maximum(quantum, x.dtype.type(fmt.smallest_normal), out=quantum)  # subnormals are as far apart as the smallest normals
    quantum *= 2.0 ** -fmt.mantissa_bits                                                                # eq. 2
    return quantum


def round_to(x, fmt, *, overflow):
    """The nearest number of the format, of two equally near ones that with the even code; subnormals kept, -0 too.

    x: float32 or float64, any shape   ->   the same shape and dtype, every entry on the format's grid
    overflow: what becomes of a number that rounds beyond fmt.max, and of inf. "saturate": +-fmt.max (as torch's cast to
    E4M3); "nan": nan, or inf in an ieee format (as ml_dtypes); "error": ValueError. nan stays nan. E8M0 has only numbers
    above 0: others become nan with "nan", and smaller ones its smallest, 2^-127.
    Raises ValueError for another dtype, for nan in a format that has none, for numbers <= 0 in E8M0 unless overflow="nan".
    """
    x = _door(x, fmt, overflow)
    last = fmt.max if overflow == "saturate" else min(2 * fmt.max, float(np.finfo(np.float32).max))
    first = -last if fmt.signed else fmt.smallest
    with np.errstate(over="ignore", invalid="ignore"):                  # on purpose: inf and nan go through like numbers
        clamped = np.clip(x, first, last, out=np.empty_like(x))                                         # eq. 3
        quantum = spacing(clamped, fmt)
        steps = np.divide(clamped, quantum, out=clamped)                # exact, for quantum is a power of two
        np.rint(steps, out=steps)                                       # ties to even                  # eq. 4
        rounded = np.multiply(steps, quantum, out=steps)                                                # eq. 5
    if overflow == "saturate":
        return rounded
    lost = np.abs(rounded) > fmt.max if fmt.signed else (rounded > fmt.max) | (x <= 0)
    if overflow == "error" and lost.any():
        raise ValueError(f"x holds {x[lost].flat[0]}, {fmt.name} ends at {fmt.max:g}")
    beyond = x.dtype.type(np.inf if fmt.top == "ieee" else np.nan)
    return np.where(lost, np.copysign(beyond, x), rounded) if lost.any() else rounded


def round_within(x, fmt):
    """round_to for numbers that are known to end on the grid within +-fmt.max: fewer operations, nothing asked. -0 becomes 0.

    x: float32 or float64, finite   ->   the same shape and dtype
    A sum with c = 3/2 * 2^p quanta, p the bits after the point of x's dtype, has no room for anything below a quantum: the
    processor rounds it to nearest, ties to even, and taking c away again is exact.
    """
    c = spacing(x, fmt)
    c *= x.dtype.type(1.5 * 2.0 ** (23 if x.dtype == np.float32 else 52))
    rounded = x + c                                                                                     # eq. 7
    rounded -= c
    return rounded


def encode(x, fmt, *, overflow):
    """The codes of round_to(x): uint8, or uint16 above 8 bits. Neighbouring numbers have neighbouring codes: they are counted."""
    rounded = np.asarray(round_to(x, fmt, overflow=overflow), np.float64)                               # exact: not a second rounding
    finite, m = np.isfinite(rounded), fmt.mantissa_bits
    magnitude = np.where(finite, np.abs(rounded), fmt.smallest_normal)
    quantum = spacing(magnitude, fmt)
    steps = (magnitude / quantum).astype(np.int64)
    exponent = np.frexp(quantum)[1] - 1 + m                             # quantum = 2^(exponent - m)
    code = (exponent + fmt.bias - 1) * 2 ** m + steps                                                   # eq. 6
    not_a_number = fmt.last + 1 + (2 ** m // 2 if fmt.top == "ieee" else 0)                             # a quiet one
    code = np.where(finite, code, np.where(np.isnan(rounded), not_a_number, fmt.last + 1))
    sign = np.signbit(rounded) & fmt.signed
    return (code + sign * (fmt.n_codes // 2)).astype(np.uint8 if fmt.bits <= 8 else np.uint16)


def _door(x, fmt, overflow):
    """x as an array that can be rounded. Raises ValueError with what is wrong."""
    x = np.asarray(x)
    if x.dtype not in (np.float32, np.float64):
        raise ValueError(f"x has dtype {x.dtype}, expected float32 or float64")
    if overflow not in OVERFLOW:
        raise ValueError(f"overflow = {overflow!r} must be one of {OVERFLOW}")
    if fmt.top == "none" and (overflow == "nan" or np.isnan(x).any()):
        raise ValueError(f"{fmt.name} has no nan: overflow = {overflow!r}, x holds {np.isnan(x).sum()} of them")
    if not fmt.signed and overflow != "nan" and (x <= 0).any():
        raise ValueError(f"x holds {x[x <= 0].flat[0]}, {fmt.name} only numbers above 0")
    return x


def seconds(call, times=7):
    """The median time of one call."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return sorted(taken)[times // 2]


def demo():
    """One number by hand, rounding once against twice, every 16-bit number against ml_dtypes. --plot FILE.png draws the number lines."""
    code = encode(np.array([0.3]), E4M3, overflow="error")
    print(f"shapes    x float (...) -> the same on the grid; codes (...) -> float64. E4M3: {E4M3.n_numbers} numbers, +-{E4M3.smallest:g} to +-{E4M3.max:g}")
    print(f"by hand   0.3 lies between 1/4 and 1/2, numbers 1/32 apart: 9.6 steps, 10/32 = {decode(code, E4M3)[0]}, code {code[0]:08b}")

    x = np.array([1.0625 + 2.0 ** -20])                                 # just above the middle of 1 and 1.125
    once = round_to(x, E4M3, overflow="error")[0]
    twice = round_to(round_to(x, BF16, overflow="error"), E4M3, overflow="error")[0]
    print(f"claim     rounding twice is not rounding once: 1.0625 + 2^-20 -> E4M3 {once}, by way of BF16 {twice}")
    finer = np.array([1.0625 + 2.0 ** -40])
    print(f"          1.0625 + 2^-40 in float64 -> E4M3 {round_to(finer, E4M3, overflow='error')[0]}, "
          f"by way of float32 {round_to(finer.astype(np.float32), E4M3, overflow='error')[0]}")
    every = np.arange(2 ** 16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    differ = sum(not np.array_equal(round_to(every, fmt, overflow="nan"), _cast(every, fmt), equal_nan=True) for fmt in (E4M3, E5M2))
    print(f"claim     all 65,536 BF16 numbers rounded to E4M3 and E5M2: {differ} of the two formats differ from ml_dtypes")
    wide = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)
    mine, theirs = seconds(lambda: round_to(wide, E4M3, overflow="saturate")), seconds(lambda: _cast(wide, E4M3), 3)
    print(f"          E4M3 of (512, 512) float32: {mine / wide.size * 1e9:.1f} ns an element, casting there and back {theirs / wide.size * 1e9:.1f}")
    from minideepseek.plots.canvas import panels, plot_path
    from minideepseek.plots.formats import number_lines
    if path := plot_path():
        short = [fmt for fmt in FORMATS if fmt.bits <= 8 and fmt.signed]
        numbers = {fmt.name: decode(np.arange(fmt.n_codes), fmt) for fmt in short}
        numbers = {name: values[np.isfinite(values)] for name, values in numbers.items()}
        normal = {fmt.name: fmt.smallest_normal for fmt in short}
        panels(path, lambda ax: number_lines(numbers, smallest_normal=normal, ax=ax),
               lambda ax: number_lines(numbers, smallest_normal=normal, within=(-2.1, 2.1), title="the same near zero", ax=ax), columns=1, size=(9, 3))
    assert code[0] == 0b0_0101_010 and once == 1.125 and twice == 1 and differ == 0


def _cast(x, fmt):
    """x there and back in the arithmetic of ml_dtypes."""
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(ml_dtype(fmt)).astype(x.dtype)


if __name__ == "__main__":
    from minideepseek.precision.formats import demo  # the imported copy, so that every name exists once
    demo()
