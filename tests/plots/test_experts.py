import subprocess
import sys

import numpy as np
import pytest

from minideepseek.moe.router import router_forward
from minideepseek.plots import experts as plots
from minideepseek.plots.canvas import new_axes, png_size
from tests.house import ROOT

pytest.importorskip("matplotlib")

SCORE = np.array([[0.9, 0.1, 0.2, 0.3, 0.8, 0.7], [0.2, 0.6, 0.5, 0.4, 0.1, 0.0], [0.3, 0.3, 0.9, 0.9, 0.2, 0.1]])
CHOSEN, GATE = np.array([[0, 4], [1, 2], [3, 2]]), np.array([[0.53, 0.47], [0.55, 0.45], [0.5, 0.5]])
KEPT = np.array([[True, False, True], [True, True, False], [False, True, False]])
STEPS, COUNTS = np.array([0, 10, 20]), np.array([[6, 3, 3, 0], [8, 6, 6, 4], [3, 3, 3, 3]])
BIASES = np.array([[0.0, 0.0, 0.0], [-0.1, 0.0, 0.1], [-0.2, 0.1, 0.2]])
SENT = np.array([[7, 2_000, 30_000, 0], [1_500, 9_000_000, 100, 200], [1, 2, 3, 4], [250_000, 6, 7, 8]])
KINDS = np.array([[30, 10, 0, 0], [10, 10, 20, 0]])
DRAW = {
    "routing_map": lambda **where: plots.routing_map(SCORE, CHOSEN, ["the", " $x", "\n"], gate=GATE, n_groups=3, kept=KEPT, **where),
    "load_over_training": lambda **where: plots.load_over_training(STEPS, COUNTS, **where),
    "bias_trajectories": lambda **where: plots.bias_trajectories(STEPS, BIASES, **where),
    "violation_curves": lambda **where: plots.violation_curves(STEPS, {"bias": [2, 1, 0.1], "none": [2, 2, 2]}, **where),
    "link_bytes": lambda **where: plots.link_bytes(SENT, ranks_per_node=2, **where),
    "specialisation": lambda **where: plots.specialisation(KINDS, ["names", "$verbs"], top_k=2, **where),
}


def texts(ax):
    """{(row, column): text} of the numbers in the cells."""
    return {text.get_position()[::-1]: text.get_text() for text in ax.texts}


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def hidden(ax):
    return np.ma.getmaskarray(ax.images[0].get_array())


@pytest.mark.parametrize("name", DRAW)
def test_each_writes_a_png_and_draws_on_axes_it_is_given(name, monkeypatch):
    written = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, format, **options: written.append((figure, path, format)))
    alone = DRAW[name](path="picture.png")
    assert written == [(alone.figure, "picture.png", "png")] and alone.get_xlabel() and alone.get_ylabel() and alone.get_title()
    left, right = new_axes(1, 2)
    assert DRAW[name](ax=right) is right and right.has_data() and not left.has_data() and len(written) == 1
    assert "matplotlib.pyplot" not in sys.modules or sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_the_routing_map_frames_what_is_chosen_and_hides_the_groups_that_are_shut():
    ax = DRAW["routing_map"]()
    frames = {(round(patch.get_y() + 0.45), round(patch.get_x() + 0.45)) for patch in ax.patches}
    assert frames == {(t, e) for t in range(3) for e in CHOSEN[t]}
    assert np.array_equal(hidden(ax), ~KEPT.repeat(2, axis=1)) and np.array_equal(ax.images[0].get_array()[0, 4:], [0.8, 0.7])
    assert texts(ax) == {(t, CHOSEN[t, k]): f"{GATE[t, k]:.2f}" for t in range(3) for k in range(2)}
    assert [line.get_xdata()[0] for line in ax.lines] == [1.5, 3.5]                             # between the groups
    assert [label.get_text() for label in ax.get_yticklabels()] == ["the", "\u2423$x", "\\n"] and "grey: group shut" in ax.get_title()


