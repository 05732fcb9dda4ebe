"""break_on stops inside the function, whoever calls it, and leaves nothing behind."""
import functools
import os
import subprocess
import sys

import numpy as np
import pytest

from minideepseek.attention.causal import causal_attention, causal_attention_forward
from minideepseek.autograd.stop import UnknownName, break_on, no_stops, op_modules, stop_if_wanted, stop_inside, unknown
from minideepseek.autograd.tape import Tape, Tensor
from minideepseek.basics.softmax import softmax_backward, softmax_forward
from tests.house import COMPONENTS, ROOT


@pytest.fixture
def stops(monkeypatch):
    """Instead of a debugger: a list of (function, line within it) where breakpoint() was called."""
    seen = []
    monkeypatch.setattr(sys, "breakpointhook", lambda: seen.append((sys._getframe(1).f_code.co_name, sys._getframe(1).f_locals.copy())))
    return seen


def attend():
    q = Tensor(np.random.default_rng(0).standard_normal((1, 2, 3, 4)), "q")
    with Tape() as tape:
        o = causal_attention(q, q, q, scale=0.5)
    tape.backward({o: np.ones(o.data.shape)})
    return o.data, q.grad


def test_it_stops_in_a_part_of_a_composite_before_the_first_line(stops):
    with break_on("softmax.backward", "causal_attention.forward"):
        attend()
    assert [name for name, _ in stops] == ["causal_attention_forward", "softmax_backward"]
    assert stops[1][1].keys() == {"dp", "cache"}, "its arguments are there, its first line has not run"


def test_the_numbers_stay_and_the_code_comes_back(stops):
    code, (before, slope) = softmax_forward.__code__, attend()
    with break_on("softmax.forward", "softmax.forward") as undo:
        after, slope_after = attend()
        assert softmax_forward.__code__ is not code and softmax_forward.__doc__.startswith("Exponentiate")
    assert len(stops) == 1 and before.tobytes() == after.tobytes() and slope.tobytes() == slope_after.tobytes()
    assert softmax_forward.__code__ is code
    undo = break_on("softmax.forward")                 # without `with`: until it is closed
    attend()
    undo.close()
    attend()
    assert len(stops) == 2 and softmax_forward.__code__ is code


def test_an_error_takes_the_stop_back_too(stops):
    code = softmax_forward.__code__
    with pytest.raises(ZeroDivisionError), break_on("softmax.forward"):
        raise ZeroDivisionError
    assert softmax_forward.__code__ is code


def namesake():
    def scaled(x):
        return x

    return scaled


def test_functions_of_your_own_with_defaults_and_closures(stops):
    factor = 3.0

    def scaled(x, *, by=2.0):
        y = x * by
        return y * factor

    with break_on(scaled):
        assert namesake()(1.0) == 1.0 and stops == [], "another function of the same name"
        assert scaled(1.0) == 6.0 and scaled(1.0, by=1.0) == 3.0
    assert [name for name, _ in stops] == ["scaled", "scaled"] and scaled(1.0) == 6.0


def test_inside_no_stops_nothing_stops(stops):
    with break_on("softmax.forward"):
        with no_stops():
            attend()
        assert stops == []
        attend()
        assert len(stops) == 1


@pytest.mark.parametrize("name, near", [
    ("sofmax.backward", "did you mean softmax.backward"),
    ("mla_backward", "did you mean mla.backward"),
    ("mla", "did you mean mla.forward or mla.backward"),
    ("mla.middle", "did you mean mla.forward or mla.backward"),
    ("", "there are "),
])
def test_an_unknown_name_is_refused_with_names_like_it(name, near):
    with pytest.raises(UnknownName) as caught:
        break_on("softmax.forward", name)
    assert near in str(caught.value) and repr(name) in str(caught.value)
    assert softmax_forward.__code__.co_firstlineno and "breakpoint" not in softmax_forward.__code__.co_names, "all or nothing"


