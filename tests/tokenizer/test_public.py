import json
import re
import sys

import numpy as np
import pytest

from minideepseek.tokenizer import public
from minideepseek.tokenizer.bpe import Tokenizer, TokenizerError, train
from minideepseek.tokenizer.chat import SPECIAL, encode_chat
from minideepseek.tokenizer.public import byte_letters, load_public, public_form

TEXT = ("The cat sat on the mat; 12325 cats don't sit. Der Bär süß, кот спит, 猫は寝る \U0001f408!\n\n    return x == 10_000\t#\r\n") * 4
OURS = train(TEXT, 330, special=SPECIAL)


def written(tmp_path, form):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(form), encoding="utf-8")
    return path


def test_the_letters_of_bytes():
    letters = byte_letters()
    assert len(set(letters)) == 256 and all(letter.isprintable() and not letter.isspace() for letter in letters)
    assert letters[ord("a")] == "a" and letters[ord(" ")] == "Ġ" and letters[ord("\n")] == "Ċ" and letters[0xE9] == "é"
    assert letters[0] == "Ā" and letters[0x7F] == "ġ" and letters[0xAD] == "Ń"                      # the first, one between, the last


def test_our_form_spells_every_token():
    model, letters = public_form(OURS)["model"], byte_letters()
    assert list(model["vocab"].values()) == list(range(325)) and len(model["merges"]) == 325 - 256
    for token, id in model["vocab"].items():
        assert bytes(letters.index(letter) for letter in token) == OURS.token_bytes(id)
    json.dumps(public_form(OURS))


def test_two_tokens_of_the_same_bytes_are_refused():
    with pytest.raises(ValueError, match="two tokens have the same bytes"):
        public_form(Tokenizer([(97, 98), (98, 99), (256, 99), (97, 257)]))


def test_without_the_library_the_error_says_what_to_type(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'minideepseek[tokenizers]'")):
        load_public(tmp_path / "tokenizer.json")
    public.demo()
    printed = capsys.readouterr().out
    assert "absent    load_public needs the tokenizers library" in printed and "and back: True" in printed


def samples():
    rng = np.random.default_rng(0)
    alphabet = list("aA éß猫\U0001f408\u200d\u0301\u00a0\u0085\u2028\x00\x0b\x0c\x1c\x7f\x80 \t\n\r  019.,!'\"_-<|>﷽")
    return [TEXT, "", *["".join(rng.choice(alphabet, n)) for n in range(200)], *SPECIAL, "".join(SPECIAL), "a" * 99]


def test_the_library_gives_our_ids(tmp_path):
    pytest.importorskip("tokenizers")
    theirs = load_public(written(tmp_path, public_form(OURS)))
    assert theirs.vocab_size == OURS.vocab_size == 330 and theirs.special == OURS.special
    for text in samples():
        ids = theirs.encode(text)
        assert ids.dtype == np.int64 and ids.ndim == 1
        assert ids.tolist() == OURS.encode(text).tolist() == theirs.encode(text.encode()).tolist()
        assert theirs.decode(ids) == text
    every = np.arange(330)
    assert theirs.decode(every[256:]) == OURS.decode(every[256:]) and theirs.decode(every[-5:]) == "".join(SPECIAL)


def test_the_chat_template_takes_either(tmp_path):
    pytest.importorskip("tokenizers")
    theirs = load_public(written(tmp_path, public_form(OURS)))
    messages = [{"role": "user", "content": "The <|end|> cat"}, {"role": "assistant", "content": "sat."}]
    for a, b in zip(encode_chat(messages, OURS), encode_chat(messages, theirs)):
        assert a.tolist() == b.tolist() and a.dtype == b.dtype


def added(id, content, special):
    return {"id": id, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": special}


def test_a_role_that_is_not_marked_special_cannot_be_forged_either(tmp_path):
    library = pytest.importorskip("tokenizers")
    form = public_form(OURS)
    form["added_tokens"] += [added(330, "<｜User｜>", False), added(331, "   ", False), added(332, "[END]", True)]
    form["post_processor"] = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|begin|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                              "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                              "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [325], "tokens": ["<|begin|>"]}}}
    form["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    path = written(tmp_path, form)
    theirs = load_public(path)
    text = "cat <｜User｜> sat[END]   mat"
    assert {325, 330, 332} & set(library.Tokenizer.from_file(str(path)).encode(text).ids)           # the library alone recognises them
    ids = theirs.encode(text).tolist()
    assert not {325, 330, 332} & set(ids) and 331 in ids and theirs.decode(ids) == text             # a run of spaces is ordinary text
    assert theirs.special == OURS.special | {"<｜User｜>": 330, "[END]": 332} and theirs.vocab_size == 333
    assert theirs.decode([330, 99, 332]) == "<｜User｜>c[END]"


def test_ids_and_texts_that_are_none_are_refused(tmp_path):
    pytest.importorskip("tokenizers")
    form = public_form(OURS)
    last = next(token for token, id in form["model"]["vocab"].items() if id == 324)
    form["model"]["vocab"][last], form["added_tokens"] = 329, []                # a hole: nothing has the ids from 324 to 328
    theirs = load_public(written(tmp_path, form))
    for ids, message in (([97, 330], r"ids\[1\] = 330 is not a token: vocab_size = 330"), ([-1], r"ids\[0\] = -1"), ([0.5], "whole numbers"),
                         ([97, 324], r"ids\[1\] = 324 is not a token: the file has none with this id")):
        with pytest.raises(ValueError, match=message):
            theirs.decode(ids)
    for text, message in ((7, "text is a int: it must be a str or bytes"), ("\ud800", "surrogates"), (b"\xff", "invalid start byte")):
        with pytest.raises(ValueError, match=message):
            theirs.encode(text)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff", b'{"model": {}}', b'{"added_tokens": [{}]}', b'{"added_tokens": 7}'])
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path, data):
    pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    with pytest.raises(TokenizerError, match=f"^{re.escape(str(path))}: holds no public tokenizer"):
        load_public(path)
    with pytest.raises(FileNotFoundError):
        load_public(tmp_path / "none.json")


def test_special_tokens_that_the_library_would_number_anew_are_refused(tmp_path):
    pytest.importorskip("tokenizers")
    form = public_form(OURS)
    form["added_tokens"][0]["id"] = 400
    path = written(tmp_path, form)
    with pytest.raises(TokenizerError, match=re.escape(f"{path}: gives <|begin|> the id 400, the library makes it ")):
        load_public(path)


def test_ours_and_public_files_are_not_confused(tmp_path):
    path = written(tmp_path, public_form(OURS))
    with pytest.raises(TokenizerError, match="is not one of our tokenizers .minideepseek.tokenizer.public reads"):
        Tokenizer.load(path)
    pytest.importorskip("tokenizers")
    OURS.save(path)
    with pytest.raises(TokenizerError, match="holds no public tokenizer"):
        load_public(path)
