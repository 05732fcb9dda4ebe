"""Make an assignment: the student's folder, the solution, the autograder for Gradescope; and prove it before anything is written.

Derivation: whiteboard/classroom/assign.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import importlib
import json
import os
import sys
import tempfile
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minideepseek.classroom.assignments import assignment
from minideepseek.classroom.grade import grade, report
from minideepseek.classroom.judge import ask, checks, expected
from minideepseek.classroom.mutate import mutants
from minideepseek.classroom.release import AssignmentError, leaks, release, sources
from minideepseek.classroom.worker import pack

SETUP = """#!/usr/bin/env bash
# Python 3.11 or newer with three libraries; nothing is fetched where they are.
python3 -c "import numpy, scipy, ml_dtypes" || (apt-get update && apt-get install -y python3 python3-pip && python3 -m pip install --break-system-packages "numpy>=2.1" scipy ml_dtypes)
"""
RUN = """#!/usr/bin/env bash
# Grade submission/ into results/results.json, beside this file: /autograder on Gradescope.
cd "$(dirname "$0")" && chmod -R go-rwx source && mkdir -p results && PYTHONPATH=source python3 -c \\
    "from minideepseek.classroom.grade import grade_submission; grade_submission('submission', '{name}', 'results/results.json')"
exit 0
"""
README = """# {name}: {title}

Write the functions that raise NotImplementedError; each names its whiteboard page and equations.

{tasks}

    python -m minideepseek check {name}          what is right, what is wrong, and where it is derived
    python -m minideepseek check {name} --pdb    the debugger at the first fault

