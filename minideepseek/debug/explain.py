"""Why is this gradient wrong? Find the ops it comes from, and check each of them where it stands, on what it was given.

Derivation: whiteboard/debug/explain.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import math

import numpy as np

from minideepseek.autograd.finite_differences import STEP, GradcheckError, finite_differences, floating, output_arrays
from minideepseek.autograd.gradcheck import argument_names, gradcheck
from minideepseek.autograd.stop import no_stops
from minideepseek.autograd.tape import Tensor


def explain(tape, tensor):
    """Print what every record that made or reads `tensor` says about its gradient; return the GradcheckErrors found.

    tape: replayed with keep=True
    The gradient of a tensor is the sum of what its readers send. Each reader, and the maker, is gradient-checked on its
    own inputs, in float64; a gemm that rounds is left out. A corner or a jump there is named: it has no gradient to check.
    Raises ValueError for a tensor that this tape does not know, and for a tape that was not replayed, or kept nothing.
    """
    made = [(n, record) for n, record in enumerate(tape.records) if any(y is tensor for y in record.outputs)]
    read = [(n, record) for n, record in enumerate(tape.records) if any(x is tensor for x in record.inputs)]
    if not made and not read:
        raise ValueError(f"no record of this tape made or reads {tensor!r}" + ("" if tape.records else ": replay with keep=True"))
    if not tape._replayed:
        raise ValueError("replay the tape first, with keep=True: before that there is no gradient to explain")
    print(f"{tensor!r}: {'a leaf' if not made else 'an intermediate'}, read by {len(read)} record{'s' * (len(read) != 1)}")
    if tensor.grad is None:
        print("  it has no gradient: no record that reads it leads to the loss")
    elif not np.isfinite(tensor.grad).all():
        print(f"  it holds {'nan' if np.isnan(tensor.grad).any() else 'inf'}: see nan_hunt, which stops where the first one is made")
    errors, total = [], 0.0
    for number, record in read:
        for position, x in enumerate(record.inputs):
            if x is tensor:
                name, sent = argument_names(record.op.forward, position + 1)[position], _sent(record, position)
                total = total if sent is None else total + sent
                norm = "nothing" if sent is None else f"d{name}, of norm {np.linalg.norm(sent):.3g}"
                print(f"record {number}, {record.name}, called at {record.where}, sends {norm}")
                errors += _check(record, position)
    size = np.abs(total, where=np.isfinite(total), out=np.zeros(np.shape(total))).max()
    if tensor.grad is not None and read and not np.allclose(tensor.grad, total, rtol=1e-4, atol=1e-6 * size, equal_nan=True):
        print("  what it holds is not the sum of these: it is a loss, had a gradient before this tape, or was written in place")
    for number, record in made:
        print(f"record {number}, {record.name}, called at {record.where}, made it")
        errors += _check(record)
    return errors


def _sent(record, position):
    """The gradient that a record sends to one of its arguments, computed again from what the replay kept."""
    dys = [np.zeros_like(y.data) if y.grad is None else y.grad for y in record.outputs if floating(y.data)]
    if all(y.grad is None for y in record.outputs):
        return None
    with no_stops(), np.errstate(all="ignore"):                     # a nan is said in words
        dxs = record.backward(dys[0] if len(dys) == 1 else tuple(dys), record.cache)
    return dxs[position] if isinstance(dxs, tuple) else dxs


def _check(record, first=0):
    """Gradient-check one record in place, argument number `first` before the others; print the verdicts; the errors found."""
    forward, backward = record.op.forward, record.backward
    args = [_wide(x.data if isinstance(x, Tensor) else x) for x in record.inputs]
    config = {name: _wide(value) for name, value in record.config.items() if name != "gemm"}
    names, errors = argument_names(forward, len(args)), {}
    try:
        with no_stops(), np.errstate(all="ignore"):
            slopes = finite_differences(forward, args, config)
            for i in sorted(slopes, key=lambda i: (i != first, i)):
                try:
                    gradcheck(forward, backward, args, config, slopes={i: slopes[i]} | slopes)      # this argument before the others
                except GradcheckError as error:
                    if error.stage != 5:
                        raise
                    if error.argument == names[i]:
                        errors[i] = error
    except GradcheckError as error:                             # no argument can be judged
        print(f"  checked in place: {error}")
        return [error]
    print("  checked in place: right: " + (" ".join(f"d{names[i]}" for i in slopes if i not in errors) or "nothing"))
    for i, error in errors.items():
        print(f"  {error}")
        directions = slopes[i].directions if error.index is None else [_unit(args[i].shape, error.index)]
        if directions is not None and not all(_smooth(forward, args, config, i, one) for one in directions):
            print("    but the forward has a corner or a jump within the step there (a choice that flips?): no verdict")
    return list(errors.values())


def _smooth(forward, args, config, position, direction):
    """Does the bend y(x+t) - 2 y(x) + y(x-t) grow with t squared? At a corner it grows with t, at a jump not at all."""
    def outputs(t):
        moved = list(args)
        moved[position] = x + (t * direction).reshape(x.shape)
        return np.concatenate([y.reshape(-1) for y in output_arrays(forward(*moved, **config)[0]) if floating(y)])

    x = args[position]
    h = STEP * min(1.0, math.sqrt(np.mean(np.square(x))) or 1.0)
    here = outputs(0.0)
    near, far = (np.abs(outputs(t) - 2 * here + outputs(-t)).max() for t in (h, 2 * h))
    return bool(far <= 1e-12 * np.abs(here).max() or 3 * near < far < 5 * near)


def _unit(shape, index):
    direction = np.zeros(shape)
    direction[index] = 1.0
    return direction


def _wide(value):
    return value.astype(np.float64) if floating(value) else value


def demo():
    """A norm whose gain gradient is a mean; explained from the leaf and, as right, from the tensor behind it."""
    from minideepseek.autograd.tape import Tape, op
    from minideepseek.basics.residual import add
    from minideepseek.basics.rmsnorm import rmsnorm_backward, rmsnorm_forward

    def wrong_backward(dy, cache):
        dx, dg = rmsnorm_backward(dy, cache)
        return dx, dg / len(dy)

    rng = np.random.default_rng(0)
    x, g = Tensor(rng.standard_normal((3, 4)), "x"), Tensor(rng.standard_normal(4), "g")
    with Tape() as tape:
        n = op(rmsnorm_forward, wrong_backward)(x, g)
        y = add(n, x)
    tape.backward({y: rng.standard_normal((3, 4))}, keep=True)
    (error,), behind = explain(tape, g), explain(tape, y)
    print(f"claim  the gain is wrong ({error.cause}), the sum behind it right: {behind == []}")
    assert error.argument == "g" and "3 times too small" in error.cause and not behind


if __name__ == "__main__":
    from minideepseek.debug.explain import demo  # the imported copy, so that every name exists once
    demo()
