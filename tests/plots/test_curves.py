import sys

import numpy as np
import pytest

from minideepseek.plots import curves
from minideepseek.plots.canvas import png_size
from minideepseek.plots.curves import plot_run

matplotlib = pytest.importorskip("matplotlib")

STEPS = np.arange(0, 100, 10)
BITS = 0.2 + 5 * np.exp(-STEPS / 20)
HELD = {"held_steps": STEPS[4::5], "held_bits": BITS[4::5] + 0.01}
RATE, VIOLATION = {"learning_rate": np.linspace(0, 1e-3, 10)}, {"violation": np.linspace(2, 0.1, 10)}
FLOOR = {"floor": 0.213}


@pytest.fixture
def drawn(monkeypatch):
    """The panels of each figure, in place of a file."""
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **options: figures.append(figure))
    return figures


def test_it_writes_pngs_whose_height_grows_with_the_panels(monkeypatch, tmp_path, capsys):
    few, many = tmp_path / "few.png", tmp_path / "many.png"
    few.write_bytes(b"an older file")
    plot_run(str(few), STEPS, train_bits=BITS)
    monkeypatch.setattr(sys, "argv", ["curves.py", "--plot", str(many)])
    curves.demo()                                                        # all there is, kept on request
    (width, height), (same, higher) = png_size(few), png_size(many)
    assert width == same > 500 and higher == 3 * height and "it is a picture" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few.png", "many.png"]


@pytest.mark.parametrize("extra", [{}, HELD, FLOOR, HELD | FLOOR, RATE, VIOLATION, RATE | VIOLATION, HELD | FLOOR | RATE | VIOLATION],
                         ids=lambda extra: " ".join(extra) or "the loss alone")
def test_what_is_given_is_drawn_and_nothing_else(drawn, extra):
    plot_run("unused.png", STEPS, train_bits=BITS, **extra)
    top, *others = drawn[0].axes
    lines = {line.get_label(): line for line in top.lines}
    assert set(lines) == {"training batch"} | ({"held-out"} if "held_bits" in extra else set()) | ({"floor 0.213"} if "floor" in extra else set())
    assert np.array_equal(lines["training batch"].get_xdata(), STEPS) and np.array_equal(lines["training batch"].get_ydata(), BITS)
    if "held_bits" in extra:
        assert np.array_equal(lines["held-out"].get_xdata(), HELD["held_steps"]) and np.array_equal(lines["held-out"].get_ydata(), HELD["held_bits"])
    if "floor" in extra:
        assert set(lines["floor 0.213"].get_ydata()) == {0.213}
    assert [text.get_text() for text in top.get_legend().get_texts()] == list(lines)
    assert top.get_yscale() == "log" and top.get_ylabel() == "loss (bits per byte)"
    series = [extra[name] for name in ("learning_rate", "violation") if name in extra]
    assert [np.array_equal(panel.lines[0].get_ydata(), values) for panel, values in zip(others, series, strict=True)] == [True] * len(series)
    assert [panel.get_xlabel() for panel in drawn[0].axes] == [""] * len(others) + ["step"]
    assert all(panel.get_ylabel() for panel in others)
    if "violation" in extra:
        assert others[-1].get_ylim()[0] == 0


def test_lists_and_a_single_point_will_do(drawn):
    plot_run("unused.png", [0], train_bits=[8.1], held_steps=[0], held_bits=[8.0], learning_rate=[1e-5], violation=[0.5])
    assert len(drawn[0].axes) == 3


@pytest.mark.parametrize("wrong", [{"train_bits": BITS[1:]}, {"learning_rate": BITS[1:]}, {"violation": BITS[1:]},
                                   {"held_steps": STEPS[:3], "held_bits": BITS[:2]}, {"held_steps": STEPS[:3]}, {"held_bits": BITS[:2]}],
                         ids=["train_bits", "learning_rate", "violation", "held", "held_steps alone", "held_bits alone"])
def test_what_does_not_fit_together_is_refused_aloud(drawn, wrong):
    with pytest.raises(ValueError):
        plot_run("unused.png", STEPS, **{"train_bits": BITS} | wrong)
    assert not drawn


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        plot_run(tmp_path / "nowhere" / "curves.png", STEPS, train_bits=BITS)


def test_no_figure_is_left_open_and_nothing_is_changed(drawn):
    steps, bits = STEPS.copy(), BITS.copy()
    plot_run("unused.png", steps, train_bits=bits, **HELD, **FLOOR)
    assert "matplotlib.pyplot" not in sys.modules or matplotlib.pyplot.get_fignums() == []
    assert np.array_equal(steps, STEPS) and np.array_equal(bits, BITS)
