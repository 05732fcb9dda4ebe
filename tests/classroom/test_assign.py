import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

from minideepseek.classroom import assign as module
from minideepseek.classroom import sandbox
from minideepseek.classroom.assign import assign, prove
from minideepseek.classroom.assignments import assignment
from minideepseek.classroom.grade import grade
from minideepseek.classroom.release import AssignmentError, release, sources
from tests.house import ROOT

CHECK = "import sys; from minideepseek.classroom.check import check_assignment; sys.exit(check_assignment('3-rope', debug='--pdb' in sys.argv))"
NAME = "3-rope"


@pytest.fixture(scope="module", autouse=True)
def without_scipy():
    """The week proved here does not need it, and importing it takes longer than the rest of a grading."""
    names = [name for name in sandbox.libraries() if not name.startswith("scipy")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "libraries", lambda: names)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An assignment as the instructor gets it."""
    out = tmp_path_factory.mktemp("course") / "deep" / "week3"
    lines = []
    proof = assign(NAME, out, sample=10, say=lines.append)
    return out, proof, lines


@pytest.fixture(scope="module")
def texts():
    return release(assignment(NAME))[0]


def python(folder, *command, stdin=""):
    """Without bytecode: a file edited twice within a second would be taken from there."""
    environment = {"PATH": os.environ["PATH"], "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, *command], cwd=folder, input=stdin, capture_output=True, text=True, env=environment)


def test_assignments_prove():
    """Those that lean on the most of the package, with a few mutants; all eight with all mutants: examples/prove_assignments.py."""
    run = subprocess.run([sys.executable, ROOT / "examples/prove_assignments.py", "1-tape", "5-mla", "6-moe", "8-fp8", "--mutants", "5"], capture_output=True, text=True)
    assert run.returncode == 0 and " of 20 mutants lose points" in run.stdout and "0 of 4 assignments fail" in run.stdout, run.stdout + run.stderr


def test_what_is_written(made):
    out, proof, lines = made
    assert sorted(path.name for path in out.iterdir()) == ["autograder.zip", "solution", "student"] and len(list(out.parent.iterdir())) == 1
    assert proof[:4] == (100, 0, 10, 10) and proof.equivalent == {} and "10 of 10 mutants lose points" in lines[1]
    assert [path.relative_to(out / "solution").as_posix() for path in out.glob("solution/**/*.py")] == ["minideepseek/attention/rope.py"]
    assert {path.name for path in (out / "student").iterdir()} == {"README.md", "minideepseek", "public.json", "whiteboard"}
    assert "60 points: rope_forward, rope_backward in minideepseek/attention/rope.py" in (out / "student/README.md").read_text()


def test_a_student_sees_what_is_not_written_then_what_is_wrong_then_that_all_is_right(made, tmp_path):
    shutil.copytree(made[0] / "student", tmp_path / "work")
    file = tmp_path / "work/minideepseek/attention/rope.py"
    untouched = python(tmp_path / "work", "-c", CHECK)
    assert untouched.returncode == 1, untouched.stderr
    table = untouched.stdout.splitlines()
    assert table[0].split()[:4] == ["tables", "0.0", "of", "40"] and "NotImplementedError: write frequencies: whiteboard/attention/rope.md" in table[0]
    assert table[1].startswith("rope ") and table[2].endswith(f"python -m minideepseek check {NAME} --pdb")

    solved = (made[0] / "solution/minideepseek/attention/rope.py").read_text()
    file.write_text(solved.replace("dy_b * cos - dy_a * sin", "dy_b * cos + dy_a * sin"))
    wrong = python(tmp_path / "work", "-c", CHECK)
    assert wrong.returncode == 1 and wrong.stdout.splitlines()[0].endswith("40.0 of  40  right")
    assert "rope                  30.0 of  60  dx: case 'interleaved'" in wrong.stdout and "see whiteboard/attention/rope.md" in wrong.stdout, wrong.stdout

    file.write_text(solved)
    right = python(tmp_path / "work", "-c", CHECK)
    assert right.returncode == 0 and right.stdout.count("right") == 2 and "next" not in right.stdout


def test_pdb_stops_at_the_fault(made, tmp_path):
    shutil.copytree(made[0] / "student", tmp_path / "work")
    file = tmp_path / "work/minideepseek/attention/rope.py"
    solved = (made[0] / "solution/minideepseek/attention/rope.py").read_text()
    file.write_text(solved.replace("dy_b * cos - dy_a * sin", "dy_b * cos + dy_a * sin"))
    stopped = python(tmp_path / "work", "-c", CHECK, "--pdb", stdin="p dy.shape\nw\nq\n")
    assert "(2, 3, 4, 6)" in stopped.stdout and "rope_backward()" in stopped.stdout, stopped.stdout + stopped.stderr
    file.write_text(solved.replace("dy_b * cos - dy_a * sin", "dy_b @ cos"))
    stopped = python(tmp_path / "work", "-c", CHECK, "--pdb", stdin="p dy_b.shape\nq\n")
    assert "(2, 3, 4, 3)" in stopped.stdout and "-> dx_b[...] = dy_b @ cos" in stopped.stdout, stopped.stdout + stopped.stderr


def test_the_public_questions_hold_no_code_and_are_not_those_that_are_graded(made):
    public = json.loads((made[0] / "student/public.json").read_text())
    assert public["assignment"] == NAME and public["tasks"].keys() == {"tables", "rope"}
    assert "def " not in json.dumps(public) and "import" not in json.dumps(public)


def test_the_autograder_in_gradescopes_folders(made, tmp_path):
    """Unpacked as Gradescope does: run_autograder copied out of source/, student's files in submission/, nothing from this repository in reach."""
    base = tmp_path / "autograder"
    with zipfile.ZipFile(made[0] / "autograder.zip") as archive:
        names = archive.namelist()
        assert {"setup.sh", "run_autograder"} <= set(names) and not any("whiteboard" in name or "tests" in name for name in names)
        assert all(archive.getinfo(name).external_attr >> 16 == 0o755 for name in ("setup.sh", "run_autograder"))
        archive.extractall(base / "source")
    shutil.copy(base / "source/run_autograder", base)
    os.chmod(base / "run_autograder", 0o755)
    (base / "results").mkdir()
    shutil.copytree(made[0] / "solution", base / "submission")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").symlink_to(sys.executable)
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
    setup = subprocess.run(["bash", base / "source/setup.sh"], env=environment, capture_output=True, text=True)
    assert setup.returncode == 0 and setup.stdout == "", "everything is there: nothing to fetch"
    for score in (100, 0):
        ran = subprocess.run([base / "run_autograder"], cwd="/", env=environment, capture_output=True, text=True)
        results = json.loads((base / "results/results.json").read_text())
        assert ran.returncode == 0 and results["score"] == score, ran.stdout + ran.stderr
        assert sum(test["max_score"] for test in results["tests"]) == pytest.approx(100) and {"name", "score", "max_score", "output"} <= results["tests"][0].keys()
        shutil.rmtree(base / "submission")
        (base / "submission").mkdir()
    assert not (base / "source").stat().st_mode & 0o077, "the solution lies there"


