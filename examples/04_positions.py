"""Step 4: positions. Attention alone reads a bag of words; RoPE turns queries and keys, so that distance can be felt.

    python examples/04_positions.py [--plot FILE.png]

RoPE takes the channels of a query or a key in pairs, and turns each pair by an angle that grows with the place in the
text. Fast pairs tell neighbours apart, slow pairs tell far from near. YaRN slows the slow pairs down still more, so
that a model trained on short texts meets no angle it has never seen when it reads long ones.
Pages: whiteboard/attention/causal.md, whiteboard/attention/rope.md, whiteboard/attention/yarn.md
"""
import os
import sys

sys.path[0:1] = [os.path.abspath(__file__ + "/../..")]   # run as a script: take the package from this repository

import argparse
import math

import numpy as np

from minideepseek.attention.causal import causal_attention_forward
from minideepseek.attention.rope import frequencies, rope_forward, rope_tables
from minideepseek.attention.yarn import yarn_frequencies, yarn_range
from minideepseek.model.presets import preset
from minideepseek.plots.canvas import BLUE, GREEN, GREY, ORANGE
from minideepseek.tokenizer.bpe import train

SENTENCE = "Sarah visits the bank to deposit money while Zarah visits the bank to sit by the water"
SARAH, ZARAH = 0, 8                                      # their places
R = 64                                                   # rotary channels: V3's, 32 pairs


def turned(x, positions):
    """Vectors (T, R) turned to their positions."""
    cos, sin = rope_tables(positions, frequencies(R))
    return rope_forward(x[None, :, None], cos=cos, sin=sin)[0][0, :, 0]


def last_output(x, *, rope):
    """What attention gives at the last token, when every token is its own query, key and value."""
    q = turned(x, np.arange(len(x))) if rope else x
    o, _ = causal_attention_forward(q[None, None], q[None, None], x[None, None], scale=0.3 * R**-0.5)
    return o[0, 0, -1]


def score(q, k, t, s):
    """The score between a query at position t and a key at position s."""
    return float(turned(q[None], [t])[0] @ turned(k[None], [s])[0] * R**-0.5)


def draw(path, theta, stretched, config, k):
    """Left: how many tokens a full turn takes. Right: the score of a vector with itself against the distance."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8))
    left.semilogy(2 * math.pi / theta, color=BLUE, marker="o", markersize=4, label="RoPE")
    left.semilogy(2 * math.pi / stretched, color=ORANGE, marker="s", markersize=4, label=f"with YaRN, stretched {config.yarn_factor:g} times")
    left.axhline(config.yarn_original, color=GREY, linestyle="--", label=f"{config.yarn_original:,} tokens: the texts it was trained on")
    lo, hi = yarn_range(R, config.rope_base, config.yarn_original)
    left.axvspan(lo, hi, color=GREEN, alpha=0.15, label=f"the stretch sets in: pairs {lo} to {hi}")
    left.set(xlabel="pair of channels", ylabel="one full turn (tokens)", title="fast pairs and slow pairs")
    left.legend(fontsize=9)

    distances = np.arange(0, 257)
    scores = turned(np.repeat(k[None], len(distances), axis=0), distances) @ k * R**-0.5     # the query stands at position 0
    right.plot(distances, scores, color=BLUE)
    right.axhline(0, color=GREY, linewidth=0.8)
    right.set(xlabel="distance between query and key (tokens)", ylabel="score before the softmax (no unit)",
              title="a random vector and itself: the score depends on the distance")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", metavar="FILE.png", help="write the picture")
    options = parser.parse_args()

    tokenizer = train((SENTENCE + "\n") * 2, 1000)       # trained on nothing else, so every word is one token
    ids, rng = tokenizer.encode(SENTENCE), np.random.default_rng(0)
    E = rng.standard_normal((tokenizer.vocab_size, R))
    exchanged = ids.copy()
    exchanged[[SARAH, ZARAH]] = ids[[ZARAH, SARAH]]
    shuffled = np.append(rng.permutation(ids[:-1]), ids[-1])
    print("1. Without positions attention reads a bag of words. Who has the money: Sarah, or Zarah? The last token, 'water', looks back:")
    moved = {}
    for name, rope in (("without positions", False), ("with RoPE", True)):
        before = last_output(E[ids], rope=rope)
        moved[rope] = [np.abs(last_output(E[text], rope=rope) - before).max() for text in (exchanged, shuffled)]
        print(f"   {name:18s} Sarah and Zarah exchanged: its output moves by {moved[rope][0]:.0e}; all words before it shuffled: {moved[rope][1]:.0e}")

    q, k = rng.standard_normal((2, R))
    print("\n2. RoPE turns the query by its place and the key by its place. Their score feels only the difference of the two:")
    spots = [(7, 0), (107, 100), (10_007, 10_000), (8, 0)]
    scores = [score(q, k, t, s) for t, s in spots]
    for (t, s), value in zip(spots, scores):
        print(f"   query at {t:6,d}, key at {s:6,d}, distance {t - s}: {value:+.9f}")

    config = preset("v3")
    theta = frequencies(R, config.rope_base)
    stretched = yarn_frequencies(R, config.rope_base, factor=config.yarn_factor, original=config.yarn_original,
                                 beta_fast=config.yarn_beta_fast, beta_slow=config.yarn_beta_slow)
    print(f"\n3. The {R // 2} pairs of DeepSeek-V3: from a watch hand to a calendar. Tokens for one full turn:")
    print("   pair     RoPE    YaRN    stretched")
    for pair in (0, 10, 16, 23, 31):
        print(f"   {pair:4d} {2 * math.pi / theta[pair]:8,.0f} {2 * math.pi / stretched[pair]:9,.0f} {theta[pair] / stretched[pair]:7.1f} times")
    lo, hi = yarn_range(R, config.rope_base, config.yarn_original)
    print(f"   Up to pair {lo} nothing changes: they turn often within {config.yarn_original:,} tokens, and know every angle.")

    longest = int(config.yarn_factor * config.yarn_original)
    slow = np.arange(hi, R // 2)
    new, old = longest * stretched[slow], config.yarn_original * theta[slow]
    print(f"\n4. From pair {hi} on a turn was never finished in training. At position {longest:,} the slowest would stand at")
    print("   {:.0f} degrees; it has only ever seen {:.0f}. With YaRN it stands at {:.0f} again.".format(*np.degrees([longest * theta[-1], old[-1], new[-1]])))

    if options.plot:
        draw(options.plot, theta, stretched, config, k)
    print("\nTo think about: a model with RoPE reads the same sentence at the end of a long book. Which scores change?")
    print("The first token has nothing before it: can it know that it is the first? (next: 05_latent_attention.py)")
    distance_only = max(abs(value - scores[0]) for value in scores[1:3])
    print(f"\nclaim     a bag of words without positions (moves {max(moved[False]):.0e}), not with RoPE (at least {min(moved[True]):.0e}); "
          f"equal distance, equal score: {distance_only:.0e}; YaRN brings slow pairs no new angle: {np.allclose(new, old, rtol=1e-12)}")
    return int(not (max(moved[False]) < 1e-13 and min(moved[True]) > 1e-4 and distance_only < 1e-10 and abs(scores[3] - scores[0]) > 1e-3
                    and np.allclose(new, old, rtol=1e-12)))


if __name__ == "__main__":
    raise SystemExit(main())
