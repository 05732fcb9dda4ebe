"""What the house tests share: the files of the repository, shape comments read while the code runs, planted bugs."""
import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from minideepseek.autograd.shapes import ShapeLine, _solve, _value
from minideepseek.classroom.components import components

ROOT = Path(__file__).parent.parent
FILES = sorted(p.relative_to(ROOT) for p in ROOT.glob("minideepseek/*/*.py") if p.name != "__init__.py")
PAGES = sorted(p.relative_to(ROOT) for p in ROOT.glob("whiteboard/**/*.md"))
COMPONENTS = components()
NAMES = [component.name for component in COMPONENTS]
DIMS = re.compile(r"\((?P<dims>(?:[^()]|\([^()]*\))*)\)")


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def shape_comments(function):
    """{last line of a statement: [(name, shape text), ...]} for the trailing shape comments of one function."""
    lines = Path(function.__code__.co_filename).read_text(encoding="utf-8").splitlines()
    tree = ast.parse("\n".join(lines))
    node = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)
                and n.name == function.__name__ and n.lineno == function.__code__.co_firstlineno)
    found = {}
    for statement in ast.walk(node):
        if not isinstance(statement, ast.Assign):
            continue
        comment = re.search(r"#\s+(\(.*?\)(?:\s+\(.*?\))*)\s*(?:#.*)?$", lines[statement.end_lineno - 1])
        if comment:
            target = statement.targets[0]
            names = [n.id if isinstance(n, ast.Name) else None for n in getattr(target, "elts", [target])]
            shapes = [match["dims"] for match in DIMS.finditer(comment[1])]
            found[statement.lineno, statement.end_lineno] = list(zip(names, shapes))
    return found


def lies(function, call, letters):
    """Run call() with `function` traced; return (wrong shape comments, the lines whose comment was compared)."""
    comments = shape_comments(function)
    wrong, seen = [], set()

    def compare(frame, line):
        for (first, last), pairs in comments.items():
            if line is not None and first <= line <= last:
                seen.add(last)
                for name, text in pairs:
                    value = frame.f_locals.get(name)
                    if isinstance(value, (np.ndarray, np.generic)) and not fits(np.shape(value), text, letters):
                        wrong.append(f"{function.__name__}:{last}: {name} has shape {np.shape(value)}, the comment says ({text})")

    def trace(frame, event, arg):
        if frame.f_code is not function.__code__:
            return None
        previous = None

        def local(frame, event, arg):
            nonlocal previous
            if event in ("line", "return"):
                compare(frame, previous)
                previous = frame.f_lineno
            return local
        return local

    old = sys.gettrace()
    sys.settrace(trace)
    try:
        result = call()
    finally:
        sys.settrace(old)
    return result, wrong, seen


def fits(shape, text, letters):
    """Does a shape agree with '..., D', given what the letters stand for? A letter seen first is bound here."""
    dims = [dim.strip() for dim in text.split(",") if dim.strip()]
    if "..." in dims:
        cut = len(shape) - len(dims) + 1
        if cut < 0 or letters.setdefault("...", shape[:cut]) != shape[:cut]:
            return False
        shape, dims = shape[cut:], dims[1:]
    if len(shape) != len(dims):
        return False
    for dim, size in zip(dims, shape):
        _solve(dim, size, letters)
        if _value(dim, letters) != size:
            return False
    return True


def bind(component, args, config):
    """What the letters of a component's shape line stand for in one call."""
    return ShapeLine(component.forward).bind(args, config)


def spy_on_gemm():
    """(gemm, roles): a gemm that takes two matrices and nothing else, and the list of the roles in which it is called."""
    roles = []

    def gemm(A, B, *, role):
        assert A.ndim == B.ndim == 2, f"{role}: operands of shape {A.shape} and {B.shape}"
        roles.append(role)
        return A @ B

    return gemm, roles


def plant(tmp_path, file, old, new, tests=None):
    """Copy the repository, replace `old` (found exactly once) by `new` in `file`, and demand that its own tests fail.

    Returns what the tests printed.
    """
    copy = tmp_path / "planted"
    for part in ("minideepseek", "whiteboard", "tests", "examples", "setup.cfg"):
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, copy / part)
    source = (copy / file).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{file}: the text to break stands there {source.count(old)} times, not once: {old!r}"
    (copy / file).write_text(source.replace(old, new), encoding="utf-8")
    own = tests or f"tests/{Path(file).parent.name}/test_{Path(file).name}"
    run = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", own],
                         cwd=copy, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1, f"the bug {new!r} in {file} was not noticed by {own}:\n{run.stdout[-2000:]}{run.stderr[-2000:]}"
    return run.stdout
