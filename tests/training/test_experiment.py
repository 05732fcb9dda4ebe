"""A table of runs: what is there is not run again, and a cut loses one run."""
import pytest

from minideepseek.training.experiment import ExperimentError, demo, put, spread, table

COLUMNS = ("way", "seed", "loss", "dead")
JOBS = [(way, seed) for seed in (0, 1) for way in ("none", "aux, strong")]


def fill(path, jobs=JOBS, stop_after=None, says=None):
    """The rows, and the jobs that were run for them."""
    ran = []

    def run(way, seed):
        if len(ran) == stop_after:
            raise KeyboardInterrupt
        ran.append((way, seed))
        return 0.123456 + seed, len(way)

    return table(path, COLUMNS, jobs, run, say=(says if says is not None else []).append), ran


def test_rows_come_in_the_order_of_the_jobs_and_read_back(tmp_path):
    says = []
    rows, ran = fill(tmp_path / "t.csv", says=says)
    assert ran == JOBS and [(row["way"], int(row["seed"])) for row in rows] == JOBS
    assert rows[1] == {"way": "aux, strong", "seed": "0", "loss": "0.1235", "dead": "11"}
    assert (tmp_path / "t.csv").read_text().splitlines()[:3] == ["way,seed,loss,dead", "none,0,0.1235,4", '"aux, strong",0,0.1235,11']
    assert says[0] == "way none, seed 0, loss 0.1235, dead 4"


def test_a_second_call_runs_nothing_and_gives_the_same(tmp_path):
    first, _ = fill(tmp_path / "t.csv")
    before = (tmp_path / "t.csv").read_bytes()
    second, ran = fill(tmp_path / "t.csv", JOBS[::-1])
    assert ran == [] and second == first[::-1] and (tmp_path / "t.csv").read_bytes() == before


@pytest.mark.parametrize("after", range(4))
def test_a_cut_loses_only_the_run_under_way(tmp_path, after):
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "t.csv", stop_after=after)
    assert (tmp_path / "t.csv").exists() == (after > 0)
    rows, ran = fill(tmp_path / "t.csv")
    assert ran == JOBS[after:] and len(rows) == 4
    whole, _ = fill(tmp_path / "whole.csv")
    assert rows == whole and (tmp_path / "t.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


@pytest.mark.parametrize("text", ["", "way,seed,loss\nnone,0,1\n", "way,seed,loss,dead\nnone,0\n"])
def test_another_table_is_refused_and_left_alone(tmp_path, text):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ExperimentError, match="t.csv is another table"):
        fill(tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text() == text


def test_a_run_with_another_number_of_values_is_refused(tmp_path):
    with pytest.raises(ExperimentError, match="the run of none, 0 gave 1 values, expected 2"):
        table(tmp_path / "t.csv", COLUMNS, JOBS, lambda way, seed: [1.0])
    assert not (tmp_path / "t.csv").exists()


def test_what_a_run_leaves_takes_the_place_of_what_it_left_before(tmp_path):
    path = tmp_path / "steps.csv"
    put(path, ["none"], [[0, "0.5"], [5, "0.4"]])
    put(path, ["aux, strong"], [[0, 7]])
    assert path.read_text() == 'none,0,0.5\nnone,5,0.4\n"aux, strong",0,7\n'
    put(path, ["none"], [[0, "0.6"]])
    assert path.read_text() == '"aux, strong",0,7\nnone,0,0.6\n'
    put(path, [1, "none"], [["x"]])
    put(path, [1, "none"], [["y"]])                    # both parts of the key are looked at, and numbers as text
    assert path.read_text().splitlines() == ['"aux, strong",0,7', "none,0,0.6", "1,none,y"]


def test_spread_is_the_median_and_the_range():
    assert spread([{"loss": "3"}, {"loss": "1"}, {"loss": "1.5"}], "loss") == "1.500 (1.000 to 3.000)"


def test_demo(capsys):
    demo()
    assert "none twice: 4 rows" in capsys.readouterr().out
