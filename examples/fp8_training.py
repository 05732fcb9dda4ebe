"""Does training in FP8 follow training in float32? `micro` models in six precisions, three seeds each, on the town text.

    python examples/fp8_training.py [--out examples/fp8_training.csv] [--plot FILE.png]

Scaled down: tiles of 16 where DeepSeek-V3 has 128, so that matrices 64 wide have several tiles and several chunks. Equal
seeds give equal weights at the start and equal batches, so two runs differ by rounding alone, and are compared seed by
seed. `fp32, another last bit` is float32 with one weight moved by its last bit at the start: it asks whether runs drift
apart by themselves. About a quarter of an hour on 2 cores; rows that are in the CSV are not run again.

The loss of a batch is smoothed by the mean over the last 40 steps. Columns: bits per byte above the floor, held out, at
the end (evaluated in float32); and of the smoothed loss against that of fp32, over the last half of the steps, in per cent:
the mean difference, the mean of its size, its largest size. The smoothed losses go to *_steps.csv.
"""
import os
import sys

sys.path[0:1] = [os.path.abspath(__file__ + "/../..")]   # run as a script: take the package from this repository
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")       # before NumPy comes: the pieces of a batch run side by side instead

import argparse
import csv
import dataclasses
import tempfile
from pathlib import Path

import numpy as np

from minideepseek.training import pretrain
from minideepseek.training.data import bits_per_byte
from minideepseek.training.experiment import put, spread, table
from minideepseek.training.recipe import recipe
from minideepseek.training.step import held_out_nats

WAYS = {
    "fp32": {},
    "fp32, another last bit": {},
    "bf16": {"precision": "bf16"},
    "fp8": {"precision": "fp8"},
    "fp8, a scale per tensor": {"precision": "fp8", "fp8_scales": "tensor"},
    "fp8, gradients in E5M2": {"precision": "fp8", "fp8_gradients": "E5M2"},
}
SEEDS = (0, 1, 2)
WINDOW = 40                                              # steps of the mean
COLUMNS = ("seed", "way", "above_floor", "signed_percent", "mean_percent", "largest_percent")


def smoothed(losses):
    """The mean over the last WINDOW steps, from the first whole window on: (steps - WINDOW + 1,)."""
    return np.convolve(losses, np.full(WINDOW, 1 / WINDOW), mode="valid")


def one(seed, way, steps_of):
    """Train one model; the values of its row. Its smoothed losses go to the file `steps_of`, where those of fp32 are found."""
    losses = []
    with tempfile.TemporaryDirectory() as parent:
        run = pretrain.begin(Path(parent, "run"), dataclasses.replace(recipe("micro"), n_mtp=0, seed=seed, **WAYS[way]))
        if way == "fp32, another last bit":
            run.weights.E[0, 0] = np.nextafter(run.weights.E[0, 0], np.float32(np.inf))
        pretrain.train(run, say=lambda line: None, watch=lambda step, report: losses.append(report.main))
    nats, _ = held_out_nats(run.data.held_tokens, run.data.held_targets, run.weights, run.config)
    curve = smoothed(losses).round(5)                    # as the file keeps it
    put(steps_of, [seed, way], [[f"{value:.5f}" for value in curve]])
    late = 100 * (curve / curves(steps_of)[str(seed), "fp32"] - 1)[len(curve) // 2:]
    return bits_per_byte(nats[0], run.data.held_bytes) - run.data.floor, float(late.mean()), float(np.abs(late).mean()), float(np.abs(late).max())


def curves(path):
    """{(seed, way): smoothed losses} of what has been run."""
    with open(path, newline="") as file:
        return {(seed, way): np.array(values, float) for seed, way, *values in csv.reader(file)}


def draw(path, found):
    """The smoothed losses of seed 0, and how far they are from those in float32."""
    from minideepseek.plots.canvas import new_axes, save, style

    losses, errors = new_axes(1, 2)
    for n, way in enumerate(WAYS):
        curve, base = found["0", way], found["0", "fp32"]
        steps = np.arange(WINDOW, WINDOW + len(curve))
        losses.plot(steps, curve, **style(n), linewidth=1.2, label=way)
        if way != "fp32":
            errors.plot(steps, 100 * (curve / base - 1), **style(n), linewidth=1.2, label=way)
    for percent in (-0.25, 0.25):
        errors.axhline(percent, color="black", linestyle="--", linewidth=1)
    losses.set(xlabel="step", ylabel=f"loss, mean of {WINDOW} steps (nats per token)", yscale="log", title="training in six precisions, seed 0")
    errors.set(xlabel="step (dashed: V3's 0.25 %)", ylabel="loss against fp32 (%)", title="relative difference")
    losses.legend(fontsize=8)
    save(losses, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=str(Path(__file__).with_suffix(".csv")))
    parser.add_argument("--plot", metavar="FILE.png")
    options = parser.parse_args()
    out = Path(options.out)
    steps_of = out.with_name(f"{out.stem}_steps.csv")
    rows = table(out, COLUMNS, [(seed, way) for seed in SEEDS for way in WAYS], lambda seed, way: one(seed, way, steps_of))
    print(f"\n{'median (range) of 3 seeds':26s}" + "".join(f"{name:>27s}" for name in COLUMNS[2:]))
    for way in WAYS:
        print(f"{way:26s}" + "".join(f"{spread([row for row in rows if row['way'] == way], name):>27s}" for name in COLUMNS[2:]))
    held = {(row["seed"], row["way"]): float(row["above_floor"]) for row in rows}
    print("\nheld out against fp32, seed by seed, bits per byte")
    for way in WAYS:
        print(f"{way:26s}" + "".join(f"{held[str(seed), way] - held[str(seed), 'fp32']:+10.4f}" for seed in SEEDS))
    if options.plot:
        draw(options.plot, curves(steps_of))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
