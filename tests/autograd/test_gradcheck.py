"""Right backwards pass, and each kind of wrong one stops at its own stage with its own words."""
from typing import NamedTuple

import numpy as np
import pytest

from minideepseek.autograd.finite_differences import finite_differences
from minideepseek.autograd.gradcheck import GradcheckError, gradcheck, report
from minideepseek.basics.linear import linear_backward, linear_forward
from minideepseek.basics.rmsnorm import rmsnorm_backward, rmsnorm_examples, rmsnorm_forward
from minideepseek.basics.softmax import softmax_backward, softmax_forward

rng = np.random.default_rng(0)
x, g, W = rng.standard_normal((3, 4)), rng.standard_normal(4), rng.standard_normal((4, 5))


def gain_forward(x, g):
    return x * g, (x, g)


def gain_backward(dy, cache):
    x, g = cache
    return dy * g, (dy * x).sum(axis=0)


def refused(forward, backward, args=(x, g), **options):
    with pytest.raises(GradcheckError) as caught, np.errstate(all="ignore"):
        gradcheck(forward, backward, args, **options)
    return caught.value


def broken(change):
    """gain_backward with its result or its input changed."""
    return lambda dy, cache: change(dy, cache, *gain_backward(dy, cache))


def test_a_right_backward_is_far_below_the_tolerance():
    assert max(gradcheck(gain_forward, gain_backward, (x, g)).values()) < 1e-11
    assert set(gradcheck(softmax_forward, softmax_backward, (x,))) == {"z"}


def test_stage_1_in_place_writes_raise_and_name_the_line():
    def into_dy(dy, cache):
        dy *= 2
        return gain_backward(dy, cache)

    def into_cache(dy, cache):
        cache[0][...] = 0
        return gain_backward(dy, cache)

    def into_input(x, g):
        x += 1
        return gain_forward(x, g)

    for forward, backward in ((gain_forward, into_dy), (gain_forward, into_cache), (into_input, gain_backward)):
        error = refused(forward, backward)
        assert error.stage == 1 and "in-place write" in str(error) and "test_gradcheck.py:" in str(error)


def test_stage_2_forwards():
    assert "nan or inf" in str(refused(lambda x, g: (x / 0, (x, g)), gain_backward))
    draws = np.random.default_rng(0)
    error = refused(lambda x, g: (x * draws.random(), (x, g)), gain_backward)
    assert error.stage == 2 and "randomness" in str(error)
    assert "(output, cache)" in str(refused(lambda x, g: x * g, gain_backward))


@pytest.mark.parametrize("change, words", [
    (lambda dy, cache, dx, dg: (dx,), "returned 1 gradients for 2 arguments"),
    (lambda dy, cache, dx, dg: (dx, None), "dg is None"),
    (lambda dy, cache, dx, dg: (dx.T, dg), "transposed"),
    (lambda dy, cache, dx, dg: (dx, dy * cache[0]), "sum over the leading axis is missing"),
    (lambda dy, cache, dx, dg: (dx, dg.astype(np.float32)), "dtype float32"),
    (lambda dy, cache, dx, dg: (dx * np.nan, dg), "nan or inf, first at (0, 0)"),
    (lambda dy, cache, dx, dg: (dy, dg), "dx shares memory with dy"),
    (lambda dy, cache, dx, dg: (dx, cache[1]), "dg shares memory with the argument g"),
    (lambda dy, cache, dx, dg: (dx, dx[0]), "dg shares memory with dx"),
    (lambda dy, cache, dx, dg: (np.broadcast_to(dx, dx.shape), dg), "dx is read-only"),
])
def test_stage_3_form(change, words):
    error = refused(gain_forward, broken(change))
    assert error.stage == 3 and words in str(error)


def test_stage_3_none_exactly_for_integers_and_absent_arguments():
    def forward(x, ids, b):
        return x[ids], (x.shape, ids)

    def backward(dy, cache, dids=None, db=None):
        dx = np.zeros(cache[0])
        np.add.at(dx, cache[1], dy)
        return dx, dids, db

    args = (x, np.array([0, 2, 2]), None)
    assert set(gradcheck(forward, backward_float32_safe(backward), args)) == {"x"}
    assert "made of integers" in str(refused(forward, lambda dy, c: backward(dy, c, dids=np.zeros(3)), args))
    assert "absent" in str(refused(forward, lambda dy, c: backward(dy, c, db=np.zeros(3)), args))


