"""Step 2: from tokens to embeddings. Every token id picks one row of a table, and equal tokens pick equal rows.

    python examples/02_tokens_to_embeddings.py [--plot FILE.png]

A token id is only a name: 273 is not more than 272. The embedding table gives each id a row of numbers, which training
moves. Here the rows are still random. Our sentence has two banks, one for money and one for sitting; the table does not know.
Pages: whiteboard/basics/embedding.md, whiteboard/autograd/tape.md
"""
import os
import sys

sys.path[0:1] = [os.path.abspath(__file__ + "/../..")]   # run as a script: take the package from this repository

import argparse

import numpy as np

from minideepseek.autograd.tape import Tape, Tensor
from minideepseek.basics.embedding import embedding
from minideepseek.plots.canvas import ORANGE
from minideepseek.tokenizer.bpe import train

SENTENCE = "Sarah visits the bank to deposit money while Zarah visits the bank to sit by the water"
FIRST, SECOND = 3, 11                                    # the places of the two banks
D = 8                                                    # model width


def draw(path, ids, words, x):
    """The one-hot matrix of the sentence, and the rows it picks."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    used, column = np.unique(ids, return_inverse=True)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 6), sharey=True, width_ratios=(len(used), D + 3))
    left.imshow(np.eye(len(used))[column], cmap="Greys", aspect="auto")
    left.set_xticks(range(len(used)), [f"{words[list(ids).index(id)].strip()}\n{id}" for id in used], rotation=90, fontsize=8)
    left.set_xlabel(f"token id (only the {len(used)} in use; black is 1, white is 0)")
    left.set_yticks(range(len(ids)), [f"{word.strip()} {place:2d}" for place, word in enumerate(words)])
    left.set_ylabel("token and its place in the sentence")
    left.set_title("one-hot matrix: which row is picked")
    image = right.imshow(x, cmap="PuOr", vmin=-3, vmax=3, aspect="auto")
    right.set_xlabel("channel")
    right.set_title("the picked rows: equal words, equal rows")
    figure.colorbar(image, ax=right, label="value (no unit)")
    for place in (FIRST, SECOND):
        right.add_patch(Rectangle((-0.5, place - 0.5), D, 1, fill=False, edgecolor="black", linewidth=2))
        left.get_yticklabels()[place].set(color="black", fontweight="bold", bbox={"facecolor": ORANGE, "alpha": 0.5, "pad": 1})
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", metavar="FILE.png", help="write the picture")
    options = parser.parse_args()

    tokenizer = train((SENTENCE + "\n") * 2, 1000)       # trained on nothing else, so every word is one token
    ids = tokenizer.encode(SENTENCE)
    words = [tokenizer.token_bytes(id).decode("utf-8") for id in ids]
    U, T = tokenizer.vocab_size, len(ids)
    print("1. The sentence as token ids, with their places:")
    print("  ", " ".join(f"{place}:{word.strip()}={id}" for place, (word, id) in enumerate(zip(words, ids))))

    E = Tensor(np.random.default_rng(0).standard_normal((U, D)), "E")
    with Tape() as tape:
        x = embedding(ids, E)
    print(f"\n2. The table E has a row for every token of the vocabulary, {E.data.shape}. The sentence picks {x.data.shape}:")
    for place in (FIRST, SECOND, 16):
        print(f"   x[{place:2d}], {words[place].strip():5s} =", x.data[place].round(2))
    banks = np.abs(x.data[FIRST] - x.data[SECOND]).max()
    print(f"   The two banks differ by {banks:g}. Nothing here knows which bank is which: a row depends on its id alone.")

    P = np.eye(U)[ids]                                   # (T, U)
    lookup = np.array_equal(P @ E.data, x.data)
    print(f"\n3. The same as a matrix product: P {P.shape} has a single 1 in each row, and P E = x bit for bit: {lookup}")
    print(f"   The product takes {2 * T * U * D:,} operations, the look-up none: it copies {T * D} numbers.")

    dx = np.random.default_rng(1).standard_normal((T, D))    # what the layers above would send down
    tape.backward({x: dx})
    touched = np.flatnonzero(E.grad.any(axis=1))
    print("\n4. Backward: the gradient of a place goes to its row; rows that were picked twice get the sum.")
    errors = []
    for word in (" water", " bank", " the"):
        places = [place for place in range(T) if words[place] == word]
        errors.append(np.abs(E.grad[ids[places[0]]] - dx[places].sum(axis=0)).max())
        print(f"   {word.strip():5s} at {places}: the gradient of its row is the sum of {len(places)} (difference {errors[-1]:.0e})")
    print(f"   {len(touched)} of {U} rows get a gradient, the others zeros: a word that is not in the text learns nothing from it.")

    if options.plot:
        draw(options.plot, ids, words, x.data)
    print("\nTo think about: the loss wants the first bank to mean money and the second to mean a shore. What happens to their one row?")
    print("So the meaning has to come from the neighbours. How could a place read them? (next: 03_embeddings_to_qkv.py)")
    print(f"\nclaim     the two banks are one row (difference {banks:g}); P E = E[ids]: {lookup}; their gradients add (difference {errors[1]:.0e})")
    return int(not (banks == 0 and lookup and max(errors) < 1e-14 and set(touched) == set(ids)))


if __name__ == "__main__":
    raise SystemExit(main())
