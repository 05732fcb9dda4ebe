"""Checkpoints of a run: everything it needs to go on as if it had never stopped, in one file, whole or not at all.

Derivation: whiteboard/training/checkpoint.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minideepseek.interop.safetensors import CheckpointError, SafeTensors, sync_folder, write

FORMAT = 1
SIGNED = ("minideepseek", "step", "facts", "machine")          # what the checksum covers beside the arrays
NAME, PREVIOUS = "checkpoint.safetensors", "checkpoint.previous.safetensors"


class Checkpoint(NamedTuple):
    """What is saved."""
    step: int                # steps done: the number of the next one
    arrays: dict             # {name: array}: weights, selection biases, moments
    facts: dict              # configuration, recipe, tokenizer: anything JSON can say


def save_checkpoint(folder, checkpoint):
    """Write folder/checkpoint.safetensors; the one that stood there becomes checkpoint.previous.safetensors.

    At every moment one of the two is whole: the new file is written beside, flushed to disk, and renamed.
    Raises OSError for a full disk or a folder that cannot be written; the old files stand as they were.
    """
    path, previous = Path(folder) / NAME, Path(folder) / PREVIOUS
    facts = json.dumps(checkpoint.facts, sort_keys=True)
    metadata = {"minideepseek": str(FORMAT), "step": str(checkpoint.step), "facts": facts, "machine": fingerprint()}
    metadata["sha256"] = checksum(metadata, checkpoint.arrays)
    new = path.with_name(f"{NAME}.new")
    for left_over in path.parent.glob(f".{NAME}.new.*.tmp"):       # of a save that was killed
        left_over.unlink(missing_ok=True)
    write(new, checkpoint.arrays, metadata)
    if path.exists():
        aside = path.with_name(f"{PREVIOUS}.new")
        aside.unlink(missing_ok=True)
        try:
            os.link(path, aside)                       # a second name for the old file: it is never missing
        except OSError:
            shutil.copyfile(path, aside)
        os.replace(aside, previous)
        aside.unlink(missing_ok=True)                  # two names of one file: then renaming does nothing
    os.replace(new, path)
    sync_folder(path.parent)


def load_checkpoint(path):
    """Read a checkpoint, in full, and check every byte of it.

    path: a run folder, or a file
    Raises CheckpointError for a file that is damaged, no checkpoint, or of a newer format; it names the previous
    checkpoint when there is one. FileNotFoundError when there is none.
    """
    path = Path(path)
    if path.is_dir():
        path = path / NAME
    try:
        tensors = SafeTensors(path)
        meta = tensors.metadata
        if not {*SIGNED, "sha256"} <= meta.keys() or not re.fullmatch("[1-9][0-9]{0,8}", meta["minideepseek"]) or not re.fullmatch("[0-9]{1,18}", meta["step"]):
            raise CheckpointError(f"{path} is not a checkpoint of a run")
        if int(meta["minideepseek"]) > FORMAT:
            raise CheckpointError(f"{path} has format {meta['minideepseek']}, this program knows up to {FORMAT}: update it")
        arrays = {name: np.array(array) for name, array in tensors.items()}
        if checksum(meta, arrays) != meta["sha256"]:
            raise CheckpointError(f"{path} is damaged: its checksum does not fit")
        return Checkpoint(int(meta["step"]), arrays, json.loads(meta["facts"]))
    except CheckpointError as error:
        previous = path.with_name(PREVIOUS)
        hint = f"; the one before is {previous}: rename it to {NAME} to go on from there" if path.name == NAME and previous.exists() else ""
        raise CheckpointError(f"{error}{hint}") from None


def checksum(metadata, arrays):
    """SHA-256 over the metadata and every array with its name, dtype and shape."""
    digest = hashlib.sha256("\n".join(metadata[name] for name in SIGNED).encode())
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))       # as bytes: bfloat16 has no buffer of its own
    return digest.hexdigest()


def fingerprint():
    """What decides the last bits of a float: bitwise resume holds on the same machine with the same number of threads."""
    threads = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count())
    return f"{platform.machine()}, {platform.system()}, numpy {np.__version__}, {threads} threads"


def demo():
    """Saved twice, read back, and damaged by one bit."""
    with tempfile.TemporaryDirectory() as folder:
        weights = {"W": np.arange(6, dtype=np.float32).reshape(2, 3)}
        for step in (10, 20):
            save_checkpoint(folder, Checkpoint(step, weights, {"recipe": {"seed": 0}}))
        back = load_checkpoint(folder)
        print("shapes   ", sorted(os.listdir(folder)), f"step {back.step}, W {back.arrays['W'].shape}")
        path = Path(folder, NAME)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        refused = False
        try:
            load_checkpoint(folder)
        except CheckpointError as error:
            refused = "damaged" in str(error) and PREVIOUS in str(error)
            print("by hand  ", str(error).replace(folder, "RUN"))
        old = load_checkpoint(Path(folder, PREVIOUS))
    print(f"claim     one wrong bit is noticed: {refused}; the one before is whole, step {old.step}")
    assert refused and old.step == 10 and back.step == 20 and np.array_equal(back.arrays["W"], weights["W"])


if __name__ == "__main__":
    from minideepseek.training.checkpoint import demo  # the imported copy, so that every name exists once
    demo()
