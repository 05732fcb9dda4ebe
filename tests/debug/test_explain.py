"""explain names the op whose backward is wrong, clears the others, and admits what cannot be judged."""
import re
import warnings

import numpy as np
import pytest

from minideepseek.attention.mla import MLAWeights, mla, mla_backward, mla_examples, mla_forward
from minideepseek.autograd.tape import Tape, Tensor, op
from minideepseek.basics.embedding import embedding_forward
from minideepseek.basics.linear import linear, linear_backward, linear_forward
from minideepseek.basics.residual import add
from minideepseek.basics.rmsnorm import rmsnorm
from minideepseek.debug.explain import explain
from minideepseek.moe.balance_loss import sequence_balance
from minideepseek.moe.router import router

rng = np.random.default_rng(0)


def replay(make, dtype=np.float64):
    """Run make() on a tape, replay it with a random dy, kept -> the tape."""
    with Tape() as tape:
        y = make()
    y = y[0] if isinstance(y, tuple) else y
    tape.backward({y: rng.standard_normal(y.data.shape).astype(dtype)}, keep=True)
    return tape


def leaf(name, *shape, dtype=np.float64):
    return Tensor(rng.standard_normal(shape).astype(dtype), name)


def transposed_backward(dy, cache):
    dx, dW = linear_backward(dy, cache)
    return dx, dW.T.copy()


def test_a_wrong_reader_is_named_with_place_numbers_cause_page_and_equation(capsys):
    def negative_backward(dy, cache):
        dx, dW = linear_backward(dy, cache)
        return dx, -dW

    negative_backward.__module__ = linear_backward.__module__          # as if the mistake stood in the package
    x, W = leaf("x", 5, 4), leaf("W_up", 4, 3)
    tape = replay(lambda: op(linear_forward, negative_backward)(x, W))
    (error,) = explain(tape, W)
    printed = capsys.readouterr().out
    assert (error.argument, error.cause, len(error.index)) == ("W", "wrong sign", 2)
    assert printed.startswith("(4, 3) float64 W_up, with grad: a leaf, read by 1 record\nrecord 0, linear, called at ")
    assert "test_explain.py:" in printed and f"sends dW, of norm {np.linalg.norm(W.grad):.3g}" in printed
    assert "checked in place: right: dx\n" in printed and str(error) in printed
    index, analytic, numeric = re.search(r"dW\[(\d, \d)\] = (\S+), expected (\S+), 12 of 12 differ", str(error)).groups()
    assert index == "{}, {}".format(*error.index) and abs(float(analytic) + float(numeric)) < 1e-6 and "see whiteboard/basics/linear.md" in str(error)


def test_right_records_are_cleared_and_all_readers_are_asked(capsys):
    x, g = leaf("x", 3, 4), leaf("g", 4)
    tape = replay(lambda: add(rmsnorm(x, g), x))
    assert explain(tape, x) == []
    printed = capsys.readouterr().out
    assert "read by 2 records" in printed and "record 0, rmsnorm" in printed and "record 1, add" in printed
    assert "right: dx dg" in printed and "right: dx dr" in printed and "is not the sum" not in printed


def test_an_intermediate_asks_its_maker_too(capsys):
    x, W = leaf("x", 5, 4), leaf("W", 4, 4)
    wrong = op(linear_forward, transposed_backward)
    made = []

    def make():
        made.append(wrong(x, W))
        return add(made[0], x)

    tape = replay(make)
    (error,) = explain(tape, made[0])
    printed = capsys.readouterr().out
    assert "an intermediate, read by 1 record" in printed and "record 0, linear, called at" in printed and ", made it\n" in printed
    assert error.argument == "W" and error.cause == "it is transposed"
    assert "record 1, add" in printed and "right: dx dr" in printed


