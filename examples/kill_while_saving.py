"""Kill a process again and again while it saves checkpoints, and look whether a whole one is always there.

    python examples/kill_while_saving.py [--cycles 200] [--seed 0]

A child process saves two contents in turn, 3 MB each, as fast as it can, and says so after each save. After a random
moment it gets SIGKILL, which no program can catch. What must hold then: the checkpoint loads, all its checks pass, its
content is that of its step, and its step is the last one announced or the one after. The one before is whole too. The
next child goes on in the same folder, over whatever the dead one left lying about.
A kill is no power cut: the system still writes out what it was given. The order of fsync and rename serves that case.
"""
if not __package__:  # run as a script: take the package from this repository
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../..")]

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from minideepseek.training.checkpoint import NAME, PREVIOUS, Checkpoint, load_checkpoint, save_checkpoint

SIZE = 384 * 1024        # numbers in an array; two arrays of float32: 3 MB
LONGEST = 0.15           # seconds that a child saves at most


def content(step):
    """The checkpoint of a step: even and odd ones differ in every number."""
    W = np.arange(SIZE, dtype=np.float32) * (1 if step % 2 else -1) + 0.5
    return Checkpoint(step, {"weights.W": W, "m.W": W / 2}, {"parity": step % 2})


def save_for_ever(folder):
    """What a child does. It prints the number of every step that has been saved."""
    try:
        step = load_checkpoint(folder).step
    except FileNotFoundError:
        step = 0
    contents = [content(0), content(1)]
    print("begins", flush=True)
    while True:
        step += 1
        save_checkpoint(folder, contents[step % 2]._replace(step=step))
        print(step, flush=True)


def kill_one(folder, seconds):
    """Start a child, kill it after so many seconds of saving; the last step it announced, 0 for none."""
    child = subprocess.Popen([sys.executable, __file__, "--child", str(folder)], stdout=subprocess.PIPE, text=True)
    begins = child.stdout.readline()
    time.sleep(seconds)
    child.kill()
    said = child.stdout.read().split("\n")[:-1]                 # a number without its newline was not announced
    child.stdout.close()
    child.wait()
    if begins != "begins\n" or child.returncode != -9:
        raise SystemExit(f"the child did not live long enough to be killed: exit code {child.returncode}")
    return int(said[-1]) if said else 0


def where(folder):
    """Within which part of a save the child died, by what it left."""
    if list(folder.glob(f".{NAME}.new.*.tmp")):
        return "writing the new file"
    if not (folder / f"{NAME}.new").exists():
        return "between two saves, or the first words of one"
    if (folder / f"{PREVIOUS}.new").exists():
        return "after the link to the old file"
    if (folder / PREVIOUS).exists() and os.path.samefile(folder / NAME, folder / PREVIOUS):
        return "between the last two renames"
    return "after the new file was complete"


def faults(folder, announced):
    """(what is wrong with the folder, in sentences; the step of its checkpoint or None), after a child that announced a step."""
    found, step = [], None
    for name, wanted in ((NAME, (announced, announced + 1)), (PREVIOUS, range(announced - 1, announced + 1))):
        path = folder / name
        if not path.exists() and announced < (1 if name == NAME else 2):
            continue                                            # the first save was not finished: there is nothing to lose yet
        try:
            checkpoint = load_checkpoint(path)
        except Exception as error:
            found.append(f"{name}: {type(error).__name__}: {error}")
            continue
        right = content(checkpoint.step)
        if checkpoint.step not in wanted:
            found.append(f"{name} is of step {checkpoint.step}, after step {announced} had been announced")
        if checkpoint.facts != right.facts or any(not np.array_equal(checkpoint.arrays[key], array) for key, array in right.arrays.items()):
            found.append(f"{name} does not hold what step {checkpoint.step} saved")
        step = checkpoint.step if name == NAME else step
    return found, step


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cycles", type=int, default=200, help="how many children are killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        save_for_ever(options.child)
    rng, places, wrong, announced, ahead, began = random.Random(options.seed), Counter(), [], 0, 0, time.time()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for cycle in range(options.cycles):
            announced = max(announced, kill_one(folder, rng.uniform(0, LONGEST)))
            places[where(folder)] += 1
            found, step = faults(folder, announced)
            wrong += [f"cycle {cycle}: {sentence}" for sentence in found]
            ahead += step is not None and step > announced
            announced = step or announced
        litter = sorted({path.name for path in folder.iterdir()} - {NAME, PREVIOUS})
        size = (folder / NAME).stat().st_size if (folder / NAME).exists() else 0
    for place, n in places.most_common():
        print(f"killed {n:4d} times {place}")
    print(f"{announced} checkpoints of {size / 1e6:.1f} MB saved; {ahead} kills came after the last rename and before the child could say so")
    print(f"left in the folder at the end beside the two: {', '.join(litter) or 'nothing'}; {time.time() - began:.0f} s")
    for sentence in wrong[:10]:
        print("FAULT", sentence)
    print(f"claim: {len(wrong)} faults in {options.cycles} kills")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
