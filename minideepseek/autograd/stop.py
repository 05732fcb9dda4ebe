"""Stop at an op by its name: the debugger opens on the first line of its math, whoever calls it.

    MINIDEEPSEEK_BREAK=softmax.backward,mla.forward python any_script.py

Derivation: whiteboard/autograd/stop.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import ast
import contextlib
import difflib
import importlib
import inspect
import os
import re
import sys
from pathlib import Path
from types import CodeType, FunctionType

VARIABLE = "MINIDEEPSEEK_BREAK"
PACKAGE = Path(__file__).parent.parent


class UnknownName(ValueError):
    """No op or place of the package has this name; the message says which are spelt like it."""


def break_on(*wanted):
    """Call breakpoint() on the first line of each function, from now on; with `with`, until the block ends.

        break_on("mla.backward", "softmax.forward")      # ops of the package, by name
        with break_on(my_backward): ...                  # a function of your own

    The stop is inside the function itself, so it holds for every caller: the tape, another op, your script.
    `.close()` of what is returned takes all of it back; of several, close the last first, as nested `with` blocks do.
    Raises UnknownName, with names like it; ValueError for what is no `def` with a source. An error leaves nothing stopped.
    """
    functions = [_function(one) if isinstance(one, str) else one for one in wanted]
    with contextlib.ExitStack() as undo:
        for function in functions:
            undo.callback(setattr, function, "__code__", stop_inside(function))
        return undo.pop_all()


def stop_if_wanted(name, forward, backward):
    """`op` calls this for every op that is made: the environment variable needs no import of a debugging tool."""
    for part, function in (("forward", forward), ("backward", backward)):
        if f"{name}.{part}" in WANTED:
            stop_inside(function)


def stop_inside(function):
    """Put `breakpoint()` before the first statement of a function, in its compiled form only; return the code it had.

    Raises ValueError for what is no function, and when its source cannot be read.
    """
    if not isinstance(function, FunctionType):
        raise ValueError(f"break_on: {function!r} is not a function made with `def`: of a method pass its __func__, of a cached one its __wrapped__")
    before = function.__code__
    try:
        tree = ast.parse("".join(inspect.findsource(before)[0]))
        place = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)       # its first line: a decorator's
                     and (node.name, min([node, *node.decorator_list], key=lambda it: it.lineno).lineno) == (before.co_name, before.co_firstlineno))
    except (OSError, SyntaxError, StopIteration):
        raise ValueError(f"break_on: {before.co_name} in {before.co_filename} has no `def` whose source can be read") from None
    call = ast.Expr(ast.Call(ast.Name("breakpoint", ast.Load()), [], []))
    place.body.insert(ast.get_docstring(place) is not None, ast.copy_location(call, place))   # on the line of the `def`:
    whole = compile(ast.fix_missing_locations(tree), before.co_filename, "exec", dont_inherit=True)   # so the next line is the first
    function.__code__ = next(code for code in _codes(whole)
                             if (code.co_name, code.co_firstlineno) == (before.co_name, before.co_firstlineno))
    return before


@contextlib.contextmanager
def no_stops():
    """For a tool that runs functions again by itself: inside this block breakpoint() does nothing."""
    hook, sys.breakpointhook = sys.breakpointhook, lambda *args, **kwargs: None
    try:
        yield
    finally:
        sys.breakpointhook = hook


def op_modules():
    """{"softmax": "minideepseek.basics.softmax", ...}: where every op of the package is, read from the files, unimported."""
    return {name: ".".join(("minideepseek", *path.relative_to(PACKAGE).with_suffix("").parts))
            for path in sorted(PACKAGE.glob("*/*.py"))
            for name in re.findall(r"^def ([a-z]\w*)_backward\(", path.read_text(encoding="utf-8"), re.M)}


def unknown(asked_by, name, known):
    """The UnknownName for a name that is none of `known`."""
    near = difflib.get_close_matches(name, known, 3) or [one for one in known if one.split(".")[0] == name.split(".")[0]]
    return UnknownName(f"{asked_by}: no {name!r} here; " + (f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"))


def _wanted(text):
    """The value of the environment variable as a set of names, each of which exists."""
    names = {name.strip() for name in text.split(",") if name.strip()}
    known = [f"{name}.{part}" for name in op_modules() for part in ("forward", "backward")] if names else ()
    for name in sorted(names.difference(known)):
        raise unknown(VARIABLE, name, known)
    return names


def _function(name):
    """'mla.backward' -> the function."""
    modules = op_modules()
    known = [f"{op}.{part}" for op in modules for part in ("forward", "backward")]
    if name not in known:
        raise unknown("break_on", name, known)
    op, part = name.split(".")
    return getattr(importlib.import_module(modules[op]), f"{op}_{part}")


def _codes(code):
    """A code object and all those inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


WANTED = _wanted(os.environ.get(VARIABLE, ""))


def demo():
    """Stop in a function without a debugger: the hook that breakpoint() calls says where it was called."""

    def halve(x):
        """Divide by two."""
        return x / 2

    stops, hook = [], sys.breakpointhook
    sys.breakpointhook = lambda: stops.append(sys._getframe(1).f_code.co_name)
    with break_on(halve):
        halve(4.0)
        with no_stops():
            halve(4.0)
    halve(4.0)
    sys.breakpointhook = hook
    print(f"ops       {len(op_modules())} in the package, for example {', '.join(list(op_modules())[:4])}")
    print(f"by hand   halve(4) = {halve(4.0):g}, as before")
    try:
        break_on("sofmax.backward")
    except UnknownName as error:
        print(f"unknown   {error}")
    print(f"claim     three calls, one of them under break_on and awake: stopped in {stops}")
    assert stops == ["halve"]


if __name__ == "__main__":
    from minideepseek.autograd.stop import demo  # the imported copy, so that every name exists once
    demo()