def test_of_many_arguments_the_wrong_ones_are_told_from_the_right(capsys):
    def wrong_backward(dy, cache):
        dx, *rest = mla_backward(dy, cache)
        grads = dict(zip(MLAWeights._fields, rest))
        return dx, *(grads | {"g_kv": 1.1 * grads["g_kv"], "W_DKV": 1.1 * grads["W_DKV"]}).values()

    args, config = mla_examples(rng)["query latent"]
    leaves = [Tensor(a, name) for a, name in zip(args, ("x", *MLAWeights._fields))]
    tape = replay(lambda: op(mla_forward, wrong_backward)(*leaves, **config))
    errors = explain(tape, leaves[1])
    assert [error.argument for error in errors] == ["W_DKV", "g_kv"] and all("1.1 times too large" in error.cause for error in errors)
    assert "right: dx dW_DQ dg_q dW_UQ dW_QR dW_KR dW_UK dW_UV dW_O\n" in capsys.readouterr().out


def test_the_argument_that_was_asked_for_comes_first():
    wrong = op(linear_forward, lambda dy, cache: tuple(-d for d in linear_backward(dy, cache)))
    x, W = leaf("x", 5, 4), leaf("W", 4, 3)
    tape = replay(lambda: wrong(x, W))
    assert [e.argument for e in explain(tape, W)] == ["W", "x"] and [e.argument for e in explain(tape, x)] == ["x", "W"]


def test_a_backward_that_fails_before_the_slopes_is_judged_as_a_whole(capsys):
    wrong = op(linear_forward, lambda dy, cache: (np.abs(linear_backward(dy, cache)[0]), linear_backward(dy, cache)[1]))
    x, W = leaf("x", 5, 4), leaf("W", 4, 3)
    (error,) = explain(replay(lambda: wrong(x, W)), W)
    printed = capsys.readouterr().out
    assert error.stage == 4 and "not linear in dy" in printed and "right:" not in printed


def test_a_repeated_id(capsys):
    def overwriting_backward(dy, cache):
        dE = np.zeros(cache[1])
        dE[cache[0]] += dy
        return None, dE

    E = leaf("E", 5, 3)
    explain(replay(lambda: op(embedding_forward, overwriting_backward)(np.array([1, 4, 1]), E)), E)
    assert "a scatter that overwrites where it should add" in capsys.readouterr().out


def test_one_tensor_as_two_arguments_sends_two_gradients(capsys):
    x = leaf("x", 3)
    assert explain(replay(lambda: add(x, x)), x) == []
    printed = capsys.readouterr().out
    assert "sends dx" in printed and "sends dr" in printed and "is not the sum" not in printed


def test_a_gradient_that_was_changed_in_place_or_was_there_before(capsys):
    x, g = leaf("x", 3, 4), leaf("g", 4)
    tape = replay(lambda: rmsnorm(x, g))
    explain(tape, g)
    assert "is not the sum" not in capsys.readouterr().out
    g.grad *= 2
    explain(tape, g)
    assert "what it holds is not the sum of these" in capsys.readouterr().out


def test_a_tensor_that_leads_nowhere(capsys):
    x, W, unused = leaf("x", 5, 4), leaf("W", 4, 3), leaf("unused", 4, 3)
    made = []

    def make():
        made.append(linear(x, unused))
        return linear(x, W)

    tape = replay(make)
    explain(tape, unused)
    printed = capsys.readouterr().out
    assert "it has no gradient: no record that reads it leads to the loss" in printed and "sends nothing" in printed
    explain(tape, made[0])
    assert "read by 0 records" in capsys.readouterr().out


def test_float32_is_checked_in_float64_and_a_gemm_that_rounds_is_left_out():
    def rounding(A, B, *, role):
        return np.round(A @ B, 1)

    x, W = leaf("x", 5, 4, dtype=np.float32), leaf("W", 4, 3, dtype=np.float32)
    tape = replay(lambda: linear(x, W, gemm=rounding), np.float32)
    assert explain(tape, W) == []
    args, config = mla_examples(rng)["in tiles"]
    args = [Tensor(a.astype(np.float32), "a") for a in args]
    config = {k: v.astype(np.float32) if isinstance(v, np.ndarray) else v for k, v in config.items()}
    assert explain(replay(lambda: mla(*args, **config), np.float32), args[1]) == []


