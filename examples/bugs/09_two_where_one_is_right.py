"""Two where one is right: every backward is correct, and the sum of them is not.

    python examples/bugs/09_two_where_one_is_right.py            # the symptom
    python examples/bugs/09_two_where_one_is_right.py --fix      # without the bug

y = (x + r) + x: dy/dx is 2 and dy/dr is 1. A small engine, ten lines long, replays the two additions in reverse and finds 2
for both. Whoever writes engines writes this bug once. Who changed the gradient of r?

A path to the cause, at the prompt:

    $ python -m pdb examples/bugs/09_two_where_one_is_right.py
    b add_up
    c                          y = a + x: a gets its gradient
    c                          x gets its first
    c                          a = x + r: x gets its second; r has not had its own yet
    p x, grads, dx
    p grads["x"] is dx         into what is the sum about to be written, and who gets dx next?

Derivation: whiteboard/autograd/tape.md     Bug 33 of the museum
"""
import os
import sys

sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]   # run as a script: take the package from this repository

import numpy as np


def add_backward(dy):
    """Both roads get all of dy."""
    return dy, dy


def add_up(grads, x, dx):
    """Put dx into grads[x], added to what is there."""
    if x not in grads:
        grads[x] = dx
    else:
        grads[x] += dx


def replay(records, loss):
    """records: [(output, inputs)] of additions, in the order in which they ran -> {name: gradient} of the leaves."""
    grads = {loss: np.ones(1)}
    for output, inputs in reversed(records):
        for x, dx in zip(inputs, add_backward(grads.pop(output))):
            add_up(grads, x, dx)
    return grads


def main():
    grads = replay([("a", ("x", "r")), ("y", ("a", "x"))], "y")      # a = x + r, y = a + x
    print(f"dy/dx = {grads['x'][0]:g}, expected 2")
    print(f"dy/dr = {grads['r'][0]:g}, expected 1")
    print("symptom:", "here" if grads["r"] != 1 else "gone")


if __name__ == "__main__":
    if "--fix" in sys.argv:                            # the answer: find your own first
        def add_up(grads, x, dx):
            grads[x] = grads[x] + dx if x in grads else dx
    main()
