import sys
import zlib

import numpy as np
import pytest

from minideepseek.plots import canvas

image = pytest.importorskip("matplotlib.image")
VALUES, SEEN = np.array([[0.0, 4.0, 1.0], [9.0, 2.0, np.nan]]), np.array([[True, True, True], [False, True, False]])


def grey_of(hexadecimal):
    """Brightness from the digits of a colour, without matplotlib."""
    return np.dot([int(hexadecimal[i:i + 2], 16) / 255 for i in (1, 3, 5)], [0.299, 0.587, 0.114])


def test_the_first_nine_lines_differ_in_grey_print_and_25_in_colour():
    styles = [canvas.style(n) for n in range(25)]
    assert [(look["color"], look["linestyle"]) for look in styles[:5]] == canvas.STYLES
    assert len({str(look) for look in styles}) == 25
    for m in range(9):
        for n in range(m):
            apart = abs(grey_of(styles[m]["color"]) - grey_of(styles[n]["color"]))
            assert styles[m]["linestyle"] != styles[n]["linestyle"] or apart > 0.15, (m, n)


@pytest.mark.parametrize("colour", [canvas.BLUE, canvas.ORANGE, "#000000", "#FFFFFF"])
def test_brightness(colour):
    assert canvas.brightness(colour) == pytest.approx(grey_of(colour), abs=1e-12)


def test_the_option_plot(monkeypatch):
    for arguments, path in (([], None), (["--plot", "a.png"], "a.png"), (["-v", "--plot", "b.png", "c"], "b.png")):
        monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
        assert canvas.plot_path() == path
    monkeypatch.setattr(sys, "argv", ["demo.py", "--plot"])
    with pytest.raises(SystemExit, match="FILE.png"):
        canvas.plot_path()


def test_new_axes_have_the_size_of_a_panel_each_and_need_no_window(tmp_path):
    axes = canvas.new_axes(2, 3, size=(2, 1), sharex=True)
    axes[5].set_xlim(0, 7)
    assert axes.shape == (6,) and axes[0].get_xlim() == (0, 7) and axes[0].get_ylim() != (0, 7)
    assert canvas.save(axes[4], tmp_path / "a.png") is axes[4] and canvas.png_size(tmp_path / "a.png") == (660, 220)
    assert image.imread(tmp_path / "a.png").shape[:2] == (220, 660)
    assert canvas.save(axes[4], None) is axes[4] and [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert "matplotlib.pyplot" not in sys.modules or sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_each_panel_is_drawn_once_and_what_is_left_over_stays_blank(tmp_path):
    seen = []
    first = canvas.panels(tmp_path / "a.png", *[seen.append] * 3, size=(2, 1))
    assert first is seen[0] and len(set(seen)) == 3 and all(ax.get_visible() for ax in seen)
    assert [ax.get_visible() for ax in first.figure.axes] == [True, True, True, False]
    canvas.panels(tmp_path / "b.png", seen.append, size=(2, 1))
    assert (canvas.png_size(tmp_path / "a.png"), canvas.png_size(tmp_path / "b.png")) == ((440, 220), (220, 110))


def test_a_demo_keeps_its_picture_when_asked(tmp_path, monkeypatch):
    written = []

    def draw(path):
        written.append(path)
        canvas.save(canvas.new_axes(size=(2, 1))[0], path)

    monkeypatch.setattr(sys, "argv", ["demo.py", "--plot", str(tmp_path / "kept.png")])
    assert canvas.try_out(draw) == (220, 110, (tmp_path / "kept.png").stat().st_size)
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    assert canvas.try_out(draw)[:2] == (220, 110)
    assert written[0].exists() and not written[1].exists() and not written[1].parent.exists()


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a" + bytes(30), b"\x89PNG\r\n\x1a\n" + bytes(4) + b"IHDR",
                                     b"\x89PNG\r\n\x1a\n" + zlib.compress(bytes(90)) * 2])
def test_what_is_no_png(content, tmp_path):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match="a.png is no PNG"):
        canvas.png_size(tmp_path / "a.png")


def test_vectors_and_matrices():
    assert canvas.vector("v", [1, 2]).dtype == canvas.matrix("m", [[1]], "(T, E)").dtype == np.float64
    for wrong in (3.0, [], [[1, 2]]):
        with pytest.raises(ValueError, match=r"^v has shape \(.*vector"):
            canvas.vector("v", wrong)
    for wrong in (3.0, [1, 2], np.zeros((0, 2)), np.zeros((2, 0)), np.zeros((1, 2, 3))):
        with pytest.raises(ValueError, match=r"^m has shape \(.*must be \(T, E\)"):
            canvas.matrix("m", wrong, "(T, E)")


def test_a_table_of_colours_hides_what_is_not_seen_and_takes_its_limits_from_the_rest():
    ax = canvas.new_axes()[0]
    table = canvas.heat(ax, VALUES, SEEN, label="what")
    assert np.array_equal(np.ma.getmaskarray(table.get_array()), ~SEEN) and np.array_equal(table.get_array()[SEEN], VALUES[SEEN])
    assert table.get_clim() == (0, 4) and table.colorbar.ax.get_ylabel() == "what"             # the 9 is hidden
    colours = table.to_rgba(table.get_array())
    assert (colours[0, 0, :3] == 1).all() and np.allclose(colours[0, 1, :3], [0, 0x72 / 255, 0xB2 / 255])
    assert not colours[~SEEN][:, 3].any() and ax.patch.get_hatch()                              # the hatched ground shines through
    assert canvas.heat(ax, VALUES, SEEN, label="", limits=(-1, 6)).get_clim() == (-1, 6)
    assert canvas.heat(ax, -VALUES, SEEN, label="").get_clim() == (-4, 1e-12)
    canvas.heat(ax, VALUES, np.zeros((2, 3), bool), label="nothing seen")


def test_text_in_dark_cells_is_white():
    ax = canvas.new_axes()[0]
    canvas.write_cells(canvas.heat(ax, VALUES, SEEN, label=""), {(0, 0): "light", (0, 1): "dark", (1, 0): "hidden"})
    assert {text.get_text(): (text.get_color(), text.get_position()) for text in ax.texts} \
        == {"light": ("black", (0, 0)), "dark": ("white", (1, 0)), "hidden": ("black", (0, 1))}


def test_tokens_as_labels():
    ax = canvas.new_axes()[0]
    canvas.token_ticks(ax.yaxis, ["a b", "\n", "$x$", 7])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a\u2423b", "\\n", "$x$", "7"] and ax.get_yticks().tolist() == [0, 1, 2, 3]
    assert not any(label.get_parse_math() for label in ax.get_yticklabels())
