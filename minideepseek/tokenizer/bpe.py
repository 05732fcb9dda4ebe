"""Byte-pair encoding: from 256 bytes to longer tokens, by merging the most frequent pair again and again.

Derivation: whiteboard/tokenizer/bpe.md     Source: Sennrich et al. 2016, arXiv:1508.07909; on bytes: Radford et al. 2019, "GPT-2"
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import heapq
import json
import os
import re
import tempfile
from array import array
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import numpy as np

# A word is: letters with the space before them; up to three digits; other signs with the space before them; white space,
# of which the last character is left to what follows. Bytes from 0x80 on count as letters: no character is cut in two.
WORDS = re.compile(rb" ?[A-Za-z\x80-\xff]+|[0-9]{1,3}| ?[^\sA-Za-z0-9\x80-\xff]+|\s+(?!\S)|\s+")
KIND, VERSION = "minideepseek byte-pair tokenizer", 1
MOST_BYTES = 2 ** 28             # of all tokens together: forty merges that double each other would ask for a terabyte
CACHED_WORDS, CACHED_LENGTH = 2 ** 17, 64     # how many words are remembered, and up to how many bytes
GONE = -1                        # stands where a symbol was merged away, and between words; no pair contains it


class TokenizerError(ValueError):
    """A tokenizer that cannot be: the message says what is wrong and, when it comes from a file, in which one."""


def train(data, vocab_size, special=()):
    """A Tokenizer of at most `vocab_size` tokens: 256 bytes, then merges learned from `data`, then the special tokens.

    data: str or bytes   special: spellings of tokens that no text can produce

    The most frequent pair is merged first, of equals the one with the smallest ids; the same data give the same
    tokenizer. It stops early when no pair occurs twice, and the vocabulary is then smaller than asked for: read it
    from `tokenizer.vocab_size`. Time grows linearly with the data, with or without spaces in them.

    Raises ValueError for empty data, or a vocab_size that has no room for the bytes and the special tokens.
    """
    data, special = _bytes("data", data), _checked_special(special)
    if not data:
        raise ValueError(f"data = {data!r} is empty: there is nothing to learn from")
    if type(vocab_size) is not int or vocab_size < 256 + len(special):
        raise ValueError(f"vocab_size = {vocab_size!r} must be a whole number of at least {256 + len(special)}: "
                         f"256 bytes and {len(special)} special tokens")
    words = Counter(WORDS.findall(data))
    return Tokenizer(_learn(words, vocab_size - 256 - len(special)), special)


def _learn(words, n_merges):
    """The first merges, [(left id, right id), ...], of {word: how often it occurs}.

    A merge visits only the places where its pair stands, and changes only the counts of what stands beside them.
    """
    symbol, weight, before, after = _chain(words)
    count, positions = defaultdict(int), defaultdict(partial(array, "q"))       # of each pair: how often, and where it begins
    for i in range(len(symbol) - 1):
        if symbol[i] != GONE and symbol[i + 1] != GONE:
            pair = symbol[i], symbol[i + 1]
            count[pair] += weight[i]
            positions[pair].append(i)
    # One entry a pair. It promises at least what is true: a pair is born in the merge that makes its newer half, and from
    # then on it only loses. So an entry that keeps its promise on top of the heap is the best of all.
    heap = [(-times, pair) for pair, times in count.items()]
    heapq.heapify(heap)
    merges = []
    while heap and len(merges) < n_merges:
        promised, pair = heap[0]
        if -promised != count[pair]:                              # stale: put it back, further down
            heapq.heapreplace(heap, (-count[pair], pair))
            continue
        if count[pair] < 2:
            break
        heapq.heappop(heap)
        new, fresh = 256 + len(merges), set()
        merges.append(pair)
        for i in positions.pop(pair):                             # from left to right, so "aaa" becomes (aa) a
            j = after[i]
            if (symbol[i], symbol[j]) != pair:                    # stale: one of the two went into another merge
                continue
            left, right = before[i], after[j]
            symbol[i], symbol[j] = new, GONE
            after[i], before[right] = right, i
            for start, old, other in ((left, (symbol[left], pair[0]), (symbol[left], new)),
                                      (i, (pair[1], symbol[right]), (new, symbol[right]))):
                if GONE not in other:                             # x a b y -> x (ab) y: x and y have a new neighbour
                    count[old] -= weight[i]
                    count[other] += weight[i]
                    positions[other].append(start)
                    fresh.add(other)
        del count[pair]
        for other in fresh:
            heapq.heappush(heap, (-count[other], other))
    return merges


def _chain(words):
    """All words in one linked list of symbols, with GONE before, between and after them.

    Returns arrays over positions: symbol, how often its word occurs, the position before it, the position after it.
    """
    symbol, weight = array("q", [GONE]), array("q", [0])
    for word, times in words.items():
        symbol.extend(word)
        symbol.append(GONE)
        weight.extend([times] * (len(word) + 1))
    n = len(symbol)
    return symbol, weight, array("q", range(-1, n - 1)), array("q", range(1, n + 1))


class Tokenizer:
    """Text to ids and back. Ids 0 to 255 are the bytes, then comes one id per merge, then the special tokens.

    merges: [(left id, right id), ...]: merge number n makes id 256 + n, of ids that are made before it
    special: their spellings. `encode` never makes one out of text: whoever could write "<|system|>" into a message
             could forge a role. They enter as ids only, from `tokenizer.special["<|system|>"]`.

    Raises TokenizerError for merges or special tokens that break these rules.
    """

    def __init__(self, merges, special=()):
        table, ids, room = [bytes([byte]) for byte in range(256)], {}, MOST_BYTES
        for n, merge in enumerate(merges):
            pair = tuple(merge) if isinstance(merge, (tuple, list)) else ()
            _rule(len(pair) == 2 and all(type(id) is int for id in pair), f"merges[{n}] = {merge!r} must be two ids")
            _rule(all(0 <= id < len(table) for id in pair), f"merges[{n}] = {merge!r} must be of ids from 0 to {len(table) - 1}, made before it")
            _rule(pair not in ids, f"merges[{n}] = {merge!r} is there twice")
            room -= len(table[pair[0]]) + len(table[pair[1]])
            _rule(room >= 0, f"merges[{n}] = {merge!r} brings the tokens to more than {MOST_BYTES} bytes")
            ids[pair] = len(table)
            table.append(table[pair[0]] + table[pair[1]])
        special = _checked_special(special)
        self.special = {spelling: len(table) + n for n, spelling in enumerate(special)}
        self.merges = list(ids)
        self._ids = ids                                           # of each pair; the smaller, the earlier it is merged
        self._table = table + [spelling.encode("utf-8") for spelling in special]
        self._cache = {}

    @property
    def vocab_size(self):
        return len(self._table)

    def encode(self, text):
        """The ids of a str or of bytes, any bytes: (T,) int64. Special tokens are not recognised in it.

        Raises ValueError for what is neither, UnicodeEncodeError (a ValueError) for a str with half a surrogate pair.
        """
        ids = []
        for word in WORDS.findall(_bytes("text", text)):
            known = self._cache.get(word)
            ids.extend(self._encode_word(word) if known is None else known)
        return np.array(ids, np.int64)

    def decode(self, ids):
        """The text of some ids; bytes that are no valid UTF-8 become the replacement character."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids):
        """The bytes of some ids, exactly those that were encoded. Special tokens give their spelling.

        Raises ValueError that names the first id out of range.
        """
        return b"".join([self._table[id] for id in checked_ids(ids, self.vocab_size).tolist()])

    def token_bytes(self, id):
        """The bytes of one token, perhaps half of a character; of a special token its spelling."""
        return self.decode_bytes([id])

    def save(self, path):
        """Write a JSON file, whole or not at all: to a temporary file beside it, flushed to disk, then renamed."""
        path = Path(path)
        content = {"kind": KIND, "version": VERSION, "words": WORDS.pattern.decode("ascii"), "merges": self.merges, "special": list(self.special)}
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(json.dumps(content).encode("ascii"))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path):
        """What `save` wrote. Raises TokenizerError that names the file and what is wrong in it; OSError without a file."""
        data = Path(path).read_bytes()
        try:
            return cls(*_parse(data))
        except (ValueError, RecursionError) as error:
            raise TokenizerError(f"{path}: {error}") from None

    def _encode_word(self, word):
        """Merge the pair with the smallest id, of equals the leftmost, until none is left: n bytes in O(n log n).

        That is the order in which the merges were learned: what a merge makes has a larger id than the merge itself, so
        nothing that comes later can come before.
        """
        n, ids = len(word), self._ids
        symbol = [*word, GONE]                                    # position -1, before the first, is the last: GONE too
        before, after = list(range(-1, n)), [*range(1, n + 1), n]
        heap = [ids[pair] * n + i for i, pair in enumerate(zip(word, word[1:])) if pair in ids]      # (id, position) as one number
        heapq.heapify(heap)
        while heap:
            new, i = divmod(heapq.heappop(heap), n)
            j = after[i]
            if ids.get((symbol[i], symbol[j])) != new:            # stale: one of the two went into another merge
                continue
            symbol[i], symbol[j] = new, GONE
            after[i], before[after[j]] = after[j], i
            for start in (before[i], i):                          # the two pairs that the new symbol belongs to
                made = ids.get((symbol[start], symbol[after[start]]))
                if made is not None:
                    heapq.heappush(heap, made * n + start)
        found = [id for id in symbol if id != GONE]
        if n <= CACHED_LENGTH:
            if len(self._cache) >= CACHED_WORDS:
                self._cache.clear()
            self._cache[word] = found
        return found


