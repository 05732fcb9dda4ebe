import json
import os
import re
import time
from collections import Counter

import numpy as np
import pytest

from minideepseek.tokenizer import bpe
from minideepseek.tokenizer.bpe import WORDS, Tokenizer, TokenizerError, train

TEXT = ("The cat sat on the mat, and the other cat sat there too. 12345 cats, 1 mat; der Bär aß süße Äpfel, наконец кот спит, "
        "猫は寝る \U0001f408\U0001f408 don't!\n\n    return x == 10_000\t# ...\r\n") * 3


def reference_merge(symbols, pair, new):
    """Every occurrence of a pair, from left to right, becomes `new`: in a plain loop."""
    out, i = [], 0
    while i < len(symbols):
        found = tuple(symbols[i:i + 2]) == pair
        out.append(new if found else symbols[i])
        i += 2 if found else 1
    return out


def reference_train(data, n_merges):
    """Count all pairs anew before each merge."""
    words = [(list(word), times) for word, times in Counter(WORDS.findall(data)).items()]
    merges = []
    while len(merges) < n_merges:
        count = Counter()
        for word, times in words:
            for pair in zip(word, word[1:]):
                count[pair] += times
        best = min(count, key=lambda pair: (-count[pair], pair), default=None)
        if best is None or count[best] < 2:
            break
        words = [(reference_merge(word, best, 256 + len(merges)), times) for word, times in words]
        merges.append(best)
    return merges


def reference_encode(data, merges):
    """Apply every merge to every word, in the order in which they were learned."""
    ids = []
    for word in WORDS.findall(data):
        word = list(word)
        for n, pair in enumerate(merges):
            word = reference_merge(word, pair, 256 + n)
        ids += word
    return ids


def kinds(rng, n):
    """n bytes of many kinds: any, few letters, one letter, spaces, spaces and letters, digits, signs, UTF-8 and pieces of it."""
    emoji = "a é\U0001f40b\u200d猫".encode() * 10
    start = rng.integers(8)
    alphabets = [bytes(range(256)), b"ab", b"a", b" ", b" \n\ta", b"0123456789 ", b" .,!_-'\0\x1f\x7f", b"\x80\xc3\xa9\xff\xf0\x9f", TEXT.encode()]
    drawn = [bytes(rng.choice(np.frombuffer(alphabet, np.uint8), n)) for alphabet in alphabets]
    return [*drawn, emoji[start:start + n], TEXT.encode()[start:start + n]]


