"""The narrow accumulator: sums of FP8 products that keep 14 bits, and their rescue, a float32 register every 128 products.

Derivation: whiteboard/precision/accumulate.md     Source: DeepSeek-V3, arXiv:2412.19437, sec. 3.3 and 3.5
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import numpy as np

from minideepseek.precision.tiles import quantise, relative_error

SMALLEST = 2.0 ** -300           # below any product of two float32 numbers: what the leading bit of a group of zeros counts as
ACCUMULATORS = {"14 bits, never promoted": None, "promoted every 512": 512, "promoted every 128": 128}


def narrow_matmul(A, B, *, bits=14, group=32, promote=128):
    """A @ B as the FP8 tensor cores of Hopper add it up: `group` products at a time to a register of `bits` bits.

    A: (M, K)   B: (K, N)   finite values of an FP8 format, as floats   ->   y: (M, N) float32
    bits: what is kept, counted from the leading bit   promote: after so many products the register is added to a
    float32 number and cleared; None = never. The last group, before a promotion and at the end, may be short.

    It holds group * M * N numbers at a time: for measurements, not for training.
    Raises ValueError for shapes that do not fit, values that are not finite, sizes below 1, and bits too many for float64.
    """
    A, B = _door(A, B, bits, group, promote)
    K, chunk = A.shape[1], promote or max(A.shape[1], 1)
    total = np.zeros((A.shape[0], B.shape[1]), np.float32)
    for start in range(0, K, chunk):
        stop = min(start + chunk, K)
        register = np.zeros(total.shape)
        for first in range(start, stop, group):
            k = slice(first, min(first + group, stop))
            register = add_group(register, A[:, k], B[k], bits)
        total = total + register.astype(np.float32)                                         # (M, N)   # eq. 6
    return total


def narrow_dot(a, b, **options):
    """The product of two vectors, a: (K,)   b: (K,)   ->   float32; options: those of `narrow_matmul`."""
    return narrow_matmul(np.asarray(a)[None, :], np.asarray(b)[:, None], **options)[0, 0]


def add_group(register, a, b, bits):
    """One step of the tensor core: align the products and the register, drop what sticks out below, add, drop again.

    register: (M, N)   a: (M, G)   b: (G, N)   all float64   ->   the next register (M, N)
    """
    product = a[:, :, None] * b                                                             # (M, G, N)   # eq. 1
    leading = (leading_bit(a)[:, :, None] * leading_bit(b)).max(axis=1)                     # (M, N)
    largest = np.maximum(leading, leading_bit(register))                                    # (M, N)   # eq. 2
    unit = np.maximum(largest, SMALLEST) * 2.0 ** (1 - bits)                                # (M, N)   # eq. 3
    aligned = cut(product, unit[:, None]).sum(axis=1) + cut(register, unit)                 # (M, N)   # eq. 4
    return cut(aligned, np.maximum(leading_bit(aligned), SMALLEST) * 2.0 ** (1 - bits))     # (M, N)   # eq. 5


def leading_bit(x):
    """The power of two at or below |x|: 4 for -7.5; 0 for 0."""
    return np.where(x == 0, 0.0, np.ldexp(1.0, np.frexp(x)[1] - 1))


def cut(x, unit):
    """x as a multiple of unit, a power of two, rounded toward zero: sign and magnitude, the low bits fall off."""
    return np.trunc(x / unit) * unit


def _door(A, B, bits, group, promote):
    """A and B in float64, where products of float32 numbers and sums of so few bits are exact. Raises ValueError."""
    A, B = np.asarray(A, np.float64), np.asarray(B, np.float64)
    if A.ndim != 2 or B.ndim != 2 or A.shape[1] != B.shape[0]:
        raise ValueError(f"A {A.shape} and B {B.shape} must be (M, K) and (K, N)")
    for name, size in (("bits", bits), ("group", group), ("promote", 1 if promote is None else promote)):
        if size < 1:
            raise ValueError(f"{name} = {size} must be at least 1")
    if bits + 1 + int(group).bit_length() > 53:
        raise ValueError(f"bits = {bits} with groups of {group}: their sum does not fit into the 53 bits of float64")
    for name, x in (("A", A), ("B", B)):
        if not (np.abs(x) <= np.finfo(np.float32).max).all():       # written this way round: nan must fail
            raise ValueError(f"{name} holds nan, inf, or a number that float32 does not")
    return A, B


def measure(inputs, lengths, n_outputs=16, seed=0):
    """{accumulator: relative error at each length K}, and that of rounding the inputs to E4M3, one scale per dot product.

    inputs: "N(0,1)" or "U[0,1)", what A (n_outputs, K) and B (K, n_outputs) are drawn from; errors by Frobenius norms
    """
    rng = np.random.default_rng(seed)
    draw = {"N(0,1)": rng.standard_normal, "U[0,1)": rng.random}[inputs]
    errors = {name: [] for name in [*ACCUMULATORS, "rounding to E4M3"]}
    for K in lengths:
        A, B = draw((n_outputs, K)), draw((K, n_outputs))
        (q_A, scale_A), (q_B, scale_B) = quantise(A, (1, None)), quantise(B, (None, 1))
        exact = q_A.astype(np.float64) @ q_B.astype(np.float64)
        for name, promote in ACCUMULATORS.items():
            errors[name].append(relative_error(exact, narrow_matmul(q_A, q_B, promote=promote)))
        errors["rounding to E4M3"].append(relative_error(A @ B, exact * scale_A * scale_B))
    return errors


def demo():
    """Four products by hand, a sum that stands still, and the error against K. --plot FILE.png draws it."""
    a, b = np.array([8.0, 1.0, 1.5, -0.75]), np.ones(4)
    print("shapes    A (M, K) @ B (K, N) -> y (M, N), K in groups of 32")
    print("by hand   8 + 1 + 1.5 - 0.75 = 9.75; with 4 bits the 8 leaves room for ones: 8 + 1 + 1 - 0 =", narrow_dot(a, b, bits=4))
    ones = np.ones(20_000)
    stuck, rescued = narrow_dot(ones, ones, promote=None), narrow_dot(ones, ones)
    print(f"by hand   20,000 ones: the sum stands still at 2^14 = {stuck:,.0f}; promoted every 128, {rescued:,.0f}")

    lengths = [128, 256, 512, 1024, 2048, 4096]
    errors = {inputs: measure(inputs, lengths) for inputs in ("N(0,1)", "U[0,1)")}
    for inputs, lines in errors.items():
        for name, line in lines.items():
            print(f"          {inputs}  {name:24s}", "  ".join(f"{error:.1e}" for error in line))
    never, rescue = [errors["U[0,1)"][name] for name in ("14 bits, never promoted", "promoted every 128")]
    print(f"claim     K from 128 to 4096, U[0,1): the error grows {never[-1] / never[0]:.0f} times to {never[-1]:.1%}; "
          f"promoted it stays at {rescue[-1]:.3%}")
    from minideepseek.plots.accumulators import error_by_length
    from minideepseek.plots.canvas import panels, plot_path
    if path := plot_path():
        def draw(ax, inputs):
            *sums, rounding = errors[inputs].items()
            error_by_length(lengths, dict(sums), beside=dict([rounding]), limits=(5e-5, 0.2), title=inputs, ax=ax)

        panels(path, lambda ax: draw(ax, "N(0,1)"), lambda ax: draw(ax, "U[0,1)"))
    assert (narrow_dot(a, b, bits=4), stuck, rescued) == (10, 16384, 20_000)
    assert never[-1] > 0.05 and max(rescue) < 1e-3 and max(rescue) < 1.5 * min(rescue)


if __name__ == "__main__":
    from minideepseek.precision.accumulate import demo  # the imported copy, so that every name exists once
    demo()