def checked_ids(ids, vocab_size):
    """Any row of ids as an array. Raises ValueError for other things, and names the first id out of range."""
    ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
    if ids.ndim != 1 or ids.size and ids.dtype.kind not in "iu":
        raise ValueError(f"ids must be a row of whole numbers, not {ids.dtype} of shape {ids.shape}")
    wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if wrong.size:
        raise ValueError(f"ids[{wrong[0]}] = {ids[wrong[0]]} is not a token: vocab_size = {vocab_size}")
    return ids.astype(np.int64)


def _bytes(name, text):
    """A str in UTF-8, bytes as they are; other things are refused by name."""
    if not isinstance(text, (str, bytes)):
        raise ValueError(f"{name} is a {type(text).__name__}: it must be a str or bytes")
    return text.encode("utf-8") if isinstance(text, str) else text


def _checked_special(special):
    """The spellings as a list; a lone str would be taken for a list of letters, and is refused."""
    spellings = list(special) if isinstance(special, (tuple, list)) else [None]
    _rule(all(isinstance(s, str) and s for s in spellings), f"special = {special!r} must be a tuple or list of texts that are not empty")
    twice = [spelling for spelling, times in Counter(spellings).items() if times > 1]
    _rule(not twice, f"special tokens are there twice: {', '.join(twice)}")
    return spellings