Needs Python 3.11 with numpy, scipy and ml_dtypes. Hand in: {files}
"""


class Proof(NamedTuple):
    """What was measured before an assignment was given out."""
    solution: float      # points of the solution
    stub: float          # points of the release as it is
    mutants: int         # of the solution
    lost: int            # how many of them lose points
    equivalent: dict     # {mutant that does not: why it need not}


def assign(name, out, *, sample=None, say=print):
    """Write out/student, out/solution and out/autograder.zip; return the Proof.

    sample: prove with so many mutants instead of all
    Raises AssignmentError when `out` exists, or the proof fails; then nothing is written.
    """
    one, out = assignment(name), Path(out)
    if out.exists():
        raise AssignmentError(f"{out} exists: choose another folder")
    texts, cut = release(one)
    say(f"{name}: {len(texts)} files; besides the solution {len(cut)} functions and pages cut")
    proof = prove(one, texts, sample=sample)
    say(f"solution {proof.solution:g}, untouched {proof.stub:g}, {proof.lost} of {proof.mutants} mutants lose points, {len(proof.equivalent)} are equivalent")
    whole = sources()
    student = texts | {"README.md": _readme(one), "public.json": json.dumps(pack(public(one)))}
    grader = {"setup.sh": SETUP, "run_autograder": RUN.format(name=name)} | whole | {
        f"release/{path}": text for path, text in texts.items() if path.startswith("minideepseek/")}
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".assign-", dir=out.absolute().parent) as beside:
        for folder, files in (("student", student), ("solution", {file: whole[file] for file in one.files})):
            write(Path(beside, "new", folder), files)
        with zipfile.ZipFile(Path(beside, "new", "autograder.zip"), "w", zipfile.ZIP_DEFLATED) as archive:
            for path, text in grader.items():
                info = zipfile.ZipInfo(path, (2024, 12, 27, 0, 0, 0))
                info.external_attr, info.compress_type = 0o755 << 16, zipfile.ZIP_DEFLATED
                archive.writestr(info, text)
        os.rename(Path(beside, "new"), out)
    say(f"{out}: student/, solution/, autograder.zip")
    return proof


def prove(one, texts, *, sample=None, seed=0):
    """Measure a release {path: text} and the grader together. Raises AssignmentError at the first thing that is not as it must be."""
    if left := leaks(one, texts):
        raise AssignmentError(f"{one.name}: the release still holds lines of the solution: {'; '.join(left)}")
    whole = sources()
    with ThreadPoolExecutor(2) as pool:
        solution, stub = pool.map(lambda files: _grade({file: files[file] for file in one.files}, one, texts), (whole, texts))
    for what, outcome, wanted in (("solution", solution, "passed"), ("untouched release", stub, "failed")):
        wrong = [test for test in outcome["tests"] if test["status"] != wanted]
        if wrong or not outcome["tests"]:
            raise AssignmentError(f"{one.name}: the {what} scores {outcome['score']:g} of 100:\n{report(outcome | {'tests': wrong})}")
    made = [(task, what, text) for task in one.tasks for name in task.written
            for what, text in mutants(whole[f"minideepseek/{task.file}"], name).items()]
    chosen = made if sample is None else [made[i] for i in np.random.default_rng(seed).permutation(len(made))[:sample]]
    asked = {task.name: ask(task, np.random.default_rng(seed)) for task in one.tasks}
    for question in (question for questions in asked.values() for question in questions):
        question["moved"] = []                       # what the values do not tell, slopes do not
    right = {name: expected(questions) for name, questions in asked.items()}
    alive = [what for task, what, text in chosen if not _loses(task, text, asked[task.name], right[task.name])]
    equivalent = {what: reason for what in alive for part, reason in one.equivalent.items() if part in what}
    if unknown := [what for what in alive if what not in equivalent]:
        raise AssignmentError(f"{one.name}: the grader gives full marks to wrong code:\n" + "\n".join(unknown))
    if idle := [part for part in one.equivalent if sample is None and not any(part in what for what in alive)]:
        raise AssignmentError(f"{one.name}: listed as equivalent, and no mutant that lives is: {', '.join(idle)}")
    return Proof(solution["score"], stub["score"], len(chosen), len(chosen) - len(alive), equivalent)


def _grade(files, one, texts):
    with tempfile.TemporaryDirectory() as folder:
        write(folder, files)
        return grade(folder, one, files=texts)


def _loses(task, text, questions, right):
    """Does a spoilt copy of a task's file lose points? It takes the place of the module while it is asked."""
    original = importlib.import_module(task.module)
    module = types.ModuleType(task.module)
    module.__dict__.update({key: original.__dict__[key] for key in ("__file__", "__package__", "__spec__")})
    sys.modules[task.module] = module
    try:
        with np.errstate(all="ignore"):
            exec(compile(text, original.__file__, "exec"), module.__dict__)
        return any(check.fault for check in checks(task, questions, right, expected(questions)))
    except Exception:                                # it cannot even be imported
        return True
    finally:
        sys.modules[task.module] = original


def public(one):
    """The questions that students may see, with their answers: another draw than any that is graded."""
    asked = {task.name: ask(task, np.random.default_rng(0)) for task in one.tasks}
    return {"assignment": one.name, "tasks": {name: {"questions": questions, "right": [[*key, result] for key, result in expected(questions).items()]}
                                              for name, questions in asked.items()}}


def write(folder, files):
    """Files {path: text} under a folder."""
    for path, text in files.items():
        Path(folder, path).parent.mkdir(parents=True, exist_ok=True)
        Path(folder, path).write_text(text, encoding="utf-8", newline="")


def _readme(one):
    tasks = "\n".join(f"- {task.points:3d} points: {', '.join(task.written)} in minideepseek/{task.file}" for task in one.tasks)
    return README.format(name=one.name, title=one.title, tasks=tasks, files=", ".join(one.files))


def demo():
    """A week, proved on some of its mutants and written."""
    with tempfile.TemporaryDirectory() as folder:
        proof = assign("8-fp8", Path(folder, "week8"), sample=5)
        names = sorted(path.name for path in Path(folder, "week8").iterdir())
    print(f"claim     {names}: solution {proof.solution:g}, untouched {proof.stub:g}, {proof.lost} of {proof.mutants} mutants lose points")
    assert (proof.solution, proof.stub, proof.lost + len(proof.equivalent)) == (100, 0, 5) and names == ["autograder.zip", "solution", "student"]


if __name__ == "__main__":
    from minideepseek.classroom.assign import demo  # the imported copy, so that every name exists once
    demo()
