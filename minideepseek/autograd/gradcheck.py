"""The gradient check: six stages that a backward passes or is told, in words, where and probably why it is wrong.

Derivation: whiteboard/autograd/gradcheck.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import inspect
import itertools
import re
import sys

import numpy as np

from minideepseek.autograd.causes import likely_cause
from minideepseek.autograd.finite_differences import GradcheckError, finite_differences, floating, output_arrays

TOLERANCE = 1e-7         # of the scale of each argument; correct code measures about 1e-12


def gradcheck(forward, backward, args, config=None, *, seed=0, smooth_forward=None, slopes=None):
    """Check backward against forward; return {argument: worst error / scale}, about 1e-12 when it is right.

    args: the positional arguments: float64 arrays, integer ids, or None. config: the keyword arguments.
    smooth_forward: differenced instead of forward, where that one rounds and has derivative 0 almost everywhere.
    slopes: what `finite_differences` returned for the same call, to check several backwards against it.

    Stages: 1 nothing is written in place; 2 the forward is finite and repeatable; 3 one gradient per argument, of its
    shape and dtype, in memory of its own; 4 the backward is repeatable and linear in dy; 5 it equals finite
    differences; 6 float32 in gives float32 out.
    Raises GradcheckError at the first stage that fails; TypeError for arguments that are not float64.
    """
    call = _Call(forward, backward, args, config or {}, seed)
    for name, arg in zip(call.names, call.args):
        if arg is not None and not isinstance(arg, np.ndarray):
            raise TypeError(f"gradcheck: {name} is of type {type(arg).__name__}, expected an array or None")
        if floating(arg) and arg.size == 0:
            raise TypeError(f"gradcheck: {name} has shape {arg.shape}: an empty array has nothing to check")
        if floating(arg) and arg.dtype != np.float64:
            raise TypeError(f"gradcheck: {name} has dtype {arg.dtype}: use float64; finite differences need its digits")
    call.slopes = slopes or (lambda: finite_differences(smooth_forward or forward, args, config, seed=seed))
    _check_forward(call)                          # stages 1 and 2
    dys = [call.random_dy() for _ in range(2)]
    gradients = [_check_form(call, dy) for dy in dys]
    _check_linear(call, dys, gradients)
    errors = _check_slopes(call, dys, gradients)
    _check_float32(call)
    return errors


class _Call:
    """One call under test: read-only inputs, and how to run the pair on them."""

    def __init__(self, forward, backward, args, config, seed):
        self.forward, self.backward = forward, backward
        self.op = getattr(backward, "__name__", "backward")
        self.args, self.config = _read_only(tuple(args)), _read_only(config)
        self.names = argument_names(forward, len(self.args))
        self.rng = np.random.default_rng(seed)

    def run_forward(self):
        """-> (floating outputs, all outputs, cache); the cache is made read-only."""
        try:
            returned = self.forward(*self.args, **self.config)
        except ValueError as error:
            self.in_place(error)
            raise
        if not (isinstance(returned, tuple) and len(returned) == 2):
            self.fail(2, f"the forward must return (output, cache), it returned {type(returned).__name__}")
        output, cache = returned
        outputs = output_arrays(output)
        return [y for y in outputs if floating(y)], outputs, _read_only(cache, copy=False)

    def run_backward(self, dy):
        """dy: flat, over all floating outputs -> tuple of gradients."""
        parts, start = [], 0
        for y in self.outputs:
            parts.append(_read_only(dy[start:start + y.size].reshape(y.shape).astype(y.dtype)))
            start += y.size
        self.dys = parts
        try:
            gradients = self.backward(parts[0] if len(parts) == 1 else tuple(parts), self.cache)
        except ValueError as error:
            self.in_place(error)
            raise
        gradients = gradients if isinstance(gradients, tuple) else (gradients,)
        return tuple([np.asarray(g) if isinstance(g, np.generic) else g for g in gradients])

    def random_dy(self):
        return self.rng.standard_normal(sum(y.size for y in self.outputs))

    def in_place(self, error):
        if "read-only" in str(error):
            frames = [f for f in inspect.getinnerframes(error.__traceback__) if f.filename != __file__]
            at = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
            self.fail(1, f"an in-place write into an input, the cache or dy{at}: {error}")

    def fail(self, stage, what, argument=None, index=None, cause=None):
        message = f"{self.op}: {what}" + (f": {cause}" if cause else "") + where_derived(self.backward, argument)
        raise GradcheckError(message, stage, argument, index, cause)


def _check_forward(call):
    call.outputs, everything, call.cache = call.run_forward()
    if not all(np.isfinite(y).all() for y in call.outputs):
        call.fail(2, "the forward gives nan or inf")
    call.y_max = max(np.abs(y).max(initial=0) for y in call.outputs)
    _, again, _ = call.run_forward()
    if [y.tobytes() for y in everything] != [y.tobytes() for y in again]:
        call.fail(2, "two runs of the forward differ: randomness belongs in an argument")


def _check_form(call, dy):
    """Stage 3: count, None, shape, dtype, finite, memory of its own."""
    gradients = call.run_backward(dy)
    if len(gradients) != len(call.args):
        call.fail(3, f"returned {len(gradients)} gradients for {len(call.args)} arguments {tuple(call.names)}")
    owners = [(f"the argument {name}", arg) for name, arg in zip(call.names, call.args) if arg is not None]
    owners += [("dy", dy) for dy in call.dys] + [("the cache", array) for array in _arrays(call.cache)]
    for position, (name, arg, gradient) in enumerate(zip(call.names, call.args, gradients)):
        if not floating(arg):
            if gradient is not None:
                call.fail(3, f"the gradient of {name} must be None: it is {'absent' if arg is None else 'made of integers'}", name)
            continue
        if not isinstance(gradient, np.ndarray):
            call.fail(3, f"d{name} is {gradient!r:.40}, expected an array of shape {arg.shape}", name)
        if gradient.shape != arg.shape:
            cause = likely_cause(position, gradients, _numeric(call, dy), call.args, call.names)
            call.fail(3, f"d{name} has shape {gradient.shape}, expected {arg.shape}", name, cause=cause)
        if gradient.dtype != arg.dtype:
            call.fail(3, f"d{name} has dtype {gradient.dtype}, expected {arg.dtype}", name)
        if not np.isfinite(gradient).all():
            call.fail(3, f"d{name} has nan or inf, first at {_first(~np.isfinite(gradient))}", name)
        for owner, array in owners:
            if np.shares_memory(gradient, array):
                call.fail(3, f"d{name} shares memory with {owner}: return a copy", name)
        if not gradient.flags.writeable:
            call.fail(3, f"d{name} is read-only (a broadcast view?): return an array of its own", name)
        owners.append((f"d{name}", gradient))
    return gradients


def _check_linear(call, dys, gradients):
    """Stage 4: the same dy gives the same bytes, dy = 0 gives 0, -dy gives -dx, 1e3 dy1 - 2 dy2 gives 1e3 dx1 - 2 dx2."""
    again = call.run_backward(dys[0])
    zero = call.run_backward(np.zeros_like(dys[0]))
    mixtures = [(a, b, call.run_backward(a * dys[0] + b * dys[1])) for a, b in ((-1.0, 0.0), (1e3, -2.0))]
    floor = 1e-10 * call.y_max * max(np.abs(dy).max() for dy in dys)
    for i, name in enumerate(call.names):
        if not floating(call.args[i]):
            continue
        first, second = gradients[0][i], gradients[1][i]
        if again[i].tobytes() != first.tobytes():
            call.fail(4, f"d{name}: two runs with the same dy and cache differ", name)
        if zero[i].any():
            call.fail(4, f"d{name} is not zero for dy = 0", name, _first(zero[i] != 0), "it has a part that does not come from dy")
        for a, b, mixed in mixtures:
            error = np.abs(mixed[i] - (a * first + b * second))
            linear = error <= 1e-9 * (abs(a) * np.abs(first).max() + abs(b) * np.abs(second).max()) + floor
            if not linear.all():
                call.fail(4, f"d{name} is not linear in dy", name, _first(~linear),
                          "a gradient is a sum of products with dy, never |dy| or dy * dy")


def _check_slopes(call, dys, gradients):
    """Stage 5: every entry, or ten random directions, against finite differences."""
    slopes, errors = _slopes(call), {}
    for i, slope in slopes.items():
        name, worst = call.names[i], 0.0
        numerics = [slope.rows @ dy for dy in dys]
        noise = [1e-8 * max(call.y_max, np.abs(slope.rows).max()) * np.abs(dy).max() for dy in dys]
        if all(np.abs(numeric).max() <= small for numeric, small in zip(numerics, noise)):
            call.fail(5, f"the numeric gradient of {name} is zero everywhere: this input cannot tell a right d{name} "
                         "from a missing one; choose another, or test the value", name)
        for dy, gradient, numeric in zip(dys, gradients, numerics):
            flat = gradient[i].reshape(-1)
            analytic = flat if slope.directions is None else slope.directions @ flat
            scale = (np.abs(slope.rows) @ np.abs(dy)).max() + 1e-3 * call.y_max * np.abs(dy).max()
            error = np.abs(analytic - numeric)
            right = error <= TOLERANCE * scale              # written this way round: nan must fail
            if not right.all():
                k = int(np.argmax(np.where(np.isnan(error), np.inf, error)))
                index = tuple(map(int, np.unravel_index(k, call.args[i].shape))) if slope.directions is None else None
                place = f"d{name}[{', '.join(map(str, index))}]" if index is not None else f"d{name} along random direction {k}"
                everything = _numeric(call, dy) if slope.directions is None else {i: numeric}
                given = gradient if slope.directions is None else {i: analytic}
                cause = likely_cause(i, given, everything, call.args, call.names)
                call.fail(5, f"{place} = {analytic[k]:.6g}, expected {numeric[k]:.6g}, "
                             f"{int((~right).sum())} of {right.size} differ", name, index, cause)
            worst = max(worst, float(error.max() / scale))
        errors[name] = worst
    return errors


def _check_float32(call):
    """Stage 6: the same call in float32 stays in float32, outputs and gradients."""
    call.args, call.config = _as_float32(call.args), _as_float32(call.config)
    outputs, _, cache = call.run_forward()
    for y in outputs:
        if y.dtype != np.float32:
            call.fail(6, f"float32 in, {y.dtype} out of the forward: a float64 constant or np.sqrt(int) promotes")
    call.outputs, call.cache = outputs, cache
    for name, arg, gradient in zip(call.names, call.args, call.run_backward(call.random_dy())):
        if floating(arg) and gradient.dtype != np.float32:
            call.fail(6, f"float32 in, but d{name} is {gradient.dtype}", name)


def _slopes(call):
    if callable(call.slopes):
        call.slopes = call.slopes()
    return call.slopes


def _numeric(call, dy):
    """The numeric gradient of every floating argument, in its shape; nothing when only directions are known."""
    return {i: (s.rows @ dy).reshape(call.args[i].shape) for i, s in _slopes(call).items() if s.directions is None}


def argument_names(forward, count):
    """The names of the first `count` positional parameters."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in inspect.signature(forward).parameters.values() if p.kind in kinds]
    return [names[i] if i < len(names) else f"argument {i}" for i in range(count)]


