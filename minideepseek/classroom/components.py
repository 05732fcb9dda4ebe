"""Every component of the package: each pair of x_forward and x_backward, found by name.

Derivation: whiteboard/classroom/components.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import ast
import importlib
import re
from pathlib import Path
from typing import Callable, NamedTuple

import minideepseek

PACKAGE = Path(minideepseek.__file__).parent
TAG = re.compile(r"# eq\. (\d+)\s*$")


class Component(NamedTuple):
    """A forward and a backward, and the cases they are checked on."""
    name: str            # rmsnorm
    module: object       # minideepseek.basics.rmsnorm
    forward: Callable
    backward: Callable
    examples: Callable   # (rng) -> {case: (args, config)}

    @property
    def path(self):
        return Path(self.module.__file__)


def components():
    """All components, in the order of their files.

    Raises AttributeError when a pair lacks its `x_examples`: nothing may go unchecked.
    """
    found = []
    for path in sorted(PACKAGE.glob("*/*.py")):
        names = pairs(path.read_text(encoding="utf-8"))
        if names:
            module = importlib.import_module(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
            found += [Component(name, module, *[getattr(module, f"{name}_{part}") for part in ("forward", "backward", "examples")])
                      for name in names]
    return found


def pairs(source):
    """The names x for which a file defines both x_forward and x_backward, in the order of the file."""
    functions = [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"]
    return [f.removesuffix("_forward") for f in functions
            if f.endswith("_forward") and f.removesuffix("_forward") + "_backward" in functions]


def page_of(source):
    """The whiteboard page a file names in its docstring: 'whiteboard/basics/rmsnorm.md', or None."""
    found = re.search(r"Derivation: (\S+)", ast.get_docstring(ast.parse(source)) or "")
    return found[1] if found else None


def equations(lines):
    """The numbers of the `# eq. n` tags at the ends of some source lines."""
    return [int(tag[1]) for tag in map(TAG.search, lines) if tag]


def demo():
    """List the components with their cases."""
    import numpy as np

    found = components()
    for component in found:
        cases = component.examples(np.random.default_rng(0))
        print(f"{component.name:14s} {component.module.__name__:36s} {', '.join(cases)}")
    print(f"claim: {len(found)} components, each with examples")
    assert len(found) >= 11


if __name__ == "__main__":
    from minideepseek.classroom.components import demo  # the imported copy, so that every name exists once
    demo()
