"""Parity: the same checkpoint here and in the public implementation, number against number.

Derivation: whiteboard/interop/parity.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minideepseek.autograd.tape import Tape
from minideepseek.interop.huggingface import gradients, load
from minideepseek.interop.safetensors import CheckpointError
from minideepseek.model.generate import generate
from minideepseek.model.transformer import check_ids, losses, next_token_targets, trainable

VALUE = 1e-10            # largest error of a logit, or of a loss in nats
GRADIENT = 1e-6          # largest error of a gradient, relative to (largest entry of the tensor + 1e-6): stored in float32
MTP_WEIGHT = 0.3         # of the golden total loss
PROMPT = 7               # ids of `greedy` that were given


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

    golden.npz: ids (B, T), and what the public code computed from them in float64: logits, loss, grad/<checkpoint name>
    in float32 for every weight; greedy, a prompt of 7 ids and what follows it; of prediction modules final_hidden,
    mtp/<k>/logits, mtp/<k>/loss, mtp/total_loss and mtp/grad/<checkpoint name>. What it does not hold is not compared.
    An array of another name is compared with nothing, and wrong.
    Raises CheckpointError when the folder cannot be loaded, or golden.npz holds nothing to compare or ids the model refuses.
    """
    golden = read_golden(Path(folder) / "golden.npz")
    config, weights = load(folder, np.float64)
    ids = golden.pop("ids")
    try:
        check_ids(ids, config)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    ours = {**_main(ids, weights, config), **_further(ids, weights, config)}
    if "greedy" in golden:
        prompt, length = golden["greedy"][0, :PROMPT], golden["greedy"].shape[1]
        ours["greedy"] = np.array([[*prompt, *generate(prompt, weights, config, max_new_tokens=length - PROMPT)]])
    return [compare(name, ours.get(name), expected) for name, expected in golden.items()]


def _main(ids, weights, config):
    """The main model alone: its logits, its loss, and the gradients of that loss."""
    trained = trainable(weights._replace(mtp=()))
    with Tape() as tape:
        found = losses(ids, next_token_targets(ids), trained, config)
    tape.backward(found.main)
    values = {"logits": found.out.logits.data, "loss": found.main.data, "final_hidden": found.out.hidden.data}
    return values | {f"grad/{name}": gradient for name, gradient in gradients(trained).items()}


def _further(ids, weights, config):
    """The prediction modules, and the gradients of the loss of all together."""
    if not weights.mtp:
        return {}
    trained = trainable(weights)
    with Tape() as tape:
        found = losses(ids, next_token_targets(ids), trained, config)
    seeds = found.seeds(MTP_WEIGHT)
    tape.backward(seeds)
    values = {"mtp/total_loss": np.asarray(sum(seed * loss.data for loss, seed in seeds.items()))}
    for k, (prediction, loss) in enumerate(zip(found.predictions, found.mtp)):
        values |= {f"mtp/{k}/logits": prediction.logits.data, f"mtp/{k}/loss": loss.data}
    return values | {f"mtp/grad/{name}": gradient for name, gradient in gradients(trained).items()}


def compare(name, ours, expected):
    """One Line; a value we lack, or of another shape, is wrong by infinity; of greedy tokens the error is how many differ."""
    is_gradient = "grad/" in name
    tolerance = 0 if name == "greedy" else GRADIENT if is_gradient else VALUE
    if ours is None or ours.shape != expected.shape:
        return Line(name, np.inf, tolerance)
    if name == "greedy":
        return Line(name, float((ours != expected).sum()), tolerance)
    error = np.abs(ours - expected.astype(np.float64)).max(initial=0)
    return Line(name, float(error / (np.abs(expected).max(initial=0) + 1e-6)) if is_gradient else float(error), tolerance)


def read_golden(path):
    """The arrays of a golden.npz. Raises CheckpointError when there is none, or it holds nothing to compare."""
    try:
        with np.load(path) as file:
            golden = dict(file)
    except Exception as error:                       # whatever NumPy says of a file that is none
        raise CheckpointError(f"{path} is not a golden file: {error}") from None
    if "ids" not in golden or len(golden) == 1:
        raise CheckpointError(f"{path} holds {', '.join(golden) or 'nothing'}: it needs ids, and something to compare")
    return golden


def report(folders, *, every=False):
    """Print one row of largest errors per folder, and a line for what is wrong; return 0 when everything agrees, else 1.

    every: a line for each comparison.
    """
    wrong = 0
    for folder in folders:
        lines = parity(folder)
        worst = {}
        for line in lines:
            worst[_kind(line.name)] = float(np.maximum(worst.get(_kind(line.name), 0.0), line.error))      # nan wins
        print(folder, *[f"{kind} {_text(kind, error)}" for kind, error in worst.items()], sep="  ")
        for line in lines:
            if every or not line.right:
                print(f"  {line.name:60s} {_text(line.name, line.error)}" + ("" if line.right else f"   WRONG: beyond {line.tolerance:.0e}"))
        wrong += not all(line.right for line in lines)
    return int(wrong > 0)


def _text(kind, error):
    return f"{error:.0f} differ" if kind == "greedy" else f"{error:.0e}"


def _kind(name):
    """The column of a comparison: 'mtp/1/logits' is one of 'mtp logits', 'grad/...' of 'gradients'."""
    module, rest = ("mtp ", name.removeprefix("mtp/")) if name.startswith("mtp/") else ("", name)
    return module + ("gradients" if rest.startswith("grad/") else rest.split("/")[-1].removeprefix("total_").replace("final_", ""))


def demo():
    """A comparison by hand, and a folder that is not there."""
    line = compare("grad/W", np.array([1.0, 2.0]), np.array([1.0, 2.000001]))
    print("shapes    a Line compares two arrays of one shape; another shape is wrong by", compare("logits", np.zeros(2), np.zeros(3)).error)
    print(f"by hand   2 for 2.000001, relative to the largest entry: {line.error:.1e}, right: {line.right}")
    nan = compare("loss", np.array(np.nan), np.array(1.0))
    refused = False
    try:
        parity(Path(tempfile.gettempdir(), "no such folder"))
    except CheckpointError as error:
        refused = "is not a golden file" in str(error)
    print(f"claim     nan is not right: {not nan.right}; a folder without golden.npz is refused: {refused}")
    assert line.right and not nan.right and refused


if __name__ == "__main__":
    from minideepseek.interop.parity import demo  # the imported copy, so that every name exists once
    demo()
