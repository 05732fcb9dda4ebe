"""What the tape costs: microseconds per op, forward plus backward, beside the time of the op itself.

    python examples/engine_overhead.py

The overhead is a constant per op: shape check, record, replay, checks of the gradients. It is measured where the op
itself is next to nothing, as a chain of 20 calls on a (1, 8) array, taped against called directly, and set beside the
op's own time at (8, 128, 256). float32, medians of interleaved repetitions.
"""
import os
import sys

sys.path[0:1] = [os.path.abspath(__file__ + "/../..")]   # run as a script: take the package from this repository

import statistics
import time

import numpy as np

from minideepseek.autograd.tape import Tape, Tensor
from minideepseek.basics.linear import linear
from minideepseek.basics.residual import add
from minideepseek.basics.rmsnorm import rmsnorm
from minideepseek.basics.softmax import softmax
from minideepseek.basics.swiglu import swiglu

REPEATS, PER_REPEAT = 11, 20


def direct(op, arrays, dy):
    """Forward and backward as plain function calls."""
    for _ in range(PER_REPEAT):
        _, cache = op.forward(*arrays)
        op.backward(dy, cache)


def taped(op, tensors, dy):
    """The same work as a chain on one tape, recorded and replayed."""
    y, *rest = tensors
    with Tape() as tape:
        for _ in range(PER_REPEAT):
            y = op(y, *rest)
    tape.backward({y: dy})


def microseconds(function, *args):
    start = time.perf_counter()
    function(*args)
    return (time.perf_counter() - start) / PER_REPEAT * 1e6


def own_time(op, arrays):
    """Median microseconds of one forward and backward, called directly."""
    y, _ = op.forward(*arrays)
    return statistics.median(microseconds(direct, op, arrays, np.ones_like(y)) for _ in range(REPEATS))


def overhead(op, arrays):
    """Median difference between neighbouring repetitions, taped minus direct."""
    y, _ = op.forward(*arrays)
    dy, tensors, differences = np.ones_like(y), [Tensor(a) for a in arrays], []
    for _ in range(10 * REPEATS):
        differences.append(microseconds(taped, op, tensors, dy) - microseconds(direct, op, arrays, dy))
        for tensor in tensors:
            tensor.grad = None
    return statistics.median(differences)


def main():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return (0.1 * rng.standard_normal(shape)).astype(np.float32)

    def arguments(*shape):
        D = shape[-1]
        return {add: (draw(*shape), draw(*shape)), softmax: (draw(*shape),), rmsnorm: (draw(*shape), draw(D)),
                linear: (draw(*shape), draw(D, D)), swiglu: (draw(*shape), draw(D, D), draw(D, D), draw(D, D))}

    print(f"{'op':10s} {'overhead us':>12s} {'op itself at (8, 128, 256), us':>32s} {'share':>8s}")
    for (op, small), large in zip(arguments(1, 8).items(), arguments(8, 128, 256).values()):
        extra, own = overhead(op, small), own_time(op, large)
        print(f"{op.name:10s} {extra:12.1f} {own:32.0f} {extra / own:8.2%}")


if __name__ == "__main__":
    main()