def _parse(data):
    """The content of a file -> (merges, special)."""
    try:
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"holds no valid JSON: {error}") from None
    ours = isinstance(content, dict) and content.get("kind") == KIND
    _rule(ours, "is not one of our tokenizers (minideepseek.tokenizer.public reads a public tokenizer.json)")
    version = content.get("version")
    _rule(type(version) is int and version >= 1, f"version = {version!r} must be a whole number from 1 on")
    _rule(version <= VERSION, f"version = {version} is newer than {VERSION}, the newest known here: update minideepseek")
    expected = {"kind", "version", "words", "merges", "special"}
    _rule(content.keys() == expected, f"has the keys {', '.join(content)}; expected {', '.join(sorted(expected))}")
    _rule(content["words"] == WORDS.pattern.decode("ascii"), f"splits words by another expression: {content['words']!r}")
    _rule(isinstance(content["merges"], list), f"merges = {str(content['merges'])[:30]} must be a list")
    return content["merges"], content["special"]


def _rule(holds, message):
    if not holds:
        raise TokenizerError(message)


def demo():
    """Three merges by hand, every byte and back, and how much shorter this file becomes."""
    text = "aaabdaaabac"
    tiny = train(text, 300)
    ids = tiny.encode(text)
    print(f"shapes    {len(text)} bytes -> ids {ids.shape}; 300 tokens asked for, {tiny.vocab_size} found: then no pair occurs twice")
    for n, (a, b) in enumerate(tiny.merges):
        print(f"by hand   {256 + n} = {a} {b} = {tiny.token_bytes(256 + n).decode()!r}")
    print(f"by hand   {text} -> {ids}")
    source = Path(__file__).read_bytes()
    tokenizer = train(source, 1000, special=("<|end|>",))
    every = bytes(range(256))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder, "tokenizer.json"))
        loaded = Tokenizer.load(Path(folder, "tokenizer.json"))
    same = all(t.decode_bytes(t.encode(data)) == data for t in (tokenizer, loaded) for data in (every, every[::-1], source))
    ratio = len(source) / len(loaded.encode(source))
    forged = tokenizer.special["<|end|>"] in tokenizer.encode("<|end|>")
    print(f"claim     all 256 bytes and back, saved and loaded: {same}; {ratio:.2f} bytes a token on this file, with {tokenizer.vocab_size} tokens; "
          f"<|end|> made of text: {forged}")
    assert same and not forged and ratio > 2 and tiny.merges == [(97, 97), (97, 98), (256, 257)] and ids.tolist() == [258, 100, 258, 97, 99]


if __name__ == "__main__":
    from minideepseek.tokenizer.bpe import demo  # the imported copy, so that every name exists once
    demo()
