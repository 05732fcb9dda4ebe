"""AdamW: each weight moves by its mean gradient over its typical gradient, and shrinks a little, apart from that.

Derivation: whiteboard/training/adamw.md     Source: Loshchilov & Hutter 2017, arXiv:1711.05101
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import dataclasses
import math

import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass
class AdamWState:
    """What the optimizer remembers between two steps. It is saved with the weights; without it a run does not resume."""
    m: dict          # {name: running mean of the gradient}, each like its weight
    v: dict          # {name: running mean of the squared gradient}
    step: int = 0    # updates made so far


def new_state(flat, dtype=None):
    """The state before the first step: no memory.

    flat: {name: weight}, see `adamw_step`   dtype: in which both moments are kept; None: each in that of its weight
    """
    return AdamWState({name: np.zeros_like(theta, dtype) for name, theta in flat.items()},
                      {name: np.zeros_like(theta, dtype) for name, theta in flat.items()})


def decays(name, array):
    """Does weight decay shrink this weight? Matrices, stacks of them and the head: yes. Norm gains, biases, the embedding: no.

    The reports do not list what V3 leaves out; this is our choice, and the page gives the reasons.
    """
    return array.ndim >= 2 and name.split(".")[-1] != "E"


def adamw_step(flat, gradients, state, *, lr, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1):
    """One update of all weights: theta <- theta - lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * theta), in place.

    flat: {name: array}, the very arrays of the model, and only those that a gradient trains: no selection biases
    gradients: {name: array}, one for each weight, of its shape and dtype; all zeros when nothing reached it
    state: AdamWState, of `new_state` or of the step before; changed in place. Moments kept in bfloat16, as V3 does, are
    computed in the precision of the weight and rounded once, when they are put back   lr: of this step, see schedule
    A weight whose gradient is zero still decays, and moves on while m remembers older gradients.

    Raises ValueError, before anything is changed, for names that are missing or unexpected, another shape or dtype,
    a weight that cannot be written, a number that is not finite or out of range. Not for a nan in a gradient: see clip.
    Source: Loshchilov & Hutter 2017, arXiv:1711.05101; DeepSeek-V3, arXiv:2412.19437, sec. 4.2, for the two betas and
    the decay of 0.1.
    """
    _check_numbers(lr, beta1, beta2, eps, weight_decay)
    _check_arrays(flat, gradients, state)
    lr, beta1, beta2, eps, weight_decay = map(float, (lr, beta1, beta2, eps, weight_decay))    # float32 stays float32
    state.step += 1
    correction1 = 1 - beta1**state.step             # the weights of a mean over only `step` gradients add up to this
    correction2 = 1 - beta2**state.step
    for name, theta in flat.items():
        g = gradients[name]
        m, v = [kept.astype(theta.dtype, copy=False) for kept in (state.m[name], state.v[name])]    # the very arrays, unless they are bfloat16
        m *= beta1
        m += (1 - beta1) * g                                    # eq. 1
        v *= beta2
        v += (1 - beta2) * (g * g)                              # eq. 2
        m_hat = m / correction1                                 # eq. 3
        v_hat = v / correction2                                 # eq. 4
        if decays(name, theta):
            theta *= 1 - lr * weight_decay                      # eq. 5
        theta -= lr * (m_hat / (np.sqrt(v_hat) + eps))          # eq. 6
        for kept, moment in ((state.m[name], m), (state.v[name], v)):
            if kept is not moment:
                kept[...] = moment


def _check_numbers(lr, beta1, beta2, eps, weight_decay):
    for name, value, holds, rule in (
            ("lr", lr, 0 <= lr < math.inf, "must be finite and not negative"),
            ("beta1", beta1, 0 <= beta1 < 1, "must be at least 0 and below 1"),
            ("beta2", beta2, 0 <= beta2 < 1, "must be at least 0 and below 1"),
            ("eps", eps, 0 < eps < math.inf, "must be finite and positive: a gradient of zero would be 0 / 0"),
            ("weight_decay", weight_decay, 0 <= weight_decay < math.inf, "must be finite and not negative")):
        if not holds:
            raise ValueError(f"{name} = {value!r} {rule}")


def _check_arrays(flat, gradients, state):
    """Everything that could stop a step halfway, asked before it begins."""
    for what, arrays in (("gradients", gradients), ("state.m", state.m), ("state.v", state.v)):
        missing, extra = sorted(flat.keys() - arrays.keys()), sorted(arrays.keys() - flat.keys())
        if missing or extra:
            raise ValueError(f"{what} and weights do not fit: missing {missing or 'none'}, unexpected {extra or 'none'}")
        for name, theta in flat.items():
            for whose, array in (("the weights", theta), (what, arrays[name])):
                if not isinstance(array, np.ndarray):
                    raise ValueError(f"{name} of {whose} is a {type(array).__name__}, expected an array")
            form, expected = (arrays[name].shape, arrays[name].dtype), (theta.shape, theta.dtype)
            rounded = what != "gradients" and form == (theta.shape, BF16)
            if form != expected and not rounded:
                raise ValueError(f"{name} of {what} is {form[1]} {form[0]}, its weight is {expected[1]} {expected[0]}")
    for name, theta in flat.items():
        if not theta.flags.writeable:
            raise ValueError(f"{name} of the weights is read-only, as from a mapped file: train a copy")


def demo():
    """Two steps by hand; then what decay takes from two weights, one with a hundred times the gradients of the other."""
    flat = {"W": np.array([[1.0]])}
    state = new_state(flat)
    path = []
    for g in (0.5, -0.5):
        adamw_step(flat, {"W": np.array([[g]])}, state, lr=0.1)
        path.append(float(flat["W"][0, 0]))
    print("shapes    W (1, 1), its gradient (1, 1), m (1, 1), v (1, 1) -> W (1, 1), in place")
    print(f"by hand   lr 0.1, decay 0.1, gradients 0.5 and -0.5: 1 * 0.99 - 0.1 = {path[0]:.4f}, then 0.89 * 0.99 + 0.1 / 19 = {path[1]:.4f}")

    signs = np.random.default_rng(0).choice([-1.0, 1.0], 100)
    sizes = np.array([[1.0, 100.0]])
    end = {}
    for kind in ("none", "decoupled", "in the gradient"):
        flat = {"W": np.array([[1.0, 1.0]])}
        state = new_state(flat)
        for sign in signs:
            g = sign * sizes + (0.1 * flat["W"] if kind == "in the gradient" else 0)
            adamw_step(flat, {"W": g}, state, lr=0.01, eps=1e-20, weight_decay=0.1 if kind == "decoupled" else 0.0)
        end[kind] = flat["W"][0]
    taken = {kind: end["none"] - theta for kind, theta in end.items()}
    print("          what 100 steps of decay take from weights with gradients of size", *sizes[0])
    for kind in ("decoupled", "in the gradient"):
        print(f"          {kind:15s} {taken[kind][0]:.4f} {taken[kind][1]:.4f}")
    difference = abs(taken["decoupled"][0] - taken["decoupled"][1])
    print(f"claim     decoupled, both lose the same: difference {difference:.0e}")
    assert difference < 1e-12 and taken["in the gradient"][0] > 50 * taken["in the gradient"][1]
    assert abs(path[0] - 0.89) < 1e-8 and abs(path[1] - 0.886363157894737) < 1e-8


if __name__ == "__main__":
    from minideepseek.training.adamw import demo  # the imported copy, so that every name exists once
    demo()
