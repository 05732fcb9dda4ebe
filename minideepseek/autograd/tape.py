"""The tape: write down every op while the forward runs, replay the list in reverse to get every gradient.

Derivation: whiteboard/autograd/tape.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import os
import sys
import threading
from typing import Callable, NamedTuple

import numpy as np

from minideepseek.autograd.shapes import ShapeLine, describe
from minideepseek.autograd.stop import stop_if_wanted

watch = None             # called with every record that ran, and again with its gradients: debug/nan_hunt.py sets it


class Tensor:
    """An array, its gradient and a name. It has no arithmetic: the math lives in plain functions on arrays.

    data: ndarray   grad: None or an ndarray of the same shape and dtype, set by `Tape.backward`
    """
    __slots__ = ("data", "grad", "name")

    def __init__(self, data, name=""):
        self.data = np.asarray(data)
        self.grad = None
        self.name = name

    def __repr__(self):
        return f"{self.data.shape} {self.data.dtype} {self.name}{', with grad' if self.grad is not None else ''}"


class Record(NamedTuple):
    """One op that ran: all that its backward needs."""
    name: str
    backward: Callable   # (dy, cache) -> one gradient per input
    cache: object
    inputs: tuple        # Tensors, plain arrays (constants) or None (absent)
    outputs: tuple       # Tensors
    file: str            # where the op was called
    line: int
    op: object           # with config: all it takes to run it again
    config: dict

    @property
    def where(self):
        return f"{os.path.relpath(self.file) if os.path.isabs(self.file) else self.file}:{self.line}"


class _Recording(threading.local):
    tape = None          # the active tape of this thread


_recording = _Recording()


class op:
    """Make a pair of plain functions callable on Tensors; recorded when a Tape is active.

        rmsnorm = op(rmsnorm_forward, rmsnorm_backward)
        y = rmsnorm(x, g)            # x and g: Tensors, or arrays for constants; y: Tensor

    forward(*arrays, **config) -> (y, cache) or ((y1, y2), cache); backward(dy, cache) -> one gradient per positional
    argument. An integer output gets no dy; with several floating outputs dy is a tuple.
    Raises TypeError or ShapeError when the arguments do not fit the shape line of the forward's docstring.
    """

    def __init__(self, forward, backward):
        self.forward, self.backward = forward, backward
        self.name = forward.__name__.removesuffix("_forward")
        self.shapes = ShapeLine(forward)
        self.__doc__ = forward.__doc__
        stop_if_wanted(self.name, forward, backward)

    def __repr__(self):
        return f"op {self.name}: {self.shapes.text}"

    def __call__(self, *args, **config):
        arrays = tuple([arg.data if isinstance(arg, Tensor) else arg for arg in args])
        try:
            self.shapes.bind(arrays, config)
            for keyword, value in config.items():
                if isinstance(value, Tensor):
                    raise TypeError(f"{keyword} is a Tensor: a keyword argument is never differentiated, pass its .data")
        except (TypeError, ValueError) as error:
            caller = sys._getframe(1)
            raise type(error)(f"{self.name}: {error}\n  expected {self.shapes.text}\n  got      {describe(arrays)}\n"
                              f"  called at {caller.f_code.co_filename}:{caller.f_lineno}") from None

        output, cache = self.forward(*arrays, **config)

        several = isinstance(output, tuple)
        outputs = tuple([Tensor(y, self.name) for y in (output if several else (output,))])
        if _recording.tape is not None or watch is not None:
            caller = sys._getframe(1)
            record = Record(self.name, self.backward, cache, args, outputs, caller.f_code.co_filename, caller.f_lineno, self, config)
            if _recording.tape is not None:
                _recording.tape.records.append(record)
            if watch is not None:
                watch(record)
        return outputs if several else outputs[0]


class Tape:
    """The list of ops that ran inside its `with` block.

        with Tape() as tape:
            loss = cross_entropy(linear(x, W), targets)
        tape.backward(loss)          # W.grad is dloss/dW
    """

    def __init__(self):
        self.records = []
        self._replayed = False
        self._outer = None

    def __enter__(self):
        if self._replayed:
            raise RuntimeError("this tape has been replayed: record on a new Tape()")
        if self._outer is not None or _recording.tape is self:
            raise RuntimeError("this tape is recording already: one tape, one with block")
        self._outer, _recording.tape = _recording.tape, self
        return self

    def __exit__(self, *_):
        _recording.tape, self._outer = self._outer, None

    def backward(self, losses, *, keep=False):
        """Replay the records in reverse and add dlosses/dleaf to the `.grad` of every leaf.

        losses: a scalar Tensor, or {Tensor: seed} for several: the sum of seed * Tensor is differentiated.
        keep: keep the records, and the gradient of every intermediate, for reading and printing.
        A leaf is a Tensor that no record of this tape made. Its gradients add up over tapes until `.grad = None`.
        An error leaves every leaf as it was.
        Raises RuntimeError on a second call; ValueError for a loss this tape did not record, or a seed of another
        shape; TypeError or ValueError for a backward that breaks its contract. Every error notes the forward line.
        """
        if self._replayed:
            raise RuntimeError("this tape has been replayed already: its records are used up, record a new one")
        seeds = {losses: 1.0} if isinstance(losses, Tensor) else losses
        made = {id(y) for record in self.records for y in record.outputs}
        grads = {loss: _seed(loss, seed, made) for loss, seed in seeds.items()}
        self._replayed = True

        numbers = reversed(range(len(self.records)))
        for number, record in zip(numbers, reversed(self.records) if keep else _pop_all(self.records)):
            dys = [grads.pop(y, None) for y in record.outputs]
            if keep:
                for y, dy in zip(record.outputs, dys):
                    y.grad = dy
            if all(dy is None for dy in dys):
                continue                                    # nothing downstream of this record reaches a loss
            try:
                dxs = _run_backward(record, dys)
            except Exception as error:
                error.add_note(f"in the backward of record {number}, {record.name}, whose forward was called at {record.where}")
                raise
            for x, dx in zip(record.inputs, dxs):
                if isinstance(x, Tensor) and dx is not None:
                    grads[x] = np.asarray(grads[x] + dx) if x in grads else dx   # never +=: the array may be shared

        for leaf, grad in grads.items():                    # every gradient still here belongs to a leaf
            leaf.grad = grad if leaf.grad is None else np.asarray(leaf.grad + grad)

    def __str__(self):
        """The figure of the model: one line per record; after a kept backward, with the norm of each gradient."""
        if not self.records:
            return "an empty tape" + (" (replayed; keep=True keeps the records)" if self._replayed else "")
        rows = [("", "op", "inputs", "outputs", "|dy|" if self._replayed else "", "called at")]
        for number, record in enumerate(self.records):
            norms = [f"{np.linalg.norm(y.grad):.3g}" for y in record.outputs if y.grad is not None]
            rows.append((str(number), record.name, " ".join(_shape(x) for x in record.inputs),
                         " ".join(_shape(y) for y in record.outputs), " ".join(norms), record.where))
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def _pop_all(records):
    """The records from last to first, each one forgotten as it is handed out, so that its cache can be freed."""
    while records:
        yield records.pop()


def _seed(loss, seed, made):
    """The gradient that starts the replay at `loss`, as an array of its shape and dtype."""
    if id(loss) not in made:
        raise ValueError(f"the loss {loss!r} was not made by an op of this tape")
    if loss.data.dtype.kind in "iub":
        raise ValueError(f"the loss {loss!r} is made of integers: it has no gradient")
    seed = np.array(seed, dtype=loss.data.dtype)
    if seed.shape != loss.data.shape:
        raise ValueError(f"the loss {loss!r} needs a seed of shape {loss.data.shape}, got {seed.shape}: "
                         f"reduce it to a scalar, or pass {{tensor: dy}}")
    return seed


def _run_backward(record, dys):
    """Call one backward and check what it returns: count, and shape and dtype of every gradient."""
    floating = [(y, dy) for y, dy in zip(record.outputs, dys) if y.data.dtype.kind not in "iub"]
    dy = tuple([np.zeros_like(y.data) if dy is None else dy for y, dy in floating])     # an output nobody used
    dy = dy if len(dy) > 1 else dy[0]
    dxs = record.backward(dy, record.cache)
    dxs = dxs if isinstance(dxs, tuple) else (dxs,)
    dxs = tuple([np.asarray(dx) if isinstance(dx, np.generic) else dx for dx in dxs])   # NumPy: 0-d arrays decay to scalars
    if len(dxs) != len(record.inputs):
        raise TypeError(f"{record.name}: the backward returned {len(dxs)} gradients for {len(record.inputs)} arguments")
    for position, (x, dx) in enumerate(zip(record.inputs, dxs)):
        x = x.data if isinstance(x, Tensor) else x
        if x is None or x.dtype.kind in "iub":
            if dx is not None:
                raise TypeError(f"{record.name}: argument {position} is {describe([x])}, its gradient must be None")
        elif not isinstance(dx, np.ndarray) or dx.shape != x.shape or dx.dtype != x.dtype:
            raise ValueError(f"{record.name}: the gradient of argument {position} is {describe([dx])}, "
                             f"the argument is {describe([x])}")
    if watch is not None:
        watch(record, dy, dxs)
    return dxs


def _shape(x):
    """A Tensor or array as the figure shows it: its name, if it has one of its own, and its shape."""
    if x is None:
        return "-"
    name, array = (x.name, x.data) if isinstance(x, Tensor) else ("", x)
    return f"{name}({', '.join(map(str, array.shape))})"


def demo():
    """A diamond: x feeds two roads that meet again; the tape adds their gradients."""

    def plus_forward(a, b):
        """Add.

        a: (...)   b: (...)   ->   y: (...)
        """
        return a + b, None

    def plus_backward(dy, cache):
        return dy.copy(), dy.copy()

    plus = op(plus_forward, plus_backward)
    x, r = Tensor(np.array([1.0, 2.0, 3.0]), "x"), Tensor(np.array([10.0, 20.0, 30.0]), "r")
    with Tape() as tape:
        y = plus(plus(x, r), x)              # y = (x + r) + x
    tape.backward({y: np.ones(3)}, keep=True)
    print(tape)
    print("by hand", "  x.grad", x.grad, "  r.grad", r.grad)
    print("claim   dy/dx = 2 and dy/dr = 1, with no array shared between them:", not np.shares_memory(x.grad, r.grad))
    assert (x.grad == 2).all() and (r.grad == 1).all() and not np.shares_memory(x.grad, r.grad)


if __name__ == "__main__":
    from minideepseek.autograd.tape import demo  # the imported copy, so that every name exists once
    demo()