def test_the_routing_map_of_less():
    ax = plots.routing_map(SCORE, CHOSEN)
    assert not hidden(ax).any() and not ax.texts and not ax.lines and "grey" not in ax.get_title() and "gate" not in ax.get_title()
    reachable = np.where(KEPT.repeat(2, axis=1), SCORE, -np.inf)                                # as the router's choose sees it
    ax = plots.routing_map(reachable, CHOSEN, n_groups=3)
    assert np.array_equal(hidden(ax), np.isinf(reachable)) and "grey" in ax.get_title() and ax.images[0].get_clim() == (0, 0.9)
    wide = np.tile(SCORE, 20)
    ax = plots.routing_map(wide, CHOSEN, gate=GATE)
    assert not ax.texts and len(ax.get_xticks()) <= 32 and "gate" not in ax.get_title()         # no room for numbers


def test_the_routing_map_takes_what_the_router_returns():
    rng = np.random.default_rng(0)
    (gate, chosen), (_, _, score, *_) = router_forward(rng.standard_normal((5, 4)), rng.standard_normal((4, 8)), top_k=3, n_groups=4, n_groups_kept=2)
    ax = plots.routing_map(score, chosen, gate=gate, n_groups=4)
    assert len(ax.patches) == 15 and np.array_equal(ax.images[0].get_array(), score)


def test_the_load_is_relative_to_its_due():
    ax = DRAW["load_over_training"]()
    lines = {line.get_label(): line.get_ydata().tolist() for line in ax.lines if line.get_label() in "0123"}
    assert lines == {"0": [2, 4 / 3, 1], "1": [1, 1, 1], "2": [1, 1, 1], "3": [0, 2 / 3, 1]}
    assert legend(ax) == ["0", "1", "2", "3"] and ax.get_ylim()[0] == 0                          # the highest first
    fair = ax.lines[-1]
    assert set(fair.get_ydata()) == {1} and fair.get_linestyle() == "--" and fair.get_zorder() > ax.lines[0].get_zorder()


def test_of_many_experts_the_highest_and_the_lowest_are_named():
    biases = np.arange(20.0) * np.ones((3, 1))
    ax = plots.bias_trajectories(STEPS, biases)
    assert legend(ax) == ["19", "18", "17", "2", "1", "0"] and "of 20 experts" in ax.get_legend().get_title().get_text()
    named = {line.get_label(): line.get_ydata()[0] for line in ax.lines if line.get_label().isdigit()}
    assert all(int(label) == value for label, value in named.items())
    assert sorted({line.get_ydata()[0] for line in ax.lines}) == list(range(20))                 # all are drawn
    assert len(legend(plots.bias_trajectories(STEPS, biases[:, :9]))) == 9


def test_biases_and_violations_are_drawn_as_they_are():
    ax = DRAW["bias_trajectories"]()
    assert legend(ax) == ["2", "1", "0"] and [line.get_ydata().tolist() for line in ax.lines[:3]] == BIASES.T[::-1].tolist()
    ax = DRAW["violation_curves"]()
    assert legend(ax) == ["bias", "none"] and ax.lines[0].get_ydata().tolist() == [2, 1, 0.1] and ax.get_ylim()[0] == 0
    ax = plots.violation_curves({"a": [0, 5], "b": [1, 2, 3]}, {"b": [1, 1, 1], "a": [2, 0]})
    assert [(line.get_label(), line.get_xdata().tolist()) for line in ax.lines] == [("b", [1, 2, 3]), ("a", [0, 5])]


