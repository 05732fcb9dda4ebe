"""The equations of a function as it runs: every line that ends in an `eq.` tag, with what it made.

Derivation: whiteboard/debug/equations.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import ast
import functools
import importlib
import inspect
import re
import sys
import textwrap
from typing import NamedTuple

import numpy as np

from minideepseek.autograd.finite_differences import floating, output_arrays
from minideepseek.autograd.gradcheck import where_derived
from minideepseek.autograd.stop import no_stops, op_modules, unknown
from minideepseek.autograd.tape import Tensor
from minideepseek.debug.reprs import values

TITLES = "eq.", "name", "shape", "dtype", "from ... to", "values", "code"
RETURNED = "(returned)"


class Statement(NamedTuple):
    """One statement of a function."""
    number: int | None   # of its equation; None without a tag
    code: str            # on one line, without its comment
    names: tuple         # of the variables it writes; RETURNED for a return
    line: int            # where it starts in its file


class Row(NamedTuple):
    """One array that an equation made."""
    number: int
    name: str
    value: np.ndarray    # a copy of it, as it was then
    code: str


class Rows(list):
    """A list of Row that a prompt does not print a second time."""

    def __repr__(self):
        return f"{len(self)} rows"


def equations(function, *args, **config):
    """Run function(*args, **config), print the table of its equations, and return the rows.

        equations(mla_forward, *args, **config)
        equations(mla_backward, dy, cache)       # also at the prompt of a debugger that stands in mla_backward

    A line that ran twice, in a loop, has a row for each time. The function itself is not touched.
    """
    _, rows = equation_rows(function, args, config)
    print(f"{function.__name__}{where_derived(function)}")
    print(table(rows))
    return rows


def trace(name, markdown=False):
    """Print the equations of a component on its first example, forward then backward; return 0.

    name: attention.mla, the place of a file (all its components), or mla, that of a component
    Raises UnknownName, with names like it.
    """
    modules = op_modules()
    places = {op: (op, module.removeprefix("minideepseek."), f"{module.split('.')[1]}.{op}") for op, module in modules.items()}
    asked = name.removesuffix(".py").replace("/", ".").removeprefix("minideepseek.")
    chosen = [op for op in modules if asked in places[op]]
    if not chosen:
        raise unknown("trace", name, sorted({place for three in places.values() for place in three}))
    for op in chosen:
        module = importlib.import_module(modules[op])
        forward, backward = getattr(module, f"{op}_forward"), getattr(module, f"{op}_backward")
        rng = np.random.default_rng(0)
        case, (args, config) = next(iter(getattr(module, f"{op}_examples")(rng).items()))
        (output, cache), rows = equation_rows(forward, args, config)
        dys = [rng.standard_normal(y.shape) for y in output_arrays(output) if floating(y)]
        _, rows_back = equation_rows(backward, (dys[0] if len(dys) == 1 else tuple(dys), cache), {})
        for function, found in ((forward, rows), (backward, rows_back)):
            print(f"{'### ' * markdown}{function.__name__}, example '{case}'{where_derived(function)}\n\n{table(found, markdown)}\n")
    return 0


def equation_rows(function, args, config):
    """-> (what function returned, its rows)."""
    rows = Rows()

    def see(statement, name, value, frame):
        if statement.number is not None:
            rows.append(Row(statement.number, name, np.array(value), statement.code))

    return watched(function, args, config, see), rows


def watched(function, args, config, see, deep=False):
    """Run a function and call see(statement, name, value, frame) for every array a statement of it has just made.

    deep: the functions of the package that it calls are watched too, so that the innermost statement is seen first.
    """
    root = function.__code__

    def enter(frame, event, arg):
        code = frame.f_code
        inside = code is root or deep and (code.co_filename == root.co_filename or frame.f_globals.get("__name__", "").startswith("minideepseek."))
        if not inside or not (lines := statements(code)):
            return None
        last = None                                              # the statement that is running

        def step(frame, event, arg):
            nonlocal last
            now = lines.get(frame.f_lineno) if event == "line" else None
            if event != "exception" and last is not None and now is not last:          # it is through
                for name in last.names:
                    made = (frame.f_locals.get(name),) if name != RETURNED else arg if isinstance(arg, tuple) else (arg,)
                    for value in made:
                        value = value.data if isinstance(value, Tensor) else value
                        if isinstance(value, (np.ndarray, np.generic, float)):
                            see(last, name, value, frame)
            last = now
            return step
        return step

    def run():
        before = sys.gettrace()
        sys.settrace(enter)
        try:
            return function(*args, **config)
        finally:
            sys.settrace(before)

    with no_stops():
        return sys.call_tracing(run, ())                         # traces even where a debugger's prompt has switched tracing off


@functools.lru_cache(maxsize=None)
def statements(code):
    """{line: the simple statement that stands there} of the function with this code; {} when its source cannot be read."""
    try:
        lines, first = inspect.getsourcelines(code)
        source = textwrap.dedent("".join(lines))
        function = ast.parse(source).body[0]
    except (OSError, SyntaxError):
        return {}
    found = {}
    for node in ast.walk(function) if isinstance(function, ast.FunctionDef) else ():
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.Return, ast.Expr)):
            tag = re.search(r"# eq\. (\d+)\s*$", lines[node.end_lineno - 1])
            text = " ".join(ast.get_source_segment(source, node).split())
            statement = Statement(tag and int(tag[1]), text, tuple(_written(node)), first + node.lineno - 1)
            found.update(dict.fromkeys(range(statement.line, first + node.end_lineno), statement))
    return found


def _written(node):
    """The names of the variables that a statement writes; of a call that returns nothing, its first argument."""
    if isinstance(node, ast.Return):
        return [RETURNED]
    if isinstance(node, ast.Expr):
        return [n.id for n in getattr(node.value, "args", ())[:1] if isinstance(n, ast.Name)]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    while any(isinstance(t, (ast.Tuple, ast.Starred, ast.Subscript)) for t in targets):
        targets = [part for t in targets for part in getattr(t, "elts", [getattr(t, "value", t)])]
    return [t.id for t in targets if isinstance(t, ast.Name)]


def table(rows, markdown=False):
    """The rows as text in columns, or as a Markdown table."""
    cells = [TITLES] + [(str(r.number), r.name, str(r.value.shape), r.value.dtype.name, _range(r.value), values(r.value, 4), r.code) for r in rows]
    if markdown:
        cells = [(*row[:-1], f"`{row[-1]}`") if i else row for i, row in enumerate(cells)]
        lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells]
        return "\n".join([lines[0], "|---" * len(TITLES) + "|", *lines[1:]])
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells)


def _range(value):
    """'-1.2 ... 0.7', nan when there is one."""
    if value.size == 0 or value.dtype.kind not in "iuf":
        return "-"
    return f"{value.min():.3g} ... {value.max():.3g}"


def demo():
    """Softmax, line by line; and the same bits with and without the table."""
    from minideepseek.attention.mla import mla_backward, mla_examples, mla_forward
    from minideepseek.basics.softmax import softmax_forward

    print("shapes    z (1, 3) -> p (1, 3)")
    rows = equations(softmax_forward, np.log([[1.0, 2.0, 5.0]]))
    print(f"by hand   e = (1, 2, 5) / 5 = {rows[0].value[0].round(12)}")
    args, config = mla_examples(np.random.default_rng(0))["query latent"]
    plain, cache = mla_forward(*args, **config)
    (traced, _), forward_rows = equation_rows(mla_forward, args, config)
    gradients, backward_rows = equation_rows(mla_backward, (plain, cache), {})
    same = plain.tobytes() == traced.tobytes() and all(a.tobytes() == b.tobytes() for a, b in zip(gradients, mla_backward(plain, cache)))
    print(f"claim     mla: {len(forward_rows)} rows forward, {len(backward_rows)} backward; with and without the table the same bits: {same}")
    assert same and np.allclose(rows[0].value, [0.2, 0.4, 1.0]) and len(forward_rows) == 15


if __name__ == "__main__":
    from minideepseek.debug.equations import demo  # the imported copy, so that every name exists once
    demo()