def backward_float32_safe(backward):
    def typed(dy, cache):
        return tuple(None if d is None else d.astype(dy.dtype) for d in backward(dy, cache))
    return typed


@pytest.mark.parametrize("change, words", [
    (lambda dy, cache, dx, dg: (np.abs(dy) * cache[1], dg), "not linear"),
    (lambda dy, cache, dx, dg: (dy * dy * cache[1], dg), "not linear"),
    (lambda dy, cache, dx, dg: (dx + 1e-3, dg), "not zero for dy = 0"),
    (lambda dy, cache, dx, dg: (np.ones_like(dy) * cache[1], dg), "not zero for dy = 0"),
])
def test_stage_4_linear_in_dy(change, words):
    error = refused(gain_forward, broken(change))
    assert error.stage == 4 and error.argument == "x" and words in str(error)


def test_stage_4_sees_abs_dy_whatever_the_signs_of_its_random_dy():
    """A single scalar output: |dy| and dy agree as long as every dy that is tried happens to be positive."""
    total = lambda x: (np.sum(x * x), x)
    for seed in range(16):
        assert refused(total, lambda dy, x: 2 * x * np.abs(dy), (x,), seed=seed).stage == 4


def test_arrays_in_nested_configuration_are_copied_and_cast():
    class Mask(NamedTuple):
        kept: np.ndarray

    mask = Mask(rng.standard_normal(4))
    forward = lambda x, *, mask, more: (x * mask.kept * more[0], mask.kept * more[0])
    gradcheck(forward, lambda dy, scale: dy * scale, (x,), {"mask": mask, "more": [np.ones(4)]})
    assert mask.kept.flags.writeable


def test_an_empty_argument_is_named():
    with pytest.raises(TypeError, match=r"x has shape \(0, 4\)"):
        gradcheck(gain_forward, gain_backward, (np.zeros((0, 4)), g))


def test_stage_4_repeatable():
    draws = np.random.default_rng(0)
    error = refused(gain_forward, broken(lambda dy, cache, dx, dg: (dx * (1 + 1e-12 * draws.random()), dg)))
    assert error.stage == 4 and "two runs" in str(error)


@pytest.mark.parametrize("change, argument, words", [
    (lambda dy, cache, dx, dg: (-dx, dg), "x", "wrong sign"),
    (lambda dy, cache, dx, dg: (dx, dg / 3), "g", "x has 3 entries along axis 0"),
    (lambda dy, cache, dx, dg: (dx, 2.27 * dg), "g", "looks 2.27 times too large"),
    (lambda dy, cache, dx, dg: (np.zeros_like(dx), dg), "x", "it is zero"),
    (lambda dy, cache, dx, dg: (dx * (1 + 1e-5), dg), "x", "12 of 12 differ"),
])
def test_stage_5_values(change, argument, words):
    error = refused(gain_forward, broken(change))
    assert (error.stage, error.argument) == (5, argument) and words in str(error)
    assert f"d{argument}[{', '.join(map(str, error.index))}] = " in str(error) and "expected" in str(error)


def test_stage_5_one_wrong_entry_is_found_and_indexed():
    def one_entry(dy, cache, dx, dg):
        dx[2, 1] *= 1.001
        return dx, dg

    error = refused(gain_forward, broken(one_entry))
    assert error.index == (2, 1) and "1 of 12 differ" in str(error) and error.cause == "no known cause fits"


def test_stage_5_refuses_an_argument_whose_gradient_is_zero_everywhere():
    error = refused(lambda x, g: (x + 0 * g, (x, g)), lambda dy, cache: (dy.copy(), np.zeros(4)))
    assert error.stage == 5 and error.argument == "g" and "zero everywhere" in str(error)


def test_stage_5_softmax_needs_a_random_dy():
    """With a dy of ones the gradient of softmax is zero, and a backward of zeros would look right."""
    ones = np.ones((3, 4))
    p, cache = softmax_forward(x)
    assert np.abs(softmax_backward(ones, cache)).max() < 1e-15
    gradcheck(softmax_forward, softmax_backward, (x,))
    assert refused(softmax_forward, lambda dy, cache: np.zeros_like(dy), (x,)).stage == 5


