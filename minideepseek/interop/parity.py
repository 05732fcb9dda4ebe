"""Parity: the same checkpoint here and in the public implementation, number against number.

Derivation: whiteboard/interop/parity.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minideepseek.autograd.tape import Tape
from minideepseek.basics.cross_entropy import cross_entropy
from minideepseek.interop.huggingface import gradients, load
from minideepseek.interop.safetensors import CheckpointError
from minideepseek.model.transformer import IGNORE, next_token_targets, trainable, transformer

VALUE = 1e-10            # largest error of a logit, or of a loss in nats
GRADIENT = 1e-6          # largest error of a gradient, relative to (largest entry of the tensor + 1e-6): stored in float32


class Line(NamedTuple):
    """One comparison. error: absolute for values, relative for gradients."""
    name: str            # logits, loss, grad/<checkpoint name>
    error: float
    tolerance: float

    @property
    def right(self):
        return self.error <= self.tolerance          # nan is not


def parity(folder):
    """Compare a checkpoint folder with the golden.npz in it; return the Lines.

    golden.npz: ids (B, T); and what the public code computed from them in float64: logits, loss, and
    grad/<checkpoint name> in float32 for every weight. What it does not hold is not compared.
    Raises CheckpointError when the folder cannot be loaded or holds no usable golden.npz.
    """
    golden = read_golden(Path(folder) / "golden.npz")
    config, weights = load(folder, np.float64)
    trained, ids = trainable(weights), golden["ids"]
    with Tape() as tape:
        out = transformer(ids, trained, config)
        loss = cross_entropy(out.logits, next_token_targets(ids), ignore_index=IGNORE)
    tape.backward(loss)
    values = {"logits": out.logits.data, "loss": loss.data}
    values |= {f"grad/{name}": gradient for name, gradient in gradients(trained).items()}
    return [compare(name, values.get(name), expected) for name, expected in golden.items() if name in values or name.startswith("grad/")]


def compare(name, ours, expected):
    """One Line; a value we lack, or of another shape, is wrong by infinity."""
    is_gradient = "grad/" in name
    tolerance = GRADIENT if is_gradient else VALUE
    if ours is None or ours.shape != expected.shape:
        return Line(name, np.inf, tolerance)
    error = np.abs(ours - expected.astype(np.float64)).max(initial=0)
    return Line(name, float(error / (np.abs(expected).max(initial=0) + 1e-6)) if is_gradient else float(error), tolerance)


def read_golden(path):
    """The arrays of a golden.npz. Raises CheckpointError when there is none, or it holds no ids."""
    try:
        with np.load(path) as file:
            golden = dict(file)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is not a golden file: {error}") from None
    if "ids" not in golden:
        raise CheckpointError(f"{path} holds no ids")
    return golden


def report(folder, *, every=False):
    """Print the comparison; return 0 when everything agrees, else 1. every: a line for each gradient, not the worst only."""
    lines = parity(folder)
    slopes = [line for line in lines if "grad/" in line.name]
    print(f"{folder}: largest error against the public implementation in float64")
    for line in lines:
        if every or line not in slopes or not line.right:
            print(f"  {line.name:20s} {line.error:.0e}" + ("" if line.right else f"   WRONG: beyond {line.tolerance:.0e}"))
    if slopes:
        worst = max(slopes, key=lambda line: line.error)
        print(f"  {f'{len(slopes)} gradients':20s} {worst.error:.0e}   worst: {worst.name}")
    return int(not all(line.right for line in lines))


def demo():
    """A comparison by hand, and a folder that is not there."""
    line = compare("grad/W", np.array([1.0, 2.0]), np.array([1.0, 2.000001]))
    print("shapes    a Line compares two arrays of one shape; another shape is wrong by", compare("logits", np.zeros(2), np.zeros(3)).error)
    print(f"by hand   2 for 2.000001, relative to the largest entry: {line.error:.1e}, right: {line.right}")
    nan = compare("loss", np.array(np.nan), np.array(1.0))
    try:
        parity(Path(tempfile.gettempdir(), "no such folder"))
    except CheckpointError as error:
        refused = "is not a golden file" in str(error)
    print(f"claim     nan is not right: {not nan.right}; a folder without golden.npz is refused: {refused}")
    assert line.right and not nan.right and refused


if __name__ == "__main__":
    from minideepseek.interop.parity import demo  # the imported copy, so that every name exists once
    demo()
