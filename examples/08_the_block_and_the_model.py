"""Step 8: the block and the model. One token on its way through every stage, forwards, and the gradient on its way back.

    python examples/08_the_block_and_the_model.py [--plot FILE.png]

Each layer has two branches: attention, which brings in other tokens, and a feed-forward layer, which works on each
token alone. A branch reads a normed copy of the stream and adds its answer back to it. So the stream runs through the
whole model, and everybody adds to it. The tape records every stage; here we read its records.
Pages: whiteboard/model/block.md, whiteboard/model/transformer.md, whiteboard/model/count.md, whiteboard/autograd/tape.md
"""
import os
import sys

sys.path[0:1] = [os.path.abspath(__file__ + "/../..")]   # run as a script: take the package from this repository

import argparse
import dataclasses
import math

import numpy as np

from minideepseek.autograd.params import gradients
from minideepseek.autograd.tape import Tape
from minideepseek.model.count import active, parameters, total
from minideepseek.model.presets import preset
from minideepseek.model.transformer import init, losses, next_token_targets, trainable
from minideepseek.plots.canvas import BLUE, GREEN, GREY, ORANGE
from minideepseek.tokenizer.bpe import train

SENTENCE = "Sarah visits the bank to deposit money while Zarah visits the bank to sit by the water"
BANK = 11                                                # the second one, whose way we follow
STAGES = ("norm", "attention", "add", "norm", "feed-forward", "add")     # the six records of a layer


def stages(records, n_layers):
    """[(where, what, record)] of every record of the tape."""
    where = ["start"] + [f"layer {i // 6}" for i in range(6 * n_layers)] + ["end"] * 3
    what = ["embedding", *STAGES * n_layers, "norm", "head", "loss"]
    return list(zip(where, what, records, strict=True))


def length(array, place=BANK):
    """The length of the vector of one token."""
    return float(np.linalg.norm(array[0, place]))


def draw(path, found, slopes):
    """Left: the length of the bank's vector, and of what each branch adds to it. Right: the largest gradients."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 5), width_ratios=(5, 5))
    branches = [(where, what, record) for where, what, record in found if what in ("attention", "feed-forward")]
    stream = [length(record.outputs[0].data) for _, what, record in found if what in ("embedding", "add")]
    left.plot(range(len(stream)), stream, color=GREY, marker="o", label="stream")
    for kind, color in (("attention", BLUE), ("feed-forward", ORANGE)):
        bars = [(i + 1, length(record.outputs[0].data)) for i, (_, what, record) in enumerate(branches) if what == kind]
        left.bar(*zip(*bars), color=color, label=f"added by {kind}")
    left.set_xticks(range(len(stream)), ["embedding"] + [f"{what}\n{where}" for where, what, _ in branches], fontsize=7.5)
    left.set_ylabel("length of the vector of 'bank' (no unit)")
    left.set_title("the stream, and what each branch adds to it")
    left.legend(loc="center")
    top = slopes[:12]
    colours = [GREEN if name in ("E", "W_head") else BLUE if ".attention." in name else ORANGE if ".ffn." in name else GREY for name, _ in top]
    right.barh([name for name, _ in top], [size for _, size in top], color=colours)
    right.invert_yaxis()
    right.set_xlabel("length of the gradient (nats per unit of weight)\ngreen: embedding and head; blue: attention; orange: feed-forward")
    right.set_title("where one sentence pulls hardest")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", metavar="FILE.png", help="write the picture")
    options = parser.parse_args()

    tokenizer = train((SENTENCE + "\n") * 2, 1000)       # trained on nothing else, so every word is one token
    ids = tokenizer.encode(SENTENCE)[None]               # (1, T)
    config = dataclasses.replace(preset("micro"), vocab_size=tokenizer.vocab_size, n_mtp=0)
    weights = trainable(init(config, np.random.default_rng(0), std=0.02, dtype=np.float64))
    with Tape() as tape:
        loss = losses(ids, next_token_targets(ids), weights, config)
    tape.backward(loss.main, keep=True)                  # keep: the records stay, with the gradient of every stage
    found = stages(tape.records, config.n_layers)

    print(f"1. The way of {tokenizer.token_bytes(ids[0, BANK]).decode('utf-8').strip()!r} at place {BANK} through {len(found)} stages. "
          "|y|: length of its vector after the stage; |dy|: of its gradient, coming back:")
    print("   where    stage         op             shape of all tokens      |y|       |dy|")
    for where, what, record in found:
        y = record.outputs[0]
        sizes = f"{length(y.data):8.4f}   {length(y.grad):.1e}" if y.data.ndim == 3 else f"{float(y.data):8.4f}   {float(y.grad):.1e}"
        print(f"   {where:8s} {what:13s} {record.name:14s} {y.data.shape!s:20s} {sizes}")

    branches = [record.outputs[0].data for _, what, record in found if what in ("attention", "feed-forward")]
    gap = np.abs(found[0][2].outputs[0].data + sum(branches) - loss.out.stream.data).max()
    print(f"\n2. The stream at the end is the embedding plus what the {len(branches)} branches added: difference {gap:.0e}.")

    print("\n3. Parameters: how many numbers each part holds")
    print("  ", ", ".join(f"{part} {size:,}" for part, size in parameters(config).items() if size))
    print(f"   together {total(config):,}; one token uses {active(config):,} of them")

    value, uniform = float(loss.main.data), math.log(config.vocab_size)
    print(f"\n4. A fresh model knows nothing: loss {value:.4f} nats per token; ln({config.vocab_size}) = {uniform:.4f}, as from a fair die with so many sides.")

    grads = gradients(weights)
    slopes = sorted([(name, float(np.linalg.norm(gradient))) for name, gradient in grads.items()], key=lambda pair: -pair[1])
    print("\n5. Where the gradient is large, and where it is small:")
    print("   largest " + ", ".join(f"{name} {size:.2f}" for name, size in slopes[:3]) + ", smallest {} {:.5f}".format(*slopes[-1]))
    print("   attention of layer 0: " + ", ".join(f"{name} {dict(slopes)[f'layers.0.attention.{name}']:.4f}" for name in ("W_UV", "W_O", "W_UQ", "W_UK")))
    rows = int(grads["E"].any(axis=1).sum())             # the last token is read at its own place only, and that is not scored
    experts = [grads[f"layers.{i}.ffn.W_down"].any(axis=(1, 2)) for i in range(config.n_dense_layers, config.n_layers)]
    print(f"   exactly zero: {config.vocab_size - rows} of {config.vocab_size} rows of the embedding (tokens that no scored place has read), "
          f"and {sum((~used).sum() for used in experts)} of {sum(map(len, experts))} experts (visited by nobody)")

    if options.plot:
        draw(options.plot, found, slopes)
    print("\nTo think about: the norms come before each branch, never in the stream. What would a norm in the stream do to the sum in 2?")
    print("Why is the gradient of W_UQ and W_UK, which make queries and keys, so small in a fresh model? (next: 09_pretrain.py)")
    right = gap < 1e-12 and abs(value / uniform - 1) < 0.02 and len(found) == 1 + 6 * config.n_layers + 3 and rows == len(np.unique(ids[0, :-1]))
    print(f"\nclaim     the stream is the sum of its branches: {gap:.0e}; the first loss is ln(vocabulary) within {abs(value / uniform - 1):.2%}: {right}")
    return int(not right)


if __name__ == "__main__":
    raise SystemExit(main())
