import sys

import numpy as np
import pytest

from minideepseek.plots import accumulators
from minideepseek.plots.accumulators import error_by_length
from minideepseek.plots.canvas import GREY, new_axes, png_size

pytest.importorskip("matplotlib")

K = np.array([128, 256, 512])
ERRORS = {"narrow": np.array([1e-3, 2e-3, 4e-3]), "wide": np.array([1e-4, 1e-4, 2e-4])}
BESIDE = {"inputs": np.array([0.04, 0.03, 0.04])}


def test_a_line_for_each_accumulator_and_a_grey_one_for_what_it_stands_beside():
    ax = error_by_length(K, ERRORS, beside=BESIDE, limits=(1e-5, 1), title="both")
    assert [line.get_label() for line in ax.lines] == [text.get_text() for text in ax.get_legend().get_texts()] == ["narrow", "wide", "inputs"]
    for line, values in zip(ax.lines, [*ERRORS.values(), *BESIDE.values()]):
        assert np.array_equal(line.get_xdata(), K) and np.array_equal(line.get_ydata(), values)
    assert [line.get_color() == GREY for line in ax.lines] == [False, False, True] and len({line.get_linestyle() for line in ax.lines}) == 3
    assert (ax.get_xscale(), ax.get_yscale(), ax.get_ylim(), ax.get_title()) == ("log", "log", (1e-5, 1), "both")
    assert ax.get_xlabel() and ax.get_ylabel()


def test_without_limits_everything_is_in_view():
    low, high = error_by_length(K, ERRORS).get_ylim()
    assert low < 1e-4 and high > 4e-3


def test_it_draws_on_axes_it_is_given_and_writes_a_png(tmp_path, monkeypatch, capsys):
    left, right = new_axes(1, 2)
    assert error_by_length(K.tolist(), ERRORS, ax=right) is right and right.has_data() and not left.has_data()
    error_by_length(K, ERRORS, path=tmp_path / "one.png")
    monkeypatch.setattr(sys, "argv", ["accumulators.py", "--plot", str(tmp_path / "two.png")])
    accumulators.demo()
    assert png_size(tmp_path / "one.png")[0] > 500 and png_size(tmp_path / "two.png") == (1408, 484)
    assert "it is a picture" in capsys.readouterr().out
    assert "matplotlib.pyplot" not in sys.modules or sys.modules["matplotlib.pyplot"].get_fignums() == []


@pytest.mark.parametrize("lengths, errors, message", [
    (K, {"narrow": [1e-3, 2e-3]}, r"errors of 'narrow' has shape \(2,\), lengths has shape \(3,\)"),
    (K, {"narrow": [1e-3, 0, 1e-3]}, r"errors of 'narrow' must be finite and above 0, got \[0.001, 0.0, 0.001\]"),
    (K, {"narrow": [1e-3, np.nan, 1e-3]}, "above 0"),
    ([0, 1, 2], ERRORS, "lengths must be finite and above 0"),
    ([[1, 2, 3]], ERRORS, r"lengths has shape \(1, 3\)"),
])
def test_what_cannot_be_drawn(lengths, errors, message):
    with pytest.raises(ValueError, match=message):
        error_by_length(lengths, errors)
