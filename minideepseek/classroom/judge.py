"""The judge: draws fresh questions, knows the answers, and says what a student's answers are worth, check by check.

Derivation: whiteboard/classroom/judge.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import importlib
import inspect
import operator
from typing import NamedTuple

import numpy as np

from minideepseek.autograd.causes import UNKNOWN, likely_cause
from minideepseek.autograd.finite_differences import finite_differences, floating, output_arrays
from minideepseek.autograd.gradcheck import argument_names, where_derived
from minideepseek.classroom import assignments
from minideepseek.classroom.components import equations
from minideepseek.classroom.worker import PARTS, answers

SHARES = {"runs": 1, "shapes and dtype": 1, "forward values": 3, "gradients": 4, "finite differences": 1, "cases": 8}     # of a task's points
NO_ANSWER = "no answer: the time was up, or the process ended"
SLOPE = 1e-6                 # how well a gradient must fit the slopes of the student's own forward


class Check(NamedTuple):
    """One line of a report."""
    name: str
    points: float
    fault: str | None        # None: right
    question: dict           # where the fault was found first
    part: str                # of that question


def ask(task, rng):
    """Questions for worker.answers, drawn from rng: one for each case of a task."""
    module, questions = importlib.import_module(task.module), []
    first = operator.attrgetter(task.written[0] if task.cases else f"{task.name}_forward")(module)
    numbers = ", ".join(map(str, equations(inspect.getsource(first).splitlines())))
    shared = {"dy": None, "tolerance": task.tolerance, "where": {"": where_derived(first) + (f", eq. {numbers}" if numbers else "")}}
    if task.cases:
        return [shared | {"case": case, "name": name, "args": list(args), "config": config,
                          "module": assignments.__name__ if hasattr(assignments, name) else task.module}
                for case, (name, args, config) in task.cases(rng).items()]
    forward, backward, examples = [getattr(module, f"{task.name}_{part}") for part in ("forward", "backward", "examples")]
    for case, (args, config) in examples(rng).items():
        config = config | (task.config if questions else {})
        names, (y, _) = argument_names(forward, len(args)), forward(*args, **config)
        directions = [rng.standard_normal(arg.shape) if floating(arg) else None for arg in args]
        directions = [d if d is None else d / np.linalg.norm(d) for d in directions]
        questions.append(shared | {
            "case": case, "module": task.module, "name": task.name, "args": list(args), "config": config, "names": names,
            "dy": [np.asarray(rng.standard_normal(part.shape)) for part in output_arrays(y) if floating(part)],
            "where": shared["where"] | {name: where_derived(backward, name) for name in names},
            "directions": directions, "moved": _moved(args, directions)})
    return questions


def expected(questions):
    """The answers of the functions that are imported here: {(part, number): result}."""
    with np.errstate(all="ignore"):
        return {(part, number): result for part, number, result in answers(questions)}


def checks(task, questions, right, given):
    """What the given answers are worth: a list of Check, under the same names for every submission."""
    found = {}
    for number, question in enumerate(questions):
        mine, yours = ({part: known.get((part, number), NO_ANSWER) for part in PARTS} for known in (right, given))
        for group, name, part, fault in (_of_component if question["dy"] else _of_function)(question, mine, yours):
            if (group, name) not in found or not found[group, name].fault:
                found[group, name] = Check(name, 0.0, fault and f"case '{question['case']}': {fault}", question, part)
    groups = [group for group, _ in found]
    whole = sum(SHARES[group] for group in set(groups))
    return [check._replace(points=task.points * SHARES[group] / whole / groups.count(group)) for (group, _), check in found.items()]


def _of_function(question, right, given):
    """Yield (group, check, part, fault or None) of a plain function; an error, where one is due, must be of the right kind."""
    y, y_right, where = given["forward"], right["forward"], question["where"][""]
    if isinstance(y_right, str):
        same = isinstance(y, str) and y.split(":")[0] == y_right.split(":")[0]
        yield "cases", question["case"], "forward", None if same else f"{y if isinstance(y, str) else 'it returned'}, expected {y_right}{where}"
    else:
        yield "runs", "runs", "forward", y if isinstance(y, str) else None
        yield "shapes and dtype", "shapes and dtype", "forward", form(y, y_right)
        yield "cases", question["case"], "forward", form(y, y_right) or differs(y, y_right, question["tolerance"], where=where)


def _of_component(question, right, given):
    """The same of a forward and a backward. Each is compared with the reference, and the backward with the student's own forward."""
    y, y_right, dx, dx_right = given["forward"], right["forward"], given["backward"], right["backward"]
    where, tolerance, names = question["where"], question["tolerance"], question["names"]
    yield "runs", "runs", "forward", y if isinstance(y, str) else None
    yield "shapes and dtype", "shapes and dtype", "forward" if form(y, y_right) else "backward", form(y, y_right) or form(dx, dx_right)
    yield "forward values", "forward values", "forward", form(y, y_right) or differs(y, y_right, tolerance, where=where[""])
    numerics = {i: gradient for i, gradient in enumerate(dx_right) if gradient is not None}
    for i, name in ((i, names[i]) for i in numerics):
        cause = lambda: likely_cause(i, dx, numerics, question["args"], names)
        fault = form(dx, dx_right, only=i) or differs(dx[i:i + 1], dx_right[i:i + 1], tolerance, f"d{name}", where[name], cause)
        yield "gradients", f"d{name}", "backward", fault
    if question["moved"]:                        # the proof asks without
        yield "finite differences", "finite differences", "backward", _inconsistent(question, dx, given["slopes"])


