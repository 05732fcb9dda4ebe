import ast
import subprocess
import sys

import pytest

from minideepseek.classroom.assignments import ASSIGNMENTS
from minideepseek.classroom.blank import functions
from minideepseek.classroom.release import LEFT_OUT, holds, leaks, release, sources, squeeze, statements
from tests.house import ROOT

WEEKS = list(ASSIGNMENTS.values())


@pytest.fixture(scope="module")
def releases():
    return {one.name: release(one)[0] for one in WEEKS}


@pytest.mark.parametrize("one", WEEKS, ids=ASSIGNMENTS)
def test_no_line_of_this_or_of_the_last_solution_is_left(one, releases):
    assert leaks(one, releases[one.name]) == leaks(WEEKS[-1], releases[one.name]) == []


@pytest.fixture(scope="module")
def whole():
    """{(file, name): node} of every function that some week takes away."""
    texts = sources()
    return {(file, name): node for file in {file for one in WEEKS for file in one.files} for name, node in functions(texts[file]).items()}


@pytest.mark.parametrize("one", WEEKS, ids=ASSIGNMENTS)
def test_this_week_is_to_be_written_earlier_ones_are_solved_later_ones_too_are_not_there(one, releases, whole):
    here = {(file, name): node for file in {file for week in WEEKS for file in week.files} for name, node in functions(releases[one.name][file]).items()}
    for week in WEEKS:
        for place in [(f"minideepseek/{task.file}", name) for task in week.tasks for name in task.written]:
            before, after = whole[place], here[place]
            assert ast.dump(after.args) == ast.dump(before.args) and ast.get_docstring(after) == ast.get_docstring(before)
            if WEEKS.index(week) < WEEKS.index(one):
                assert ast.dump(after) == ast.dump(before), f"{week.name}: {place}"
            else:
                assert ast.unparse(after.body[-1]).startswith(f"raise NotImplementedError('write {place[1]}: whiteboard/"), f"{week.name}: {place}"


def test_files_without_a_part_in_it_stay_as_they_are(releases):
    whole = sources()
    for file in ("minideepseek/basics/linear.py", "minideepseek/autograd/params.py", "minideepseek/__init__.py", "minideepseek/classroom/worker.py"):
        assert all(texts[file].rstrip() == whole[file].rstrip() for texts in releases.values())
    page = "whiteboard/basics/rmsnorm.md"
    assert releases["2-norms"][page] == (ROOT / page).read_text(encoding="utf-8"), "the derivation is what a student works from"
    assert all("tests/" not in file and "examples/" not in file for file in releases["2-norms"])


def test_near_copies_go_with_the_original(releases):
    for name, file, function in (("4-attention", "minideepseek/attention/flash.py", "flash_attention_backward"), ("5-mla", "minideepseek/attention/multi_head.py", "multi_head_backward"),
                                 ("6-moe", "minideepseek/moe/classic.py", "dense_moe_forward"), ("1-tape", "minideepseek/moe/classic.py", "dense_moe_forward"),
                                 ("2-norms", "minideepseek/basics/rmsnorm.py", "demo"), ("8-fp8", "minideepseek/precision/tiles.py", "fake_quantise")):
        assert LEFT_OUT in ast.unparse(functions(releases[name][file])[function])
    assert LEFT_OUT not in ast.unparse(functions(releases["7-mtp"]["minideepseek/moe/classic.py"])["dense_moe_forward"]), "it is back when it gives nothing away"


@pytest.mark.parametrize("text", [
    "dx_hat = dy*g", "    dx_hat  =  (dy *\n        g)  # the gain", "# once: dx_hat = dy * g", "| `dx_hat = dy * g` |", "dx_hat = \\\n dy * g"])
def test_a_line_is_found_however_it_is_written(text):
    secrets = statements({"f": "def f(dy, g):\n    dx_hat = dy * g\n    return dx_hat\n"}, {"f": ["f"]})
    assert secrets == ["dx_hat=dy*g"] and holds(f"before\n{text}\nafter", secrets)


def test_what_gives_nothing_away_is_no_secret():
    source = "def f(cache):\n    a, b = cache\n    B, T, _ = a.shape\n    c = np.zeros(B)\n    raise ValueError(f'{a} {b}')\n    return a, b\n"
    assert statements({"f": source}, {"f": ["f"]}) == []
    assert squeeze("f( 'a',\n  \"b\" )  # words") == 'f"a","b"'


def test_a_line_put_into_a_page_or_a_docstring_is_a_leak(releases):
    for file in ("whiteboard/basics/linear.md", "minideepseek/basics/linear.py"):
        spoilt = releases["2-norms"] | {file: releases["2-norms"][file] + "\n# dx_hat = dy * g\n"}
        assert leaks(ASSIGNMENTS["2-norms"], spoilt) == [f"{file}: dx_hat=dy*g"]


def test_every_file_of_the_emptiest_release_can_be_imported(releases, tmp_path):
    for file, text in releases["1-tape"].items():
        if file.startswith("minideepseek/"):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(text, encoding="utf-8")
    names = [file.removesuffix(".py").replace("/", ".") for file in releases["1-tape"] if file.endswith(".py") and "__" not in file]
    probe = f"import importlib, sys\nfor name in {names + ['minideepseek.__main__']}:\n    importlib.import_module(name)\nprint(sys.modules['minideepseek'].__file__)"
    run = subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and str(tmp_path) in run.stdout, run.stderr
