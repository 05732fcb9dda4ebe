"""The table of equations: every tag has its row, the values are those of that moment, the math is untouched."""
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from minideepseek.autograd.finite_differences import floating, output_arrays
from minideepseek.autograd.stop import UnknownName, break_on
from minideepseek.basics.softmax import softmax_backward, softmax_forward
from minideepseek.debug.equations import RETURNED, Row, equation_rows, equations, statements, table, trace
from minideepseek.model.block import block
from tests.house import COMPONENTS, NAMES, ROOT


def tags(function):
    """The numbers of the equations in the source of one function."""
    lines = open(function.__code__.co_filename, encoding="utf-8").read().splitlines()[function.__code__.co_firstlineno - 1:]
    end = next((n for n, line in enumerate(lines[1:], 1) if line and not line[0].isspace()), len(lines))
    return {int(number) for number in re.findall(r"# eq\. (\d+)$", "\n".join(lines[:end]), re.M)}


def bits(tree):
    return [y.tobytes() for y in output_arrays(tree) if y.dtype != object]


@pytest.mark.parametrize("component", COMPONENTS, ids=NAMES)
def test_the_same_bits_and_a_row_for_every_equation(component):
    found = {component.forward: set(), component.backward: set()}
    for args, config in component.examples(np.random.default_rng(0)).values():
        (output, cache), (traced, rows) = component.forward(*args, **config), equation_rows(component.forward, args, config)
        assert bits(traced[0]) == bits(output)
        dys = [np.random.default_rng(1).standard_normal(y.shape) for y in output_arrays(output) if floating(y)]
        dy = dys[0] if len(dys) == 1 else tuple(dys)
        gradients, rows_back = equation_rows(component.backward, (dy, cache), {})
        assert bits(gradients) == bits(component.backward(dy, cache))
        found[component.forward] |= {row.number for row in rows}
        found[component.backward] |= {row.number for row in rows_back}
    for function, numbers in found.items():
        assert numbers == tags(function), f"{function.__name__}: equations without a row, or rows without an equation"


def many_forms(x, rows, *, n=2):
    """Every form of statement that carries a tag."""
    y = x * 2                                       # eq. 1
    a, (b, *rest) = y[0], y                         # eq. 2
    y[0, 1:] = -1                                   # eq. 3
    for i in range(n):
        y += i                                      # (T, D)   # eq. 4
    long = y
    long = np.where(x > 0,
                    x,  # the upper half
                    0)                              # eq. 5
    np.add.at(y, rows, 1.0)                         # eq. 6
    untagged = y + long
    scalar = untagged.sum()                         # eq. 7
    words, empty = "no array", np.zeros((0, 3))     # eq. 8
    if n:
        return y.copy(), scalar                     # eq. 9


def test_the_forms_of_a_statement():
    x = np.array([[1.0, -2.0], [3.0, 4.0]])
    (y, scalar), found = equation_rows(many_forms, (x, np.array([0, 0])), {})
    assert [(r.number, r.name) for r in found] == [(1, "y"), (2, "a"), (2, "b"), (3, "y"), (4, "y"), (4, "y"), (5, "long"), (6, "y"),
                                                  (7, "scalar"), (8, "empty"), (9, RETURNED), (9, RETURNED)]
    values = [r.value.tolist() for r in found]
    assert values[0] == [[2, -4], [6, 8]] and values[3] == [[2, -1], [6, 8]], "a copy, as it was then: what comes later changes nothing"
    assert values[4] == [[2, -1], [6, 8]] and values[5] == [[3, 0], [7, 9]] and values[7] == [[5, 2], [7, 9]]
    assert values[6] == [[1, 0], [3, 4]] and found[6].code == "long = np.where(x > 0, x, # the upper half 0)"
    assert values[-2] == y.tolist() and values[-1] == scalar
    assert statements(many_forms.__code__)[many_forms.__code__.co_firstlineno + 2].code == "y = x * 2"


def test_a_function_that_raises_is_not_caught_and_the_tracer_is_gone():
    def fails(x):
        y = x * 2                                   # eq. 1
        z = y.nothing                               # eq. 2
        return z

    old = sys.gettrace()
    with pytest.raises(AttributeError):
        equation_rows(fails, (np.ones(2),), {})
    assert sys.gettrace() is old


def test_a_line_that_raised_made_nothing():
    def tries(x):
        y = x
        for divisor in (2, 0, 4):
            try:
                y = x / int(6 / divisor)            # eq. 1
            except ZeroDivisionError:
                pass
        return y

    _, rows = equation_rows(tries, (np.array([6.0]),), {})
    assert [row.value.tolist() for row in rows] == [[2], [6]], "twice, not three times"


