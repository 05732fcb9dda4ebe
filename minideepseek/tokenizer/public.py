"""Public tokenizers: a tokenizer.json read through the tokenizers library, and ours written in that form.

Derivation: whiteboard/tokenizer/public.md     Source: the library's own reader, github.com/huggingface/tokenizers
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import json
import tempfile
from pathlib import Path

import numpy as np

from minideepseek.tokenizer.bpe import TokenizerError, checked_ids, train

# bpe.WORDS for characters instead of bytes: everything outside ASCII counts as a letter, and \s would be more than ASCII
WORDS = r" ?[A-Za-z\x{80}-\x{10ffff}]+|[0-9]{1,3}| ?[^ \t\n\r\f\vA-Za-z0-9\x{80}-\x{10ffff}]+|[ \t\n\r\f\v]+(?![^ \t\n\r\f\v])|[ \t\n\r\f\v]+"


def load_public(path):
    """A PublicTokenizer from a tokenizer.json.

    Raises ImportError, with the line to type, without the tokenizers library; TokenizerError that names the file when
    it holds no tokenizer; OSError when it cannot be opened.
    """
    try:
        import tokenizers as library
    except ImportError as error:
        raise ImportError("load_public needs the tokenizers library: pip install 'minideepseek[tokenizers]'") from error
    data = Path(path).read_bytes()
    try:
        content = json.loads(data)
        added = content.get("added_tokens") or []
        for token in added:                                       # many public files mark roles as ordinary: see `_is_special`
            token["special"] = _is_special(token)
        reader = library.Tokenizer.from_str(json.dumps(content))
    except Exception as error:                                    # the library raises nothing narrower
        raise TokenizerError(f"{path}: holds no public tokenizer: {error}") from None
    for token in added:                                           # the library numbers them itself, whatever the file says
        number = reader.token_to_id(token["content"])
        if number != token["id"]:
            raise TokenizerError(f"{path}: gives {token['content']} the id {token['id']}, the library makes it {number}")
    reader.encode_special_tokens = True                           # their spelling in a text is text
    reader.no_truncation()
    reader.no_padding()
    return PublicTokenizer(reader, {token["content"]: token["id"] for token in added if token["special"]})


class PublicTokenizer:
    """A public tokenizer with the face of ours: encode, decode, vocab_size, special.

    vocab_size is one more than the largest id: the rows that an embedding needs. Some ids below it may be unused.
    """

    def __init__(self, reader, special):
        self._reader, self.special = reader, special
        self._spelling = {id: token for token, id in reader.get_vocab(with_added_tokens=True).items()}
        self.vocab_size = 1 + max(self._spelling, default=-1)

    def encode(self, text):
        """The ids of a str, or of bytes in UTF-8: (T,) int64. No special token is added, and none is recognised."""
        if not isinstance(text, (str, bytes)):
            raise ValueError(f"text is a {type(text).__name__}: it must be a str or bytes")
        text = text.encode("utf-8") if isinstance(text, str) else text                 # both ways: half characters are refused
        return np.array(self._reader.encode(text.decode("utf-8"), add_special_tokens=False).ids, np.int64)

    def decode(self, ids):
        """The text of some ids, special tokens spelled out. Raises ValueError that names the first id that is no token."""
        ids = checked_ids(ids, self.vocab_size).tolist()
        for n, id in enumerate(ids):
            if id not in self._spelling:                          # the library would leave it out
                raise ValueError(f"ids[{n}] = {id} is not a token: the file has none with this id")
        return self._reader.decode(ids, skip_special_tokens=False)


def byte_letters():
    """The printable character that stands for each byte in public files: [256 characters].

    The printable ones of Latin-1, except the space, stand for themselves; the others, in order, for those from 256 on.
    """
    itself = [byte for byte in range(33, 256) if chr(byte).isprintable()]
    others = [byte for byte in range(256) if byte not in itself]
    return [chr(byte) if byte in itself else chr(256 + others.index(byte)) for byte in range(256)]


def public_form(tokenizer):
    """A Tokenizer of ours as the content of a tokenizer.json, of the same ids for every text: a dict, to be written as JSON.

    Raises ValueError when two merges make the same bytes: the public form knows a token by its spelling.
    """
    letters = byte_letters()
    n_ordinary = tokenizer.vocab_size - len(tokenizer.special)
    spelled = ["".join(letters[byte] for byte in tokenizer.token_bytes(id)) for id in range(n_ordinary)]
    if len(set(spelled)) < n_ordinary:
        raise ValueError("two tokens have the same bytes: the public form cannot tell them apart")
    split = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None, "decoder": byte_level,
        "added_tokens": [{"id": id, "content": spelling, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                          "special": True} for spelling, id in tokenizer.special.items()],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {token: id for id, token in enumerate(spelled)},
                  "merges": [[spelled[a], spelled[b]] for a, b in tokenizer.merges]},
    }


def _is_special(token):
    """Marked so, or written in angle brackets like <|user|>. Runs of spaces and such are ordinary text."""
    return bool(token["special"]) or token["content"][:1] + token["content"][-1:] == "<>"


def demo():
    """The letters of some bytes, and our ids against the library's; without the library, the letters alone."""
    letters = byte_letters()
    print(f"shapes    {len(letters)} bytes -> {len(set(letters))} letters, all printable: {all(map(str.isprintable, letters))}")
    print(f"by hand   a -> {letters[97]}, space -> {letters[32]}, line end -> {letters[10]}, the two bytes of é -> {letters[0xC3]}{letters[0xA9]}")
    source = Path(__file__).read_text(encoding="utf-8")
    ours = train(source, 600, special=("<|end|>",))
    form = public_form(ours)
    assert len(set(letters)) == 256 and all(map(str.isprintable, letters))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokenizer.json")
        path.write_text(json.dumps(form), encoding="utf-8")
        try:
            theirs = load_public(path)
        except ImportError as error:
            back = [bytes(letters.index(letter) for letter in token) for token in form["model"]["vocab"]]
            same = back == [ours.token_bytes(id) for id in range(len(back))]
            print(f"absent    {error}")
            print(f"claim     {len(back)} tokens spelled in letters and back: {same}")
        else:
            texts = [source, "é  ö\n\n  12345 \U0001f40b <|end|>", " \t \n"]
            same = all(ours.encode(text).tolist() == theirs.encode(text).tolist() and theirs.decode(ours.encode(text)) == text for text in texts)
            print(f"claim     the same {len(ours.encode(source))} ids from our encoder and the library's on this file, {ours.vocab_size} tokens: {same}")
    assert same


if __name__ == "__main__":
    from minideepseek.tokenizer.public import demo  # the imported copy, so that every name exists once
    demo()