def test_stage_6_float32_stays_float32():
    def promotes(x, g):
        return x * np.sqrt(4) * g, (x, g)

    def backward(dy, cache):
        return tuple((2 * d).astype(c.dtype) for d, c in zip(gain_backward(dy, cache), cache))

    error = refused(promotes, backward)
    assert error.stage == 6 and "float64 out of the forward" in str(error)
    error = refused(gain_forward, broken(lambda dy, cache, dx, dg: (dx, dg.astype(np.float64))))
    assert error.stage == 6 and "dg is float64" in str(error)


def test_above_2000_entries_random_directions_find_the_error_too():
    big = rng.standard_normal((50, 41)), rng.standard_normal(41)
    assert max(gradcheck(gain_forward, gain_backward, big).values()) < 1e-9
    error = refused(gain_forward, broken(lambda dy, cache, dx, dg: (-dx, dg)), big)
    assert "random direction" in str(error) and "wrong sign" in str(error)


def test_float32_input_is_told_to_use_float64():
    with pytest.raises(TypeError, match="g has dtype float32: use float64"):
        gradcheck(gain_forward, gain_backward, (x, g.astype(np.float32)))
    with pytest.raises(TypeError, match="g is of type float"):
        gradcheck(gain_forward, gain_backward, (x, 1.0))


def test_rounding_is_checked_through_its_smooth_twin():
    """A straight-through estimator: the true derivative of rounding is zero, the declared one is 1."""
    def round_forward(x):
        return np.round(x), None

    def straight_through_backward(dy, cache):
        return dy.copy()

    assert "zero everywhere" in str(refused(round_forward, straight_through_backward, (x,)))
    gradcheck(round_forward, straight_through_backward, (x,), smooth_forward=lambda x: (x.copy(), None))


def test_several_outputs_and_an_integer_one():
    def forward(x):
        return (x * 2, x.sum(axis=0), np.argmax(x, axis=0)), None

    def backward(dys, cache):
        dy, dsum = dys
        return 2 * dy + dsum

    gradcheck(forward, backward, (x,))
    assert refused(forward, lambda dys, cache: 2 * dys[0] + 2 * dys[1], (x,)).stage == 5


def test_slopes_can_be_reused():
    slopes = finite_differences(gain_forward, (x, g))
    assert gradcheck(gain_forward, gain_backward, (x, g), slopes=slopes) == gradcheck(gain_forward, gain_backward, (x, g))


def test_the_inputs_of_the_caller_are_left_alone():
    before = x.copy()
    gradcheck(gain_forward, gain_backward, (x, g))
    assert (x == before).all() and x.flags.writeable


def test_the_message_names_page_and_equation():
    args, config = rmsnorm_examples(rng)["tokens"]

    def rmsnorm_wrong(dy, cache):
        dx, dg = rmsnorm_backward(dy, cache)
        return dx, dg / 3

    rmsnorm_wrong.__module__ = rmsnorm_backward.__module__
    assert "see whiteboard/basics/rmsnorm.md" in str(refused(rmsnorm_forward, rmsnorm_wrong, args))
    wrong_forward = lambda x, g: (2 * rmsnorm_forward(x, g)[0], rmsnorm_forward(x, g)[1])
    assert "see whiteboard/basics/rmsnorm.md eq. 6" in str(refused(wrong_forward, rmsnorm_backward, args))


def test_a_wrong_forward_with_its_own_gradient_passes():
    """What a gradient check cannot see: forwards need value tests."""
    gradcheck(lambda x, W: linear_forward(x, W), linear_backward, (x, W))
    gradcheck(lambda x, g: gain_forward(x, g), gain_backward, (x, g))
    cube = lambda x: (x ** 3, x)                                    # was meant to be a square
    gradcheck(cube, lambda dy, x: 3 * x * x * dy, (x,))


def test_report_prints_the_worst_error_of_every_argument(capsys):
    errors = report(rmsnorm_forward, rmsnorm_backward, rmsnorm_examples)
    assert set(errors) == {"x", "g"} and capsys.readouterr().out.startswith("gradients rmsnorm: dx ")
