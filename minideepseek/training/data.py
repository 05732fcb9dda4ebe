"""What a run reads: the tokenizer, the row of training tokens, and the held-out texts with the floor of their loss.

Derivation: whiteboard/training/data.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import itertools
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minideepseek.corpus import town
from minideepseek.corpus.batches import whole, windows
from minideepseek.tokenizer.bpe import Tokenizer, train
from minideepseek.tokenizer.chat import SPECIAL
from minideepseek.training.recipe import Recipe

BEGIN = SPECIAL[0]                       # stands before every text; with the beginning given, the rest is predicted


class DataError(ValueError):
    """A text that cannot be trained on; the message names the file and what is wrong."""


class Data(NamedTuple):
    """All that a run reads."""
    tokenizer: Tokenizer
    ids: np.ndarray                      # (n,) training tokens
    starts: np.ndarray | None            # where a window may begin: at the beginning of a story; None: anywhere
    held_tokens: np.ndarray              # (texts, longest) whole held-out texts, see batches.whole
    held_targets: np.ndarray
    held_bytes: int                      # how many bytes the held-out targets spell
    floor: float | None                  # bits per byte of the held-out texts under the probabilities that made them


def town_data(recipe, tokenizer=None):
    """Stories of the town: made, never stored. tokenizer: of the run, when it goes on; None: trained here."""
    texts = town.text_of(recipe.seed, recipe.corpus_bytes)
    tokenizer = tokenizer or train("".join(texts[:4_000]), recipe.vocab_size, SPECIAL)
    begin = tokenizer.special[BEGIN]
    rows = [np.append(begin, tokenizer.encode(text)) for text in texts]
    if sum(map(len, rows)) <= recipe.length:
        raise DataError(f"corpus_bytes = {recipe.corpus_bytes} makes {sum(map(len, rows))} tokens, fewer than a window of {recipe.length}")
    starts = np.cumsum([0, *map(len, rows[:-1])])
    held = list(itertools.islice(town.stories(recipe.seed, held_out=True), recipe.evaluation_stories))
    held_rows = [np.append(begin, tokenizer.encode(story.text)) for story in held]
    n_bytes = sum(len(story.text.encode()) for story in held)
    floor = -sum(story.log_p for story in held) / math.log(2) / n_bytes
    return Data(tokenizer, np.concatenate(rows), starts, *whole(held_rows), n_bytes, floor)


def text_data(path, recipe, tokenizer=None):
    """Any UTF-8 text file. The last part of it is held out; there is no floor: nobody knows its entropy.

    Raises DataError for a file that is empty, not UTF-8, or shorter than one batch; OSError when it cannot be read.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from None
    if not text.strip():
        raise DataError(f"{path} is empty")
    cut = len(text) - min(len(text) // 10, 200_000)
    tokenizer = tokenizer or train(text[:min(cut, 5_000_000)], recipe.vocab_size, SPECIAL)
    ids, held = _paragraphs(text[:cut], tokenizer), _paragraphs(text[cut:], tokenizer)
    if len(ids) < recipe.batch * recipe.length + 1:
        raise DataError(f"{path} makes {len(ids)} training tokens, fewer than one batch: {recipe.batch} windows of {recipe.length}")
    rows = [held[start:start + recipe.length + 1] for start in range(0, len(held) - 1, recipe.length)][:recipe.evaluation_stories]
    if not rows:
        raise DataError(f"{path} leaves {len(held)} tokens to hold out: a tenth of it must be at least two")
    n_bytes = sum(len(tokenizer.token_bytes(int(id))) for row in rows for id in row[1:] if id != tokenizer.special[BEGIN])
    return Data(tokenizer, ids, None, *whole(rows), n_bytes, None)


def _paragraphs(text, tokenizer):
    """The ids of a text, with BEGIN before every paragraph: so the model learns how one begins."""
    begin = tokenizer.special[BEGIN]
    parts = re.split(r"(?<=\n\n)(?=\S)", text)
    return np.concatenate([np.empty(0, np.int64), *[np.append(begin, tokenizer.encode(part)) for part in parts if part]])


def batch(data, recipe, step):
    """The batch of a step: (tokens, targets), each (batch, length)."""
    return windows(data.ids, seed=recipe.seed, step=step, batch=recipe.batch, length=recipe.length, starts=data.starts)


def bits_per_byte(nats, n_bytes):
    """A sum of nats over a text of n_bytes, in bits per byte: comparable between tokenizers."""
    return nats / math.log(2) / n_bytes


def demo():
    """A small corpus, and what a token is worth in bytes."""
    recipe = Recipe(corpus_bytes=60_000, evaluation_stories=16, vocab_size=400)
    data = town_data(recipe)
    tokens, targets = batch(data, recipe, step=0)
    print(f"shapes    ids {data.ids.shape}, {len(data.starts)} stories; a batch: tokens {tokens.shape}, targets {targets.shape}")
    print("by hand  ", repr(data.tokenizer.decode(tokens[0, :12])))
    again = town_data(recipe, data.tokenizer)
    print(f"floor     {data.floor:.3f} bits per byte over {data.held_bytes:,} held-out bytes")
    trained = {text for text in town.text_of(recipe.seed, recipe.corpus_bytes)}
    kept = {data.tokenizer.decode([*row[1:][goal[:-1] != -100], goal[goal != -100][-1]]) for row, goal in zip(data.held_tokens, data.held_targets)}
    print(f"claim     every batch begins with a story: {(tokens[:, 0] == data.tokenizer.special[BEGIN]).all()}; "
          f"held-out stories among the trained: {len(trained & kept)} of {len(kept)}; made again the same: {np.array_equal(data.ids, again.ids)}")
    assert (tokens[:, 0] == data.tokenizer.special[BEGIN]).all() and not trained & kept and len(kept) == 16 and np.array_equal(data.ids, again.ids)


if __name__ == "__main__":
    from minideepseek.training.data import demo  # the imported copy, so that every name exists once
    demo()
