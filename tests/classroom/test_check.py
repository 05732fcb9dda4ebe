import subprocess
import sys

import pytest

from minideepseek.__main__ import main
from minideepseek.classroom import check
from minideepseek.classroom.blank import ExerciseError, blank
from minideepseek.classroom.check import check_all, check_assignment
from tests.house import COMPONENTS, NAMES, ROOT

RIGHT = """    g, r, x_hat = cache
    dg = (dy * x_hat).reshape(-1, g.size).sum(axis=0)
    p = dy * g
    return (p - x_hat * (p * x_hat).mean(-1, keepdims=True)) / r, dg"""
MEAN_GAIN = RIGHT.replace(".sum(axis=0)", ".mean(axis=0)")
PAGE = "whiteboard/basics/rmsnorm.md"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def hand_in(body, function="rmsnorm_backward", component="rmsnorm"):
    """An exercise with the student's body in place of the NotImplementedError."""
    out, _ = blank(component, function)
    lines = out.read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if "NotImplementedError" in line)
    lines[place] = body
    out.write_text("\n".join(lines) + "\n")
    return str(out)


def test_all_components(capsys, monkeypatch):
    """Of the package's components every sixth: that all are right is what tests/test_components.py says."""
    assert [component.name for component in check.components()] == NAMES
    monkeypatch.setattr(check, "components", lambda: COMPONENTS[::6])
    assert main(["check", "--seeds", "1"]) == 0
    table = capsys.readouterr().out
    assert all(f"\n{name} " in table for name in NAMES[::6]) and "WRONG" not in table


def test_a_component_that_is_not_written_does_not_stop_the_table(capsys, monkeypatch):
    """As in a student's folder."""
    def stub(*_, **__):
        raise NotImplementedError("write it")

    monkeypatch.setattr(check, "components", lambda: [COMPONENTS[0]._replace(forward=stub), COMPONENTS[1]])
    assert check_all(seeds=(0,)) == 1
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("not written yet: write it") and "dq" in second


@pytest.mark.parametrize("name, words", [("2-norms", "holds no questions of 2-norms: work in the folder student/"), ("9-none", "no assignment '9-none'")])
def test_an_assignment_is_checked_in_its_own_folder(name, words):
    """What it prints there: test_assign."""
    with pytest.raises(ExerciseError, match=words):
        check_assignment(name)


def test_an_untouched_exercise_is_not_right(capsys):
    out, _ = blank("rmsnorm")
    assert main(["check", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "rmsnorm_forward          right" in printed
    assert f"not written yet: write rmsnorm_backward: {PAGE}, eq. 4, 5, 6" in printed


def test_a_right_solution_in_another_style(capsys):
    assert main(["check", hand_in(RIGHT)]) == 0
    assert capsys.readouterr().out.count("right") == 2


@pytest.mark.parametrize("body, words", [
    (MEAN_GAIN, "looks 3 times too small, and x has 3 entries along axis 0: a mean for a sum"),
    (MEAN_GAIN, f"see {PAGE} eq. 4"),
    (RIGHT.replace("p - x_hat", "p + x_hat"), "no known cause fits"),
    (RIGHT.replace("return (p", "return -(p"), "wrong sign"),
    ("    return None", "returned 1 gradients for 2 arguments"),
    ("    return dy, dy", "dx shares memory with dy"),
    ("    return nonsense", "NameError: name 'nonsense' is not defined (rmsnorm_exercise.py:"),
    ("    return cache[7]", "IndexError"),
])
def test_a_wrong_backward_is_told_why(capsys, body, words):
    assert main(["check", hand_in(body)]) == 1
    printed = capsys.readouterr().out
    assert "rmsnorm_backward         WRONG: " in printed and words in printed


@pytest.mark.parametrize("body, words", [
    ("    return x * g, (g, 1.0, x)", "output["),
    ("    return x[0] * g, (g, 1.0, x)", "has shape (4,), expected (3, 4)"),
    ("    return x * g", "must return (output, cache)"),
    ("    return x * float('nan'), None", "= nan, expected"),
])
def test_a_wrong_forward_is_shown_a_value_and_does_not_cost_the_backward(capsys, body, words):
    assert main(["check", hand_in(body, "rmsnorm_forward")]) == 1
    forward, backward = capsys.readouterr().out.splitlines()
    assert "WRONG" in forward and words in forward and "expected" in forward or "must return" in forward
    assert backward.startswith("rmsnorm_backward         right")


def test_a_students_own_cache_goes_with_the_students_own_backward(capsys):
    path = hand_in("    r = np.sqrt((x * x).mean(-1, keepdims=True) + eps)\n    return g * x / r, {'x': x, 'g': g, 'r': r}", "rmsnorm_forward")
    source = open(path).read()
    start, end = source.index("    g, r, x_hat = cache"), source.index("\n\n\nrmsnorm = op")
    own = RIGHT.replace("g, r, x_hat = cache", "g, r, x_hat = cache['g'], cache['r'], cache['x'] / cache['r']")
    open(path, "w").write(source[:start] + own + source[end:])
    assert main(["check", path]) == 0


def test_a_file_whose_reference_cannot_be_found(tmp_path, capsys):
    (tmp_path / "mine.py").write_text('"""Mine."""\ndef a_forward(x): ...\ndef a_backward(dy, cache): ...\n')
    assert main(["check", "mine.py"]) == 2
    assert "names no whiteboard page" in capsys.readouterr().err
    (tmp_path / "mine.py").write_text(f'"""Derivation: {PAGE}"""\ndef a_forward(x): ...\ndef a_backward(dy, cache): ...\n')
    assert main(["check", "mine.py"]) == 2
    assert "a: the reference has no such component, only rmsnorm" in capsys.readouterr().err


def test_a_file_that_does_not_run(capsys):
    path = hand_in("    pass")
    open(path, "a").write("\nraise RuntimeError('at import')\n")
    assert main(["check", path]) == 2
    assert "it does not run: RuntimeError: at import" in capsys.readouterr().err


def test_an_exercise_runs_by_itself(tmp_path):
    run = subprocess.run([sys.executable, hand_in(MEAN_GAIN)], capture_output=True, text=True,
                         env={"PYTHONPATH": str(ROOT), "PATH": ""})
    assert run.returncode == 1 and "WRONG" in run.stdout, run.stdout + run.stderr


def test_without_arguments_the_first_commands(capsys):
    assert main([]) == 0
    assert capsys.readouterr().out.count("python -m minideepseek ") == 3