def test_large_arguments_are_checked_along_random_directions(capsys):
    wrong = op(linear_forward, lambda dy, cache: (linear_backward(dy, cache)[0], 3 * linear_backward(dy, cache)[1]))
    x, W = leaf("x", 3, 50), leaf("W", 50, 45)
    (error,) = explain(replay(lambda: wrong(x, W)), W)
    assert error.index is None and "looks 3 times too large" in error.cause and "no verdict" not in capsys.readouterr().out


def taped(function, x, W, **config):
    x, W = Tensor(x, "x"), Tensor(W, "W")
    return replay(lambda: function(x, W, **config)), W


def test_a_choice_that_flips_is_said_to_have_no_gradient(capsys):
    (error,) = explain(*taped(router, np.array([[1.0, 1.0 + 1e-5]]), np.eye(2), top_k=1, normalise=False))
    assert "an integer output (a choice) changes within the finite-difference step" in str(error)
    assert "checked in place: an integer output" in capsys.readouterr().out


def test_a_jump_without_an_integer_output_is_recognised(capsys):
    """The balance loss counts choices: near a tie a count jumps, and no output says so."""
    assert explain(*taped(sequence_balance, np.array([[[1.0, 1.0 + 1e-5], [0.3, -0.5]]]), np.eye(2), top_k=1))
    assert "the forward has a corner or a jump within the step there (a choice that flips?): no verdict" in capsys.readouterr().out


def test_a_corner_is_recognised_and_a_bend_is_not_taken_for_one(capsys):
    def relu_forward(x):
        """max(x, 0).

        x: (...)   ->   y: (...)
        """
        return np.maximum(x, 0), x

    def square_forward(x):
        """x squared.

        x: (...)   ->   y: (...)
        """
        return x * x, x

    for near in (1e-5, 1.5e-3):                          # within one step of the corner, and within two
        x = Tensor(np.array([near, 2.0]), "x")
        assert explain(replay(lambda: op(relu_forward, lambda dy, x: dy * (x > 0))(x)), x)
        assert "no verdict" in capsys.readouterr().out
    x = Tensor(np.array([1e-9, 2.0]), "x")
    assert explain(replay(lambda: op(square_forward, lambda dy, x: 3 * x * dy + dy)(x)), x)
    assert "no verdict" not in capsys.readouterr().out, "smooth, and wrong"


def test_a_router_whose_gate_is_the_constant_one(capsys):
    explain(*taped(router, rng.standard_normal((3, 4)), rng.standard_normal((4, 5)), top_k=1))
    assert "the numeric gradient of W_router is zero everywhere" in capsys.readouterr().out


def test_a_tape_that_was_not_replayed():
    x = leaf("x", 3)
    with Tape() as tape:
        add(x, x)
    with pytest.raises(ValueError, match="replay the tape first, with keep=True"):
        explain(tape, x)


@pytest.mark.parametrize("kind", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["seed", "forward"])
def test_a_gradient_that_is_nan_gets_no_false_reason(kind, where, capsys):
    data, dy = rng.standard_normal((2, 3, 4))
    (dy if where == "seed" else data)[0, 0] = kind
    x, W = Tensor(data, "x"), leaf("W", 4, 4)
    with Tape() as tape, np.errstate(all="ignore"):
        y = add(linear(x, W), x)
        tape.backward({y: dy}, keep=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        errors = explain(tape, W)
    printed = capsys.readouterr().out
    assert f"  it holds {kind}: see nan_hunt, which stops where the first one is made\n" in printed and "is not the sum" not in printed
    assert ("right: dx dW" in printed) == (not errors) == (where == "seed")
    W.grad = np.where(np.isfinite(W.grad), 0, W.grad) if where == "seed" else np.zeros((4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explain(tape, W)
    assert "is not the sum" in capsys.readouterr().out, "what is finite is still added up"


def test_a_stranger_and_a_tape_that_kept_nothing():
    x = leaf("x", 3)
    with Tape() as tape:
        y = add(x, x)
    with pytest.raises(ValueError, match="no record of this tape made or reads .*stranger$"):
        explain(tape, leaf("stranger", 2))
    tape.backward({y: np.ones(3)})
    with pytest.raises(ValueError, match="replay with keep=True"):
        explain(tape, x)
