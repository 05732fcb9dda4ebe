import subprocess
import sys

import numpy as np
import pytest

from minideepseek.plots import attention as plots
from minideepseek.plots.canvas import new_axes, png_size
from tests.house import ROOT

pytest.importorskip("matplotlib")

P, WORDS = np.tril(np.full((3, 3), 0.25)), ["the", " $x", "\n"]
THETA, SEEN = 100.0 ** (-np.arange(4) / 4), np.tri(3, dtype=bool)
DRAW = {
    "attention_map": lambda **where: plots.attention_map(P, WORDS, mask=SEEN, **where),
    "rope_pairs": lambda **where: plots.rope_pairs(THETA, np.arange(9), **where),
    "score_by_distance": lambda **where: plots.score_by_distance(np.arange(9), np.ones((2, 9)), labels=["a", "b"], **where),
    "yarn_ramp": lambda **where: plots.yarn_ramp(THETA, THETA / [1, 1, 2, 4], **where),
    "cache_bars": lambda **where: plots.cache_bars({"mha": 40_960, "mla": 576}, **where),
    "flash_tiles": lambda **where: plots.flash_tiles(200, 200, 64, **where),
}


@pytest.mark.parametrize("name", DRAW)
def test_each_writes_a_png_and_draws_on_axes_it_is_given(name, tmp_path):
    path = tmp_path / "picture.png"
    alone = DRAW[name](path=path)
    assert min(png_size(path)) > 250 and alone.get_xlabel() and (alone.get_ylabel() or name == "cache_bars") and alone.get_title()
    left, right = new_axes(1, 2)
    assert DRAW[name](ax=right) is right and right.has_data() and not left.has_data()
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]
    assert "matplotlib.pyplot" not in sys.modules or sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_the_map_hides_what_is_not_seen_and_names_the_tokens():
    ax = DRAW["attention_map"]()
    drawn = ax.images[0].get_array()
    assert np.array_equal(~np.ma.getmaskarray(drawn), SEEN) and np.array_equal(drawn[SEEN], P[SEEN]) and len(ax.texts) == SEEN.sum()
    assert [t.get_text() for t in ax.get_xticklabels()] == ["the", "\u2423$x", "\\n"] and "grey" in ax.get_title()
    by_nan = plots.attention_map(np.where(SEEN, P, np.nan), WORDS).images[0].get_array()
    assert np.array_equal(np.ma.getmaskarray(by_nan), ~SEEN)
    plots.attention_map(np.full((1, 2), np.nan), ["a"], ["b", "c"])       # nothing seen at all


def test_the_lines_are_the_numbers():
    ax = plots.rope_pairs(THETA, np.arange(9), shown=[0, 3])
    assert np.array_equal(ax.lines[1].get_ydata(), np.cos(np.arange(9) * THETA[3])) and len(ax.lines) == 2
    assert np.array_equal(plots.rope_pairs(THETA, np.arange(9), shown=[3], angle=True).lines[0].get_ydata(), np.arange(9) * THETA[3])
    assert np.allclose(DRAW["yarn_ramp"]().lines[0].get_ydata(), [1, 1, 0.5, 0.25])


def test_the_axis_of_the_bars_is_logarithmic_where_needed():
    wide, near = DRAW["cache_bars"](), plots.cache_bars({"mqa": 320, "mla": 576}, unit="bytes")
    assert wide.get_xscale() == "log" and "logarithmic" in wide.get_xlabel() and [t.get_text() for t in wide.texts] == ["40,960", "576"]
    assert near.get_xscale() == "linear" and near.get_xlim()[0] == 0 and near.get_xlabel().startswith("bytes")


@pytest.mark.parametrize("T, S, tile", [(200, 200, 64), (7, 12, 3), (12, 7, 3), (1, 5, 2), (5, 1, 2)])
def test_every_tile_is_of_the_kind_that_its_cells_say(T, S, tile):
    sees, counts = np.arange(S) <= np.arange(T)[:, None] + S - T, {"whole": 0, "on the diagonal": 0, "skipped": 0}
    for i in range(max(T - S, 0), T, tile):
        for j in range(0, S, tile):
            cells = sees[i:i + tile, j:j + tile]
            counts["whole" if cells.all() else "on the diagonal" if cells.any() else "skipped"] += 1
    labels = {text.get_text() for text in plots.flash_tiles(T, S, tile).get_legend().get_texts()}
    assert labels - {"the diagonal"} == {f"{kind}: {n}" for kind, n in counts.items()}


@pytest.mark.parametrize("call, words", [
    (lambda: plots.attention_map(P[0], WORDS), r"p has shape \(3,\)"),
    (lambda: plots.attention_map(P, WORDS[1:]), r"words_q has 2 tokens, but p of shape \(3, 3\)"),
    (lambda: plots.attention_map(P, WORDS, WORDS * 2), r"words_k has 6 tokens"),
    (lambda: plots.attention_map(P, WORDS, mask=SEEN[1:]), r"mask has shape \(2, 3\)"),
    (lambda: plots.attention_map(P, WORDS, mask=P), "dtype float64"),
    (lambda: plots.rope_pairs(np.ones((2, 2)), [1]), r"theta has shape \(2, 2\)"),
    (lambda: plots.rope_pairs(THETA, []), r"positions has shape \(0,\)"),
    (lambda: plots.rope_pairs(THETA, [1], shown=[4]), r"shown = \[4\]"),
    (lambda: plots.score_by_distance([1, 2], [1, 2, 3]), r"scores has shape \(1, 3\), distances has shape \(2,\)"),
    (lambda: plots.score_by_distance([1, 2], [1, 2], labels=["a", "b"]), "labels has 2 names"),
    (lambda: plots.yarn_ramp(THETA, THETA[1:]), r"stretched has shape \(3,\), theta has shape \(4,\)"),
    (lambda: plots.cache_bars({}), "floats_by_kind has shape"),
    (lambda: plots.cache_bars({"mla": 0}), "must be positive"),
    (lambda: plots.flash_tiles(4, 4, 0), "tile = 0"),
])
def test_what_does_not_fit_together_is_refused_by_name(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_the_demos_draw_on_request(tmp_path):
    runs = {name: subprocess.Popen([sys.executable, ROOT / f"minideepseek/attention/{name}.py", "--plot", f"{name}.png"], cwd=tmp_path,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for name in ("yarn", "kv_cache")}
    for name, run in runs.items():
        printed, _ = run.communicate(timeout=60)
        assert run.returncode == 0 and "claim" in printed, printed
        assert min(png_size(tmp_path / f"{name}.png")) > 250
