"""The rungs of the attention ladder as models: MHA, GQA, MQA and MLA at equal parameters, on the town text.

    python examples/attention_ladder.py [--out examples/attention_ladder.csv] [--plot FILE.png]

Four `micro` models that differ in their attention only; the width of the experts is chosen so that all have as many
weights as the one with latent attention. Three seeds each, about ten minutes on 2 cores. A row is written as soon as
its run ends; rows that are there are not run again.

Columns: weights of the main model; numbers that one token leaves in the caches of all layers; bits per byte above the
floor on held-out stories; milliseconds per token when a text of 200 tokens is recomputed from the start for each of its
last 20 (the same for all kinds: only latent attention has a cache here, see decode_cached_ms).
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

from minideepseek.model.count import cache_bytes_per_token, total
from minideepseek.model.generate import generate
from minideepseek.model.presets import PRESETS, preset
from minideepseek.plots.canvas import BLUE, GREEN, ORANGE, new_axes, save
from minideepseek.training import pretrain
from minideepseek.training.experiment import spread, table
from minideepseek.training.recipe import recipe

KINDS = {"mha": None, "gqa": 2, "mqa": None, "mla": None}
SEEDS = (0, 1, 2)
COLUMNS = ("attention", "seed", "weights", "cached_numbers", "above_floor", "decode_ms", "decode_cached_ms")


def ladder_model(kind):
    """The micro model with another attention, its experts as wide as makes its size nearest to that of latent attention."""
    base = preset("micro")
    models = [dataclasses.replace(base, attention=kind, n_kv_heads=KINDS[kind], d_expert=width) for width in range(16, 49)]
    return min(models, key=lambda model: abs(total(model) - total(base)))


def decode_seconds(run, use_cache):
    """Seconds per token for the last 20 of 200."""
    prompt = run.data.ids[:180]
    began = time.perf_counter()
    list(generate(prompt, run.weights, run.config, max_new_tokens=20, use_cache=use_cache))
    return (time.perf_counter() - began) / 20


def one(kind, seed):
    """Train one kind with one seed; the values of its row."""
    PRESETS[f"ladder {kind}"] = ladder_model(kind)
    chosen = dataclasses.replace(recipe("micro"), model=f"ladder {kind}", attention=kind, seed=seed)
    with tempfile.TemporaryDirectory() as parent:
        run = pretrain.begin(Path(parent, "run"), chosen)
        pretrain.train(run, say=lambda line: None)
        with open(run.folder / "log.csv", newline="") as file:
            above = [row["above_floor"] for row in csv.DictReader(file)][-1]
    cached = decode_seconds(run, True) * 1e3 if kind == "mla" else float("nan")
    return total(run.config), cache_bytes_per_token(run.config, 1), float(above), decode_seconds(run, False) * 1e3, cached


def draw(path, rows):
    """Loss above the floor against what a token leaves in the cache."""
    ax = new_axes(size=(6, 4))[0]
    for kind, colour in zip(KINDS, (BLUE, ORANGE, GREEN, "#D55E00")):
        mine = [row for row in rows if row["attention"] == kind]
        ax.plot([float(row["cached_numbers"]) for row in mine], [float(row["above_floor"]) for row in mine], "o", color=colour, label=kind)
    ax.set_xscale("log")
    ax.set_xlabel("numbers in the cache, per token, all layers")
    ax.set_ylabel("held-out loss above the floor (bits per byte)")
    ax.legend(title="three seeds each")
    save(ax, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=str(Path(__file__).with_suffix(".csv")))
    parser.add_argument("--plot", metavar="FILE.png")
    options = parser.parse_args()
    rows = table(options.out, COLUMNS, [(kind, seed) for seed in SEEDS for kind in KINDS], one)
    print(f"\n{'attention':10s} {'weights':>9s} {'cached numbers':>15s} {'above the floor (range)':>26s} {'ms/token, no cache':>19s} {'with':>6s}")
    for kind in KINDS:
        mine = [row for row in rows if row["attention"] == kind]
        middle = lambda name: statistics.median(float(row[name]) for row in mine)
        print(f"{kind:10s} {int(mine[0]['weights']):9,d} {int(mine[0]['cached_numbers']):15d} {spread(mine, 'above_floor'):>26s} "
              f"{middle('decode_ms'):19.1f} {middle('decode_cached_ms'):6.1f}")
    if options.plot:
        draw(options.plot, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
