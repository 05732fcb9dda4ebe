"""Tiles of one scale: a matrix in FP8 as q, with one multiplier for every tile, x ~ q * scale.

Derivation: whiteboard/precision/tiles.md     Source: DeepSeek-V3, arXiv:2412.19437, sec. 3.3, its released weights and code
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import ml_dtypes
import numpy as np

from minideepseek.precision import formats
from minideepseek.precision.formats import round_to, round_within, seconds

FLOAT8 = ml_dtypes.float8_e4m3fn    # eight bits as NumPy stores them; what a Format rounds to is in float32
SMALLEST_AMAX = 1e-4     # what a tile counts as at least, zeros among them: the released code's floor for activations
FLOAT32_MAX = float(np.finfo(np.float32).max)
SIZES = {"tensor": (None, None), "row": (1, None), "tile": (1, 128), "block": (128, 128)}      # rows, columns; None: all of them


class NotFinite(ValueError):
    """The numbers are at fault, not the call: what a run that grew nan meets, and may want to tell from a wrong argument."""


def scales(x, block, fmt=formats.E4M3, *, power_of_two=False):
    """The multiplier of every tile: its largest entry, or 1e-4 if that is more, becomes the format's largest number.

    x: (m, n) float   block: (rows, columns) of a tile, None for all of them; the last tiles may be ragged
    -> scale: (tiles down, tiles across) float32; power_of_two: each rounded up to a power of two (UE8M0)
    Raises NotFinite, a ValueError, when x holds nan or inf, or is so large that its tile's largest number would not fit float32
    (E4M3 with powers of two: above 2.97e38); ValueError for what is not a matrix, for an empty tile, for a format with float32's range.
    """
    return _scales(*_cut(x, block, fmt), fmt, power_of_two)


def quantise(x, block, fmt=formats.E4M3, *, power_of_two=False):
    """x ~ q * scale, q on the grid of the format, of which no range is wasted. See scales.

    x: (m, n) float -> q: (m, n) float32   scale: (tiles down, tiles across) float32, to be multiplied
    """
    filled, sizes = _cut(x, block, fmt)
    scale = _scales(filled, sizes, fmt, power_of_two)
    q = round_to(_bands(filled, sizes) / _spread(scale, sizes), fmt, overflow="saturate")          # eq. 2
    return _whole(q, np.shape(x)).astype(np.float32, copy=False), scale


def fake_quantise(x, block, fmt=formats.E4M3, *, power_of_two=False):
    """What is left of x after quantise and back: float32 (m, n). Fast: float arithmetic, no cast to eight bits. See scales.

    Nothing has to be clamped: the largest entry of a tile over its scale is fmt.max, or one bit of float32 more, which rounds back.
    """
    filled, sizes = _cut(x, block, fmt)
    spread = _spread(_scales(filled, sizes, fmt, power_of_two), sizes)
    q = round_within(_bands(filled, sizes) / spread, fmt).astype(np.float32, copy=False)
    x_hat = np.multiply(q, spread, out=q)                                                           # eq. 3
    return _whole(x_hat, np.shape(x))


def _scales(filled, sizes, fmt, power_of_two):
    """The scales of a matrix that was cut. Whole rows first: the maximum of two long rows is fast."""
    down, rows, across, columns = sizes
    amax = np.abs(filled)
    if rows > 1:
        amax = amax.reshape(down, rows, across * columns).max(axis=1)
    if columns > 1:
        runs = amax.reshape(-1, columns)                                # of short ones, the transpose is faster
        amax = runs.max(axis=1) if columns > 32 else runs.T.copy().max(axis=0)
    if not (amax <= FLOAT32_MAX).all():                                 # written this way round: nan must fail
        raise NotFinite("x holds nan, inf, or numbers that float32 cannot hold")
    amax = amax.reshape(down, across).astype(np.float32, copy=False)
    scale = np.maximum(amax, np.float32(SMALLEST_AMAX)) / np.float32(fmt.max)                       # eq. 1
    if power_of_two:
        fraction, exponent = np.frexp(scale)                            # scale = fraction * 2^exponent, 1/2 <= fraction < 1
        scale = np.ldexp(np.float32(1), exponent - (fraction == 0.5))                               # eq. 4
    if float(scale.max()) * fmt.max > FLOAT32_MAX:                      # near the end of float32, a scale rounded up leads beyond it
        raise NotFinite(f"x holds {amax.max():.4g}: its scale {scale.max():.4g} times {fmt.max:g} is a number that float32 cannot hold")
    return scale


def _cut(x, block, fmt):
    """A matrix filled up to whole tiles, and (down, rows, across, columns) of them. Zeros at ragged edges change no maximum."""
    x = np.asarray(x)
    if x.ndim != 2 or not x.size or not all(size is None or size >= 1 for size in block):
        raise ValueError(f"x {x.shape} must be a matrix of numbers that float32 can hold, in tiles of at least (1, 1), not {tuple(block)}")
    if fmt.exponent_bits == 8:
        raise ValueError(f"{fmt.name} has the range of float32, there is nothing to scale")
    x = x if x.dtype in (np.float32, np.float64) else x.astype(np.float32)
    m, n = x.shape
    rows, columns = [whole if size is None else min(size, whole) for whole, size in zip(x.shape, block)]
    down, across = -(-m // rows), -(-n // columns)
    if (m, n) != (down * rows, across * columns):
        x, edged = np.zeros((down * rows, across * columns), x.dtype), x
        x[:m, :n] = edged
    return np.ascontiguousarray(x), (down, rows, across, columns)


def _bands(filled, sizes):
    """The rows of one row of tiles together: (down, rows, n)."""
    return filled.reshape(sizes[0], sizes[1], -1)


def _spread(scale, sizes):
    """The scale of every column in every band: (down, 1, n)."""
    return scale.repeat(sizes[3], axis=1)[:, None, :]


def _whole(bands, shape):
    """The matrix of that shape that was cut into bands."""
    return bands.reshape(-1, bands.shape[-1])[:shape[0], :shape[1]]


def quantise_blocks(x, block=(128, 128)):
    """quantise as checkpoints store it: q has eight bits.

    x: (m, n) float   block: rows and columns of a block; the last ones may be ragged
    -> q: (m, n) float8_e4m3fn   scale: (ceil(m / rows), ceil(n / columns)) float32, to be multiplied
    Raises ValueError for an array that is not a matrix, NotFinite for one that holds nan or inf.
    """
    q, scale = quantise(x, block)
    return q.astype(FLOAT8), scale


def dequantise_blocks(q, scale, block=(128, 128), dtype=np.float32):
    """x = q * scale, the multiplier of its block: public checkpoints call it weight_scale_inv, and it is multiplied.

    q: (m, n)   scale: (ceil(m / rows), ceil(n / columns))   ->   x: (m, n) of dtype, rounded to float32 first as the
    public code does: four significant bits times the 24 of a scale do not always fit
    Raises ValueError when the scales do not fit the blocks.
    """
    if q.ndim != 2:
        raise ValueError(f"q has shape {q.shape}: blocks are those of a matrix")
    expected = tuple(-(-n // size) for n, size in zip(q.shape, block))
    if scale.shape != expected:
        raise ValueError(f"a matrix {q.shape} in blocks of {tuple(block)} needs scales {expected}, got {scale.shape}")
    return (q.astype(np.float32) * spread_blocks(scale.astype(np.float32), q.shape, block)).astype(dtype)    # eq. 5


def spread_blocks(scale, shape, block):
    """The scale of every entry: each repeated over its block, cut off at the ragged edge. None in a block: all there are."""
    rows, columns = [whole if size is None else size for size, whole in zip(block, shape)]
    return scale.repeat(rows, axis=0)[:shape[0]].repeat(columns, axis=1)[:, :shape[1]]


def relative_error(x, x_hat):
    """|x_hat - x| / |x|, both lengths over all entries (Frobenius). 1 when nothing is left.

    Zeros have no length to be relative to: nan for x of zeros alone, or inf when x_hat is something else, and a RuntimeWarning.
    """
    x, x_hat = np.asarray(x, np.float64), np.asarray(x_hat, np.float64)
    return float(np.linalg.norm(x_hat - x) / np.linalg.norm(x))


def error_beside(outlier, block, fmt=formats.E4M3, *, shape=(256, 256), seed=0):
    """The relative error of a standard normal matrix one entry of which is the outlier; that entry is not counted."""
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    x[0, 0] = outlier
    others = np.s_[1:]
    return relative_error(x.ravel()[others], fake_quantise(x, block, fmt).ravel()[others])


def demo():
    """Blocks of 2 x 2 by hand, the error beside an outlier, the speed. --plot FILE.png draws errors by the size of the tiles."""
    x = np.array([[448.0, 1.0, 3.0], [2.0, 0.5, 0.0]])
    q, scale = quantise_blocks(x, (2, 2))
    print(f"shapes    x {x.shape} in blocks of (2, 2) -> q {q.shape} {q.dtype}, scale {scale.shape}")
    print(f"by hand   largest entries 448 and 3: scales {scale[0, 0]:g} and 3/448 = {scale[0, 1]:.6f}, or as powers of two "
          f"{' and '.join(f'{s:g}' for s in scales(x, (2, 2), power_of_two=True)[0])}; the 3 is stored as {q[0, 2].astype(float):g}")
    w = np.random.default_rng(0).standard_normal((200, 300))
    back = dequantise_blocks(*quantise_blocks(w))
    error = np.abs(back - w) / np.maximum(np.abs(w), np.abs(w).max() / 448 * 2.0 ** -6)
    print(f"claim     normal numbers keep 3 bits after the point: largest relative error {error.max():.4f} <= 2^-4 = 0.0625")
    outliers = 10.0 ** np.arange(0, 8)
    print("claim     error beside an outlier of " + " ".join(f"{size:6.0e}" for size in outliers))
    curves = {(fmt.name, name): [error_beside(size, SIZES[name], fmt) for size in outliers]
              for fmt in (formats.E4M3, formats.E2M1) for name in ("tensor", "tile")}
    for name, errors in curves.items():
        print(f"          {', '.join(name):24s} " + " ".join(f"{error:6.3f}" for error in errors))
    wide = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)
    fast = {name: seconds(lambda: fake_quantise(wide, SIZES[name])) for name in ("tile", "block")}
    cast = seconds(lambda: dequantise_blocks(*quantise_blocks(wide)), 3)
    print(f"          (1024, 1024), ns an element: tile {fast['tile'] * 1e9 / wide.size:.1f}, block {fast['block'] * 1e9 / wide.size:.1f}, "
          f"block with a cast there and back {cast * 1e9 / wide.size:.1f}")
    from minideepseek.plots.canvas import panels, plot_path
    from minideepseek.plots.formats import error_by_outlier, error_histograms
    if path := plot_path():            # on the left one entry in 2,000 is a hundred thousand times too large
        spiky = wide[:256, :512] * np.where(np.random.default_rng(1).random((256, 512)) < 1 / 2000, 1e5, 1)
        errors = {name: np.abs(fake_quantise(spiky, block) / spiky - 1).ravel() for name, block in SIZES.items()}
        panels(path, lambda ax: error_histograms(errors, title="one entry in 2,000 is 100,000 times as large, E4M3", ax=ax),
               lambda ax: error_by_outlier(outliers, {", ".join(name): line for name, line in curves.items()}, ax=ax))
    assert scale[0, 0] == 1 and q[0, 2].astype(float) == 448 and error.max() <= 2 ** -4 * (1 + 1e-5)
    assert max(curves["E4M3", "tile"]) < 0.05 and max(curves["E4M3", "tensor"]) > 0.99


if __name__ == "__main__":
    from minideepseek.precision.tiles import demo  # the imported copy, so that every name exists once
    demo()
