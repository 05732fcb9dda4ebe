"""Where the tokens of a drafted text stand, and what colour they have."""
import re
from types import SimpleNamespace

import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from minideepseek.plots.canvas import ORANGE, SKY, png_size
from minideepseek.plots.speculation import accepted_and_rejected, demo, lay_out


def one(tokens, drafts=(), n_accepted=0):
    return SimpleNamespace(tokens=list(tokens), drafts=list(drafts), n_accepted=n_accepted)


ROUNDS = [one(["A"]), one(["b", "c"], ["b", "x"], 1), one(["d", "e", "f"], ["d", "e"], 2), one(["g"], ["y", "z"], 0)]


def test_each_token_is_of_its_kind_and_in_order():
    pieces = lay_out(ROUNDS, str)
    assert [(piece.text, piece.kind) for piece in pieces] == [
        ("A", "own"), ("b", "accepted"), ("x", "rejected"), ("c", "own"), ("d", "accepted"), ("e", "accepted"), ("f", "own"),
        ("y", "rejected"), ("z", "rejected"), ("g", "own")]
    assert [piece.column for piece in pieces] == list(range(0, 20, 2)) and {piece.line for piece in pieces} == {0}


def test_a_stop_token_among_the_accepted_leaves_no_token_of_the_models_own():
    assert [piece.kind for piece in lay_out([one(["a", "stop"], ["a", "stop", "c"], 3)], str)] == ["accepted", "accepted"]


def test_lines_break_at_the_width_and_at_line_ends():
    pieces = lay_out([one(["abc", "defg", "h\n", "i"])], str, width=8)
    assert [(piece.text, piece.line, piece.column) for piece in pieces] == [("abc", 0, 0), ("defg", 0, 4), ("h\\n", 1, 0), ("i", 2, 0)]
    thrown = lay_out([one(["a"], ["\n"], 0)], str)
    assert [(piece.text, piece.line) for piece in thrown] == [("\\n", 0), ("a", 0)]         # it is not in the text: no new line


def test_the_picture_has_a_box_for_each_token_in_its_colour(tmp_path):
    ax = accepted_and_rejected(ROUNDS, str, path=tmp_path / "p.png")
    boxes = [to_hex(box.get_facecolor()).upper() for box in ax.patches if isinstance(box, Rectangle)]
    assert len(boxes) == 10 and boxes.count(SKY.upper()) == 3 and boxes.count(ORANGE.upper()) == 3 and len(ax.lines) == 3
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["drafted and accepted: 3", "the model's own: 4", "drafted and thrown away: 3"]
    assert [text.get_text() for text in ax.texts] == list("AbxcdefYZG".lower().replace("a", "A", 1))
    assert png_size(tmp_path / "p.png")[0] > 500


def test_dollars_are_letters(tmp_path):
    accepted_and_rejected([one(["$x", "_1$"])], str, path=tmp_path / "p.png")


@pytest.mark.parametrize("rounds, message", [([], "hold no token"), ([one(["a"], ["b"], 2)], "rounds[0] accepted 2 of 1 drafts")])
def test_what_cannot_be_drawn_is_named(rounds, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        accepted_and_rejected(rounds, str)


def test_demo(capsys):
    demo()
    assert "without what was thrown away it is the text" in capsys.readouterr().out
