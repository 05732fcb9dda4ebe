import inspect
from functools import partial

import ml_dtypes
import numpy as np
import pytest

from minideepseek.attention.mla import mla_backward, mla_examples, mla_forward
from minideepseek.autograd.finite_differences import GradcheckError
from minideepseek.autograd.gradcheck import gradcheck
from minideepseek.basics.linear import linear_backward, linear_examples, linear_forward, matmul
from minideepseek.basics.swiglu import swiglu_backward, swiglu_examples, swiglu_forward
from minideepseek.precision.accumulate import narrow_matmul
from minideepseek.precision.formats import E4M3, E5M2
from minideepseek.precision.fp8_gemm import bf16_gemm, fp8_gemm, fp8_gemm_faithful, layer_errors
from minideepseek.precision.tiles import NotFinite, fake_quantise, quantise, relative_error

GEMMS = {"fast": fp8_gemm, "faithful": fp8_gemm_faithful}
ROLES = ("forward", "dx", "dW")
DTYPES = {E4M3: ml_dtypes.float8_e4m3fn, E5M2: ml_dtypes.float8_e5m2}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rounded(x, rows, columns, fmt=E4M3):
    """What FP8 leaves of x, the plain way: tile by tile, cast to eight bits and back."""
    x_hat = np.zeros_like(x, dtype=np.float32)
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            tile = np.float32(x[i:i + rows, j:j + columns])
            scale = max(np.abs(tile).max(), np.float32(1e-4)) / np.float32(fmt.max)
            x_hat[i:i + rows, j:j + columns] = np.clip(tile / scale, -fmt.max, fmt.max).astype(DTYPES[fmt]).astype(np.float32) * scale
    return x_hat


def exact(A, B):
    return A.astype(np.float64) @ B.astype(np.float64)


