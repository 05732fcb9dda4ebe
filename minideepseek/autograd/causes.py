"""Why is this gradient wrong? Each known cause is tested against the numbers; what no test recognises is not guessed.

Derivation: whiteboard/autograd/gradcheck.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import itertools

import numpy as np

UNKNOWN = "no known cause fits"


def likely_cause(position, gradients, numerics, args, names):
    """Words for what went wrong with one gradient, or UNKNOWN.

    position: of the argument   gradients: the analytic ones, by position   numerics: {position: numeric gradient},
    in the shape of the argument   args, names: of the call
    """
    if position not in numerics:
        return UNKNOWN
    given, expected = gradients[position], numerics[position]
    return next(filter(None, (
        _zero(given),
        _missing_sum(given, expected),
        _factor(given, expected, args, names),
        _transposed(given, expected),
        _swapped(position, gradients, numerics, names),
        _lost_duplicates(given, expected, args, names),
    )), UNKNOWN)


def _same(a, b):
    return a.shape == b.shape and bool((np.abs(a - b) <= 1e-6 * np.abs(b).max(initial=0)).all())


def _zero(given):
    if not given.any():
        return "it is zero: a road is cut, or the result was never filled"


def _missing_sum(given, expected):
    extra = given.ndim - expected.ndim
    if extra > 0 and _same(given.sum(axis=tuple(range(extra))), expected):
        return f"a sum over the {'leading axis' if extra == 1 else f'{extra} leading axes'} is missing (it was broadcast in the forward)"
    if given.shape == expected.shape:
        return None
    axes = [k for k in range(given.ndim) if given.ndim == expected.ndim and expected.shape[k] == 1 != given.shape[k]]
    if axes and _same(given.sum(axis=tuple(axes), keepdims=True), expected):
        return f"a sum over axis {axes[0]} is missing (it was broadcast in the forward)"


def _factor(given, expected, args, names):
    if given.shape != expected.shape or not expected.any():
        return None
    ratio = float(np.vdot(given, expected) / np.vdot(expected, expected))
    if ratio == 0 or not _same(given / ratio, expected):
        return None
    if abs(ratio + 1) < 1e-6:
        return "wrong sign"
    words = "wrong sign, and " if ratio < 0 else ""
    size = max(abs(ratio), 1 / abs(ratio))
    words += f"looks {size:.3g} times too {'large' if abs(ratio) > 1 else 'small'}"
    for name, arg in zip(names, args):
        for axis, length in enumerate(() if arg is None else arg.shape):
            if abs(length - size) < 1e-6 * size:
                return f"{words}, and {name} has {length} entries along axis {axis}: a mean for a sum, or the reverse?"
    return words


def _transposed(given, expected):
    for axes in itertools.permutations(range(given.ndim)):
        if list(axes) != sorted(axes) and _same(given.transpose(axes), expected):
            return "it is transposed" if given.ndim == 2 else f"its axes are permuted: transpose{axes} would be right"


def _swapped(position, gradients, numerics, names):
    for other, expected in numerics.items():
        if other != position and gradients[other] is not None and _same(gradients[position], expected):
            if _same(gradients[other], numerics[position]):
                return f"the gradients of {names[position]} and {names[other]} are swapped"
            return f"this is the gradient of {names[other]}"


def _lost_duplicates(given, expected, args, names):
    """Every row that differs belongs to an id that occurs more than once."""
    for name, ids in zip(names, args):
        if ids is None or ids.dtype.kind not in "iu" or given.shape != expected.shape or given.ndim < 2:
            continue
        values, counts = np.unique(ids, return_counts=True)
        wrong = np.abs(given - expected).reshape(len(given), -1).max(axis=1) > 1e-6 * np.abs(expected).max()
        if wrong.any() and set(np.flatnonzero(wrong)) <= set(values[counts > 1].tolist()):
            return f"only rows that occur more than once in {name} are wrong: a scatter that overwrites where it should add"


def demo():
    """Six known mistakes on a (3, 2) gradient, and one that no rule knows."""
    rng = np.random.default_rng(0)
    x, W = rng.standard_normal((4, 3)), rng.standard_normal((3, 2))
    dy = rng.standard_normal((4, 2))
    numerics = {0: dy @ W.T, 1: x.T @ dy}
    per_token = x[:, :, None] * dy[:, None, :]
    for what, dW in [("zeros", 0 * W), ("minus", -x.T @ dy), ("a mean over tokens", x.T @ dy / 4), ("transposed", dy.T @ x),
                     ("no sum over tokens", per_token), ("dx instead", dy @ W.T), ("noise", rng.standard_normal(W.shape))]:
        print(f"{what:19s} {likely_cause(1, (dy @ W.T, dW), numerics, (x, W), ('x', 'W'))}")
    unknown = likely_cause(1, (dy @ W.T, rng.standard_normal(W.shape)), numerics, (x, W), ("x", "W"))
    print("claim: noise is not explained:", unknown)
    assert unknown == UNKNOWN


if __name__ == "__main__":
    from minideepseek.autograd.causes import demo  # the imported copy, so that every name exists once
    demo()