def test_bytes_that_stay_at_home_are_grey_and_the_title_adds_up_the_rest():
    ax = DRAW["link_bytes"]()
    assert np.array_equal(hidden(ax), np.eye(4, dtype=bool))
    away = SENT.sum() - SENT.trace()
    across = SENT[:2, 2:].sum() + SENT[2:, :2].sum()
    assert (away, across) == (283_820, 280_309) and ax.get_title().startswith("284 kB leave their rank, 280 kB their node")
    assert texts(ax)[1, 1] == "9" and texts(ax)[3, 0] == "0.25" and texts(ax)[0, 3] == "0"       # in MB, the unit of the largest
    assert ax.images[0].colorbar.ax.get_ylabel() == "MB" and ax.images[0].get_clim() == (0, 0.25)
    assert [line.get_xdata()[0] for line in ax.lines if len(set(line.get_xdata())) == 1] == [1.5]
    assert [line.get_ydata()[0] for line in ax.lines if len(set(line.get_ydata())) == 1] == [1.5]
    plain = plots.link_bytes(SENT)
    assert not plain.lines and "node" not in plain.get_title()
    assert plots.link_bytes([[5]]).get_title().startswith("0 bytes") and not plots.link_bytes(np.ones((30, 30))).texts


@pytest.mark.parametrize("n, words", [(0, "0 bytes"), (999, "999 bytes"), (999.7, "1 kB"), (1000, "1 kB"), (12_345, "12.3 kB"), (999_600, "1 MB"),
                                      (5e9, "5 GB"), (7e12, "7 TB")])
def test_bytes_in_words(n, words):
    assert plots._readable(n) == words


def test_specialisation_is_the_share_over_the_overall_share():
    """Of the names 3/4 go to expert 0, which serves 1/2 of all: 1.5."""
    ax = DRAW["specialisation"]()
    assert texts(ax) == {(0, 0): "1.5", (0, 1): "1.0", (0, 2): "0.0", (1, 0): "0.5", (1, 1): "1.0", (1, 2): "2.0"}
    assert np.array_equal(hidden(ax), np.tile([False, False, False, True], (2, 1))) and "grey" in ax.get_title()
    values = ax.images[0].get_array()
    assert np.allclose(values[:, :3], [[np.log2(1.5), 0, -1], [-1, 0, 1]]) and ax.images[0].get_clim() == (-1, 1)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["names (20)", "$verbs (20)"]  # two choices a token
    assert [label.get_text() for label in ax.images[0].colorbar.ax.get_yticklabels()] == ["1/2", "1", "2"]


def test_specialisation_in_a_large_table_and_at_its_ends():
    counts = np.full((30, 40), 10)
    counts[2, 7], counts[5] = 5, 0
    ax = plots.specialisation(counts, [f"kind {n}" for n in range(30)])
    marks = ax.lines[0]
    assert not ax.texts and (marks.get_xdata().tolist(), marks.get_ydata().tolist()) == ([7], [2]) and "dash" in ax.get_title()
    assert hidden(ax).any(axis=1).nonzero()[0].tolist() == [5] and "grey" in ax.get_title()
    extreme = plots.specialisation(np.diag([1.0] * 16) + 1e-6, range(16))
    assert extreme.images[0].get_clim() == (-3, 3) and "dash" not in extreme.get_title() and "grey" not in extreme.get_title()
    assert plots.specialisation([[5, 5]], ["all"]).images[0].get_clim() == (-1, 1)               # nothing to tell apart


