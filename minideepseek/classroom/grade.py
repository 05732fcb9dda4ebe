"""Grade a submission: its files laid over the release, run in the sandbox, judged from outside; a report, and Gradescope's results.json.

Derivation: whiteboard/classroom/grade.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import json
import os
import stat
import tempfile
from pathlib import Path

import numpy as np

from minideepseek.classroom.assignments import assignment
from minideepseek.classroom.blank import ExerciseError
from minideepseek.classroom.components import PACKAGE
from minideepseek.classroom.judge import ask, checks, expected
from minideepseek.classroom.release import release, sources
from minideepseek.classroom.sandbox import run
from minideepseek.classroom.worker import pack, unpack

SECONDS = 10.0               # for the questions of one task
LARGEST = 200_000            # bytes of a file that is handed in


def grade(submission, one, *, seconds=SECONDS, files=None, namespaces=True):
    """What a submission is worth, as results.json has it: {score, output, tests: [{name, score, max_score, output}]}.

    submission: a folder   one: the Assignment   files: what `release` gave for it; taken from the folder "release" beside
    the package, or made, when left out
    Whatever the submission is or does, this returns: what cannot be graded has score 0 and an output that says why.
    """
    outcome = {"score": 0.0, "output": "", "tests": [], "extra_data": {}}
    try:
        handed, notes = collect(submission, one)
        questions = [ask(task, np.random.default_rng()) for task in one.tasks]                      # fresh ones, for this submission alone
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as root:
            for path, text in ((files or released(one)) | handed).items():
                if path.startswith("minideepseek/"):
                    Path(root, path).parent.mkdir(parents=True, exist_ok=True)
                    Path(root, path).write_text(text, encoding="utf-8", newline="")
            written = run(root, [json.dumps(pack(asked)) for asked in questions], seconds, namespaces)
        for task, asked, (started, answer) in zip(one.tasks, questions, written):
            walls = json.loads(started)
            if isinstance(walls, list):              # still the questions: the worker never came to them
                raise RuntimeError("the sandbox did not start")
            outcome["extra_data"] = {"walls": walls}
            for check in checks(task, asked, expected(asked), read_answers(answer)):
                outcome["tests"].append({"name": f"{task.name}: {check.name}", "score": 0.0 if check.fault else check.points, "max_score": check.points,
                                         "status": "failed" if check.fault else "passed", "output": check.fault or "right"})
        outcome["score"] = round(sum(test["score"] for test in outcome["tests"]), 2)
        outcome["output"] = "\n".join(notes)
    except Exception as error:
        outcome |= {"score": 0.0, "tests": [], "output": f"could not be graded: {type(error).__name__}: {error}"}
    return outcome


def released(one):
    """The release that came with this grader, or a fresh one."""
    folder = PACKAGE.parent / "release"
    if not (folder / "minideepseek").is_dir():
        return release(one)[0]
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in folder.glob("**/*.py")}


def collect(submission, one):
    """-> ({path: text} of the files that are asked for, what to tell about them). At its place or at the top; regular, small, UTF-8."""
    folder, handed, notes = Path(submission), {}, []
    if not folder.is_dir():
        raise ExerciseError(f"{submission}: no such folder")
    for name in one.files:
        path = next((path for path in (folder / name, folder / Path(name).name) if os.path.lexists(path)), None)
        try:
            handed |= {} if path is None else {name: _read(path, folder)}
            notes += [f"{name}: not handed in"] if path is None else []
        except (OSError, ValueError) as error:
            notes.append(f"{name}: not read: {error}")
    return handed, notes


def _read(path, folder):
    if any(part.is_symlink() for part in (path, *path.parents) if part != folder and folder in part.parents):
        raise ValueError("a symbolic link")
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST:
            raise ValueError(f"not a regular file of at most {LARGEST:,} bytes")
        return file.read(LARGEST).decode("utf-8")


def read_answers(written):
    """{(part, number): result} from the lines a worker wrote. Anyone may have written them: a line of another form is no line."""
    given = {}
    for line in written.split(b"\n"):
        try:
            part, number, result = unpack(json.loads(line))
            rows = result if part == "slopes" else [result]
            if isinstance(result, str):
                given[part, int(number)] = "".join(c if c.isprintable() else " " for c in result[:1000])
            elif all(isinstance(row, list) and all(x is None or isinstance(x, np.ndarray) for x in row) for row in rows):
                given[part, int(number)] = result
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
            pass
    return given


def grade_submission(submission, name, results="results.json", *, seconds=SECONDS):
    """Grade, print a report, write results.json; return 0 for full marks, 1 for less, 2 for what could not be graded."""
    write_results(results, {"score": 0.0, "output": "could not be graded: the grader was stopped before it ended"})
    outcome = grade(submission, assignment(name), seconds=seconds)
    write_results(results, outcome)
    print(report(outcome))
    return 2 if not outcome["tests"] else int(any(test["status"] == "failed" for test in outcome["tests"]))


def write_results(path, outcome):
    """results.json, whole or not at all."""
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(outcome, indent=1), encoding="utf-8")
    os.replace(partial, path)


def report(outcome):
    """For the instructor: a line for each check, what was not read, what the sandbox could not do on this machine, the score."""
    rows = [f"{test['name']:36s} {test['score']:6.2f} of {test['max_score']:5.2f}  {test['output']}" for test in outcome["tests"]]
    notes = outcome["output"].splitlines() + [f"this machine gave the sandbox no wall around {name}" for name, there in outcome["extra_data"].get("walls", {}).items() if not there]
    return "\n".join([*rows, *notes, f"score {outcome['score']:g} of {sum(test['max_score'] for test in outcome['tests']):.0f}"])


def demo():
    """A solution, and an empty folder."""
    one = assignment("3-rope")
    with tempfile.TemporaryDirectory() as folder:
        empty = grade(folder, one, files=sources())
        for name in one.files:
            Path(folder, Path(name).name).write_bytes((PACKAGE.parent / name).read_bytes())
        full = grade(folder, one, files=sources())
    print(report(full))
    print(f"claim     the solution gets {full['score']:g}; of an empty folder is said: {empty['output']}")
    assert full["score"] == 100 and "not handed in" in empty["output"]


if __name__ == "__main__":
    from minideepseek.classroom.grade import demo  # the imported copy, so that every name exists once
    demo()
