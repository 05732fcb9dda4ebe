import math

import numpy as np
import pytest

from minideepseek.corpus import town
from minideepseek.corpus.batches import IGNORE
from minideepseek.tokenizer.bpe import Tokenizer, train
from minideepseek.tokenizer.chat import SPECIAL
from minideepseek.training import data as module
from minideepseek.training.data import BEGIN, DataError, batch, bits_per_byte, text_data, town_data
from minideepseek.training.recipe import Recipe

RECIPE = Recipe(corpus_bytes=20_000, vocab_size=300, evaluation_stories=5, batch=8, length=32, pieces=2)
TEXT = "".join(f"Line {n}: the {town.THINGS[n % 20]} is {town.COLOURS[n % 6]} and the {town.THINGS[n * 7 % 20]} is not, café.\n" for n in range(200))
TAIL = "".join(f"XYZZY{n} PLUGH{n} " for n in range(110))               # looks like nothing before it


@pytest.fixture(scope="module")
def data():
    return town_data(RECIPE)


@pytest.fixture
def file(tmp_path):
    def write(content):
        path = tmp_path / "some text.txt"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path
    return write


def held_rows(data):
    """The held-out rows put together again, each as ids without its padding."""
    for tokens, targets in zip(data.held_tokens, data.held_targets):
        counts = targets != IGNORE
        assert np.array_equal(tokens[1:][counts[1:]], targets[:-1][counts[1:]])
        yield np.concatenate([tokens[:1], targets[counts]])


# ---- the town ----

def test_the_row_is_the_stories_each_after_a_beginning(data):
    texts = town.text_of(RECIPE.seed, RECIPE.corpus_bytes)
    begin = data.tokenizer.special[BEGIN]
    assert BEGIN == "<|begin|>" and data.ids.dtype == np.int64 and data.ids.ndim == 1
    assert np.array_equal(np.flatnonzero(data.ids == begin), data.starts)
    stories = np.split(data.ids, data.starts[1:])
    assert [data.tokenizer.decode(story[1:]) for story in stories] == texts
    assert all(np.array_equal(story[1:], data.tokenizer.encode(text)) for story, text in zip(stories, texts))
    assert data.tokenizer.vocab_size <= 300 and list(data.tokenizer.special) == list(SPECIAL)


def test_the_floor_is_what_the_town_says_of_the_held_out_texts(data):
    """From the ids back to texts, read by the town's own inverse: minus the sum of log p, in bits, for each byte."""
    texts = [data.tokenizer.decode(row[1:]) for row in held_rows(data)]
    assert len(texts) == 5 and all(map(town.is_held_out, texts))
    n_bytes = sum(len(text.encode()) for text in texts)
    nats = -sum(town.log_probability(text) for text in texts)
    assert data.held_bytes == n_bytes and data.floor == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-12)
    assert bits_per_byte(nats, n_bytes) == pytest.approx(data.floor, rel=1e-12) and 0.15 < data.floor < 0.3


def test_nothing_held_out_is_trained_on(data):
    trained = {data.tokenizer.decode(story[1:]) for story in np.split(data.ids, data.starts[1:])}
    held = {data.tokenizer.decode(row[1:]) for row in held_rows(data)}
    assert len(held) == 5 and not trained & held
    other = town_data(Recipe(corpus_bytes=20_000, vocab_size=300, evaluation_stories=5, seed=1), data.tokenizer)
    assert not held & {other.tokenizer.decode(row[1:]) for row in held_rows(other)}


def test_held_out_rows_begin_with_the_beginning_and_predict_every_byte(data):
    begin = data.tokenizer.special[BEGIN]
    assert (data.held_tokens[:, 0] == begin).all() and not (data.held_targets == begin).any()
    assert data.held_tokens.shape == data.held_targets.shape and (data.held_targets[:, -1] != IGNORE).any()
    assert sum(len(data.tokenizer.decode_bytes(targets[targets != IGNORE])) for targets in data.held_targets) == data.held_bytes


