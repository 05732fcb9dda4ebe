"""Which eight bits do real tensors want? Both operands of every product of a training step, in every split of the bits.

    python examples/fp8_tuning.py [RUN] [--out examples/fp8_tuning.csv] [--plot FILE.png]

RUN is the folder of a run of `python -m minideepseek train` (its tables go there too); without one a `micro` model is
trained first. A minute on 2 cores, in two parts; rows that are in a CSV are not measured again.

(a) The operands: weights, inputs and gradients as they pass the gemm door, with a scale for the whole matrix, for each
tile of 128 (V3's, here mostly a whole row) and of 16 (V3's scaled down). Columns, medians over all products: relative error
of all entries and of the smaller half, in per cent; entries flushed to 0 and left subnormal; log2 of the crest of both; tiles
held up by the floor of 1e-4; in how many products this split is the best of the five. `times 2^20` are the same gradients, as
if the loss had been multiplied: so that no tile lies below the floor.

(b) The sums, *_sums.csv: each product in FP8, rounding alone (fp8_gemm against float32, gradients in E4M3 or in E5M2) and
what the narrow accumulator adds to it (fp8_gemm_faithful against fp8_gemm): medians of each layer, and the largest ratio of
the second to the first; then random products with K = 4096.
"""
import os
import sys

sys.path[0:1] = [os.path.abspath(__file__ + "/../..")]   # run as a script: take the package from this repository
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")       # before NumPy comes

import argparse
import dataclasses
import functools
import itertools
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minideepseek.model.presets import preset
from minideepseek.plots.canvas import panels
from minideepseek.plots.formats import error_by_split
from minideepseek.precision.formats import E4M3, E5M2
from minideepseek.precision.fp8_gemm import fp8_gemm, fp8_gemm_faithful, tiling
from minideepseek.precision.tiles import SMALLEST_AMAX, relative_error, scales
from minideepseek.precision.tuning import best, crest, smaller_half, splits, sweep
from minideepseek.tokenizer.bpe import Tokenizer
from minideepseek.training import pretrain
from minideepseek.training.checkpoint import load_checkpoint
from minideepseek.training.data import batch, text_data, town_data
from minideepseek.training.experiment import table
from minideepseek.training.mixed_precision import observe
from minideepseek.training.recipe import Recipe, recipe

LOUDER = 2.0**20
KINDS = {"weights W": ("forward", 1, 1), "inputs x": ("forward", 0, 1), "inputs x, for dW": ("dW", 0, 1),       # role, which operand, factor
         "gradients dy, for dx": ("dx", 0, 1), "gradients dy, for dW": ("dW", 1, 1),
         "dy times 2^20, for dx": ("dx", 0, LOUDER), "dy times 2^20, for dW": ("dW", 1, LOUDER)}
TILES = {"tensor": None, "128": 128, "16": 16}
COLUMNS = ("kind", "scales", "format", "error_percent", "small_percent", "flushed_percent", "subnormal_percent", "crest_log2", "small_crest_log2",
           "floor_percent", "best_of_all", "best_of_small", "products")
WAYS = {"tiles of 16": {"tile": 16}, "tiles of 128": {"tile": 128}, "one scale, never promoted": {"tile": None, "promote": None}}
RANDOM = {"random N(0,1)": np.random.Generator.standard_normal, "random U[0,1)": np.random.Generator.random}
SUMS = ("layer", "role", "way", "rounding_percent", "rounding_dy_in_E5M2_percent", "accumulator_percent", "largest_ratio", "longest_K")


class Operands(NamedTuple):
    """One product of a step."""
    layer: str
    role: str
    A: np.ndarray
    B: np.ndarray


@functools.cache
def products(folder):
    """Every product of the next step of a run, in float32: [Operands]. Without a folder, of `micro` after all its steps."""
    if folder is None:
        with tempfile.TemporaryDirectory() as parent:
            print("training a micro model")
            run = pretrain.begin(Path(parent, "run"), dataclasses.replace(recipe("micro"), n_mtp=0))
            pretrain.train(run, say=lambda line: None)
            return products(run.folder)
    checkpoint = load_checkpoint(folder)
    own, text = Recipe.from_dict(checkpoint.facts["recipe"]), checkpoint.facts["text"]
    config, weights, _ = pretrain.load_run(folder)
    tokenizer = Tokenizer.load(Path(folder) / "tokenizer.json")
    data = text_data(text["file"], own, tokenizer) if text else town_data(own, tokenizer)
    operands = []

    def keep(A, B, *, role):
        operands.append((A, B))
        return A @ B

    seen, found = observe(weights, *batch(data, own, checkpoint.step), config, keep), []
    for product, (A, B) in zip(seen, operands):
        layer = ".".join(product.weight.split(".")[:2]) if product.weight else found[-1].layer     # dW follows the dx of its layer
        found.append(Operands(layer, product.role, A, B))
    return found


