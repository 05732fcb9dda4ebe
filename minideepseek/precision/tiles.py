"""Blocks of one scale: an array stored in FP8 as q, with one multiplier for every block, x ~ q * scale.

Derivation: whiteboard/precision/tiles.md     Source: DeepSeek-V3, arXiv:2412.19437, sec. 3.3, and its released weights
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import ml_dtypes
import numpy as np

E4M3 = ml_dtypes.float8_e4m3fn
E4M3_MAX = 448.0         # the largest value; ml_dtypes turns what is beyond 464 into nan, so casts clamp first
SMALLEST_AMAX = 1e-4     # what a block counts as at least, zeros among them: the released code's floor for activations


def quantise_blocks(x, block=(128, 128)):
    """Scale every block so that its largest entry becomes 448 (or less, when it is below 1e-4), and round to E4M3: x ~ q * scale.

    x: (m, n) float   block: rows and columns of a block; the last ones may be ragged
    -> q: (m, n) float8_e4m3fn   scale: (ceil(m / rows), ceil(n / columns)) float32, to be multiplied
    Raises ValueError for an array that is not a matrix, or holds nan or inf.
    """
    x = np.asarray(x)
    if x.ndim != 2 or not (np.abs(x) <= np.finfo(np.float32).max).all():
        raise ValueError(f"x {x.shape} must be a matrix of numbers that float32 can hold")
    starts = [np.arange(0, n, size) for n, size in zip(x.shape, block)]
    rows = np.maximum.reduceat(np.abs(x), starts[0], axis=0)
    amax = np.maximum.reduceat(rows, starts[1], axis=1).astype(np.float32)      # (blocks down, blocks across)
    scale = np.maximum(amax, np.float32(SMALLEST_AMAX)) / np.float32(E4M3_MAX)  # eq. 1
    spread = spread_blocks(scale, x.shape, block)
    q = np.clip(x / spread, -E4M3_MAX, E4M3_MAX).astype(E4M3)                   # eq. 2
    return q, scale


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
    return (q.astype(np.float32) * spread_blocks(scale.astype(np.float32), q.shape, block)).astype(dtype)    # eq. 3


def spread_blocks(scale, shape, block):
    """The scale of every entry: each repeated over its block, cut off at the ragged edge."""
    return scale.repeat(block[0], axis=0)[:shape[0]].repeat(block[1], axis=1)[:, :shape[1]]


def demo():
    """Blocks of 2 x 2 by hand, a ragged edge, and the error."""
    x = np.array([[448.0, 1.0, 3.0], [2.0, 0.5, 0.0]])
    q, scale = quantise_blocks(x, (2, 2))
    print(f"shapes    x {x.shape} in blocks of (2, 2) -> q {q.shape} {q.dtype}, scale {scale.shape}")
    print(f"by hand   largest entries 448 and 3: scales {scale[0, 0]:g} and 3/448 = {scale[0, 1]:.6f}; the 3 is stored as {q[0, 2].astype(float):g}")
    w = np.random.default_rng(0).standard_normal((200, 300))
    back = dequantise_blocks(*quantise_blocks(w))
    error = np.abs(back - w) / np.maximum(np.abs(w), np.abs(w).max() / 448 * 2.0 ** -6)
    print(f"claim     normal numbers keep 3 bits after the point: largest relative error {error.max():.4f} <= 2^-4 = 0.0625")
    assert scale[0, 0] == 1 and q[0, 2].astype(float) == 448 and error.max() <= 2 ** -4 * (1 + 1e-5)


if __name__ == "__main__":
    from minideepseek.precision.tiles import demo  # the imported copy, so that every name exists once
    demo()