def test_the_same_recipe_gives_the_same_data_and_another_seed_other_data(data):
    again, other = town_data(RECIPE), town_data(Recipe(corpus_bytes=20_000, vocab_size=300, evaluation_stories=5, seed=1))
    assert again.tokenizer.merges == data.tokenizer.merges and (again.floor, again.held_bytes) == (data.floor, data.held_bytes)
    for one, two in zip(again[1:5], data[1:5]):
        assert np.array_equal(one, two)
    assert other.floor != data.floor and not np.array_equal(other.ids[:500], data.ids[:500])


def refuse(*_):
    raise AssertionError("a tokenizer was trained, though one was given")


def test_a_tokenizer_that_is_given_is_used(data, monkeypatch, tmp_path, file):
    data.tokenizer.save(tmp_path / "tokenizer.json")
    given = Tokenizer.load(tmp_path / "tokenizer.json")
    of_text = text_data(file(TEXT), RECIPE)
    monkeypatch.setattr(module, "train", refuse)
    again = town_data(RECIPE, given)
    assert again.tokenizer is given and np.array_equal(again.ids, data.ids) and np.array_equal(again.held_targets, data.held_targets)
    text = text_data(file(TEXT), RECIPE, of_text.tokenizer)
    assert text.tokenizer is of_text.tokenizer and np.array_equal(text.ids, of_text.ids) and np.array_equal(text.held_tokens, of_text.held_tokens)
    bare = town_data(RECIPE, Tokenizer([], SPECIAL))                     # bytes alone: longer rows, the same bytes, the same floor
    assert len(bare.ids) > 1.5 * len(data.ids) and (bare.held_bytes, bare.floor) == (data.held_bytes, data.floor)


def test_the_batch_of_a_step(data):
    tokens, targets = batch(data, RECIPE, 0)
    assert tokens.shape == targets.shape == (8, 32) and np.array_equal(tokens[:, 1:], targets[:, :-1])
    assert (tokens[:, 0] == data.tokenizer.special[BEGIN]).all()         # every window begins with a story
    assert np.array_equal(tokens, batch(data, RECIPE, 0)[0]) and not np.array_equal(tokens, batch(data, RECIPE, 1)[0])
    reseeded = Recipe(corpus_bytes=20_000, vocab_size=300, evaluation_stories=5, length=32, seed=1)
    assert not np.array_equal(tokens, batch(data, reseeded, 0)[0])


def test_bits_per_byte_by_hand():
    assert bits_per_byte(8 * math.log(2), 4) == pytest.approx(2) and bits_per_byte(0.0, 10) == 0
    assert bits_per_byte(1_000 * math.log(256), 1_000) == pytest.approx(8)      # a byte that could be anything


# ---- a text file ----

def spelt(tokenizer, ids):
    """The text of some ids without the tokens that mark beginnings."""
    return tokenizer.decode([id for id in ids if id != tokenizer.special[BEGIN]])


def test_a_good_text_is_cut_once_and_nothing_is_lost(file):
    data = text_data(file(TEXT), RECIPE)
    cut = len(TEXT) - len(TEXT) // 10
    assert spelt(data.tokenizer, data.ids) == TEXT[:cut] and data.floor is None and data.starts is None
    rows = list(held_rows(data))
    assert len(rows) == 5 and {len(row) for row in rows} == {33} and rows[0][0] == data.tokenizer.special[BEGIN]
    assert all(first[-1] == second[0] for first, second in zip(rows, rows[1:]))          # each row's first token was predicted before
    held = spelt(data.tokenizer, np.concatenate([row[1:] for row in rows])).encode()
    assert TEXT[cut:].encode().startswith(held) and data.held_bytes == len(held)

    everything = text_data(file(TEXT), Recipe(vocab_size=300, evaluation_stories=10_000, length=32))
    rows = list(held_rows(everything))
    assert spelt(everything.tokenizer, np.concatenate([row[1:] for row in rows])) == TEXT[cut:]
    assert everything.held_bytes == len(TEXT[cut:].encode()) > len(TEXT[cut:])      # bytes, not characters
    assert {len(row) for row in rows[:-1]} == {33} and 2 <= len(rows[-1]) <= 33