def letters(n, seed=0):
    """Words of a small made-up language, one after another, without any space."""
    rng = np.random.default_rng(seed)
    syllables = ["".join(rng.choice(list("aeioubcdlmnrst"), 3)) for _ in range(300)]
    lexicon = ["".join(rng.choice(syllables, rng.integers(1, 4))) for _ in range(3000)]
    return "".join(rng.choice(lexicon, n // 4, p=1 / np.arange(1, 3001) / (1 / np.arange(1, 3001)).sum()))[:n]


TRAINED = train(TEXT, 340, special=("<|end|>", "<|user|>"))
GIANT = letters(60_000)


def test_merges_by_hand():
    tiny = train("aaabdaaabac", 300)
    # aa is there 4 times, overlapping ones counted; then aab -> (aa)a b: ab twice, (aa)a twice, ab has the smaller ids; then (aa)(ab)
    assert tiny.merges == [(97, 97), (97, 98), (256, 257)]
    assert [tiny.token_bytes(id) for id in (256, 257, 258)] == [b"aa", b"ab", b"aaab"]
    assert tiny.vocab_size == 259                                 # no pair occurs twice any more
    ids = tiny.encode("aaabdaaabac")
    assert ids.dtype == np.int64 and ids.tolist() == [258, 100, 258, 97, 99]
    assert tiny.encode("aaaa").tolist() == [256, 256] and tiny.encode("aaa").tolist() == [256, 97]
    assert tiny.encode("aab").tolist() == [256, 98]               # aa was learned before ab


def test_merges_of_counted_words_by_hand():
    # "we" is there 2 + 6 times; then " l" and "lo" 5 + 2 times each, and " l" has the smaller ids, which leaves (" l")o with 7;
    # then five pairs of " newest" have 6, of which " n" has the smallest ids. No pair crosses from word to word.
    tokenizer = train(" low" * 5 + " lower" * 2 + " newest" * 6, 256 + 4)
    assert tokenizer.merges == [(119, 101), (32, 108), (257, 111), (32, 110)]
    assert [tokenizer.token_bytes(256 + n) for n in range(4)] == [b"we", b" l", b" lo", b" n"]


@pytest.mark.parametrize("seed", range(6))
def test_training_equals_counting_anew_before_each_merge(seed):
    rng = np.random.default_rng(seed)
    for data in kinds(rng, 120 + 40 * seed):
        tokenizer = train(data, 256 + 40)
        assert tokenizer.merges == reference_train(data, 40)


def test_training_on_text_equals_the_reference_and_itself():
    assert len(TRAINED.merges) == 82 and TRAINED.merges == reference_train(TEXT.encode(), 82)
    assert train(TEXT.encode(), 400).merges[:82] == TRAINED.merges
    assert train(TEXT, 256).merges == [] and train("ab", 300).merges == [] and train("a", 300).vocab_size == 256


def test_of_equal_pairs_the_smallest_is_first():
    assert train("zyzy.baba", 257).merges == [(98, 97)]
    assert train("xy.ab.xy.ab", 258).merges == [(97, 98), (120, 121)]


@pytest.mark.parametrize("n", range(51))
def test_any_bytes_come_back_and_equal_the_reference(n):
    rng = np.random.default_rng(n)
    for data in kinds(rng, n):
        ids = TRAINED.encode(data)
        assert ids.dtype == np.int64 and ids.ndim == 1
        assert ids.tolist() == reference_encode(data, TRAINED.merges)
        assert TRAINED.decode_bytes(ids) == data
        assert b"".join(WORDS.findall(data)) == data


@pytest.mark.parametrize("text", ["", "a", TEXT, "\U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301 ﷽ \x00 \u2028", " " * 50, "\n \n", "aaa" * 17])
def test_text_comes_back(text):
    assert TRAINED.decode(TRAINED.encode(text)) == text
    assert TRAINED.encode(text).tolist() == TRAINED.encode(text.encode()).tolist()
    assert TRAINED.encode(text).tolist() == TRAINED.encode(text).tolist(), "the second time, from the cache"


def test_words():
    def split(text):
        return [word.decode() for word in WORDS.findall(text.encode())]

    assert split("Hello there,  you 2") == ["Hello", " there", ",", " ", " you", " ", "2"]
    assert split("in 12345 y") == ["in", " ", "123", "45", " y"]
    assert split("x = {'a'}\n    return") == ["x", " =", " {'", "a", "'}", "\n   ", " return"]
    assert split("größte 猫 !?") == ["größte", " 猫", " !?"]
    assert split(" \n") == [" \n"] and split("a \n") == ["a", " \n"] and split("  7") == [" ", " ", "7"]


def test_half_characters_are_replaced_in_text_only():
    ids = TRAINED.encode("é".encode()[:1])
    assert TRAINED.decode(ids) == "\ufffd" and TRAINED.decode_bytes(ids) == b"\xc3"


def test_special_tokens_come_last_and_are_never_made_of_text():
    assert TRAINED.special == {"<|end|>": 338, "<|user|>": 339} and TRAINED.vocab_size == 340
    trained_on_them = train("<|end|>" * 50, 300, special=("<|end|>",))
    for tokenizer in (TRAINED, trained_on_them):
        ids = tokenizer.encode("a<|end|><|user|>")
        assert not set(ids.tolist()) & set(tokenizer.special.values())
        assert tokenizer.decode(ids) == "a<|end|><|user|>"
    assert TRAINED.decode([97, 338, 98]) == "a<|end|>b" and TRAINED.token_bytes(339) == b"<|user|>"


def test_ids_of_many_kinds_are_decoded():
    for ids in ([104, 105], np.array([104, 105], np.uint8), (id for id in (104, 105)), np.array([104, 105])):
        assert TRAINED.decode(ids) == "hi"
    assert TRAINED.decode([]) == "" and TRAINED.decode(np.array([])) == "" and TRAINED.token_bytes(0) == b"\0"


@pytest.mark.parametrize("ids, message", [
    ([104, 340], r"ids\[1\] = 340 is not a token: vocab_size = 340"),
    ([-1], r"ids\[0\] = -1 is not a token"),
    (np.array([2 ** 63], np.uint64), "= 9223372036854775808 is not a token"),
    ([2 ** 70], "ids must be a row of whole numbers, not object"),
    ([1.0], "not float64"), ([True], "not bool"), ([[1, 2]], r"of shape \(1, 2\)"), ("hi", "must be a row of whole numbers"),
])
def test_ids_that_are_no_tokens_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        TRAINED.decode(ids)


@pytest.mark.parametrize("data, vocab_size, special, message", [
    ("", 300, (), "data = b'' is empty"),
    (b"", 300, (), "data = b'' is empty"),
    (["a"], 300, (), "data is a list: it must be a str or bytes"),
    ("a", 255, (), "vocab_size = 255 must be a whole number of at least 256: 256 bytes and 0 special tokens"),
    ("a", 257, ("<a>", "<b>"), "vocab_size = 257 must be a whole number of at least 258"),
    ("a", 300.0, (), "vocab_size = 300.0 must be a whole number"),
    ("a", True, (), "vocab_size = True"),
    ("a", 300, ("<a>", "<a>"), "special tokens are there twice: <a>"),
    ("a", 300, "<a>", "special = '<a>' must be a tuple or list of texts"),
    ("a", 300, ("",), "that are not empty"),
    ("a", 300, (7,), r"special = \(7,\) must be"),
    ("\ud800", 300, (), "surrogates not allowed"),
])
def test_bad_arguments_are_refused(data, vocab_size, special, message):
    with pytest.raises(ValueError, match=message):
        train(data, vocab_size, special)


def test_bad_text_is_refused():
    for text, message in ((None, "text is a NoneType"), (7, "text is a int"), ("\udfff", "surrogates not allowed")):
        with pytest.raises(ValueError, match=message):
            TRAINED.encode(text)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("what stood there before")
    TRAINED.save(path)
    for loaded in (Tokenizer.load(path), Tokenizer.load(str(path))):
        assert loaded.merges == TRAINED.merges and loaded.special == TRAINED.special and loaded.vocab_size == TRAINED.vocab_size
        assert loaded.encode(TEXT).tolist() == TRAINED.encode(TEXT).tolist()
    first = path.read_bytes()
    loaded.save(path)
    assert path.read_bytes() == first and os.listdir(tmp_path) == ["tokenizer.json"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    TRAINED.save(path)
    first = path.read_bytes()

    def full(handle):
        raise OSError("no space left")

    monkeypatch.setattr(bpe.os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        train("other", 300).save(path)
    assert path.read_bytes() == first and os.listdir(tmp_path) == ["tokenizer.json"]


GOOD = {"kind": bpe.KIND, "version": 1, "words": WORDS.pattern.decode(), "merges": [[97, 98], [256, 99]], "special": ["<a>"]}


@pytest.mark.parametrize("change, message", [
    ({"kind": "other"}, "is not one of our tokenizers"),
    ({"version": 2}, "version = 2 is newer than 1, the newest known here"),
    ({"version": 2, "more": 1}, "version = 2 is newer than 1"),
    ({"version": 0}, "version = 0 must be a whole number from 1 on"),
    ({"version": "1"}, "version = '1' must be"), ({"version": True}, "version = True must be"), ({"version": None}, "version = None must be"),
    ({"more": 1}, "has the keys kind, version, words, merges, special, more; expected"),
    ({"words": "."}, "splits words by another expression: '.'"),
    ({"merges": {}}, r"merges = {} must be a list"),
    ({"merges": [[97, 256]]}, r"merges\[0\] = \[97, 256\] must be of ids from 0 to 255, made before it"),
    ({"merges": [[97, 98], [257, 97]]}, r"merges\[1\] = \[257, 97\] must be of ids from 0 to 256"),
    ({"merges": [[-1, 97]]}, r"merges\[0\] = \[-1, 97\] must be of ids"),
    ({"merges": [[97, 98], [97, 98]]}, r"merges\[1\] = \[97, 98\] is there twice"),
    ({"merges": [[97, 98, 99]]}, r"merges\[0\] = \[97, 98, 99\] must be two ids"),
    ({"merges": [[97, 98.0]]}, "must be two ids"), ({"merges": [[97, True]]}, "must be two ids"), ({"merges": ["ab"]}, "must be two ids"),
    ({"special": ["<a>", "<a>"]}, "special tokens are there twice: <a>"),
    ({"special": "<a>"}, "special = '<a>' must be"), ({"special": [1]}, r"special = \[1\] must be"), ({"special": ["\ud800"]}, "surrogates not allowed"),
])
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path, change, message):
    path = tmp_path / "spoilt.json"
    path.write_text(json.dumps(GOOD))
    assert Tokenizer.load(path).decode([257, 258]) == "abc<a>"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(TokenizerError, match=f"^{re.escape(str(path))}: .*{message}"):
        Tokenizer.load(path)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 10_000, json.dumps(GOOD).encode()[:-1]])
def test_a_file_that_is_no_json_is_refused_by_name(tmp_path, data):
    path = tmp_path / "spoilt.json"
    path.write_bytes(data)
    with pytest.raises(TokenizerError, match=f"^{re.escape(str(path))}: (holds no valid JSON|is not one)"):
        Tokenizer.load(path)


def test_a_file_cannot_ask_for_endless_memory(monkeypatch):
    monkeypatch.setattr(bpe, "MOST_BYTES", 1000)
    doubled = [[97 if n == 0 else 255 + n] * 2 for n in range(10_000)]
    assert Tokenizer(doubled[:8]).vocab_size == 264               # 2 + 4 + ... + 256 bytes
    with pytest.raises(TokenizerError, match=r"merges\[8\] = \[263, 263\] brings the tokens to more than 1000 bytes"):
        Tokenizer(doubled)


def test_a_missing_file_and_missing_keys(tmp_path):
    with pytest.raises(FileNotFoundError):
        Tokenizer.load(tmp_path / "none.json")
    for key in GOOD:
        (tmp_path / "spoilt.json").write_text(json.dumps({k: v for k, v in GOOD.items() if k != key}))
        with pytest.raises(TokenizerError, match="is not one of our|version = None|expected"):
            Tokenizer.load(tmp_path / "spoilt.json")
    for content in ([], None, "x"):
        (tmp_path / "spoilt.json").write_text(json.dumps(content))
        with pytest.raises(TokenizerError, match="is not one of our tokenizers"):
            Tokenizer.load(tmp_path / "spoilt.json")


def test_the_cache_keeps_its_limits(monkeypatch):
    monkeypatch.setattr(bpe, "CACHED_WORDS", 3)
    tokenizer = Tokenizer(TRAINED.merges)
    for text in ("one two three four five", "x" * 1000, "one two"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert len(tokenizer._cache) <= 3 and all(len(word) <= bpe.CACHED_LENGTH for word in tokenizer._cache)


def ratio(function, size, factor, rounds=5):
    """How many times longer a `factor` times longer word takes: the median of several, each measured at one moment."""
    def seconds(text):
        start = time.process_time()
        function(text)
        return time.process_time() - start
    return float(np.median([seconds(GIANT[:factor * size]) / seconds(GIANT[:size]) for _ in range(rounds)]))


def one_of_three(limit, *measured):
    """A busy machine may spoil a measurement or two; time that grows too fast spoils them all."""
    ratios = []
    while len(ratios) < 3 and (not ratios or ratios[-1] > limit):
        ratios.append(ratio(*measured))
    assert ratios[-1] <= limit, ratios


def test_training_time_is_linear_without_any_space():
    one_of_three(2.3, train_400, 25_000, 2)


def train_400(text):
    return train(text, 400)


def test_encoding_time_is_almost_linear_in_a_giant_word():
    tokenizer = train(GIANT[:20_000], 600)
    one_of_three(8, tokenizer.encode, 10_000, 4)                  # n log n gives 5, a square 16; the processor's caches add some


def test_one_letter_over_and_over():
    tokenizer = train("a" * 20_000, 300)
    assert [len(tokenizer.token_bytes(id)) for id in range(256, 260)] == [2, 4, 8, 16]
    assert tokenizer.decode(tokenizer.encode("a" * 19_999)) == "a" * 19_999
