"""The first nan is found where it is made: op, array, index, line, caller; and what came in with it is blamed for it."""
import sys
import threading

import numpy as np
import pytest

from minideepseek.attention.causal import causal_attention
from minideepseek.attention.mla import mla, mla_examples
from minideepseek.autograd import tape as engine
from minideepseek.autograd.stop import break_on
from minideepseek.autograd.tape import Tape, Tensor, op
from minideepseek.basics.linear import linear, linear_backward, linear_forward
from minideepseek.basics.residual import add
from minideepseek.debug.nan_hunt import nan_hunt


def root_forward(x):
    """The square root.

    x: (...)   ->   y: (...)
    """
    y = np.sqrt(x)                                  # eq. 1
    return y, y


def root_backward(dy, cache):
    slope = 0.5 / cache                             # eq. 2
    dx = dy * slope                                 # eq. 3
    return dx


root = op(root_forward, root_backward)


@pytest.fixture(autouse=True)
def quiet_and_over_afterwards():
    with np.errstate(all="ignore"):
        yield
    assert engine.watch is None


def caught(run):
    with nan_hunt(), pytest.raises(FloatingPointError) as error:
        run()
    return str(error.value).splitlines()


def test_a_forward():
    lines = caught(lambda: root(Tensor(np.array([[1.0, 4.0], [9.0, -1.0]]), "x"))); line = sys._getframe().f_lineno
    assert lines[0] == "root: the output y has nan, first at [1, 1], 1 of 4 entries"
    assert lines[1].startswith("  made in root_forward eq. 1, test_nan_hunt.py:") and lines[1].endswith(": y = np.sqrt(x)")
    assert lines[2] == "  there y has nan, first at [1, 1], 1 of 4 entries"
    assert lines[3].startswith("  root was called at ") and lines[3].endswith(f"test_nan_hunt.py:{line}")


def test_a_backward_and_the_leaves_stay_as_they_were():
    x = Tensor(np.array([4.0, 0.0]), "x")
    with nan_hunt():
        with Tape() as tape:
            y = root(x); line = sys._getframe().f_lineno
        with pytest.raises(FloatingPointError) as error:
            tape.backward({y: np.ones(2)})
    lines = str(error.value).splitlines()
    assert lines[0] == "root: the gradient dx has inf, first at [1], 1 of 2 entries"
    assert "made in root_backward eq. 2, " in lines[1] and lines[1].endswith(": slope = 0.5 / cache"), "not the line that handed it on"
    assert lines[3].endswith(f"test_nan_hunt.py:{line}"), "where the forward was called"
    assert "record 0, root" in error.value.__notes__[0] and x.grad is None


def test_a_second_gradient_is_looked_at_too():
    def no_tokens_backward(dy, cache):
        dx, dW = linear_backward(dy, cache)
        dW = dW * np.float64(0) / 0                 # a mean over the tokens of an idle expert
        return dx, dW

    def run():
        with Tape() as tape:
            y = op(linear_forward, no_tokens_backward)(Tensor(np.ones((2, 3)), "x"), Tensor(np.ones((3, 4)), "W"))
        tape.backward({y: np.ones((2, 4))})

    lines = caught(run)
    assert lines[0] == "linear: the gradient dW has nan, first at [0, 0], 12 of 12 entries"
    assert "made in no_tokens_backward, test_nan_hunt.py:" in lines[1] and ": dW = dW * np.float64(0) / 0" in lines[1]


def test_an_input_is_blamed_by_its_name():
    W = Tensor(np.array([[1.0, 2.0], [np.inf, 3.0]]), "layers.0.W_gate")
    lines = caught(lambda: linear(np.ones((1, 2)), W))
    assert lines[1].startswith("  it came in like this: its argument W ('layers.0.W_gate') has inf, first at [1, 0], 1 of 4 entries")
    assert "made in" not in "".join(lines)
    lines = caught(lambda: linear(np.array([[np.nan, 1.0]]), np.ones((2, 2))))
    assert "its argument x has nan" in lines[1], "a plain array has no name of its own"


def test_a_seed_that_is_nan_is_blamed():
    def run():
        with Tape() as tape:
            y = root(Tensor(np.ones(2)))
        tape.backward({y: np.array([1.0, np.nan])})

    lines = caught(run)
    assert "the gradient that came down to it, the seed or a sum of gradients, has nan, first at [1]" in lines[1]


