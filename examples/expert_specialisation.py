"""Which experts serve which kinds of token? Three ways of balancing, three seeds each, on the town text.

    python examples/expert_specialisation.py [--out examples/expert_specialisation.csv] [--plot FILE.png]

`micro` models without multi-token prediction, five minutes on 2 cores. Every held-out token is of a kind that is plain
to see: a person, a place, a thing, a colour, what they do, another word, the end of a sentence. The table of kinds
against experts is the picture (seed 0, with the bias rule); one number for a table is how much the expert tells of the
kind: their mutual information, in bits. A token counts once for each of its two experts.

Columns: that number for each layer with experts; the same when the kinds are dealt out to the tokens at random (what
chance alone would show); the entropy of the kinds, which is the most it could be; MaxVio, mean of the layers.
"""
import os
import sys

sys.path[0:1] = [os.path.abspath(__file__ + "/../..")]   # run as a script: take the package from this repository
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")       # before NumPy comes: the pieces of a batch run side by side instead

import argparse
import dataclasses
import re
import statistics
import tempfile
from pathlib import Path

import numpy as np

from minideepseek.corpus.batches import IGNORE
from minideepseek.corpus.town import COLOURS, DROPS, MOVES, PEOPLE, PLACES, TAKES, THINGS
from minideepseek.model.presets import preset
from minideepseek.model.transformer import transformer
from minideepseek.moe.bias_balance import expert_counts, max_violation
from minideepseek.plots.canvas import panels
from minideepseek.plots.experts import specialisation
from minideepseek.training import pretrain
from minideepseek.training.experiment import spread, table
from minideepseek.training.recipe import recipe

DOES = {word for phrase in MOVES + TAKES + DROPS for word in phrase.split()}
KINDS = ("person", "place", "thing", "colour", "does", "other word", "end of sentence")
WORDS = dict.fromkeys(PEOPLE, 0) | dict.fromkeys(PLACES, 1) | dict.fromkeys(THINGS, 2) | dict.fromkeys(COLOURS, 3) | dict.fromkeys(DOES, 4)
WAYS = {"none": {"balance": "none"}, "aux loss 0.01": {"balance": "aux", "balance_weight": 0.01}, "bias 0.01": {"gamma": 0.01, "balance_weight": 0.0}}
SEEDS = (0, 1, 2)
TOP_K = preset("micro").top_k
COLUMNS = ("way", "seed", "bits_first_layer", "bits_last_layer", "bits_by_chance", "bits_at_most", "max_violation")


def kinds_of(row, tokenizer):
    """The kind of each token of one text: that of the word in which its last letter stands."""
    pieces = [tokenizer.token_bytes(int(id)).decode("latin-1") for id in row]
    text, ends = "".join(pieces), np.cumsum([len(piece) for piece in pieces])
    kind_at = np.full(len(text), 6)                                # spaces and stops; overwritten where there are words
    for word in re.finditer(r"[A-Za-z]+", text):
        kind_at[word.start():word.end()] = WORDS.get(word[0], 5)
    return kind_at[ends - 1]


def count(run):
    """How many tokens of each kind each expert serves, for each layer: int (layers, kinds, E)."""
    tokens, targets = run.data.held_tokens, run.data.held_targets
    used = targets != IGNORE
    used[:, 0] = False                                             # the token that begins a text is of no kind
    kinds = np.concatenate([kinds_of(row[1:][mask[1:]], run.data.tokenizer) for row, mask in zip(tokens, used)])
    routed = [route for route in transformer(tokens, run.weights, run.config).routed if route is not None]
    E = run.config.n_routed
    return np.array([[expert_counts(route.chosen.data[used][kinds == kind], E) for kind in range(len(KINDS))] for route in routed])


def mutual_information(counts):
    """sum_ij p_ij log2(p_ij / (p_i p_j)), in bits, of a table of counts."""
    p = counts / counts.sum()
    alone = p.sum(axis=1, keepdims=True) * p.sum(axis=0, keepdims=True)
    seen = p > 0
    return float((p[seen] * np.log2(p[seen] / alone[seen])).sum())


def by_chance(counts, rng):
    """The mutual information of a table with the same sums, kinds dealt out at random; mean of 20."""
    kinds, experts = (np.repeat(np.arange(n), counts.sum(axis=axis)) for n, axis in zip(counts.shape, (1, 0)))
    tables = (np.bincount(rng.permutation(kinds) * counts.shape[1] + experts, minlength=counts.size) for _ in range(20))
    return statistics.mean(mutual_information(table.reshape(counts.shape)) for table in tables)


def one(way, seed, found):
    """Train one model; the values of its row. found: the counts of seed 0 are put there, for the picture."""
    with tempfile.TemporaryDirectory() as parent:
        run = pretrain.begin(Path(parent, "run"), dataclasses.replace(recipe("micro"), n_mtp=0, seed=seed, **WAYS[way]))
        pretrain.train(run, say=lambda line: None)
    counts = count(run)
    if seed == 0:
        found[way] = counts
    of_kinds = counts[0].sum(axis=1) / counts[0].sum()
    return (mutual_information(counts[0]), mutual_information(counts[-1]), by_chance(counts[-1], np.random.default_rng(seed)),
            -float((of_kinds * np.log2(of_kinds)).sum()), statistics.mean(max_violation(layer.sum(axis=0)) for layer in counts))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=str(Path(__file__).with_suffix(".csv")))
    parser.add_argument("--plot", metavar="FILE.png", help="write the picture; trains seed 0 with the bias rule again when its row was there")
    options = parser.parse_args()
    found = {}
    rows = table(options.out, COLUMNS, [(way, seed) for seed in SEEDS for way in WAYS], lambda way, seed: one(way, seed, found))
    print(f"\n{'median (range) of 3 seeds':26s}" + "".join(f"{name:>26s}" for name in COLUMNS[2:]))
    for way in WAYS:
        print(f"{way:26s}" + "".join(f"{spread([row for row in rows if row['way'] == way], name):>26s}" for name in COLUMNS[2:]))
    if options.plot:
        if "bias 0.01" not in found:
            one("bias 0.01", 0, found)
        panels(options.plot, *[lambda ax, counts=counts: specialisation(counts, KINDS, top_k=TOP_K, ax=ax) for counts in found["bias 0.01"]])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