def where_derived(backward, argument=None):
    """'; see whiteboard/basics/rmsnorm.md eq. 4': where the line that computes this gradient is derived, if it says so."""
    page = re.search(r"Derivation: (\S+)", getattr(sys.modules.get(backward.__module__), "__doc__", None) or "")
    if not page:
        return ""
    try:
        source = inspect.getsource(backward)
    except (OSError, TypeError):
        source = ""
    tags = re.findall(rf"^[^#=]*\bd{argument}\b[^#=]*=.*# eq\. (\d+)\s*$", source, re.M) if argument else []
    return f"; see {page[1]}" + (f" eq. {tags[-1]}" if tags else "")


def _first(wrong):
    return tuple(int(i) for i in np.argwhere(wrong)[0])


def _arrays(tree):
    """Every array in a cache or a configuration: tuples, lists, dicts and namespaces are walked."""
    if isinstance(tree, np.ndarray):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif hasattr(tree, "__dict__") and not callable(tree):
        tree = vars(tree).values()
    elif not isinstance(tree, (tuple, list)):
        return []
    return list(itertools.chain.from_iterable(_arrays(part) for part in tree))


def _read_only(tree, copy=True):
    """The same tree with every array read-only; the arrays of inputs are copied first, those of a cache are not."""
    tree = _map_arrays(np.copy, tree) if copy else tree
    for array in _arrays(tree):
        array.flags.writeable = False
    return tree