def test_what_has_no_source_is_refused():
    namespace = {}
    exec("def typed(x):\n    return x", namespace)
    for function in (namespace["typed"], lambda x: x):
        with pytest.raises(ValueError, match="no `def` whose source can be read"):
            stop_inside(function)


class Counter:
    def count(self, x):
        return x + 1


@functools.lru_cache
def remembered(x):
    return x + 1


@pytest.mark.parametrize("function", [Counter().count, len, remembered], ids=["bound method", "builtin", "lru_cache"])
def test_what_is_no_function_is_refused(function):
    with pytest.raises(ValueError, match="is not a function made with `def`: of a method pass its __func__, of a cached one its __wrapped__"):
        break_on(function)


def test_as_the_message_says(stops):
    with break_on(Counter.count, remembered.__wrapped__):
        assert Counter().count(1) == remembered(1) == 2
    assert [name for name, _ in stops] == ["count", "remembered"]


def test_an_error_on_the_way_takes_back_what_was_set_before_it():
    code = softmax_forward.__code__
    for second in (lambda x: x, len):
        with pytest.raises(ValueError):
            break_on("softmax.forward", second)
        assert softmax_forward.__code__ is code


def test_two_are_closed_the_last_first(stops):
    code = softmax_forward.__code__
    outer, inner = break_on("softmax.forward"), break_on("softmax.forward")
    inner.close()
    assert softmax_forward.__code__ is not code
    outer.close()
    assert softmax_forward.__code__ is code


def test_every_component_can_be_named():
    assert {c.name: c.module.__name__ for c in COMPONENTS}.items() <= op_modules().items()
    assert str(unknown("me", "ab", ["abc", "xyz"])) == "me: no 'ab' here; did you mean abc?" and str(unknown("me", "q", ["x", "y"])).endswith("there are x, y")


def test_an_op_is_planted_when_it_is_made_only_if_it_is_wanted(monkeypatch, stops):
    def twice_forward(x):
        return 2 * x

    def twice_backward(dy, cache):
        return 2 * dy

    monkeypatch.setattr("minideepseek.autograd.stop.WANTED", {"twice.backward"})
    stop_if_wanted("twice", twice_forward, twice_backward)
    assert twice_forward(1.0) == 2.0 and stops == []
    assert twice_backward(1.0, None) == 2.0 and len(stops) == 1


def in_pdb(commands, variable, script="examples/step_through_backward.py"):
    return subprocess.run([sys.executable, script], input=commands, cwd=ROOT, env=os.environ | {"MINIDEEPSEEK_BREAK": variable},
                          capture_output=True, text=True, timeout=60)


def test_the_environment_variable_stops_a_script_that_knows_nothing_of_it():
    run = in_pdb("p dy.shape\nw\nn\nn\np dg.shape\nc\n", "rmsnorm.backward, softmax.forward")
    landed, *rest = run.stdout.split("(Pdb) ")
    assert "rmsnorm_backward()\n-> g, r, x_hat = cache" in landed, "on its first line"
    assert rest[0].startswith("(4, 6)")
    assert "main()\n-> tape.backward(loss" in rest[1] and rest[1].rstrip().endswith("-> g, r, x_hat = cache")
    assert rest[2].count("\n-> dg = ") == 1 and "\n-> dx_hat" in rest[3] and rest[4].startswith("(6,)")
    assert run.returncode == 0 and "|dW_gate|" in rest[5], "and the script runs to its end"


def test_the_environment_variable_with_an_unknown_name():
    run = in_pdb("", "softmax.backward,rmsnrm.backward")
    assert run.returncode == 1 and "MINIDEEPSEEK_BREAK: no 'rmsnrm.backward' here; did you mean rmsnorm.backward" in run.stderr


def test_without_it_nothing_is_planted():
    assert "breakpoint" not in softmax_backward.__code__.co_names + causal_attention_forward.__code__.co_names
    assert in_pdb("", "").returncode == 0
