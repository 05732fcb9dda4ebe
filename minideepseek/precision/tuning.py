"""Tuning a format: bits are shared between exponent and mantissa, and the data of a tile say how many of which they need.

Derivation: whiteboard/precision/tuning.md     Source: DeepSeek-V3, arXiv:2412.19437, sec. 3.3, for the question
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import math
from typing import NamedTuple

import numpy as np

from minideepseek.precision.formats import E4M3, exmy
from minideepseek.precision.tiles import SIZES, quantise, relative_error, scales, spread_blocks

DRAWS = {"Gaussian": lambda rng, shape: rng.standard_normal(shape), "Laplace": lambda rng, shape: rng.laplace(size=shape),
         "Student t, 3": lambda rng, shape: rng.standard_t(3, shape), "Cauchy": lambda rng, shape: rng.standard_cauchy(shape)}


class Fit(NamedTuple):
    """What a format does to a matrix. Zeros are nobody's fault: only the other entries are counted."""
    error: float         # relative, of all entries together: tiles.relative_error
    small: float         # the same of the smaller half of them, see `smaller_half`
    flushed: float       # share that became 0
    subnormal: float     # share that is left with fewer bits than the mantissa has


def splits(bits=8, top="fn"):
    """{"E2M5": Format, ...}: every way to share the bits behind the sign, from two of exponent to one of mantissa.

    top: of all of them, see formats.Format. "fn", that of E4M3, so that nothing but the split differs; E5M2 is in use with "ieee"
    Raises ValueError for less than 4 bits, or more than 16. With 8 bits of exponent there would be nothing to scale.
    """
    if not 4 <= bits <= 16:
        raise ValueError(f"bits = {bits} must be from 4, two of exponent and one of mantissa, to 16")
    return {f"E{x}M{bits - 1 - x}": exmy(x, bits - 1 - x, top) for x in range(2, min(bits - 2, 7) + 1)}


def sweep(x, block, bits=8, *, top="fn", power_of_two=False):
    """Quantise x in every split of the bits: {"E2M5": Fit, ...}.

    x: (m, n) float   block: (rows, columns) of a tile, None for all of them   top: see splits   power_of_two: see tiles.scales
    Raises ValueError for zeros alone, and for what cannot be quantised.
    """
    x = np.asarray(x)
    some, small, fits = x != 0, smaller_half(x), {}
    for name, fmt in splits(bits, top).items():
        q, scale = quantise(x, block, fmt, power_of_two=power_of_two)
        x_hat = q * spread_blocks(scale, x.shape, block)
        below = (q != 0) & (np.abs(q) < fmt.smallest_normal)
        fits[name] = Fit(relative_error(x, x_hat), relative_error(x[small], x_hat[small]), float((q[some] == 0).mean()), float(below[some].mean()))
    return fits


def best(fits, by="error"):
    """The name of the least: by "error" or any other field of Fit; of equal ones, that with fewer exponent bits."""
    return min(fits, key=lambda name: getattr(fits[name], by))


def smaller_half(x):
    """Which entries are not 0, and not above the median of those: booleans of the shape of x. Raises ValueError when there is none."""
    size = np.abs(x)
    if not (size > 0).any():
        raise ValueError(f"x {size.shape} must have an entry that is not 0: there is no error to be relative to")
    return (size > 0) & (size <= np.median(size[size > 0]))


def crest(x, block, part=...):
    """How far the data lie below the top of the format: each entry's tile's largest, over the entry, in the root mean square.

    x: (m, n)   block: see sweep   part: booleans (m, n), the entries that are meant, or all   ->   c, at least 1
    The floor of 1e-4 counts as an entry: a tile below it does not reach the top, see tiles.scales.
    """
    x = np.asarray(x)
    largest = spread_blocks(scales(x, block) * np.float64(E4M3.max), x.shape, block)
    return float(np.linalg.norm(largest[part]) / np.linalg.norm(np.float64(x[part])))                   # eq. 1


