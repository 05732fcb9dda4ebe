"""Blank out a function: a copy of a component whose forward or backward the student writes anew.

Derivation: whiteboard/classroom/blank.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import ast
import os
from pathlib import Path

from minideepseek.classroom.components import PACKAGE, equations, page_of, pairs

ENDING = '''

if __name__ == "__main__":
    from minideepseek.classroom.check import check_file
    raise SystemExit(check_file(__file__))
'''


class ExerciseError(ValueError):
    """This file cannot be blanked or checked; the message says why."""


def find(file):
    """The path of a component, from its name ('rmsnorm'), its place ('basics/rmsnorm') or a path.

    Raises ExerciseError when there is no such file, or more than one.
    """
    path = Path(file)
    if path.is_file():
        return path
    name = str(file).removesuffix(".py")
    found = [p for p in sorted(PACKAGE.glob("*/*.py")) if f"/{p.relative_to(PACKAGE).with_suffix('')}".endswith(f"/{name}")]
    if len(found) != 1:
        hint = f"it could be any of {', '.join(str(p.relative_to(PACKAGE)) for p in found)}" if found else "no such file or component"
        raise ExerciseError(f"{file}: {hint}")
    return found[0]


def read(path):
    """-> (source, names of its pairs).

    Raises ExerciseError for a file that is not text, not Python, or holds no x_forward with an x_backward.
    """
    try:
        source = path.read_text(encoding="utf-8")
        names = pairs(source)
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ExerciseError(f"{path}: not a Python file that can be read: {error}") from None
    if not names:
        raise ExerciseError(f"{path}: no component: it defines no function x_forward together with x_backward")
    return source, names


def functions(source):
    """{name: node} of every function of a file, and of its classes: 'rmsnorm_forward', 'Tape.backward'."""
    found = {}
    for node in ast.parse(source).body:
        methods = [child for child in node.body if isinstance(child, ast.FunctionDef)] if isinstance(node, ast.ClassDef) else []
        found |= {node.name: node} if isinstance(node, ast.FunctionDef) else {f"{node.name}.{child.name}": child for child in methods}
    return found


def hollow(source, messages):
    """The source with the body of every function of `messages` {name: words} replaced by a NotImplementedError; docstrings stay."""
    lines = source.splitlines()
    nodes = [(node, messages[name]) for name, node in functions(source).items() if name in messages]
    for node, words in sorted(nodes, key=lambda pair: -pair[0].lineno):       # from the bottom up, so that line numbers stay true
        first = body(node)[0]
        lines[first.lineno - 1:node.end_lineno] = [f'{" " * first.col_offset}raise NotImplementedError("{words}")']
    return "\n".join(lines) + "\n"


def body(node):
    """The statements of a function, its docstring left out."""
    return node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body


def to_write(source, names):
    """{name: 'write rmsnorm_backward: whiteboard/basics/rmsnorm.md, eq. 4, 5, 6'} for functions of a file."""
    lines, page, words = source.splitlines(), page_of(source), {}
    for name, node in functions(source).items():
        numbers = equations(lines[body(node)[0].lineno - 1:node.end_lineno])
        words[name] = f"write {name}: {page}" + (f", eq. {', '.join(map(str, numbers))}" if numbers else "")
    return {name: words[name] for name in names}


def blank_source(source, names):
    """A copy that lives outside the package and checks itself, with the bodies of the functions `names` left to the student."""
    lines = hollow(source, to_write(source, names)).splitlines()
    for node in reversed(ast.parse("\n".join(lines)).body):
        if isinstance(node, ast.If) and ("__package__" in ast.unparse(node.test) or "__main__" in ast.unparse(node.test)):
            lines[node.lineno - 1:node.end_lineno] = []
    return "\n".join(lines).rstrip() + "\n" + ENDING


def blank(file, function=None, out=None):
    """Write an exercise: a copy of a component without the body of `function`; return the path of the copy.

    file: a component's name or path   function: of that file; every backward when it is left out
    out: where to write, `<name>_exercise.py` in the current folder by default; never overwritten
    Raises ExerciseError for a file that is no component, an unknown function, or a file that exists.
    """
    path = find(file)
    source, names = read(path)
    known = [f"{name}_{part}" for name in names for part in ("forward", "backward")]
    if function is not None and function not in known:
        raise ExerciseError(f"{path}: no function {function}; it has {', '.join(known)}")
    chosen = [function] if function else [name for name in known if name.endswith("_backward")]
    out = Path(out or f"{path.stem}_exercise.py")
    if out.exists():
        raise ExerciseError(f"{out} exists already and may hold work: move it away, or choose another name with --out")
    text = blank_source(source, chosen)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, out)
    return out, chosen


def demo():
    """Blank rmsnorm_backward in memory and show what is left of it."""
    source, _ = read(find("basics/rmsnorm"))
    text = blank_source(source, ["rmsnorm_backward"])
    start = text.index("def rmsnorm_backward")
    print(text[start:text.index("\n\n", start)])
    left = [line for line in source.splitlines() if "dx_hat" in line and line in text]
    print(f"claim: lines of the solution that are left: {len(left)}")
    assert not left and "def rmsnorm_forward" in text


if __name__ == "__main__":
    from minideepseek.classroom.blank import demo  # the imported copy, so that every name exists once
    demo()
