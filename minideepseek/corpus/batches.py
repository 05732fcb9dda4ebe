"""Batches: windows of a long row of tokens, chosen by (seed, step) alone, and whole stories for evaluation.

Derivation: whiteboard/corpus/batches.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import numpy as np

IGNORE = -100            # a target of this value does not count


def windows(ids, *, seed, step, batch, length, starts=None):
    """The training batch of one step: (tokens, targets), each (batch, length) int64, targets one place further on.

    ids: (n,) the corpus   starts: where a window may begin, an ascending array; None: anywhere
    A window is a draw with replacement from a generator seeded by (seed, step): the same call gives the same batch on
    every machine, in any order of steps, so a resumed run has nothing to remember.
    Raises ValueError when no window fits.
    """
    last = len(ids) - length - 1
    if last < 0:
        raise ValueError(f"ids has {len(ids)} tokens: a window takes {length} and one more")
    if starts is None:
        chosen = np.random.default_rng([seed, step]).integers(0, last + 1, batch)
    else:
        possible = starts[:np.searchsorted(starts, last, side="right")]
        if not len(possible):
            raise ValueError(f"no window of {length} tokens begins at one of the {len(starts)} starts")
        chosen = possible[np.random.default_rng([seed, step]).integers(0, len(possible), batch)]
    rows = ids[chosen[:, None] + np.arange(length + 1)]                 # (batch, length + 1)
    return rows[:, :-1], rows[:, 1:]


def whole(texts):
    """Rows that each hold one text from its first token to its last: (tokens, targets), filled up with IGNORE.

    texts: a list of (n_i,) arrays of at least two tokens
    The first token is given, not predicted: begin a text with a token that carries no news.
    """
    short = [i for i, text in enumerate(texts) if len(text) < 2]
    if short or not texts:
        raise ValueError(f"texts[{short[0]}] has {len(texts[short[0]])} tokens: at least 2 are needed" if texts else "texts is empty")
    longest = max(map(len, texts)) - 1
    tokens, targets = np.zeros((len(texts), longest), np.int64), np.full((len(texts), longest), IGNORE, np.int64)
    for row, text in enumerate(texts):
        tokens[row, :len(text) - 1], targets[row, :len(text) - 1] = text[:-1], text[1:]
    return tokens, targets


def demo():
    """A batch by hand, and the same batch again."""
    ids = np.arange(100, 120)
    tokens, targets = windows(ids, seed=0, step=3, batch=2, length=4, starts=np.array([0, 5, 10]))
    print(f"shapes    ids {ids.shape} -> tokens {tokens.shape}, targets {targets.shape}")
    print("by hand   tokens", tokens.tolist(), "targets", targets.tolist())
    again, _ = windows(ids, seed=0, step=3, batch=2, length=4, starts=np.array([0, 5, 10]))
    other, _ = windows(ids, seed=0, step=4, batch=64, length=4)
    rows, goals = whole([np.array([7, 8, 9]), np.array([7, 5])])
    print("whole    ", rows.tolist(), goals.tolist())
    print(f"claim     (seed, step) determines the batch: {np.array_equal(tokens, again)}; every target is the next token: {(targets == tokens + 1).all()}")
    assert np.array_equal(tokens, again) and (targets == tokens + 1).all() and len(np.unique(other[:, 0])) > 8


if __name__ == "__main__":
    from minideepseek.corpus.batches import demo  # the imported copy, so that every name exists once
    demo()