def test_the_innermost_line_of_a_composite_is_named():
    args, config = mla_examples(np.random.default_rng(0))["query latent"]
    config["scale"] = 5e307
    lines = caught(lambda: mla(*args, **config))
    assert lines[0].startswith("mla: the output y has nan")
    assert "made in causal_attention_forward eq. 2, causal.py:" in lines[1] and ", from mla_forward: scores = " in lines[1]
    assert lines[2].startswith("  there scores has nan") and lines[2].endswith("; see whiteboard/attention/causal.md")


def test_what_lies_in_fresh_memory_is_not_blamed(monkeypatch):
    """np.empty_like hands out old bytes, nan among them; the line that fills them is not to be found before it has run."""
    def halves_forward(x):
        """The first row, and the roots of the others.

        x: (T, D)   ->   y: (T, D)
        """
        y = np.empty_like(x)
        y[:1] = x[:1]
        y[1:] = np.sqrt(x[1:])
        return y, x

    empty_like = np.empty_like
    monkeypatch.setattr(np, "empty_like", lambda x: np.full_like(x, np.nan))
    lines = caught(lambda: op(halves_forward, root_backward)(np.array([[1.0], [-1.0]])))
    assert "made in halves_forward, " in lines[1] and lines[1].endswith(": y[1:] = np.sqrt(x[1:])")
    assert np.empty_like is empty_like, "as NumPy has it"


def test_a_mask_of_minus_inf_is_not_blamed():
    q = np.full((1, 1, 3, 2), 1.0)
    q[0, 0, 2] = 1e200
    lines = caught(lambda: causal_attention(q, q, q, scale=1.0))
    assert "causal_attention_forward eq. 2" in lines[1]


def test_minus_inf_is_blamed_when_nothing_else_is_wrong():
    def log_forward(x):
        """Logarithm.

        x: (...)   ->   y: (...)
        """
        y = np.log(x)
        return y, x

    lines = caught(lambda: op(log_forward, root_backward)(np.array([1.0, 0.0])))
    assert "has -inf, first at [1]" in lines[0] and "made in log_forward, test_nan_hunt.py:" in lines[1] and lines[1].endswith(": y = np.log(x)")


def test_a_mask_that_does_no_harm_is_no_find():
    q = np.random.default_rng(0).standard_normal((1, 2, 3, 4))
    with nan_hunt():
        o = causal_attention(q, q, q, scale=0.5)
    assert o.data.tobytes() == causal_attention(q, q, q, scale=0.5).data.tobytes()


def test_an_intermediate_that_is_first_made_wrong_is_found_before_it_spreads():
    def run():
        with Tape() as tape:
            h = root(Tensor(np.array([4.0, -4.0]), "x"))
            y = add(h, h)
        tape.backward({y: np.ones(2)})

    assert caught(run)[0].startswith("root: the output y")


def test_integers_and_absent_arguments_are_no_trouble():
    from minideepseek.moe.deepseek_moe import deepseek_moe, deepseek_moe_examples
    with nan_hunt():
        for component, examples in ((deepseek_moe, deepseek_moe_examples), (mla, mla_examples)):
            for args, config in examples(np.random.default_rng(0)).values():
                args = [None if a is None else Tensor(a, "a") if a.dtype.kind == "f" else a for a in args]
                with Tape() as tape:
                    y = component(*args, **config)
                y = y[0] if isinstance(y, tuple) else y
                tape.backward({y: np.ones(y.data.shape)})


def test_it_does_not_stop_where_a_stop_is_set_when_it_looks_for_the_line(monkeypatch):
    stops = []
    monkeypatch.setattr(sys, "breakpointhook", lambda: stops.append(1))
    with break_on(root_forward):
        caught(lambda: root(np.array([-1.0])))
    assert stops == [1], "once, for the call itself"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_other_threads_are_watched_and_closing_ends_it():
    seen = []

    def work():
        try:
            root(np.array([-1.0]))
        except FloatingPointError:
            seen.append(1)

    hunt = nan_hunt()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    hunt.close()
    work()
    assert seen == [1]


def test_nested_hunts_end_one_after_the_other():
    with nan_hunt():
        with nan_hunt():
            pass
        with pytest.raises(FloatingPointError):
            root(np.array([-1.0]))
