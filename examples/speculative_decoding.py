"""How much faster is decoding when the prediction module drafts? Plain and speculative decoding of one trained model, in turns.

    python examples/speculative_decoding.py [RUN] [--stories 30] [--plot FILE.png]

RUN is a folder of `python -m minideepseek train`; without one, `micro` is trained first, which takes under a minute. Stories are told
freely, each way the same number; greedy decoding would tell one story again and again, so each begins with an opening of
its own. Depth 1 uses the module as it was trained; beyond, the same module goes on from its own output.

Acceptance counts the drafts the model could judge: those before the first rejection, and that one. Tokens per second are the median over stories.
"""
import os
import sys

sys.path[0:1] = [os.path.abspath(__file__ + "/../..")]   # run as a script: take the package from this repository
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from minideepseek.corpus.town import stories
from minideepseek.model.generate import generate
from minideepseek.model.speculative import expected_tokens, speculate
from minideepseek.training import pretrain
from minideepseek.training.data import BEGIN
from minideepseek.training.recipe import recipe

WAYS = [(temperature, depth) for temperature in (0.0, 1.0) for depth in (0, 1, 2, 3)]
TOKENS = 120                                             # of a story, at most


def tell(run, opening, seed, temperature, depth):
    """(tokens, seconds, Rounds) of one story."""
    config, weights, tokenizer = run
    first = tokenizer.special[BEGIN]
    ids, options = np.append(first, tokenizer.encode(opening)), {"seed": seed, "temperature": temperature, "max_new_tokens": TOKENS, "stop": [first]}
    began = time.perf_counter()
    rounds = list(speculate(ids, weights, config, depth=depth, **options)) if depth else []
    tokens = [token for one in rounds for token in one.tokens] if depth else list(generate(ids, weights, config, **options))
    return tokens, time.perf_counter() - began, rounds


def judged(one):
    """Drafts of a Round that were looked at: the accepted ones, and the first that was not."""
    return min(one.n_accepted + 1, len(one.drafts))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", metavar="RUN")
    parser.add_argument("--stories", type=int, default=30)
    parser.add_argument("--plot", metavar="FILE.png")
    options = parser.parse_args()
    if options.folder:
        run = pretrain.load_run(options.folder)
    else:
        with tempfile.TemporaryDirectory() as parent:
            trained = pretrain.begin(Path(parent, "run"), recipe("micro"))
            pretrain.train(trained)
            run = trained.config, trained.weights, trained.data.tokenizer
    openings = ["\n".join(story.text.split("\n")[:2]) + "\n" for story in itertools.islice(stories(0, held_out=True), options.stories)]
    found = {way: [] for way in WAYS}
    for seed, opening in enumerate(openings):
        for way in WAYS:
            found[way].append(tell(run, opening, seed, *way))
    same = all(plain[0] == drafted[0] for depth in (1, 2, 3) for plain, drafted in zip(found[0.0, 0], found[0.0, depth]))
    print(f"\n{'temperature':>11s} {'depth':>6s} {'accepted':>9s} {'by place':>20s} {'tokens per forward':>19s} {'tokens/s':>9s} {'against plain':>14s}")
    speed = {}
    for temperature, depth in WAYS:
        told = found[temperature, depth]
        speed[temperature, depth] = statistics.median(len(tokens) / seconds for tokens, seconds, _ in told)
        rounds = [one for _, _, of_story in told for one in of_story]
        n_judged = sum(map(judged, rounds))
        rate = sum(one.n_accepted for one in rounds) / n_judged if depth else None
        places = [[one.n_accepted > i for one in rounds if judged(one) > i] for i in range(depth)]
        per_forward = sum(len(one.tokens) for one in rounds) / len(rounds) if depth else 1.0
        ratio = statistics.median((len(a[0]) / a[1]) / (len(b[0]) / b[1]) for a, b in zip(told, found[temperature, 0]))
        print(f"{temperature:11.0f} {depth or 'plain':>6} {f'{rate:.1%}' if depth else '-':>9s} {' '.join(f'{statistics.mean(place):.0%}' for place in places):>20s} "
              f"{per_forward:19.2f} {speed[temperature, depth]:9.0f} {ratio:12.2f} x")
        if depth == 1:
            print(f"{'':11s} (the formula for this acceptance: {expected_tokens(rate, 1):.2f} tokens per forward)")
    print(f"\nclaim     {len(openings)} greedy stories at depth 1, 2 and 3 are the plain ones, token for token: {same}")
    if options.plot:
        draw(options.plot, run[2], found[1.0, 1][0])
    return int(not same)


def draw(path, tokenizer, told):
    """One story, drawn at temperature 1 and depth 1: whose token is whose."""
    from minideepseek.plots.speculation import accepted_and_rejected

    accepted_and_rejected(told[2], lambda token: tokenizer.token_bytes(token).decode("utf-8", "replace"), path=path)


if __name__ == "__main__":
    raise SystemExit(main())
