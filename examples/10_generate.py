"""Step 10: generation. One token after another: always the likeliest, or drawn; with a cache, or without.

    python examples/10_generate.py [RUN]

RUN is a folder of `python -m minideepseek train`; without one, a model is trained for half a minute first.
Pages: whiteboard/model/generate.md, whiteboard/model/decode.md, whiteboard/attention/kv_cache.md
"""
import os
import sys

sys.path[0:1] = [os.path.abspath(__file__ + "/../..")]   # run as a script: take the package from this repository
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

from minideepseek.attention.kv_cache import cached_floats
from minideepseek.corpus import town
from minideepseek.model.count import cache_bytes_per_token
from minideepseek.training import pretrain
from minideepseek.training.recipe import recipe

PROMPT = "Today, Anna is in the kitchen and Ben is in the garden.\nThere is a red ball in the kitchen.\nAnna takes the red ball.\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", metavar="RUN")
    options = parser.parse_args()
    if options.folder:
        config, weights, tokenizer = pretrain.load_run(options.folder)
    else:
        print("no run was named: training a small model first (a better one: python -m minideepseek train)\n")
        with tempfile.TemporaryDirectory() as parent:
            chosen = dataclasses.replace(recipe("micro").with_steps(200), evaluate_every=200, evaluation_stories=16)
            run = pretrain.begin(Path(parent, "run"), chosen)
            pretrain.train(run)
            config, weights, tokenizer = run.config, run.weights, run.data.tokenizer

    def tell(**how):
        return "".join(pretrain.story(weights, config, tokenizer, prompt=PROMPT, max_new_tokens=60, **how))

    print(f"\nThe beginning:\n{PROMPT}")
    for name, how in (("greedy", {"temperature": 0.0}), ("drawn, temperature 1", {}), ("drawn, top-p 0.5", {"top_p": 0.5}), ("temperature 3", {"temperature": 3.0})):
        print(f"-- {name}\n{tell(**how)}")

    stories = ["".join(pretrain.story(weights, config, tokenizer, seed=seed, max_new_tokens=250)) for seed in range(20)]
    possible = sum(town.log_probability(story) is not None for story in stories)
    print(f"Of 20 stories told freely, {possible} could have happened in the town (every sentence, every answer).")

    began = time.perf_counter()
    cached = tell(temperature=0.0)
    middle = time.perf_counter()
    plain = tell(temperature=0.0, use_cache=False)
    end = time.perf_counter()
    whole = cached_floats("mha", n_heads=config.n_heads, d_key=config.d_nope + config.d_rope, d_value=config.d_value)
    print(f"60 tokens with the latent cache: {middle - began:.2f} s; recomputing the text for each: {end - middle:.2f} s.")
    print(f"The cache: {cache_bytes_per_token(config, 4)} bytes per token; keys and values of all heads would be {config.n_layers * whole * 4}.")
    print("\nTo think about: why does greedy repeat itself, and why does temperature 3 leave the town?")
    same = cached == plain
    print(f"\nclaim     with and without the cache the same text: {same}")
    return int(not same)


if __name__ == "__main__":
    raise SystemExit(main())