def expected(c, fmt):
    """The relative error that a format should have, of data (or a part of them) with this crest: rounding, and subnormals."""
    rounding = math.log(2) / 18 * 4.0 ** -fmt.mantissa_bits                                             # eq. 2
    subnormal = (c * fmt.smallest / fmt.max) ** 2 / 12                                                  # eq. 3
    return min(math.sqrt(rounding + subnormal), 1.0)                                                    # eq. 4


def reach(fmt):
    """The crest up to which a format should be ahead of the one with a bit more of exponent and a bit less of mantissa."""
    return math.sqrt(2 * math.log(2)) * fmt.max / fmt.smallest_normal                                   # eq. 5


def demo():
    """A crest by hand; four kinds of data, a scale per tensor or per tile, every split of 8 bits. --plot FILE.png draws the errors."""
    x, both = np.array([[4.0, 2.0, 2.0, 1.0]]), splits(top="ieee")
    print("shapes    x (m, n) in tiles (rows, columns) -> an error for each of", *splits())
    print(f"by hand   4, 2, 2, 1 in one tile: root mean square 2.5, crest 4 / 2.5 = {crest(x, (1, 4)):.1f}. "
          f"E2M5 reaches {reach(splits()['E2M5']):.1f}, E3M4 {reach(splits()['E3M4']):.0f}, E4M3 {reach(E4M3):,.0f}")
    print("          numbers with an ieee top, of 256 codes:", ", ".join(f"{name} {fmt.n_numbers}" for name, fmt in both.items()), "; fn: 254 each")

    errors, estimates, rng = {}, {}, np.random.default_rng(0)
    print(f"          error in per cent: {'':19s} log2 c " + "".join(f"{name:>7s}" for name in splits()))
    for name, draw in DRAWS.items():
        x = draw(rng, (256, 512)).astype(np.float32)
        for size in ("tensor", "tile"):
            fits = sweep(x, SIZES[size])
            for kind, part in (("error", ...), ("small", smaller_half(x))):
                c, row = crest(x, SIZES[size], part), np.array([getattr(fit, kind) for fit in fits.values()])
                errors[name, size, kind], estimates[name, size, kind] = row, np.array([expected(c, fmt) for fmt in splits().values()])
                print(f"          {name:14s} {size:7s} {'all' if kind == 'error' else 'smaller half':14s} {math.log2(c):6.1f} "
                      + "".join(f"{100 * error:7.2f}" for error in row) + f"   {best(fits, kind)}")
    off = max(np.abs(errors[key] / estimates[key] - 1).max() for key in errors if key[0] != "Cauchy" and key[2] == "small")
    tensor, tile = [dict(zip(splits(), errors["Cauchy", size, "small"])) for size in ("tensor", "tile")]
    print(f"claim     the estimate from the crest alone is off by at most {off:.0%} (smaller half, Cauchy apart)")
    print(f"          Cauchy, smaller half: one scale, E5M2 {tensor['E5M2']:.1%} against E4M3 {tensor['E4M3']:.1%}; "
          f"a scale per 1 x 128, E4M3 {tile['E4M3']:.1%} against E5M2 {tile['E5M2']:.1%}")
    from minideepseek.plots.canvas import panels, plot_path
    from minideepseek.plots.formats import error_by_split
    if path := plot_path():
        panels(path, *[lambda ax, size=size, kind=kind: error_by_split(
            list(splits()), {name: errors[name, size, kind] for name in DRAWS}, beside={name: estimates[name, size, kind] for name in DRAWS}, limits=(4e-4, 1.5),
            title=f"{'all entries' if kind == 'error' else 'the smaller half'}, a scale per {size}", ax=ax) for kind in ("error", "small") for size in ("tensor", "tile")])
    assert abs(crest(np.array([[4.0, 2, 2, 1]]), (1, 4)) - 1.6) < 1e-6 and off < 0.3 and tensor["E5M2"] < tensor["E4M3"] and tile["E4M3"] < tile["E5M2"]


if __name__ == "__main__":
    from minideepseek.precision.tuning import demo  # the imported copy, so that every name exists once
    demo()
