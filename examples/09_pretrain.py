"""Step 9: pre-training. A small model learns the town, and we watch what it learns first.

    python examples/09_pretrain.py [--steps 250] [--keep FOLDER] [--plot FILE.png]

The text is made by known probabilities, so we know the best loss anybody can have: the floor. First the model learns
which tokens there are, then the sentences, and only late that a person who was named may be named again.
Pages: whiteboard/corpus/town.md, whiteboard/training/step.md, whiteboard/training/pretrain.md
"""
import os
import sys

sys.path[0:1] = [os.path.abspath(__file__ + "/../..")]   # run as a script: take the package from this repository
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")       # before NumPy comes: the pieces of a batch run side by side instead

import argparse
import csv
import dataclasses
import math
import shutil
import tempfile
from pathlib import Path

from minideepseek.training import pretrain
from minideepseek.training.recipe import recipe


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--keep", metavar="FOLDER", help="where to leave the run; default: it is thrown away")
    parser.add_argument("--plot", metavar="FILE.png")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as parent:
        chosen = dataclasses.replace(recipe("micro").with_steps(options.steps), evaluate_every=max(options.steps // 5, 1), evaluation_stories=48)
        run = pretrain.begin(options.keep or Path(parent, "run"), chosen)
        config, data = run.config, run.data
        print(f"A model of {config.n_layers} layers, {config.n_routed} experts, vocabulary {config.vocab_size}; {len(data.ids):,} tokens of text.")
        print(f"Floor: {data.floor:.3f} bits per byte. A story costs at least that, whoever reads it.\n")
        print("Before:", repr("".join(pretrain.story(run.weights, config, data.tokenizer, max_new_tokens=12))), "\n")
        pretrain.train(run)
        print("\nAfter:\n" + "".join(pretrain.story(run.weights, config, data.tokenizer, seed=1)))

        with open(run.folder / "log.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        held = [(int(row["step"]) + 1, float(row["above_floor"])) for row in rows if row["above_floor"]]
        first, last = rows[0], rows[-1]
        print(f"first loss {float(first['loss']):.3f} nats, ln(vocabulary) = {math.log(config.vocab_size):.3f}: a fresh model knows nothing")
        print("held-out, bits per byte above the floor: " + ", ".join(f"step {step}: {above:.3f}" for step, above in held))
        print(f"busiest expert, above its due (MaxVio): {float(first['max_violation']):.2f} at first, {float(last['max_violation']):.2f} at last")
        print("\nTo think about: which words of a story are free choices, and which could be known from what came before?")
        print("Which of the two does this model miss? Train longer (--steps 1000) and look again.")
        if options.plot:
            shutil.copy(run.folder / "curves.png", options.plot)
    learnt = held[-1][1] < held[0][1] and abs(float(first["loss"]) / math.log(config.vocab_size) - 1) < 0.02
    print(f"\nclaim     it starts from ln(vocabulary) and comes nearer to the floor: {learnt}")
    return int(not learnt)


if __name__ == "__main__":
    raise SystemExit(main())
