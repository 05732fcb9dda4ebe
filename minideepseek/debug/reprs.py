"""Short array reprs for debuggers: dtype, shape, a few values, mean and spread, and how many are nan or inf.

Derivation: whiteboard/debug/reprs.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import contextlib

import numpy as np

WHOLE = 8                # arrays of at most so many numbers are written out


def short_reprs():
    """From now on every array shows itself in one line, in pdb, in VS Code and in `repr`; with `with`, until the block ends.

    `.close()` of what is returned takes it back. str(array) and print(array) stay as they are.
    """
    undo = contextlib.ExitStack()
    undo.callback(np.set_printoptions, override_repr=np.get_printoptions()["override_repr"])
    np.set_printoptions(override_repr=short)
    return undo


def short(array):
    """'float64 (2, 3, 5) [-1.2, 0.3, 0.11, ... 2.1] mean 0.1 std 1.0'; small arrays are written out."""
    return " ".join(filter(None, (array.dtype.name, str(array.shape), values(array), summary(array))))


def values(array, whole=WHOLE):
    """All numbers of a small array, the first three and the last of a larger one."""
    flat = _widened(array).reshape(-1)
    first, last = (flat, flat[:0]) if flat.size <= whole else (flat[:3], flat[-1:])
    words, end = [[f"{x:.3g}" if isinstance(x, float) else f"{x!s:.20}" for x in part.tolist()] for part in (first, last)]
    return f"[{', '.join(words)}{', ... ' + end[0] if end else ''}]"


def summary(array):
    """Mean and spread of the finite numbers of a larger array, least and largest of integers; nan and inf counted always."""
    array = _widened(array)
    if array.dtype.kind not in "iuf" or array.size == 0:
        return ""
    finite = array[np.isfinite(array)]
    words = [f"{n} {name}" for name, n in (("nan", np.isnan(array).sum()), ("inf", np.isinf(array).sum())) if n]
    if array.size > WHOLE and finite.size:
        with np.errstate(all="ignore"):              # 1e308 + 1e308: looking at an array must not warn
            mean, std = finite.mean(dtype=np.float64), finite.std(dtype=np.float64)
        words.insert(0, f"mean {mean:.3g} std {std:.3g}" if array.dtype.kind == "f" else f"from {finite.min()} to {finite.max()}")
    return " ".join(words)


def _widened(array):
    """bfloat16, float8 and their kin as float32: NumPy takes them for bytes."""
    return np.asarray(array, np.float32 if array.dtype.type.__module__ == "ml_dtypes" else None)


def demo():
    """The same arrays, before, inside and after."""
    x = np.linspace(-1, 2, 30).reshape(2, 3, 5)
    x[0, 0, 1] = np.nan
    before = repr(x), str(x)
    with short_reprs():
        print("shapes  ", repr(x))
        print("by hand ", repr(np.array([1.0, -np.inf, 0.5])), repr(np.arange(12)))
        inside = repr(x), str(x)
    print(f"claim    one line instead of {before[0].count(chr(10)) + 1}; str unchanged: {inside[1] == before[1]}; afterwards as before: {repr(x) == before[0]}")
    assert "\n" not in inside[0] and inside[1] == before[1] and (repr(x), str(x)) == before


if __name__ == "__main__":
    from minideepseek.debug.reprs import demo  # the imported copy, so that every name exists once
    demo()