@pytest.mark.parametrize("call, words", [
    (lambda: plots.routing_map(SCORE[0], CHOSEN), r"score has shape \(6,\)"),
    (lambda: plots.routing_map(SCORE, CHOSEN[1:]), r"chosen has shape \(2, 2\) and dtype int64, score of shape \(3, 6\)"),
    (lambda: plots.routing_map(SCORE, GATE), "dtype float64"),
    (lambda: plots.routing_map(SCORE, CHOSEN + 3), r"ids from 3 to 7, score of shape \(3, 6\) has experts 0 .. 5"),
    (lambda: plots.routing_map(SCORE, CHOSEN - 1), "ids from -1 to 3"),
    (lambda: plots.routing_map(SCORE, CHOSEN, ["a"]), r"words has 1 tokens, but score of shape \(3, 6\)"),
    (lambda: plots.routing_map(SCORE, CHOSEN, gate=GATE[0]), r"gate has shape \(2,\), chosen has shape \(3, 2\)"),
    (lambda: plots.routing_map(SCORE, CHOSEN, n_groups=4), r"n_groups = 4 .* shape \(3, 6\)"),
    (lambda: plots.routing_map(SCORE, CHOSEN, n_groups=0), "n_groups = 0"),
    (lambda: plots.routing_map(SCORE, CHOSEN, n_groups=2, kept=KEPT), r"kept has shape \(3, 3\) and dtype bool, expected booleans of shape \(3, 2\)"),
    (lambda: plots.routing_map(SCORE, CHOSEN, n_groups=3, kept=KEPT * 1), "dtype int64"),
    (lambda: plots.routing_map(SCORE, CHOSEN, n_groups=3, kept=KEPT[[0, 0, 2]]), r"chosen\[1\] = \[1, 2\] .* kept\[1\] = \[True, False, True\]"),
    (lambda: plots.load_over_training(STEPS, COUNTS[0]), r"counts has shape \(4,\), it must be \(n, E\)"),
    (lambda: plots.load_over_training(STEPS[1:], COUNTS), r"counts has shape \(3, 4\), steps has shape \(2,\)"),
    (lambda: plots.load_over_training(STEPS, -COUNTS), r"counts\[0, 0\] = -6.0, but counts of shape \(3, 4\)"),
    (lambda: plots.load_over_training(STEPS, COUNTS * [[1], [np.nan], [1]]), r"counts\[1, 0\] = nan"),
    (lambda: plots.load_over_training(STEPS, COUNTS * [[1], [0], [1]]), r"counts of shape \(3, 4\) has a row without any choice: 1"),
    (lambda: plots.bias_trajectories(STEPS, BIASES[1:]), r"biases has shape \(2, 3\), steps has shape \(3,\)"),
    (lambda: plots.bias_trajectories([STEPS], BIASES), r"steps has shape \(1, 3\)"),
    (lambda: plots.violation_curves(STEPS, {}), "violations_by_name is empty"),
    (lambda: plots.violation_curves(STEPS, {"a": [1, 2]}), r"violations_by_name\['a'\] has shape \(2,\), steps has shape \(3,\)"),
    (lambda: plots.violation_curves({"b": STEPS}, {"a": STEPS}), r"steps has the names \['b'\]"),
    (lambda: plots.link_bytes(SENT[1:]), r"sent has shape \(3, 4\), it must be square"),
    (lambda: plots.link_bytes(SENT, ranks_per_node=3), r"ranks_per_node = 3 .* shape \(4, 4\)"),
    (lambda: plots.link_bytes(-SENT), r"sent\[0, 0\] = -7.0"),
    (lambda: plots.specialisation(KINDS, ["a"]), r"kinds has 1 names, but counts of shape \(2, 4\) wants 2"),
    (lambda: plots.specialisation(KINDS * 0, ["a", "b"]), r"counts of shape \(2, 4\) is zero everywhere"),
])
def test_what_does_not_fit_together_is_refused_by_name(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_the_demo_of_the_router_draws_on_request(tmp_path):
    run = subprocess.run([sys.executable, ROOT / "minideepseek/moe/router.py", "--plot", "router.png"], cwd=tmp_path, capture_output=True,
                         text=True, timeout=60)
    assert run.returncode == 0 and "claim" in run.stdout, run.stdout + run.stderr
    assert min(png_size(tmp_path / "router.png")) > 250


def test_names_of_lines_are_letters(tmp_path):
    ax = plots.violation_curves(STEPS, {r"a $\frac$ b": [2, 1, 0.1], "_x": [2, 2, 2]}, path=tmp_path / "p.png")
    assert legend(ax) == [r"a $\frac$ b", "_x"]
