import subprocess
import sys

import numpy as np
import pytest

from minideepseek.plots import formats as plots
from minideepseek.plots.canvas import new_axes, png_size
from tests.house import ROOT

pytest.importorskip("matplotlib")

NUMBERS = {"small $x": [-1, -0.5, 0, 0.5, 1], "large": np.arange(1, 9)}
ERRORS = {"tensor": np.array([0, 0.01, 0.02, 0.5]), "tile": np.array([0.001, 0.03, 0.06, 0.0625])}
DRAW = {
    "number_lines": lambda **where: plots.number_lines(NUMBERS, smallest_normal={"small $x": 1}, **where),
    "error_histograms": lambda **where: plots.error_histograms(ERRORS, **where),
    "error_by_outlier": lambda **where: plots.error_by_outlier([1, 10, 100], {"tensor": [0.03, 0.1, 1], "tile": [0.03, 0.03, 0.05]}, **where),
    "error_by_split": lambda **where: plots.error_by_split(["E2M5", "E3M4"], {"x": [0.01, 0.02], "dy": [0.5, 0.03]}, beside={"dy": [0.6, 0.03]}, **where),
}


@pytest.mark.parametrize("name", DRAW)
def test_each_writes_a_png_and_draws_on_axes_it_is_given(name, tmp_path):
    path = tmp_path / "picture.png"
    alone = DRAW[name](path=path)
    assert min(png_size(path)) > 200 and alone.get_xlabel() and alone.get_ylabel() and alone.get_title()
    left, right = new_axes(1, 2)
    assert DRAW[name](ax=right) is right and right.has_data() and not left.has_data()
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]
    assert "matplotlib.pyplot" not in sys.modules or sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_a_tick_for_each_number_and_the_subnormal_ones_apart():
    places = lambda ax: [[segment[0][0] for segment in lines.get_segments()] for lines in ax.collections]
    assert places(DRAW["number_lines"]()) == [[1], [0.5], list(range(1, 9)), []]
    assert places(DRAW["number_lines"](within=(-1, 3))) == [[-1, 1], [-0.5, 0, 0.5], [1, 2, 3], []]
    assert places(plots.number_lines({"twice": [2, 2, 4]})) == [[2, 4], []]
    assert DRAW["number_lines"]().get_xscale() == "log" and DRAW["number_lines"](within=(-1, 3)).get_xscale() == "linear"
    assert "subnormal" in DRAW["number_lines"]().get_xlabel() and "subnormal" not in plots.number_lines({"a": [1]}).get_xlabel()


def test_every_error_is_in_a_bar():
    ax = DRAW["error_histograms"]()
    for patch, values in zip(ax.patches, ERRORS.values()):
        shares, edges, _ = patch.get_data()
        assert shares.sum() == 1 and edges[0] == plots.LEAST
        for value in values:
            assert shares[np.searchsorted(edges, max(value, plots.LEAST), side="right") - 1] >= 1 / len(values)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["tensor: 25.0% above 1/16", "tile: 0.0% above 1/16"]
    ax = plots.error_histograms({"all": [0.01, 0.05, 0.1, 1.0]})
    assert ax.get_legend().get_texts()[0].get_text() == "all: 50.0% above 1/16"
    far = plots.error_histograms({"all": [0.01, 1.0, 5.0]}).patches[0].get_data()        # a wrong scale can cost more than everything
    assert np.isclose(far.values.sum(), 1)


def test_the_lines_are_the_numbers():
    ax = DRAW["error_by_outlier"]()
    assert ax.lines[0].get_ydata().tolist() == [0.03, 0.1, 1] and ax.lines[1].get_xdata().tolist() == [1, 10, 100]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["tensor", "tile"]


def test_a_line_for_each_kind_of_data_over_the_formats():
    ax = plots.error_by_split(["E2M5", "E3M4"], {"x": [0.01, 0.02], "dy": [0.5, 0.03]}, beside={"dy": [0.6, 0.03], "x": [0.01, 0.02]}, limits=(1e-3, 1))
    assert [line.get_ydata().tolist() for line in ax.lines] == [[0.01, 0.02], [0.5, 0.03], [0.6, 0.03], [0.01, 0.02]] and ax.get_ylim() == (1e-3, 1)
    assert [text.get_text() for text in ax.get_xticklabels()] == ["E2M5", "E3M4"] and ax.get_yscale() == "log"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["x", "dy", "expected"]


@pytest.mark.parametrize("call, words", [
    (lambda: plots.error_by_split(["E2M5"], {"x": [0.1, 0.2]}), r"errors of 'x' must be one above 0 for each of \['E2M5'\]"),
    (lambda: plots.error_by_split(["E2M5"], {"x": [0.1]}, beside={"y": [0.0]}), r"errors of 'y' .* got \[0.0\]"),
    (lambda: plots.error_by_split(["E2M5"], {"x": [np.nan]}), "errors of 'x'"),
    (lambda: plots.number_lines({}), r"numbers of \[\] must be finite"),
    (lambda: plots.number_lines({"a": [1, np.nan]}), r"numbers of \['a'\] must be finite"),
    (lambda: plots.number_lines({"a": [[1]]}), r"numbers has shape \(1, 1\)"),
    (lambda: plots.error_histograms({"a": [-0.1]}), r"errors\['a'\] must be finite and not negative"),
    (lambda: plots.error_histograms({"a": [np.nan]}), r"errors\['a'\]"),
    (lambda: plots.error_by_outlier([1, 2], {"a": [1]}), r"errors\['a'\] has shape \(1,\), sizes has shape \(2,\)"),
])
def test_what_does_not_fit_together_is_refused_by_name(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("name", ["formats", "tiles", "tuning"])
def test_the_demos_draw_on_request(name, tmp_path):
    run = subprocess.run([sys.executable, ROOT / f"minideepseek/precision/{name}.py", "--plot", "it.png"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and "claim" in run.stdout, run.stdout + run.stderr
    assert min(png_size(tmp_path / "it.png")) > 400