@pytest.mark.parametrize("tile", (1, 3, 4, 128))
@pytest.mark.parametrize("gradient_fmt", (E4M3, E5M2), ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("gemm", GEMMS.values(), ids=GEMMS)
def test_the_three_products_of_a_linear_layer_against_their_definition(gemm, gradient_fmt, tile):
    """The gradients are surrogates: this formula is what they are, and not the slope of the forward. Edges are ragged."""
    x, W, dy = normal(9, 13), normal(13, 11, seed=1), normal(9, 11, seed=2)
    options = {"bits": 46} if gemm is fp8_gemm_faithful else {}
    y, cache = linear_forward(x, W, gemm=partial(gemm, tile=tile, gradient_fmt=gradient_fmt, **options))
    dx, dW = linear_backward(dy, cache)
    W_hat = rounded(W, tile, tile)
    np.testing.assert_allclose(y, exact(rounded(x, 1, tile), W_hat), rtol=0, atol=1e-5)
    np.testing.assert_allclose(dx, exact(rounded(dy, 1, tile, gradient_fmt), W_hat.T), rtol=0, atol=1e-5)
    np.testing.assert_allclose(dW, exact(rounded(x, tile, 1).T, rounded(dy, tile, 1, gradient_fmt)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("gemm", GEMMS.values(), ids=GEMMS)
def test_without_tiles_a_matrix_has_one_scale(gemm):
    x, W, dy = normal(9, 13), normal(13, 11, seed=1), normal(9, 11, seed=2)
    options = {"bits": 46} if gemm is fp8_gemm_faithful else {}
    y, cache = linear_forward(x, W, gemm=partial(gemm, tile=None, gradient_fmt=E5M2, **options))
    dx, dW = linear_backward(dy, cache)
    x_hat, W_hat, dy_hat = rounded(x, 99, 99), rounded(W, 99, 99), rounded(dy, 99, 99, E5M2)
    for found, expected in ((y, exact(x_hat, W_hat)), (dx, exact(dy_hat, W_hat.T)), (dW, exact(x_hat.T, dy_hat))):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("gemm", GEMMS.values(), ids=GEMMS)
def test_each_chunk_times_its_own_scales(gemm):
    """Bug 28. The chunks of K differ by factors of a thousand, and each outlier scales its own tile only."""
    size = np.repeat([1e-3, 1.0, 1e3, 1e-3], 4)
    A, B = normal(5, 16) * size, normal(16, 6, seed=1) / size[:, None]
    A[2, 5] = 1e5
    for role in ROLES:
        y = gemm(A, B, role=role, tile=4)
        assert relative_error(np.delete(exact(A, B), 2, axis=0), np.delete(y, 2, axis=0)) < 0.06
        assert relative_error(exact(A, B)[2], y[2]) < 0.1


def test_by_hand():
    """(448 448 | 1 0) with scales 1 and 1/448, ones with scale 1/448: 896 + 1. The mean of the scales would give 674, the last one 3."""
    A, B = np.array([[448.0, 448.0, 1.0, 0.0]]), np.ones((4, 1))
    for gemm in GEMMS.values():
        assert gemm(A, B, role="forward", tile=2) == pytest.approx(897, rel=1e-6)
    q, scale = quantise(A, (1, 2))
    assert q.tolist() == [[448, 448, 448, 0]] and scale.tolist() == [[1, np.float32(1) / np.float32(448)]]


def test_gradients_are_e4m3_unless_asked_otherwise():
    """Bug 29: V3 uses E4M3 everywhere. Two mantissa bits double the error of dy, and of what dy is in."""
    for gemm in GEMMS.values():
        assert {inspect.signature(gemm).parameters[name].default for name in ("fmt", "gradient_fmt")} == {E4M3}
    three, two = layer_errors(fp8_gemm), layer_errors(partial(fp8_gemm, gradient_fmt=E5M2))
    assert three[0] == two[0] and all(1.45 < b / a < 1.7 for a, b in zip(three[1:], two[1:]))


def test_errors_are_what_three_mantissa_bits_allow():
    """Uniform within a step, each factor is off by 2.6 % of its size (root mean square), a product by sqrt(2) times that."""
    assert all(0.034 < error < 0.041 for error in layer_errors(fp8_gemm))
    assert all(0.028 < error < 0.038 for error in layer_errors(partial(fp8_gemm, tile=16)))     # the largest of each tile is exact
    assert all(0.034 < error < 0.041 for error in layer_errors(partial(fp8_gemm, power_of_two=True)))
    assert all(0.034 / 16 < error < 0.041 / 16 for error in layer_errors(bf16_gemm))


def test_the_fast_path_is_exact_up_to_its_sums():
    A, B = normal(40, 300), normal(300, 50, seed=1)
    A_hat, B_hat = rounded(A, 1, 128), rounded(B, 128, 128)
    y = fp8_gemm(A, B, role="forward")
    assert y.dtype == np.float32 and relative_error(exact(A_hat, B_hat), y) < 1e-6
    in_float64 = fp8_gemm(A.astype(np.float64), B.astype(np.float64), role="forward")
    assert in_float64.dtype == np.float64 and relative_error(exact(A_hat, B_hat), in_float64) < 1e-14


@pytest.mark.parametrize("gemm", (fp8_gemm, fp8_gemm_faithful, bf16_gemm))
def test_float64_is_rounded_to_the_same_values_as_float32(gemm):
    """Just above a tie of E4M3, and of BF16: float32 drops the last bit and the tie goes to even, so it does in float64."""
    A, B = np.array([[448.0, 17 + 2.0**-30, 1 + 2.0**-8 + 2.0**-40]]), np.eye(3)
    y = gemm(A, B, role="dW")
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, gemm(A.astype(np.float32), B.astype(np.float32), role="dW"), rtol=1e-6)
    assert y[0, 1] == pytest.approx(17 if gemm is bf16_gemm else 16, rel=1e-6) and y[0, 2] == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("options", [{}, {"power_of_two": True}, {"fmt": E5M2, "tile": 96}], ids=str)
def test_both_paths_agree_as_the_accumulator_widens(role, options):
    A, B = normal(12, 400), normal(400, 10, seed=1)
    fast = fp8_gemm(A, B, role=role, **options)
    by_bits = [relative_error(fast, fp8_gemm_faithful(A, B, role=role, bits=bits, **options)) for bits in (10, 14, 18, 22, 40)]
    assert by_bits[-1] < 5e-7 and (np.diff(by_bits[:4]) < 0).all() and 3e-5 < by_bits[1] < 3e-4
    by_promotion = [relative_error(fast, fp8_gemm_faithful(A, B, role=role, promote=promote, **options)) for promote in (None, 32)]
    assert by_promotion[1] < by_promotion[0]


def test_the_narrow_sum_costs_little_beside_the_rounding_whatever_k():
    for K in (128, 512, 2048):
        A, B = normal(16, K), normal(K, 16, seed=1)
        fast, faithful = [gemm(A, B, role="forward") for gemm in GEMMS.values()]
        assert 5e-5 < relative_error(fast, faithful) < 3e-4 < 0.03 < relative_error(exact(A, B), fast)
    whole = fp8_gemm_faithful(A, B, role="forward", tile=2048, promote=None)        # one scale, never promoted: it grows
    assert relative_error(fp8_gemm(A, B, role="forward", tile=2048), whole) > 5e-4


def test_a_chunk_goes_through_the_narrow_accumulator():
    A, B = normal(3, 10), normal(10, 4, seed=1)
    (q_A, scale_A), (q_B, scale_B) = quantise(A, (1, None)), quantise(B, (None, None))
    y = fp8_gemm_faithful(A, B, role="forward", bits=6, group=3, promote=6)
    assert (y == narrow_matmul(q_A, q_B, bits=6, group=3, promote=6) * (scale_A * scale_B)).all()


def test_w_is_quantised_once_for_the_forward_and_for_dx_because_its_blocks_are_square():
    W, eye = normal(10, 7), np.eye(10, dtype=np.float32)
    for tile in (3, 128):
        (q, scale), (q_T, scale_T) = quantise(W, (tile, tile)), quantise(W.T, (tile, tile))
        assert (q.T == q_T).all() and (scale.T == scale_T).all()
    assert (fake_quantise(W, (1, 3)).T != fake_quantise(W.T, (1, 3))).any()         # tiles are not square
    exact_eye = partial(fp8_gemm, tile=3, power_of_two=True)                        # here the identity is rounded to itself
    forward, dx = exact_eye(eye, W, role="forward"), exact_eye(eye[:7, :7], W.T, role="dx")
    assert (forward == dx.T).all() and (forward != W).any()


def test_x_is_two_different_matrices_in_the_forward_and_in_dw_unless_scales_are_powers_of_two():
    """Tiles run along channels there, along tokens here. With powers of two a normal number is rounded alike by any scale."""
    x, eye = normal(9, 8) + np.sign(normal(9, 8)), np.eye(9, dtype=np.float32)                     # nothing small: no subnormals
    for power_of_two in (False, True):
        gemm = partial(fp8_gemm, tile=4, power_of_two=power_of_two)
        along_channels, along_tokens = fake_quantise(x, (1, 4), power_of_two=power_of_two), gemm(x.T, eye, role="dW").T
        assert (along_channels == along_tokens).all() == power_of_two


def test_gradients_get_a_scale_for_each_token_never_for_a_block_of_them():
    """128 x 128 blocks of dy made a model of DeepSeek's diverge. One loud token must not silence its neighbours."""
    dy, W = normal(8, 12), normal(12, 6, seed=1)
    dy[3] *= 1e7
    others = np.delete(np.arange(8), 3)
    for gemm in GEMMS.values():
        assert relative_error(exact(dy, W)[others], gemm(dy, W, role="dx", tile=4)[others]) < 0.06
    assert relative_error(dy[others], fake_quantise(dy, (4, 4))[others]) > 0.2       # what a block would leave of them


class Spy:
    """fp8_gemm with tiles of 16, and the roles it was called in."""

    def __init__(self):
        self.roles = []

    def __call__(self, A, B, *, role):
        self.roles.append(role)
        return fp8_gemm(A, B, role=role, tile=16)


COMPOSITES = {"linear": (linear_forward, linear_backward, linear_examples), "swiglu": (swiglu_forward, swiglu_backward, swiglu_examples),
              "mla": (mla_forward, mla_backward, mla_examples)}


@pytest.mark.parametrize("name, products", [("linear", 1), ("swiglu", 3), ("mla", 8)])
def test_through_the_gemm_door_of_a_component(name, products):
    forward, backward, examples = COMPOSITES[name]
    args, config = next(iter(examples(np.random.default_rng(0)).values()))
    spy = Spy()
    results = []
    for gemm in (matmul, spy):
        y, cache = forward(*args, **config | {"gemm": gemm})
        dy = np.random.default_rng(1).standard_normal(y.shape)
        results.append((y, *backward(dy, cache)))
    assert spy.roles[:products] == ["forward"] * products and sorted(spy.roles[products:]) == sorted(["dx", "dW"] * products)
    for right, near in zip(*results):
        assert near.dtype == np.float64 and near.shape == right.shape and 0.005 < relative_error(right, near) < 0.2
    y, _ = forward(*[a.astype(np.float32) for a in args], **{k: np.float32(v) if isinstance(v, np.ndarray) else v for k, v in config.items()},
                   gemm=partial(fp8_gemm, tile=16))
    assert y.dtype == np.float32 and relative_error(results[1][0], y) < 1e-2         # a tie may fall otherwise after the first layer


@pytest.mark.parametrize("name", COMPOSITES)
def test_without_formats_it_is_the_plain_product_and_passes_the_gradient_check(name):
    forward, backward, examples = COMPOSITES[name]
    args, config = next(iter(examples(np.random.default_rng(0)).values()))
    gradcheck(forward, backward, args, config | {"gemm": partial(fp8_gemm, fmt=None, gradient_fmt=None)})


def test_the_finite_difference_check_must_fail_where_numbers_are_rounded():
    """Straight-through gradients are no derivatives: rounded dy makes them nonlinear in dy, the steps of the forward slopes of 0."""
    args, _ = linear_examples(np.random.default_rng(0))["tokens"]
    for options, stage in (({}, 4), ({"gradient_fmt": None}, 5)):
        with pytest.raises(GradcheckError) as caught:
            gradcheck(linear_forward, linear_backward, args, {"gemm": partial(fp8_gemm, tile=2, **options)})
        assert caught.value.stage == stage


def test_with_the_rounding_errors_held_fixed_it_passes():
    """What straight-through means: x_hat = x + (an error that does not move). dy is left alone, and powers of two make x_hat one matrix."""
    args, _ = linear_examples(np.random.default_rng(0))["tokens"]
    x, W = [np.sign(a) * (1 + np.abs(a)) for a in args]                              # nothing small: no subnormals
    fixed = [fake_quantise(a, block, power_of_two=True) - a for a, block in ((x, (1, 2)), (W, (2, 2)))]

    def smooth_forward(x, W, *, gemm):
        return linear_forward(x + fixed[0], W + fixed[1])

    gemm = partial(fp8_gemm, tile=2, power_of_two=True, gradient_fmt=None)
    gradcheck(linear_forward, linear_backward, (x, W), {"gemm": gemm}, smooth_forward=smooth_forward)
    with pytest.raises(GradcheckError):                                              # and not with the identity alone: W_hat is not W
        gradcheck(linear_forward, linear_backward, (x, W), {"gemm": gemm}, smooth_forward=linear_forward)


def test_bf16_is_the_cast_of_ml_dtypes():
    A, B = normal(5, 70) * 1e3, normal(70, 6, seed=1)
    A_hat, B_hat = [x.astype(ml_dtypes.bfloat16).astype(np.float32) for x in (A, B)]
    for role in ROLES:
        assert (bf16_gemm(A, B, role=role) == A_hat @ B_hat).all()


def test_gradients_far_below_one_lose_digits_to_the_floor_of_the_scales():
    """A tile counts as 1e-4 at least: a dy of 1e-4 is as good as one of 1, one of 1e-9 is half lost."""
    dy, W = normal(16, 64), normal(64, 16, seed=1)
    errors = [relative_error(exact(dy, W) * size, fp8_gemm(dy * np.float32(size), W, role="dx")) for size in (1, 1e-4, 1e-9)]
    assert max(errors[:2]) < 0.045 and 0.1 < errors[2] < 1


def test_the_inputs_stay_as_they_are():
    A, B = normal(6, 9), normal(9, 5)
    before = A.copy(), B.copy()
    A.flags.writeable = B.flags.writeable = False
    for gemm in (*GEMMS.values(), bf16_gemm, partial(fp8_gemm, fmt=None)):
        for role in ROLES:
            assert gemm(A, B, role=role).shape == (6, 5)
    assert (A == before[0]).all() and (B == before[1]).all()


@pytest.mark.parametrize("gemm", GEMMS.values(), ids=GEMMS)
@pytest.mark.parametrize("change, message", [
    ({"role": "Forward"}, "role = 'Forward', expected 'forward', 'dx' or 'dW'"),
    ({"tile": 0}, "tiles of at least"),
    ({"B": np.zeros((2, 0))}, r"x \(2, 0\) must be a matrix"),
])
def test_what_cannot_be_is_named(gemm, change, message):
    with pytest.raises(ValueError, match=message):
        gemm(**{"A": np.ones((3, 2)), "B": np.ones((2, 4)), "role": "forward"} | change)


@pytest.mark.parametrize("wrong", (np.nan, np.inf))
def test_what_has_no_scale_goes_through_as_in_float32(wrong):
    """So that a loss is nan and a training step can say where it began; the faithful path, for measuring, refuses it."""
    A, B = np.ones((3, 2)), np.ones((2, 4))
    A[1, 0] = wrong
    y = fp8_gemm(A, B, role="forward")
    assert not np.isfinite(y[1]).any() and np.isfinite(y[[0, 2]]).all()
    with pytest.raises(NotFinite, match="nan, inf, or"):
        fp8_gemm_faithful(A, B, role="forward")