def form(given, right, only=None):
    """What is wrong with the number, shapes or dtypes of some results, or of one of them; None when nothing is."""
    if isinstance(given, str):
        return given
    if len(given) != len(right):
        return f"{len(given)} values returned, expected {len(right)}"
    for i, (a, b) in enumerate(zip(given, right)):
        if only in (None, i) and not (a is None and b is None):
            got, wanted = ["None" if x is None else f"{x.dtype} of shape {x.shape}" for x in (a, b)]
            counts = a is not None and b is not None and a.shape == b.shape == () and a.dtype.kind == b.dtype.kind == "i"     # of any width
            if got != wanted and not counts:
                return f"value {i} is {got}, expected {wanted}"
            if not np.isfinite(a).all():
                return f"value {i} holds nan or inf"
    return None


def differs(given, right, tolerance, name="output", where="", cause=lambda: UNKNOWN):
    """'dg[0] = 0.567, expected 0.25, 5 of 5 differ: why; where' of the first result that is off by more than tolerance times its largest value."""
    for a, b in ((a, b) for a, b in zip(given, right) if b is not None):
        error = np.abs(a.astype(float) - b.astype(float))
        wrong = ~(error <= tolerance * (np.abs(b).max(initial=0) or 1))
        if wrong.any():
            worst = np.unravel_index(error.argmax(), error.shape)
            index = f"[{', '.join(map(str, map(int, worst)))}]" if worst else ""
            why = cause()
            return (f"{name}{index} = {a[worst]:.4g}, expected {b[worst]:.4g}, {wrong.sum()} of {wrong.size} differ"
                    f"{'' if why == UNKNOWN else f': {why}'}{where}")
    return None


def _steps(args, directions, evaluate):
    """finite_differences along one direction of every floating argument; evaluate(args) -> outputs."""
    def forward(*steps):
        steps = iter(steps)
        return tuple(evaluate([arg if d is None else arg + next(steps) * d for arg, d in zip(args, directions)])), None

    return finite_differences(forward, [np.zeros(1) for d in directions if d is not None])


def _moved(args, directions):
    """The arguments of every forward that the slopes take."""
    points = []
    _steps(args, directions, lambda moved: points.append(moved) or [np.zeros(1)])
    return points


def _inconsistent(question, gradients, outputs):
    """Where the student's gradients leave the slopes of the student's own forward, right or wrong."""
    if isinstance(gradients, str) or isinstance(outputs, str):
        return gradients if isinstance(gradients, str) else outputs
    try:
        replies = iter(outputs)
        slopes = _steps(question["args"], question["directions"], lambda moved: next(replies))
        dy = np.concatenate([part.ravel() for part in question["dy"]])
        floats = [(name, d, dx) for name, d, dx in zip(question["names"], question["directions"], gradients, strict=True) if d is not None]
        for (name, d, dx), slope in zip(floats, slopes.values(), strict=True):
            along, measured = np.vdot(d, dx), slope.rows[0] @ dy
            scale = np.abs(slope.rows[0]) @ np.abs(dy)
            if not scale > 0 or not abs(along - measured) <= SLOPE * scale:
                return f"along a direction of {name} your forward rises by {measured:.6g}, your d{name} says {along:.6g}"
    except Exception as error:                   # shapes that do not fit, nan, an integer output that changes
        return f"your forward and backward cannot be compared: {error}"
    return None


def demo():
    """A right answer, and one that takes a mean for a sum."""
    task = assignments.assignment("2-norms").tasks[0]
    questions = ask(task, np.random.default_rng(0))
    right = expected(questions)
    wrong = {key: [x if x is None or key[0] != "backward" or x.ndim > 1 else x / 3 for x in result] for key, result in right.items()}
    scores = []
    for what, given in (("right", right), ("dg / 3", wrong), ("silent", {})):
        found = checks(task, questions, right, given)
        scores.append(sum(check.points for check in found if not check.fault))
        print(f"{what:9s} {scores[-1]:4.1f} of {task.points}: " + "; ".join(f"{check.name} {'wrong' if check.fault else 'right'}" for check in found))
    print("says     ", next(check.fault for check in checks(task, questions, right, wrong) if check.name == "dg"))
    print(f"claim     all of it, less one gradient and its slopes, nothing: {scores}")
    assert scores[0] == 20 and 10 < scores[1] < 20 and scores[2] == 0


if __name__ == "__main__":
    from minideepseek.classroom.judge import demo  # the imported copy, so that every name exists once
    demo()
