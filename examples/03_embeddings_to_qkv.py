"""Step 3: from embeddings to attention. Queries, keys and values, and what each of the two banks can know.

    python examples/03_embeddings_to_qkv.py [--plot FILE.png]

Every token asks a question (its query), shows a label (its key) and offers a content (its value). A token reads the
contents of the tokens it can see, each as much as its label answers the question. Causal means: it sees itself and
what came before it, never what comes after. The weights are small and untrained: look at who sees whom, not at how much.
Pages: whiteboard/basics/linear.md, whiteboard/attention/causal.md, whiteboard/model/transformer.md
"""
import os
import sys

sys.path[0:1] = [os.path.abspath(__file__ + "/../..")]   # run as a script: take the package from this repository

import argparse
import dataclasses

import numpy as np

from minideepseek.attention.causal import causal_attention_forward, visible
from minideepseek.basics.embedding import embedding_forward
from minideepseek.basics.linear import linear_forward
from minideepseek.basics.softmax import softmax_forward
from minideepseek.model.presets import preset
from minideepseek.model.transformer import init, transformer
from minideepseek.plots.canvas import ORANGE
from minideepseek.tokenizer.bpe import train

SENTENCE = "Sarah visits the bank to deposit money while Zarah visits the bank to sit by the water"
FIRST, SECOND, MONEY = 3, 11, 6                          # the places of the two banks, and of the money
D, K = 16, 8                                             # model width, head size


def attend(ids, E, W_q, W_k, W_v):
    """One head over the sentence: its queries, keys, values, output and attention weights, without the batch axis."""
    x, _ = embedding_forward(ids, E)
    q, k, v = [linear_forward(x, W)[0] for W in (W_q, W_k, W_v)]
    o, cache = causal_attention_forward(q[None, None], k[None, None], v[None, None], scale=K**-0.5)
    return q, k, v, o[0, 0], cache[3][0, 0]              # cache[3] is p, the weights


def draw(path, p, words):
    """The attention map: each row is a token that reads, each column a token that is read."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    T = len(words)
    labels = [f"{word.strip()} {place:2d}" for place, word in enumerate(words)]
    figure, ax = pyplot.subplots(figsize=(9, 7.5))
    colours = matplotlib.colormaps["cividis"].copy()
    colours.set_bad("#e8e8e8")
    image = ax.imshow(np.where(visible(T, T), p, np.nan), cmap=colours, vmin=0, vmax=0.5)
    ax.set_xticks(range(T), labels, rotation=90)
    ax.set_yticks(range(T), labels)
    ax.set_xlabel("token that is read")
    ax.set_ylabel("token that reads")
    ax.set_title("untrained attention; grey lies in the future and cannot be seen")
    for place in (FIRST, SECOND):
        ax.add_patch(Rectangle((-0.5, place - 0.5), place + 1, 1, fill=False, edgecolor=ORANGE, linewidth=3))
        ax.get_yticklabels()[place].set(fontweight="bold", bbox={"facecolor": ORANGE, "alpha": 0.5, "pad": 1})
    figure.colorbar(image, ax=ax, label="attention weight (a row sums to 1)", extend="max")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", metavar="FILE.png", help="write the picture")
    options = parser.parse_args()

    tokenizer = train((SENTENCE + "\n") * 2, 1000)       # trained on nothing else, so every word is one token
    ids = tokenizer.encode(SENTENCE)
    words, T = [tokenizer.token_bytes(id).decode("utf-8") for id in ids], len(ids)
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((tokenizer.vocab_size, D)), *[0.2 * rng.standard_normal((D, K)) for _ in range(3)]]
    q, k, v, o, p = attend(ids, *weights)

    print("1. Three small matrices make a query, a key and a value of every embedding. The two banks still have the same:")
    same = [np.abs(array[FIRST] - array[SECOND]).max() for array in (q, k, v)]
    print("   largest difference:", ", ".join(f"{name} {error:.0e}" for name, error in zip(("query", "key", "value"), same)))

    print("\n2. But they do not see the same tokens:")
    for place in (FIRST, SECOND):
        seen = "".join(words[j] for j in np.flatnonzero(visible(T, T)[place]))
        print(f"   bank at {place:2d} sees {place + 1:2d} tokens: {seen}")
    print(f"   So their outputs differ, by {np.abs(o[FIRST] - o[SECOND]).max():.2f}. Different is not yet understood: the weights are random.")

    print("\n3. How much the second bank reads from each token it sees; the weights sum to 1:")
    print("  ", " ".join(f"{words[j].strip()} {p[SECOND, j]:.2f}" for j in range(SECOND + 1)), f"(evenly would be {1 / (SECOND + 1):.2f})")

    other = ids.copy()
    other[MONEY] = ids[16]                               # ... to deposit water while ...
    changed = np.flatnonzero((attend(other, *weights)[3] != o).any(axis=-1))
    print(f"\n4. Change 'money' to 'water' at place {MONEY}. Outputs that change in any bit: {changed.min()} .. {changed.max()}.")
    print(f"   The first bank, at {FIRST}, keeps every bit; the second, at {SECOND}, hears of it.")

    config = dataclasses.replace(preset("micro"), vocab_size=tokenizer.vocab_size, n_dense_layers=3, n_mtp=0)
    model = init(config, rng, std=0.1)
    futures = [np.concatenate([ids[:FIRST + 1], rng.permutation(ids[FIRST + 1:])]) for _ in range(5)]
    states = [transformer(text[None], model, config).hidden.data[0, FIRST] for text in (ids, *futures)]
    stays = all(np.array_equal(state, states[0]) for state in states)
    print(f"\n5. Do more layers help? A whole model of {config.n_layers} layers, and 5 other orders of all that follows the first bank:")
    print(f"   its state at the first bank is the same bit for bit: {stays}. At that place 'deposit' has not been said,")
    print("   so no causal model, however large and well trained, can know there which bank it is.")
    guess, _ = softmax_forward(transformer(ids[None], model, config).logits.data[0, FIRST])
    print(f"   It can only spread its bets on what comes next. Untrained, it gives 'to' {guess[ids[FIRST + 1]]:.4f}; evenly would be {1 / len(guess):.4f}.")

    if options.plot:
        draw(options.plot, p, words)
    print("\nTo think about: where in the sentence could a model first know that Sarah's bank keeps money?")
    print("The second bank has seen 'deposit money'. Does that help it, or mislead it? (next: 04_positions.py)")
    print(f"\nclaim     a change at {MONEY} changes exactly the places {changed.min()} to {changed.max()}; "
          f"five other futures leave the first bank as it was, bit for bit: {stays}")
    return int(not (max(same) < 1e-14 and changed.tolist() == list(range(MONEY, T)) and stays))


if __name__ == "__main__":
    raise SystemExit(main())