@functools.cache
def measured(folder, kind, size):
    """{format: the values of its row} of one kind of operand: medians over the products of a step."""
    role, place, factor = KINDS[kind]
    block, _ = tiling(role, TILES[size], E4M3, E4M3)[place]
    matrices = [factor * (product.A, product.B)[place] for product in products(folder) if product.role == role]
    fits = [sweep(x, block) for x in matrices]
    crests = [np.log2([crest(x, block), crest(x, block, smaller_half(x))]) for x in matrices]
    floor = [100 * (scales(x, block) <= np.float32(SMALLEST_AMAX) / np.float32(E4M3.max)).mean() for x in matrices]
    winners = [[best(fit, by) for fit in fits] for by in ("error", "small")]
    return {name: (*np.median([100 * np.array(fit[name]) for fit in fits], axis=0).tolist(), *np.median(crests, axis=0).tolist(), float(np.median(floor)),
                   *[won.count(name) for won in winners], len(fits)) for name in splits()}


def summed(folder, layer, role, way):
    """The values of a row of sums: medians over the products of a layer, the largest ratio, the longest sum."""
    if layer in RANDOM:
        rng = np.random.default_rng(0)
        pairs = [[RANDOM[layer](rng, shape).astype(np.float32) for shape in ((16, 4096), (4096, 16))]]
    else:
        pairs = [(product.A, product.B) for product in products(folder) if (product.layer, product.role) == (layer, role)]
    tile, errors = WAYS[way]["tile"], []
    for A, B in pairs:
        rounded, with_E5M2 = fp8_gemm(A, B, role=role, tile=tile), fp8_gemm(A, B, role=role, tile=tile, gradient_fmt=E5M2)
        sums = fp8_gemm_faithful(A, B, role=role, **WAYS[way])
        errors.append((relative_error(A @ B, rounded), relative_error(A @ B, with_E5M2), relative_error(rounded, sums)))
    rounding, _, accumulator = np.transpose(errors)
    return *(100 * np.median(errors, axis=0)).tolist(), float((accumulator / rounding).max()), max(A.shape[1] for A, _ in pairs)


def draw(path, rows):
    """Error against the split, of all entries and the smaller half, a scale per matrix and per tile of 16."""
    def panel(ax, size, column, what):
        lines = {kind: [float(row[column]) / 100 for row in rows if (row["kind"], row["scales"]) == (kind, size)] for kind in KINDS if not kind.endswith("for dW")}
        error_by_split(list(splits()), lines, limits=(3e-3, 1.5), title=f"{what}, {'a scale per matrix' if size == 'tensor' else 'tiles of ' + size}", ax=ax)

    panels(path, *[lambda ax, size=size, column=column, what=what: panel(ax, size, column, what)
                   for column, what in (("error_percent", "all entries"), ("small_percent", "the smaller half")) for size in ("tensor", "16")])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", metavar="RUN", help="the folder of a run; default: a micro model is trained")
    parser.add_argument("--out", help="default: beside this program, or in RUN")
    parser.add_argument("--plot", metavar="FILE.png")
    options = parser.parse_args()
    out = Path(options.out or Path(options.run or Path(__file__).parent, "fp8_tuning.csv"))
    quiet = lambda line: None

    rows = table(out, COLUMNS, [(kind, size, name) for kind in KINDS for size in TILES for name in splits()],
                 lambda kind, size, name: measured(options.run, kind, size)[name], say=quiet)
    for what, column, wins, c in (("all entries", "error_percent", "best_of_all", "crest_log2"), ("the smaller half", "small_percent", "best_of_small", "small_crest_log2")):
        print(f"\n{what + ', error in per cent':36s}" + "".join(f"{name:>8s}" for name in splits()) + "   log2 c  at the floor   best in how many of the products")
        for kind, size in itertools.product(KINDS, TILES):
            group = [row for row in rows if (row["kind"], row["scales"]) == (kind, size)]
            won = ", ".join(f"{row['format']} {row[wins]}" for row in group if row[wins] != "0")
            print(f"{kind:24s} {size:11s}" + "".join(f"{float(row[column]):8.2f}" for row in group)
                  + f"{float(group[0][c]):9.1f}{float(group[0]['floor_percent']):12.0f} %   {won}")

    sums_of = out.with_name(f"{out.stem}_sums.csv")
    config = pretrain.load_run(options.run)[0] if options.run else dataclasses.replace(preset("micro"), n_mtp=0)
    layers = [f"layers.{n}" for n in range(config.n_layers)] + [f"mtp.{k}" for k in range(config.n_mtp)]
    jobs = [(layer, role, way) for layer in layers for role in ("forward", "dx", "dW") for way in WAYS] + [(name, "forward", way) for name in RANDOM for way in WAYS]
    sums = table(sums_of, SUMS, jobs, functools.partial(summed, options.run), say=quiet)
    print(f"\n{'errors in per cent, medians of a layer':50s}  rounding  dy in E5M2  accumulator  largest ratio  longest K")
    for row in sums:
        print(f"{row['layer']:14s} {row['role']:8s} {row['way']:26s}" + "".join(f"{row[name]:>{width}s}" for name, width in zip(SUMS[3:], (10, 12, 13, 15, 11))))
    if options.plot:
        draw(options.plot, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
