"""How should the load of the experts be balanced? Seven ways, three seeds each, on the town text.

    python examples/balance_experiment.py [--out examples/balance_experiment.csv] [--plot FILE.png]

`micro` models without multi-token prediction: no balancing; the auxiliary (sequence-wise) loss alone, weak and strong;
the selection bias alone at three speeds; the bias with the sequence-wise loss beside it, as V3 has it. One after
another, about a quarter of an hour on 2 cores. Rows that are in the CSV are not run again.

Columns: bits per byte above the floor on held-out stories; MaxVio (by how much the busiest expert exceeds its due) of all
held-out tokens together and of a training batch, mean over the last tenth of the steps, both averaged over layers;
experts of all layers with less than a tenth of their due on the held-out text. The steps of seed 0 go to *_steps.csv:
MaxVio of the batch, and load and bias of each expert of the first layer that has experts.
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
from pathlib import Path

import numpy as np

from minideepseek.moe.bias_balance import max_violation
from minideepseek.plots.canvas import panels
from minideepseek.plots.experts import bias_trajectories, load_over_training, violation_curves
from minideepseek.training import pretrain
from minideepseek.training.data import bits_per_byte
from minideepseek.training.experiment import put, spread, table
from minideepseek.training.recipe import recipe
from minideepseek.training.step import expert_blocks, held_out_nats

WAYS = {
    "none": {"balance": "none"},
    "aux loss 0.001": {"balance": "aux", "balance_weight": 0.001},
    "aux loss 0.01": {"balance": "aux", "balance_weight": 0.01},
    "bias 0.001": {"gamma": 0.001, "balance_weight": 0.0},
    "bias 0.01": {"gamma": 0.01, "balance_weight": 0.0},
    "bias 0.1": {"gamma": 0.1, "balance_weight": 0.0},
    "bias 0.01 + loss 0.0001": {"gamma": 0.01, "balance_weight": 0.0001},
}
SEEDS = (0, 1, 2)
COLUMNS = ("way", "seed", "above_floor", "max_violation_held_out", "max_violation_batch", "dead_experts")
EVERY = 5                                                # steps between two rows of the steps' table


def one(way, seed, steps_of):
    """Train one model; the values of its row. Its steps go to the file `steps_of` when there is one."""
    violations, steps = [], []

    def watch(step, report):
        violations.append(statistics.mean(report.violations))
        if step % EVERY == 0:
            bias = expert_blocks(run.weights)[0].b_select        # none without the bias rule
            steps.append([step, f"{violations[-1]:.4f}", *report.counts[0], *(np.zeros(len(report.counts[0])) if bias is None else bias.round(4))])

    with tempfile.TemporaryDirectory() as parent:
        run = pretrain.begin(Path(parent, "run"), dataclasses.replace(recipe("micro"), n_mtp=0, seed=seed, **WAYS[way]))
        pretrain.train(run, say=lambda line: None, watch=watch)
    nats, counts = held_out_nats(run.data.held_tokens, run.data.held_targets, run.weights, run.config)
    if steps_of:
        put(steps_of, [way], steps)
    return (bits_per_byte(nats[0], run.data.held_bytes) - run.data.floor, statistics.mean(map(max_violation, counts)),
            statistics.mean(violations[-len(violations) // 10:]), sum(int((count < count.mean() / 10).sum()) for count in counts))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=str(Path(__file__).with_suffix(".csv")))
    parser.add_argument("--plot", metavar="FILE.png")
    options = parser.parse_args()
    out = Path(options.out)
    steps_of = out.with_name(f"{out.stem}_steps.csv")
    rows = table(out, COLUMNS, [(way, seed) for seed in SEEDS for way in WAYS], lambda way, seed: one(way, seed, steps_of if seed == 0 else None))
    print(f"\n{'median (range) of 3 seeds':24s} {'above the floor':>24s} {'MaxVio held-out':>24s} {'MaxVio of a batch':>24s} {'dead experts':>14s}")
    for way in WAYS:
        mine = [row for row in rows if row["way"] == way]
        print(f"{way:25s}" + "".join(f"{spread(mine, name):>25s}" for name in COLUMNS[2:5]) + f"{'  '.join(row['dead_experts'] for row in mine):>15s}")
    if options.plot:
        draw(options.plot, steps_of)
    return 0


def draw(path, steps_of):
    """MaxVio of every way, the loads of two of them, and the biases at the three speeds; seed 0."""
    with open(steps_of, newline="") as file:
        lines = [(way, np.array(values, float)) for way, *values in csv.reader(file)]
    found = {way: np.array([values for name, values in lines if name == way]) for way in WAYS}      # step, MaxVio, loads, biases
    E = (found["none"].shape[1] - 2) // 2

    def titled(draw_one, way, columns):
        def on(ax):
            draw_one(found[way][:, 0], found[way][:, columns], ax=ax)
            ax.set_title(way)
        return on

    loads, biases = slice(2, 2 + E), slice(2 + E, None)
    panels(path, lambda ax: violation_curves(found["none"][:, 0], {way: found[way][:, 1] for way in WAYS}, ax=ax),
           *[titled(load_over_training, way, loads) for way in ("none", "aux loss 0.01", "bias 0.01")],
           *[titled(bias_trajectories, way, biases) for way in ("bias 0.01", "bias 0.1")])


if __name__ == "__main__":
    raise SystemExit(main())