def _as_float32(tree):
    return _read_only(_map_arrays(lambda a: a.astype(np.float32) if a.dtype == np.float64 else a.copy(), tree))


def _map_arrays(function, tree):
    if isinstance(tree, np.ndarray):
        return function(tree)
    if isinstance(tree, dict):
        return {key: _map_arrays(function, part) for key, part in tree.items()}
    if isinstance(tree, (tuple, list)):
        parts = [_map_arrays(function, part) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return tree


def worst_errors(forward, backward, examples, seeds=(0,)):
    """Check every case of a component at every seed; return {argument: worst error / scale}."""
    worst = {}
    for seed in seeds:
        for args, config in examples(np.random.default_rng(seed)).values():
            for name, error in gradcheck(forward, backward, args, config, seed=seed).items():
                worst[name] = max(error, worst.get(name, 0.0))
    return worst


def report(forward, backward, examples):
    """Check every case of a component, print the worst error per argument, and return {argument: error}."""
    worst = worst_errors(forward, backward, examples)
    name = forward.__name__.removesuffix("_forward")
    print(f"gradients {name}: " + "  ".join(f"d{name} {error:.0e}" for name, error in worst.items()))
    return worst


def demo():
    """A right backward, then five wrong ones and what each is told."""

    def gain_forward(x, g):
        return x * g, (x, g)

    def gain_backward(dy, cache):
        x, g = cache
        return dy * g, (dy * x).sum(axis=0)

    wrong = {
        "wrong sign": lambda dy, cache: (-dy * cache[1], (dy * cache[0]).sum(axis=0)),
        "mean, not sum": lambda dy, cache: (dy * cache[1], (dy * cache[0]).mean(axis=0)),
        "no sum": lambda dy, cache: (dy * cache[1], dy * cache[0]),
        "abs(dy)": lambda dy, cache: gain_backward(np.abs(dy), cache),
        "zeros": lambda dy, cache: (np.zeros_like(dy), (dy * cache[0]).sum(axis=0)),
    }
    rng = np.random.default_rng(0)
    args = rng.standard_normal((3, 4)), rng.standard_normal(4)
    print("shapes         x (3, 4), g (4,) -> y = x * g (3, 4)")
    errors = gradcheck(gain_forward, gain_backward, args)
    print("right         ", "  ".join(f"d{name} {error:.0e}" for name, error in errors.items()))
    caught = 0
    for what, backward in wrong.items():
        try:
            gradcheck(gain_forward, backward, args)
        except GradcheckError as error:
            caught += 1
            print(f"{what:14s} {error}")
    print(f"claim          {caught} of {len(wrong)} wrong backwards caught")
    assert caught == len(wrong)


if __name__ == "__main__":
    from minideepseek.autograd.gradcheck import demo  # the imported copy, so that every name exists once
    demo()
