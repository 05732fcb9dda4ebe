"""Step 1: from text to tokens. Bytes, words, and the merges that turn common pieces of text into one number each.

    python examples/01_text_to_tokens.py [--plot FILE.png]

A model reads whole numbers, called token ids. The tokenizer cuts a text into pieces and gives every piece its number.
It starts from the 256 possible bytes and learns merges: the most frequent pair of neighbours becomes a new token.
Pages: whiteboard/tokenizer/bpe.md, whiteboard/corpus/town.md
"""
import os
import sys

sys.path[0:1] = [os.path.abspath(__file__ + "/../..")]   # run as a script: take the package from this repository

import argparse
import itertools

import numpy as np

from minideepseek.corpus.town import stories, text_of
from minideepseek.plots.canvas import BLUE, GREY, ORANGE
from minideepseek.tokenizer.bpe import WORDS, Tokenizer, train

SENTENCE = "Sarah visits the bank to deposit money while Zarah visits the bank to sit by the water"
MERGES = (0, 20, 100, 400)                               # how many to ask for


def training_text():
    """The town's stories, and 50 times the first half of the sentence: Sarah becomes a known word, Zarah never occurs."""
    return "".join(text_of(0, 100_000)) + (SENTENCE.split(" while")[0] + ".\n") * 50


def pieces(tokenizer, text):
    """The text of every token, in order."""
    return [tokenizer.token_bytes(id).decode("utf-8", errors="replace") for id in tokenizer.encode(text)]


def ratio(tokenizer, text):
    """Bytes per token."""
    return len(text.encode("utf-8")) / len(tokenizer.encode(text))


def draw(path, tokenizers, held_out):
    """The cuts of the sentence as coloured boxes, and bytes per token against the number of merges."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (cuts, curve) = pyplot.subplots(2, 1, figsize=(13, 6), height_ratios=(3, 4))
    for row, (n, tokenizer) in enumerate(tokenizers.items()):
        start = 0
        for number, piece in enumerate(pieces(tokenizer, SENTENCE)):
            cuts.barh(row, len(piece), left=start, height=0.7, color=(BLUE, ORANGE)[number % 2], alpha=0.45, edgecolor="white")
            for place, letter in enumerate(piece):
                cuts.text(start + place + 0.5, row, letter, family="monospace", ha="center", va="center")
            start += len(piece)
    cuts.set_yticks(range(len(tokenizers)), [f"{n} merges\n{len(t.encode(SENTENCE))} tokens" for n, t in tokenizers.items()])
    cuts.invert_yaxis()
    cuts.set_xlim(0, len(SENTENCE))
    cuts.set_xlabel("place in the text (bytes); the colour changes where a new token begins")
    cuts.spines[:].set_visible(False)

    merges = [*tokenizers.values()][-1].merges
    steps = [*range(0, len(merges), 20), len(merges)]
    for text, name, color, marker in ((held_out, "stories that were not trained on", BLUE, "o"), (SENTENCE, "the sentence", ORANGE, "s")):
        curve.plot(steps, [ratio(Tokenizer(merges[:n]), text) for n in steps], color=color, marker=marker, markersize=4, label=name)
    curve.axhline(1, color=GREY, linestyle="--", label="no merges: every byte is a token")
    curve.set_xlabel("merges learned")
    curve.set_ylabel("bytes per token")
    curve.set_ylim(bottom=0)
    curve.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", metavar="FILE.png", help="write the picture")
    options = parser.parse_args()

    print("1. A text is bytes, and bytes are numbers from 0 to 255.")
    print(f"   'Sarah' = {list(SENTENCE[:5].encode('utf-8'))}; the whole sentence has {len(SENTENCE.encode('utf-8'))} bytes")

    print("\n2. It is first cut into words. The space belongs to the word after it; no token crosses a border.")
    words = WORDS.findall(SENTENCE.encode("utf-8"))
    print(f"   {len(words)} words, with their spaces:", *[repr(word.decode("utf-8")) for word in words[:5]], "...")

    data = training_text()
    trained = train(data, 256 + max(MERGES))
    tokenizers = {len(t.merges): t for t in [Tokenizer(trained.merges[:n]) for n in MERGES]}    # the beginning of the list is a tokenizer too
    print(f"\n3. Inside the words, the most frequent pair of neighbours becomes one token, and again. From {len(data):,} bytes:")
    for n in (0, 1, 4, 15):
        left, right, both = [trained.token_bytes(id).decode("utf-8") for id in (*trained.merges[n], 256 + n)]
        print(f"   merge {n:2d}: {left!r} + {right!r} = {both!r}, token {256 + n}")
    found, whole = len(trained.merges), all(len(trained.encode(word)) == 1 for word in set(WORDS.findall(data.encode("utf-8"))))
    print(f"   {max(MERGES)} merges asked for, {found} found: then every word that was seen is one token: {whole}")

    print("\n4. The same sentence after more and more merges. A bar | is a border between tokens:")
    for n, tokenizer in tokenizers.items():
        print(f"   {n:3d} merges, {len(tokenizer.encode(SENTENCE)):2d} tokens: {'|'.join(pieces(tokenizer, SENTENCE))}")
    held_out = "".join(story.text for story in itertools.islice(stories(0, held_out=True), 200))
    print("\n5. Bytes per token, on the sentence and on 200 stories that were kept out of the training:")
    for n, tokenizer in tokenizers.items():
        print(f"   {n:3d} merges: sentence {ratio(tokenizer, SENTENCE):.2f}   stories {ratio(tokenizer, held_out):.2f}")

    print("\n6. 'Sarah' was seen, 'Zarah' never. An unseen word is no error, only more tokens:")
    sarah, zarah = pieces(trained, "Sarah"), pieces(trained, " Zarah")
    print(f"   'Sarah' -> {sarah}, ' Zarah' -> {zarah}; 'Zarah' in the training text: {'Zarah' in data}")

    if options.plot:
        draw(options.plot, tokenizers, held_out)
    print("\nTo think about: why are the stories cut into longer pieces than the sentence? How long would a Japanese text become?")
    print("More merges make shorter texts; what grows with every merge? (next: 02_tokens_to_embeddings.py)")
    texts = {"the sentence": SENTENCE.encode("utf-8"), "unseen stories": held_out.encode("utf-8"),
             "two Japanese signs": "\u9280\u884c".encode("utf-8"), "random bytes": np.random.default_rng(0).bytes(1000)}
    exact = all(t.decode_bytes(t.encode(text)) == text for text in texts.values() for t in tokenizers.values())
    gain = ratio(trained, held_out)
    print(f"\nclaim     text to tokens and back loses no byte ({', '.join(texts)}): {exact}; "
          f"{found} merges make unseen stories {gain:.1f} times shorter than their bytes")
    return int(not (exact and whole and gain > 2 and sarah == ["Sarah"] and len(zarah) > 1 and "Zarah" not in data))


if __name__ == "__main__":
    raise SystemExit(main())
