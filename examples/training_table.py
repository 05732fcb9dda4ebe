"""What does each part of the recipe do? The tiny preset three times, and micro runs with one thing changed.

    python examples/training_table.py [--out examples/training_table.csv]

Runs of the town text, three seeds each: `tiny` as it is; `micro` as it is, without multi-token prediction, without any
balancing, and with the auxiliary loss (weight 0.01) in place of the selection bias. One after another, about a quarter
of an hour on 2 cores. A row is written as soon as its run ends; rows that are there are not run again.

Columns: bits per byte above the floor on held-out stories at the end; MaxVio of the training batches (mean of the last
tenth of the log) and of all held-out tokens together; seconds.
"""
import os
import sys

sys.path[0:1] = [os.path.abspath(__file__ + "/../..")]   # run as a script: take the package from this repository
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")       # before NumPy comes: the pieces of a batch run side by side instead

import argparse
import csv
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

from minideepseek.moe.bias_balance import max_violation
from minideepseek.training import pretrain
from minideepseek.training.experiment import spread, table
from minideepseek.training.recipe import recipe
from minideepseek.training.step import held_out_nats

VARIANTS = {
    "tiny": ("tiny", {}),
    "micro": ("micro", {}),
    "micro, no MTP": ("micro", {"n_mtp": 0}),
    "micro, no balancing": ("micro", {"balance": "none"}),
    "micro, auxiliary loss 0.01": ("micro", {"balance": "aux", "balance_weight": 0.01}),
}
SEEDS = (0, 1, 2)
COLUMNS = ("variant", "seed", "above_floor", "max_violation_batch", "max_violation_held_out", "seconds")


def one(variant, seed):
    """Train one variant with one seed; the values of its row."""
    preset, changes = VARIANTS[variant]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as parent:
        run = pretrain.begin(Path(parent, "run"), dataclasses.replace(recipe(preset), seed=seed, **changes))
        pretrain.train(run, say=lambda line: None)
        seconds = time.perf_counter() - began
        with open(run.folder / "log.csv", newline="") as file:
            rows = list(csv.DictReader(file))
    last = [float(row["max_violation"]) for row in rows[-max(len(rows) // 10, 1):]]
    _, counts = held_out_nats(run.data.held_tokens, run.data.held_targets, run.weights, run.config)
    return float(rows[-1]["above_floor"]), statistics.mean(last), statistics.mean(map(max_violation, counts)), seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=str(Path(__file__).with_suffix(".csv")))
    rows = table(parser.parse_args().out, COLUMNS, [(variant, seed) for seed in SEEDS for variant in VARIANTS], one)
    print(f"\n{'median (range) of 3 seeds':28s}" + "".join(f"{name:>28s}" for name in COLUMNS[2:]))
    for variant in VARIANTS:
        mine = [row for row in rows if row["variant"] == variant]
        print(f"{variant:28s}" + "".join(f"{spread(mine, name):>28s}" for name in COLUMNS[2:]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