def test_every_paragraph_of_a_text_has_a_beginning(file):
    text = "first paragraph\nstill the first\n\nsecond\n\n\n  third?\n\nfourth\n" * 60
    data = text_data(file(text), RECIPE)
    begins = np.flatnonzero(data.ids == data.tokenizer.special[BEGIN])
    after = {data.tokenizer.decode(data.ids[i + 1:i + 30])[:5] for i in begins[:-1]}
    assert after == {"first", "secon", "fourt"} or after == {"first", "secon", "fourt", "  thi"}


def test_the_tail_is_in_neither_the_ids_nor_the_tokenizer(file, monkeypatch):
    assert len(TAIL) * 9 > len(TEXT)                                     # so the last tenth is all tail
    seen = []
    monkeypatch.setattr(module, "train", lambda text, *rest: seen.append(text) or train(text, *rest))
    text = TEXT + TAIL[-len(TEXT) // 9:]
    data = text_data(file(text), RECIPE)
    cut = len(text) - len(text) // 10
    assert seen == [text[:cut]] and spelt(data.tokenizer, data.ids) == text[:cut]
    held = data.tokenizer.decode(np.concatenate([row[1:] for row in held_rows(data)]))
    words = [word for word in held.split()[1:-1] if word.startswith("XYZZY")]
    assert len(words) > 3 and not any(word in data.tokenizer.decode(data.ids) for word in words)


def test_at_most_200_000_characters_are_held_out(file):
    text = ("café" * 12 + "\n") * 43_000                                  # 2.1 million characters, and more bytes
    data = text_data(file(text), RECIPE, train(text[:4_900], 300, SPECIAL))
    assert len(spelt(data.tokenizer, data.ids)) == len(text) - 200_000


def test_windows_of_a_text_begin_anywhere_and_stay_in_it(file):
    data = text_data(file(TEXT), RECIPE)
    tokens, targets = batch(data, RECIPE, 3)
    row = data.ids.tobytes()
    assert all(np.append(token, target[-1:]).tobytes() in row for token, target in zip(tokens, targets))
    assert len({tuple(token) for token in tokens}) == 8


@pytest.mark.parametrize("content, message", [
    ("", "is empty"),
    (" \n\t\n", "is empty"),
    (b"caf\xe9 au lait", "is not UTF-8: .* can't decode byte 0xe9 in position 3"),
    (b"\xff\xfea\x00b\x00", "is not UTF-8: .* 0xff in position 0"),
    (TEXT.encode()[:-1] + b"\xc3", "is not UTF-8: .* 0xc3"),
    ("too short", "makes 10 training tokens, fewer than one batch: 8 windows of 32"),
    ("x", "makes 2 training tokens, fewer than one batch"),
])
def test_a_text_that_cannot_be_trained_on(file, content, message):
    path = file(content)
    with pytest.raises(DataError, match=message) as caught:
        text_data(path, RECIPE)
    assert str(caught.value).startswith(str(path)) and isinstance(caught.value, ValueError)


def test_exactly_one_batch_is_enough_and_one_token_less_is_not(file):
    tokenizer = Tokenizer([], SPECIAL)                                   # a token is a byte
    n = 8 * 32                                                           # and the token that marks the beginning
    enough = next("x" * m for m in range(n, 2 * n) if m - m // 10 == n)
    assert len(text_data(file(enough), RECIPE, tokenizer).ids) == n + 1
    with pytest.raises(DataError, match=f"makes {n} training tokens"):
        text_data(file(next("x" * m for m in range(n, 2 * n) if m - m // 10 == n - 1)), RECIPE, tokenizer)


def test_a_held_out_part_that_is_too_short_is_called_that(file):
    small = Recipe(batch=2, length=4, pieces=1)
    with pytest.raises(DataError, match="leaves 0 tokens to hold out: a tenth of it must be at least two"):
        text_data(file("nine char"), small, Tokenizer([], SPECIAL))


def test_a_file_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "nowhere.txt", tmp_path):
        with pytest.raises(OSError):
            text_data(path, RECIPE)