def test_a_folder_that_exists_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("work")
    with pytest.raises(AssignmentError, match="exists: choose another"):
        assign(NAME, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_nothing_is_left_of_an_assignment_that_was_not_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "prove", lambda *_, **__: module.Proof(100, 0, 0, 0, {}))
    monkeypatch.setattr(zipfile.ZipFile, "writestr", lambda *_: exec("raise OSError('no space left')"))
    with pytest.raises(OSError, match="no space"):
        assign(NAME, tmp_path / "week", say=lambda _: None)
    assert list(tmp_path.iterdir()) == []


def refused(one, texts, words, tmp_path):
    with pytest.raises(AssignmentError, match=words) as error:
        prove(one, texts, sample=40)
    return str(error.value)


def test_a_line_of_the_solution_left_is_refused(texts, tmp_path):
    page = "whiteboard/attention/rope.md"
    assert page in refused(assignment(NAME), texts | {page: texts[page] + "`y_a[...] = a*cos - b*sin`"}, "still holds lines of the solution", tmp_path)


def test_a_solution_that_does_not_get_everything_is_refused(texts, tmp_path):
    """As when a task needs something that the release does not hold."""
    spoilt = texts | {"minideepseek/autograd/tape.py": "op = nothing_of_that_name"}
    assert "nothing_of_that_name" in refused(assignment(NAME), spoilt, "the solution scores 0", tmp_path)


def test_a_stub_that_gets_something_is_refused(texts, tmp_path):
    one = assignment(NAME)
    stub = re.sub(r'raise NotImplementedError\("write rope_forward.*', "return x, None", texts[one.files[0]])
    message = refused(one, texts | {one.files[0]: stub}, "the untouched release scores 6", tmp_path)
    assert "rope: runs" in message and "rope: dx" not in message, "only what should have failed is listed"


def test_a_grader_that_does_not_notice_is_refused(texts, tmp_path, monkeypatch):
    real = module.checks
    monkeypatch.setattr(module, "checks", lambda *args: [check._replace(fault=None) for check in real(*args)])
    message = refused(assignment(NAME), texts, "gives full marks to wrong code", tmp_path)
    assert message.count("\n") == 40 and "rope_backward, line" in message


def test_a_list_of_equivalent_mutants_holds_only_those_that_live(texts, tmp_path):
    one = assignment(NAME)._replace(equivalent={"theta": "no reason"})
    with pytest.raises(AssignmentError, match="listed as equivalent, and no mutant that lives is: theta"):
        prove(one, texts)


def test_a_sample_of_mutants_loses_points_in_the_sandbox_too(texts, tmp_path):
    """What is proved in this process is what the grader does."""
    one = assignment(NAME)
    source = sources()[one.files[0]]
    for old, new, lost in (("y_a[...] = a * cos - b * sin", "y_a[...] = a * cos + b * sin", {"rope: forward values", "rope: finite differences"}),
                           ("[:, None] * theta", "[:, None] / theta", {"tables: tables", "tables: float32"})):
        (tmp_path / "rope.py").write_text(source.replace(old, new))
        outcome = grade(tmp_path, one, files=texts)
        assert source.count(old) == 1 and {test["name"] for test in outcome["tests"] if test["status"] == "failed"} >= lost, outcome
