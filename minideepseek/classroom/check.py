"""Check a component, a student's copy of one, or an assignment: forward against the reference's values, backward against slopes.

Derivation: whiteboard/classroom/check.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import importlib
import importlib.util
import json
import pdb
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np

from minideepseek.autograd.finite_differences import GradcheckError, output_arrays
from minideepseek.autograd.gradcheck import where_derived, worst_errors
from minideepseek.autograd.stop import break_on
from minideepseek.classroom.assignments import assignment
from minideepseek.classroom.blank import ExerciseError, find, read
from minideepseek.classroom.components import PACKAGE, components, page_of
from minideepseek.classroom.judge import checks, differs, expected
from minideepseek.classroom.worker import answer, unpack

SEEDS = (0, 1, 2)
SAME = 1e-12             # a forward is right when it differs from the reference by at most this, relative to the largest value


def check_all(seeds=SEEDS):
    """Print the worst gradient error of every component, per argument; return 0 when all are right, else 1."""
    wrong = 0
    print(f"{'component':14s} worst error of each gradient, relative to its scale (tolerance 1e-07, {len(seeds)} seeds)")
    for component in components():
        try:
            errors = worst_errors(component.forward, component.backward, component.examples, seeds)
            print(f"{component.name:14s} " + "  ".join(f"d{name} {error:.0e}" for name, error in errors.items()))
        except (GradcheckError, NotImplementedError) as error:
            wrong += 1
            print(f"{component.name:14s} {'WRONG ' if isinstance(error, GradcheckError) else 'not written yet:'} {error}")
    return int(wrong > 0)


def check_file(file):
    """Check the functions of one file and print a line for each; return 0 when all are right, else 1.

    file: a component's name, a path, or a copy made by `blank`.
    Raises ExerciseError for a file that is no component, or that does not run.
    """
    path = find(file)
    source, names = read(path)
    reference = _reference(path, source)
    references = {c.name: c for c in components() if c.path == reference}
    unknown = [name for name in names if name not in references]
    if unknown:
        raise ExerciseError(f"{path}: {', '.join(unknown)}: the reference has no such component, only {', '.join(references)}")
    module = _load(path)
    wrong = 0
    for name in names:
        for part in ("forward", "backward"):
            function = getattr(module, f"{name}_{part}")
            verdict = _verdict(references[name], module, name, part)
            wrong += not verdict.startswith("right")
            print(f"{function.__name__:24s} {verdict}")
    return int(wrong > 0)


def check_assignment(name, debug=False):
    """The grader's checks on the public questions of a student's folder: a line for each task; return 0 when all is right, else 1.

    debug: stop in the debugger at the first fault: where it was raised, or on the first line of the function that is wrong
    Raises ExerciseError where there are no questions for this assignment.
    """
    one, path = assignment(name), PACKAGE.parent / "public.json"
    stored = unpack(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {"assignment": None}
    if stored["assignment"] != name:
        raise ExerciseError(f"{path}: it holds no questions of {name}: work in the folder student/ that `assign {name}` wrote")
    faults = []
    for task in one.tasks:
        asked = stored["tasks"][task.name]
        found = checks(task, asked["questions"], {(part, number): result for part, number, result in asked["right"]}, expected(asked["questions"]))
        points, wrong = sum(check.points for check in found if not check.fault), [check for check in found if check.fault]
        print(f"{task.name:20s} {points:5.1f} of {task.points:3d}  " + (f"{wrong[0].name}: {wrong[0].fault}" if wrong else "right"))
        faults += wrong[:1]
    if faults and debug:
        _debug(faults[0])
    elif faults:
        print(f"next: read what the first fault points to, or stop there: python -m minideepseek check {name} --pdb")
    return int(bool(faults))


def _debug(fault):
    question = fault.question
    name = question["name"] + (f"_{fault.part}" if question["dy"] else "")
    try:
        answer(question, fault.part)
    except Exception as error:
        pdb.post_mortem(error.__traceback__)
    else:
        with break_on(getattr(importlib.import_module(question["module"]), name)):
            answer(question, fault.part)


def _reference(path, source):
    """The file of the package that `path` is, or is a copy of: its docstring names the page, the page names the file."""
    page = page_of(source)
    reference = PACKAGE / Path(page).relative_to("whiteboard").with_suffix(".py") if page and page.startswith("whiteboard/") else None
    if reference is None or not reference.is_file():
        raise ExerciseError(f"{path}: its docstring names no whiteboard page of this package ('Derivation: whiteboard/...'), "
                            "so its reference cannot be found")
    return reference


def _load(path):
    """Import a file that stands outside the package."""
    spec = importlib.util.spec_from_file_location(f"exercise_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ExerciseError(f"{path}: it does not run: {type(error).__name__}: {error}") from error
    return module


def _verdict(reference, module, name, part):
    """One line on one function: right, not written yet, or what is wrong with it."""
    forward, backward = getattr(module, f"{name}_forward"), getattr(module, f"{name}_backward")
    try:
        if part == "forward":
            return f"right: values equal, largest difference {_compare_values(reference, forward):.0e}"
        try:
            _compare_values(reference, forward)
        except Exception:
            forward = reference.forward          # the student's own is not right yet: judge the backward on the reference's
        errors = worst_errors(forward, backward, reference.examples, SEEDS)
        return "right: " + "  ".join(f"d{name} {error:.0e}" for name, error in errors.items())
    except NotImplementedError as error:
        return f"not written yet: {error}"
    except GradcheckError as error:              # the student's lines need not carry tags: the reference's do
        own, derived = where_derived(backward, error.argument), where_derived(reference.backward, error.argument)
        return f"WRONG: {str(error).removesuffix(own)}{derived}"
    except ExerciseError as error:
        return f"WRONG: {error}"
    except Exception as error:                   # whatever a student's function raises is an answer, not a crash
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"WRONG: {type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno}: {last.line})"


def _compare_values(reference, forward):
    """The largest difference from the reference's outputs. Raises ExerciseError at the first case that differs."""
    largest = 0.0
    for case, args, config in _cases(reference):
        y_right, _ = reference.forward(*args, **config)
        returned = forward(*[np.copy(a) if isinstance(a, np.ndarray) else a for a in args], **config)
        if not (isinstance(returned, tuple) and len(returned) == 2):
            raise ExerciseError(f"case '{case}': it must return (output, cache), it returned {type(returned).__name__}")
        given, right = output_arrays(returned[0]), output_arrays(y_right)
        fault = next((f"the output has shape {y.shape}, expected {y_right.shape}" for y, y_right in zip(given, right) if y.shape != y_right.shape), None)
        if fault := fault or differs(given, right, SAME):
            raise ExerciseError(f"case '{case}': {fault}")
        largest = max(largest, *(float(np.abs(y - y_right).max(initial=0)) for y, y_right in zip(given, right)))
    return largest


def _cases(reference):
    for seed in SEEDS:
        for case, (args, config) in reference.examples(np.random.default_rng(seed)).items():
            yield case, args, config


def demo():
    """One component as it stands, and the same file with a sign changed."""
    wrong_before = check_file("residual")
    source = find("residual").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        spoilt = Path(folder, "residual_exercise.py")
        spoilt.write_text(source.replace("dr = dy.copy()", "dr = -dy"), encoding="utf-8")
        wrong_after = check_file(spoilt)
    print(f"claim: the component is right, its copy with one sign changed is not: {(wrong_before, wrong_after) == (0, 1)}")
    assert (wrong_before, wrong_after) == (0, 1)


if __name__ == "__main__":
    from minideepseek.classroom.check import demo  # the imported copy, so that every name exists once
    demo()
