"""FP8 products behind the gemm door: the three of a linear layer, each with scales along its own contraction axis.

Derivation: whiteboard/precision/fp8_gemm.md     Source: DeepSeek-V3, arXiv:2412.19437, sec. 3.3
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

from functools import partial

import ml_dtypes
import numpy as np

from minideepseek.precision.accumulate import narrow_matmul
from minideepseek.precision.formats import E4M3, E5M2
from minideepseek.precision.tiles import NotFinite, fake_quantise, quantise, relative_error


def fp8_gemm(A, B, *, role, tile=128, fmt=E4M3, gradient_fmt=E4M3, power_of_two=False):
    """A @ B after rounding both to FP8: the gemm of `linear` and of everything built on it, `gemm=fp8_gemm`.

    A: (M, K)   B: (K, N)   ->   y: (M, N) of the dtype of A and B; in float64 the rounded values are the same, the sum finer
    role: forward | dx | dW, which says what is a weight and what a gradient, see `tiling`; `partial(fp8_gemm, tile=16)` binds the rest
    tile: entries that share a scale along an axis; None: one scale for the whole matrix, as was done before V3
    fmt: of weights and activations; gradient_fmt: of dy; None: left as it is   power_of_two: the scales (UE8M0)

    dx and dW made with it are surrogates (straight-through): the slope of rounding is taken for 1, where it is 0 or infinite.
    nan and inf go through, as in float32. Raises ValueError for an unknown role, a tile below 1, or an empty matrix.
    """
    (A_block, A_fmt), (B_block, B_fmt) = tiling(role, tile, fmt, gradient_fmt)
    A_hat = _rounded(A, A_block, A_fmt, power_of_two)                               # (M, K)   # eq. 1
    B_hat = _rounded(B, B_block, B_fmt, power_of_two)                               # (K, N)   # eq. 2
    dtype = np.result_type(A, B)
    return A_hat.astype(dtype, copy=False) @ B_hat.astype(dtype, copy=False)        # (M, N)   # eq. 3


def tiling(role, tile, fmt, gradient_fmt):
    """((block, format) of A, (block, format) of B): a scale is constant over `tile` steps of K, A's columns and B's rows.

    What has a token on one axis gets a scale for each token or, where tokens are summed over, for each channel; weights
    get square blocks, so that W of the forward and W.T of dx are one quantised matrix. Raises ValueError for an unknown role.
    """
    if role not in ("forward", "dx", "dW"):
        raise ValueError(f"role = {role!r}, expected 'forward', 'dx' or 'dW'")
    if tile is None:
        return ((None, None), gradient_fmt if role == "dx" else fmt), ((None, None), gradient_fmt if role == "dW" else fmt)
    if role == "forward":
        return ((1, tile), fmt), ((tile, tile), fmt)                                # x W
    if role == "dx":
        return ((1, tile), gradient_fmt), ((tile, tile), fmt)                       # dy W.T
    return ((1, tile), fmt), ((tile, 1), gradient_fmt)                              # x.T dy


def _rounded(x, block, fmt, power_of_two):
    """What FP8 leaves of x; x itself when there is no format. By way of float32, so that float64 is rounded to the same values.

    nan and inf have no scale: x is handed on, and they turn up in the product as they do in float32, where somebody looks.
    """
    if fmt is None:
        return x
    try:
        return fake_quantise(np.asarray(x, np.float32), block, fmt, power_of_two=power_of_two)
    except NotFinite:
        return x


def fp8_gemm_faithful(A, B, *, role, tile=128, fmt=E4M3, gradient_fmt=E4M3, power_of_two=False, bits=14, group=32, promote=128):
    """fp8_gemm as the hardware does it: q times q in the narrow accumulator, chunk by chunk of K, each times its own scales.

    The same arguments, but that a format cannot be None; bits, group, promote: see `narrow_matmul`. Slow, and sums in float32.
    """
    (A_block, A_fmt), (B_block, B_fmt) = tiling(role, tile, fmt, gradient_fmt)
    q_A, scale_A = quantise(np.asarray(A, np.float32), A_block, A_fmt, power_of_two=power_of_two)       # (M, K) (M, K/tile)
    q_B, scale_B = quantise(np.asarray(B, np.float32), B_block, B_fmt, power_of_two=power_of_two)       # (K, N) (K/tile, N/columns)
    y = np.zeros((A.shape[0], B.shape[1]), np.float32)
    for b in range(scale_A.shape[1]):
        k = slice(b * tile, (b + 1) * tile) if tile else slice(None)
        chunk = narrow_matmul(q_A[:, k], q_B[k], bits=bits, group=group, promote=promote)               # (M, N)   # eq. 4
        scale = scale_A[:, b, None] * scale_B[b].repeat(B_block[1] or y.shape[1])[:y.shape[1]]                        # (M, N)   # eq. 5
        y = y + chunk * scale                                                                           # (M, N)   # eq. 6
    return y.astype(np.result_type(A, B), copy=False)


def bf16_gemm(A, B, *, role):
    """A @ B after rounding both to BF16, summed in the dtype of A and B: nothing to scale, whatever the role. See fp8_gemm."""
    dtype = np.result_type(A, B)
    A_hat, B_hat = [np.asarray(x, np.float32).astype(ml_dtypes.bfloat16) for x in (A, B)]               # eq. 7
    return A_hat.astype(dtype) @ B_hat.astype(dtype)


def layer_errors(gemm, shape=(128, 256, 192), seed=0):
    """Relative errors of y, dx and dW of a linear layer with this gemm: a normal x (M, D), W (D, F) and dy (M, F)."""
    M, D, F = shape
    rng = np.random.default_rng(seed)
    x, W, dy = [rng.standard_normal(size).astype(np.float32) for size in ((M, D), (D, F), (M, F))]
    products = {"forward": (x, W), "dx": (dy, W.T), "dW": (x.T, dy)}
    return [relative_error(A @ B, gemm(A, B, role=role)) for role, (A, B) in products.items()]


def demo():
    """Two chunks by hand, the errors of each product by format, the narrow accumulator beside the rounding."""
    A, B = np.array([[448.0, 448.0, 1.0, 0.0]]), np.ones((4, 1))
    fast, faithful = fp8_gemm(A, B, role="forward", tile=2).item(), fp8_gemm_faithful(A, B, role="forward", tile=2).item()
    print("shapes    A (M, K) @ B (K, N) -> y (M, N); tiles of A (1, 128), of B (128, 128), for dW (128, 1)")
    print(f"by hand   (448 448 | 1 0) with scales 1 and 1/448, times ones with 1/448: 896 + 1 = {fast:.4f}, chunk by chunk {faithful:.4f}")

    gemms = {"E4M3": fp8_gemm, "E4M3, powers of two": partial(fp8_gemm, power_of_two=True),
             "E5M2 for dy": partial(fp8_gemm, gradient_fmt=E5M2), "BF16": bf16_gemm}
    print("          relative error of        y        dx       dW")
    found = {name: layer_errors(gemm) for name, gemm in gemms.items()}
    for name, row in found.items():
        print(f"          {name:22s}", "  ".join(f"{error:.5f}" for error in row))
    rng = np.random.default_rng(0)
    differences = {}
    for K in (128, 512, 2048):
        A, B = [rng.standard_normal(shape).astype(np.float32) for shape in ((16, K), (K, 16))]
        differences[K] = relative_error(fp8_gemm(A, B, role="forward"), fp8_gemm_faithful(A, B, role="forward"))
    print("claim     with 14 bits, a promotion and two scales each 128, the sums differ from exact ones by",
          ", ".join(f"{error:.1e} (K {K})" for K, error in differences.items()), "beside the", f"{found['E4M3'][0]:.1e} of rounding")
    assert abs(fast - 897) < 1e-3 and abs(faithful - 897) < 0.5 and max(differences.values()) < 3e-4
    assert all(0.03 < error < 0.045 for error in found["E4M3"]) and found["E5M2 for dy"][1] > 1.4 * found["E4M3"][1] and max(found["BF16"]) < 0.003


if __name__ == "__main__":
    from minideepseek.precision.fp8_gemm import demo  # the imported copy, so that every name exists once
    demo()
