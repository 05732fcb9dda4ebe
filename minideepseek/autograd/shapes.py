"""The shape line: the line of a docstring that says what goes in and what comes out, read by the machine too.

    x: (..., D)   W: (D, F)   ->   y: (..., F)

Derivation: whiteboard/autograd/shapes.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import inspect
import re
from typing import NamedTuple

import numpy as np

ITEM = re.compile(
    r"(?P<name>\w+): "
    r"(?:\((?P<dims>(?:[^()]|\([^()]*\))*)\)"                    # an array: (..., D), (B, H*V), (2*(N+R),)
    r"(?P<ids> int < (?P<below>\w)(?: or (?P<except>(?!None\b)\w+))?)?"  # ... of ids: int < U, int < U or ignore_index
    r"(?P<optional> or None)?"                                   # ... that may be absent
    r"|(?P<letter>[A-Z])\b)"                                     # a number in the configuration: n_heads: H
)


class ShapeError(ValueError):
    """An argument does not fit the shape line of the function it was given to."""


class Item(NamedTuple):
    """One entry of a shape line."""
    name: str
    dims: tuple          # ("D", "F"): a letter, or an expression such as "H*V"
    leading: bool        # the dims begin with "...": any number of leading axes, the same ones everywhere
    ids: bool            # integers (no gradient) rather than floating point
    below: str | None    # ids are in 0 .. below-1 ...
    exempt: str | None   # ... or equal to the configuration value of this name
    optional: bool       # None is allowed
    letter: str | None   # not an array but a number that gives this letter its value


class ShapeLine:
    """The shape line of `function`, compiled once; `bind` then checks one call.

    Raises TypeError when the docstring has no such line, or the line forgets a positional argument.
    """

    def __init__(self, function):
        doc = inspect.getdoc(function) or ""
        lines = [" ".join(part.split()) for part in doc.split("\n\n") if "->" in part and ITEM.match(part)]
        if not lines:
            raise TypeError(f"{function.__name__}: the docstring has no shape line 'x: (..., D)   ->   y: (..., D)'")
        before, after = lines[0].split("->")
        items = {item.name: item for item in map(_read_item, ITEM.finditer(before))}
        parameters = inspect.signature(function).parameters.values()
        positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        missing = [name for name in positional if name not in items]
        if missing:
            raise TypeError(f"{function.__name__}: the shape line says nothing about {', '.join(missing)}")
        self.text = lines[0]
        self.defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        self.args = [items[name] for name in positional]
        self.config = [item for name, item in items.items() if name in self.defaults]
        self.outputs = [_read_item(match) for match in ITEM.finditer(after)]

    def bind(self, args, config):
        """Check one call and return what the letters stand for: {"...": (2, 5), "D": 8, "F": 3}.

        args: the positional arguments, arrays or None. config: the keyword arguments.
        Raises TypeError for a wrong kind of value, ShapeError for a wrong shape or an id out of range.
        """
        if len(args) != len(self.args):
            raise TypeError(f"takes {len(self.args)} positional arguments, got {len(args)}")
        known, postponed = {}, []
        for item, array in zip(self.args, args):
            if isinstance(array, np.ndarray) and item.ids is not (array.dtype.kind in "iub"):
                expected = "integer ids" if item.ids else "floating point (this argument is differentiated)"
                raise TypeError(f"{item.name} has dtype {array.dtype}, expected {expected}")
            self._bind_one(item, array, known, postponed)
        for item in self.config:
            value = config.get(item.name, self.defaults[item.name])
            if item.letter:
                self._agree(item, item.letter, value, known)
            elif value is not None and value is not inspect.Parameter.empty:
                self._bind_one(item, value, known, postponed)
        while postponed and (ready := [entry for entry in postponed if len(_unknown(entry[1], known)) <= 1]):
            item, dim, size = ready[0]
            postponed.remove(ready[0])
            _solve(dim, size, known)
            if _value(dim, known) != size:
                raise ShapeError(self._misfit(item, dim, size, known))
        for item, array in zip(self.args, args):
            if item.below and array is not None:
                self._check_ids(item, array, known, config)
        return known

    def _bind_one(self, item, array, known, postponed):
        if array is None:
            if item.optional:
                return
            raise TypeError(f"{item.name} is None, expected an array")
        if not isinstance(array, np.ndarray):
            raise TypeError(f"{item.name} is of type {type(array).__name__}, expected an array or a Tensor")
        shape, cut = array.shape, array.ndim - len(item.dims)
        if cut < 0 or (cut and not item.leading):
            raise ShapeError(f"{item.name} has shape {shape}, which has {array.ndim} axes")
        if item.leading:
            self._agree(item, "...", shape[:cut], known)
        for dim, size in zip(item.dims, shape[cut:]):
            if dim.isalpha():
                self._agree(item, dim, size, known)
            else:
                postponed.append((item, dim, size))

    def _agree(self, item, dim, size, known):
        if known.setdefault(dim, size) != size:
            raise ShapeError(self._misfit(item, dim, size, known))

    def _misfit(self, item, dim, size, known):
        expected = _value(dim, known)
        if expected is None:
            settled = ", ".join(f"{letter} = {known[letter]}" for letter in re.findall("[A-Z]", dim) if letter in known)
            return f"{item.name} has {dim} = {size}, which cannot be with {settled}"
        return f"{item.name} has {dim} = {size}, but the other arguments give {dim} = {expected}"

    def _check_ids(self, item, ids, known, config):
        top = known[item.below]
        if ids.size == 0 or (ids.min() >= 0 and ids.max() < top):
            return
        wrong = (ids < 0) | (ids >= top)
        if item.exempt:
            wrong &= ids != config.get(item.exempt, self.defaults[item.exempt])
        if wrong.any():
            first = tuple(int(i) for i in np.argwhere(wrong)[0])
            place = f"{item.name}[{', '.join(map(str, first))}]"
            raise ShapeError(f"{place} = {ids[first]} is not in 0 .. {top - 1} ({item.below} = {top})")


def _read_item(match):
    dims = [dim.strip() for dim in (match["dims"] or "").split(",") if dim.strip()]
    return Item(match["name"], tuple(dim for dim in dims if dim != "..."), "..." in dims, bool(match["ids"]),
                match["below"], match["except"], bool(match["optional"]), match["letter"])


def _unknown(dim, known):
    """The letters of a dimension that stand for nothing yet."""
    return set(re.findall("[A-Z]", dim)) - known.keys()


def _value(dim, known):
    """The number a dimension stands for, None while one of its letters is unknown."""
    if dim in known:
        return known[dim]
    return None if _unknown(dim, known) else eval(dim, {"__builtins__": {}}, known)


def _solve(dim, size, known):
    """Bind the one letter of `dim` that is still unknown: H*V = 12 with V = 4 gives H = 3."""
    unknown = _unknown(dim, known)
    if len(unknown) == 1:
        (letter,) = unknown
        at_0, at_1 = (_value(dim, known | {letter: n}) for n in (0, 1))   # the expression is a line in the letter
        if at_1 != at_0 and (size - at_0) % (at_1 - at_0) == 0:
            known[letter] = int((size - at_0) // (at_1 - at_0))


def describe(args):
    """The shapes of a call, for error messages: '(2, 5, 8) float64, None, (8, 3) float32'."""
    return ", ".join(f"{a.shape} {a.dtype}" if isinstance(a, np.ndarray) else repr(a)[:40] for a in args)


def demo():
    """Read one shape line, bind a right call, and show what three wrong ones are told."""

    def project(x, W, *, n_heads):
        """Project onto heads.

        x: (..., D)   W: (D, H*K)   n_heads: H   ->   y: (..., H, K)
        """

    line = ShapeLine(project)
    x, W = np.zeros((2, 5, 8)), np.zeros((8, 12))
    print("shape line   ", line.text)
    print("a right call ", line.bind((x, W), {"n_heads": 3}))
    refused = 0
    for what, args, heads in [("W transposed", (x, W.T), 3), ("ids for x", (x.astype(int), W), 3), ("5 heads", (x, W), 5)]:
        try:
            line.bind(args, {"n_heads": heads})
        except (ShapeError, TypeError) as error:
            refused += 1
            print(f"{what:13s} {type(error).__name__}: {error}")
    print(f"claim: 3 wrong calls, {refused} refused")
    assert refused == 3


if __name__ == "__main__":
    from minideepseek.autograd.shapes import demo  # the imported copy, so that every name exists once
    demo()
