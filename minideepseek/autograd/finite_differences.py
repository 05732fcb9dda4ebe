"""Finite differences: the slope of a forward, measured by moving one number a little to both sides.

Derivation: whiteboard/autograd/finite_differences.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import math
from typing import NamedTuple

import numpy as np

MOST_ENTRIES = 2_000     # with more, ten random directions per argument instead of every entry
STEP = 1e-3              # times min(1, root mean square of the argument)


class GradcheckError(AssertionError):
    """A backward failed. stage: 1 to 6; argument: its name, or None; index: of the worst entry, or None; cause: words."""

    def __init__(self, message, stage, argument=None, index=None, cause=None):
        super().__init__(message)
        self.stage, self.argument, self.index, self.cause = stage, argument, index, cause


class Slopes(NamedTuple):
    """Finite differences of all outputs with respect to one argument."""
    directions: np.ndarray | None    # (10, size): random, of length 1; None: one row per entry
    rows: np.ndarray                 # (size or 10, outputs): row i is dy/dx_i, or dy along direction i


def finite_differences(forward, args, config=None, *, seed=0):
    """Richardson-extrapolated central differences of every output: {position of a floating argument: Slopes}.

    Raises GradcheckError when an integer output (a choice) changes within the step, or a slope is not finite.
    """
    floats = [i for i, arg in enumerate(args) if floating(arg)]
    rng = np.random.default_rng(seed)
    every_entry = sum(args[i].size for i in floats) <= MOST_ENTRIES
    choices = _evaluate(forward, args, config)[1]
    slopes = {}
    for i in floats:
        x = args[i]
        directions = None if every_entry else _random_directions(rng, x.size)
        rms = math.sqrt(np.mean(np.square(x))) if x.size else 0.0
        h = STEP * min(1.0, rms or 1.0)

        def move(direction, t):
            moved = list(args)
            moved[i] = x + (t * direction).reshape(x.shape)
            y, now = _evaluate(forward, moved, config)
            if now != choices:
                raise GradcheckError("an integer output (a choice) changes within the finite-difference step: "
                                     "take an example with a wider gap, so that the selection is frozen", 5)
            return y

        rows = []
        for direction in (_unit_vectors(x.size) if every_entry else directions):
            near = (move(direction, h) - move(direction, -h)) / (2 * h)
            far = (move(direction, 2 * h) - move(direction, -2 * h)) / (4 * h)
            rows.append((4 * near - far) / 3)
        slopes[i] = Slopes(directions, np.array(rows))
        if not np.isfinite(slopes[i].rows).all():
            raise GradcheckError("the forward gives nan or inf near this input", 5)
    return slopes


def _random_directions(rng, size):
    """Ten of length 1: a step along one of them is as long as a step of a single entry, so it curves as little."""
    directions = rng.standard_normal((10, size))
    return directions / np.linalg.norm(directions, axis=1, keepdims=True)


def _unit_vectors(size):
    for k in range(size):
        unit = np.zeros(size)
        unit[k] = 1.0
        yield unit


def _evaluate(forward, args, config):
    """-> all floating outputs in one vector, and the bytes of the integer ones."""
    output, _ = forward(*args, **(config or {}))
    outputs = output_arrays(output)
    floats = [y.reshape(-1) for y in outputs if floating(y)]
    return np.concatenate(floats), [y.tobytes() for y in outputs if not floating(y)]


def output_arrays(output):
    """What a forward returned, one output or a tuple of several, as a list of arrays."""
    return [np.asarray(y) for y in (output if isinstance(output, tuple) else (output,))]


def floating(array):
    """Is this an array that gets a gradient?"""
    return isinstance(array, np.ndarray) and array.dtype.kind == "f"


def demo():
    """The slope of sin at 1 with steps of two sizes, plain and extrapolated."""

    def sin_forward(x):
        return np.sin(x), None

    x = np.array([1.0])
    exact = math.cos(1.0)
    print(f"shapes    x (1,) -> y (1,); d sin(1) = cos(1) = {exact:.6f}")
    for h in (1e-1, 1e-3):
        central = [(math.sin(1 + t) - math.sin(1 - t)) / (2 * t) for t in (h, 2 * h)]
        extrapolated = (4 * central[0] - central[1]) / 3
        print(f"by hand   step {h:.0e}: central error {abs(central[0] - exact):.0e}, extrapolated {abs(extrapolated - exact):.0e}")
    error = abs(finite_differences(sin_forward, (x,))[0].rows[0, 0] - exact)
    print(f"claim     finite_differences is right to {error:.0e}")
    assert error < 1e-12


if __name__ == "__main__":
    from minideepseek.autograd.finite_differences import demo  # the imported copy, so that every name exists once
    demo()
