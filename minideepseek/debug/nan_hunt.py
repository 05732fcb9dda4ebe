"""The first value that is not finite: which op, which array, which equation, and where the op was called.

Derivation: whiteboard/debug/nan_hunt.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import contextlib
import re

import numpy as np

from minideepseek.autograd import tape
from minideepseek.autograd.finite_differences import floating
from minideepseek.autograd.gradcheck import argument_names
from minideepseek.autograd.tape import Tensor
from minideepseek.debug.equations import watched

EMPTY = np.empty, np.empty_like


def nan_hunt():
    """From now on every op looks at what it made, forward and backward; with `with`, until the block ends.

    The first nan or inf raises FloatingPointError. `.close()` of what is returned ends the hunt. In every thread.
    """
    undo = contextlib.ExitStack()
    undo.callback(setattr, tape, "watch", tape.watch)
    tape.watch = look
    return undo


def look(record, dy=None, dxs=None):
    """Raise FloatingPointError when the op of this record has just made the first nan or inf."""
    names = argument_names(record.op.forward, len(record.inputs))
    arrays = [x.data if isinstance(x, Tensor) else x for x in record.inputs]
    if dxs is None:
        made = [(f"the output {item.name}", y.data) for item, y in zip(record.op.shapes.outputs, record.outputs)]
        given = [(f"its argument {name}" + (f" ('{x.name}')" if isinstance(x, Tensor) and x.name else ""), array)
                 for name, x, array in zip(names, record.inputs, arrays)]
        function, args, config = record.op.forward, arrays, record.config
    else:
        made = [(f"the gradient d{name}", dx) for name, dx in zip(names, dxs)]
        given = [("the gradient that came down to it, the seed or a sum of gradients,", one) for one in (dy if isinstance(dy, tuple) else (dy,))]
        function, args, config = record.backward, (dy, record.cache), {}
    if (bad := _first_bad(made)) is None:
        return
    words = f"{record.name}: {bad}"
    if (came_in := _first_bad(given)) is not None:
        words += f"\n  it came in like this: {came_in}"
    else:
        words += f"\n  {guilty_line(function, args, config)}"
    raise FloatingPointError(f"{words}\n  {record.name} was called at {record.where}")


def guilty_line(function, args, config):
    """Run a function again and say which statement first made nan or inf: of it, or of what it calls, the innermost.

    -inf alone comes second: masks are made of it, so it is blamed only when no statement made nan or +inf.
    """
    found = {}

    def see(statement, name, value, frame):
        value = np.asarray(value)
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            kind = "nan or inf" if _worst(value).any() else "-inf"
            if kind not in found:
                page = re.search(r"Derivation: (\S+)", frame.f_globals.get("__doc__") or "")
                found[kind] = (f"made in {_chain(frame, statement, function)}: {statement.code}\n  there {_first_bad([(name, value)])}"
                               + (f"; see {page[1]}" if page else ""))

    try:
        np.empty, np.empty_like = np.zeros, np.zeros_like        # what lies in fresh memory is nobody's doing
        with np.errstate(all="ignore"):
            watched(function, args, config, see, deep=True)
    finally:
        np.empty, np.empty_like = EMPTY
    return found.get("nan or inf") or found.get("-inf") or "no statement of it whose source can be read made it"


def _chain(frame, statement, root):
    """'softmax_forward eq. 1, line 21 of softmax.py, from causal_attention_forward, from mla_forward'."""
    file = frame.f_code.co_filename.replace("\\", "/").rsplit("/", 1)[-1]
    words = f"{frame.f_code.co_name}" + (f" eq. {statement.number}" if statement.number is not None else "") + f", {file}:{statement.line}"
    while frame.f_code is not root.__code__:
        frame = frame.f_back
        words += f", from {frame.f_code.co_name}"
    return words


def _first_bad(named):
    """'the output p has nan, first at [0, 2], 3 of 12 entries' for the first array that is not finite, or None."""
    for name, array in named:
        if floating(array := np.asarray(array)) and not np.isfinite(array).all():
            bad = _worst(array) if _worst(array).any() else np.isneginf(array)
            index = tuple(int(i) for i in np.argwhere(bad)[0])
            return f"{name} has {array[index]}, first at [{', '.join(map(str, index))}], {int(bad.sum())} of {array.size} entries"


def _worst(array):
    """Where there is nan or +inf, which nobody writes on purpose."""
    return np.isnan(array) | np.isposinf(array)


def demo():
    """A score that overflows, in a softmax without the subtraction; then a weight that was nan all along."""
    from minideepseek.basics.linear import linear
    from minideepseek.basics.softmax import softmax_backward

    def plain_softmax_forward(z):
        """exp(z) / sum(exp(z)), without subtracting the largest score.

        z: (..., S)   ->   p: (..., S)
        """
        e = np.exp(z)
        p = e / e.sum(axis=-1, keepdims=True)
        return p, p

    plain_softmax = tape.op(plain_softmax_forward, softmax_backward)
    W = Tensor(np.array([[1.0, 0.0], [np.nan, 1.0]]), "W_gate")
    said = []
    for run in (lambda: plain_softmax(np.array([[1.0, 710.0], [0.0, 1.0]])), lambda: linear(np.ones((3, 2)), W)):
        try:
            with nan_hunt(), np.errstate(all="ignore"):
                run()
        except FloatingPointError as error:
            said.append(str(error))
            print(error)
    found = "e = np.exp(z)" in said[0] and "its argument W ('W_gate') has nan, first at [1, 0]" in said[1]
    print(f"claim   the line that overflows is found, and the weight that came in with nan: {found}")
    assert found


if __name__ == "__main__":
    from minideepseek.debug.nan_hunt import demo  # the imported copy, so that every name exists once
    demo()