def test_it_runs_a_function_with_a_stop_in_it_without_stopping(monkeypatch):
    monkeypatch.setattr(sys, "breakpointhook", lambda: pytest.fail("stopped"))
    with break_on("softmax.forward"):
        _, rows = equation_rows(softmax_forward, (np.zeros((1, 2)),), {})
    assert [row.number for row in rows] == [1, 2]


def test_a_function_without_source_has_no_rows():
    namespace = {}
    exec("def typed(x):\n    y = x + 1   # eq. 1\n    return y", namespace)
    assert equation_rows(namespace["typed"], (1.0,), {}) == (2.0, [])


def test_the_printed_table(capsys):
    rows = equations(softmax_forward, np.log([[1.0, 2.0, 5.0]]))
    assert capsys.readouterr().out.splitlines() == [
        "softmax_forward; see whiteboard/basics/softmax.md",
        "eq.  name  shape   dtype    from ... to      values                code",
        "1    e     (1, 3)  float64  0.2 ... 1        [0.2, 0.4, 1]         e = np.exp(z - np.max(z, axis=-1, keepdims=True))",
        "2    p     (1, 3)  float64  0.125 ... 0.625  [0.125, 0.25, 0.625]  p = e / np.sum(e, axis=-1, keepdims=True)"]
    assert repr(rows) == "2 rows" and isinstance(rows[0], Row) and np.allclose(rows[1].value, [[0.125, 0.25, 0.625]])


def test_the_markdown_table_and_odd_values():
    text = table([Row(1, "m", np.array([True]), "m = a | b"), Row(2, "x", np.array([1.0, np.nan]), "x = y")], markdown=True)
    assert text.splitlines()[1:] == ["|---|---|---|---|---|---|---|", r"| 1 | m | (1,) | bool | - | [True] | `m = a \| b` |",
                                     "| 2 | x | (2,) | float64 | nan ... nan | [1, nan] | `x = y` |"]


@pytest.mark.parametrize("name, functions", [
    ("attention.mla", ["mla_forward", "mla_backward"]),
    ("mla", ["mla_forward", "mla_backward"]),
    ("basics/softmax", ["softmax_forward", "softmax_backward", "log_softmax_forward", "log_softmax_backward"]),
    ("minideepseek/basics/rmsnorm.py", ["rmsnorm_forward", "rmsnorm_backward"]),
    ("attention.causal_attention", ["causal_attention_forward", "causal_attention_backward"]),
    ("router", ["router_forward", "router_backward"]),
])
def test_trace_finds_a_component_by_its_place_or_name(name, functions, capsys):
    assert trace(name) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^(\w+), example '", printed, re.M) == functions


def test_trace_in_markdown(capsys):
    trace("basics.rmsnorm", markdown=True)
    printed = capsys.readouterr().out
    assert printed.startswith("### rmsnorm_forward, example 'tokens'; see whiteboard/basics/rmsnorm.md\n\n| eq. |")
    assert len({line.count("|") for line in printed.splitlines() if line.startswith("|")}) == 1


def test_trace_of_an_unknown_name():
    with pytest.raises(UnknownName, match="trace: no 'attention.mal' here; did you mean attention.mla"):
        trace("attention.mal")


def test_a_function_of_ops_shows_the_data_of_its_tensors():
    from minideepseek.model.block import Config, block_outline, flatten, position_tables, unflatten
    config = Config(d_model=8, n_heads=2, q_rank=6, kv_rank=4, d_nope=4, d_rope=2, d_value=3, n_layers=1, n_dense_layers=1, d_ff=5)
    form = block_outline(config, dense=True)
    weights = unflatten({name: np.ones(leaf.shape) for name, leaf in flatten(form).items()}, form)
    cos, sin = position_tables(config, np.arange(3), np.float64)
    _, rows = equation_rows(block, (np.ones((1, 3, 8)), weights, config, cos, sin), {})
    assert [row.number for row in rows] == [1, 2, 3, 4, 6, 7] and all(row.value.shape == (1, 3, 8) for row in rows)


def test_at_the_prompt_of_a_debugger():
    """There Python has switched tracing off, and the function that is traced may hold the very stop we stand at."""
    commands = ("from minideepseek.debug.equations import equations\nfrom minideepseek.basics.rmsnorm import rmsnorm_backward\n"
                "rows = equations(rmsnorm_backward, dy, cache)\np rows\nn\nc\n")
    run = subprocess.run([sys.executable, "examples/step_through_backward.py"], input=commands, cwd=ROOT, capture_output=True, text=True,
                         env=os.environ | {"MINIDEEPSEEK_BREAK": "rmsnorm.backward"}, timeout=60)
    assert "***" not in run.stdout and "\n4    dg " in run.stdout and "3 rows" in run.stdout
    assert "-> dg = " in run.stdout, "and afterwards the debugger goes on stepping"
    assert run.returncode == 0 and softmax_backward.__code__.co_names
