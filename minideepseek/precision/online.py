"""When a scale is measured: on this very tensor (online, DeepSeek-V3), or on those of the last steps (delayed).

Derivation: whiteboard/precision/online.md     Source: DeepSeek-V3, arXiv:2412.19437, sec. 3.3
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

from typing import NamedTuple

import numpy as np

from minideepseek.precision.formats import E2M1, E4M3, round_to
from minideepseek.precision.tiles import SIZES, relative_error, scales


class Drift(NamedTuple):
    """What happened at each step: arrays (steps, 2), column 0 online, column 1 delayed."""
    scale: np.ndarray
    error: np.ndarray         # see tiles.relative_error
    saturated: np.ndarray     # entries beyond the format's largest number, clamped to it
    vanished: np.ndarray      # entries that became 0 and were not


def online_scale(x, fmt=E4M3):
    """The multiplier that makes the largest entry of x the format's largest number. x is read once before it can be cast.

    x: float, any shape -> float, see tiles.scales
    """
    return float(scales(np.reshape(x, (1, -1)), SIZES["tensor"], fmt)[0, 0])                        # eq. 1


def delayed_scale(history, fmt=E4M3):
    """The multiplier that would have been right for the largest of the last steps: known before this step's tensor is.

    history: (n,) the largest |entry| of each of the last n steps -> float
    Raises ValueError unless these are one number or more, and none negative.
    """
    history = np.asarray(history, np.float64)
    if history.ndim != 1 or not history.size or not (history >= 0).all():
        raise ValueError(f"history = {history} must be the largest |entry| of one step or more, in a row")
    return online_scale(history, fmt)                                                               # eq. 2


def drift(sizes, *, n=16, fmt=E4M3, shape=(64, 256), seed=0):
    """A tensor of normal entries with standard deviation sizes[t] at step t, quantised with either scale.

    sizes: (steps,)   n: steps that the history holds   ->   Drift
    For n steps before the first the tensor has been of sizes[0]. The history records what came, not what was left of it.
    Raises ValueError for no size at all, for one that is not positive, or an empty history.
    """
    sizes = np.asarray(sizes, np.float64)
    if sizes.ndim != 1 or not sizes.size or not (np.isfinite(sizes) & (sizes > 0)).all() or n < 1:
        raise ValueError(f"sizes = {sizes}, n = {n}: positive standard deviations in a row, and a history of at least one step")
    rng = np.random.default_rng(seed)
    history = [np.abs(sizes[0] * rng.standard_normal(shape)).max() for _ in range(n)]
    steps = []
    for size in sizes:
        x = size * rng.standard_normal(shape)
        both = online_scale(x, fmt), delayed_scale(history, fmt)
        x_hat = [scale * round_to(x / scale, fmt, overflow="saturate") for scale in both]
        beyond = [np.abs(x) > scale * fmt.max * (1 + 1e-6) for scale in both]                       # a scale is rounded to float32
        steps.append((both, [relative_error(x, back) for back in x_hat],
                      [b.sum() for b in beyond], [(back == 0).sum() for back in x_hat]))
        history = [*history[1:], np.abs(x).max()]                                                   # eq. 3
    return Drift(*(np.array(column) for column in zip(*steps)))


def demo():
    """A jump, a slow growth and a spike, online against delayed."""
    n, at = 16, 4
    print(f"shapes    sizes (30,), a history of {n} -> scale, error, saturated, vanished (30, 2), of 64 x 256 entries each")
    print(f"by hand   history 2, 7, 3, now 14: delayed 7/448 = {delayed_scale([2, 7, 3])}, and 14 is clamped to half of it; "
          f"online 14/448 = {online_scale([14.0])}")

    entries, after = 64 * 256, slice(at + 1, at + 1 + n)
    size = np.ones(30)
    size[at:] = 8
    jump, growth = drift(size, n=n), drift(1.05 ** np.arange(30), n=n)
    clamped, error = jump.saturated[:, 1] / entries, jump.error[:, 1]
    print(f"claim     8 times as large from step {at} on: delayed clamps {clamped[at]:.0%} of that step (error {error[at]:.2f}), "
          f"{clamped[at + 1]:.2%} of the next (error {error[at + 1]:.3f}): one step suffers, not {n}")
    print(f"          5 % more every step: delayed clamps something in {(growth.saturated[:, 1] > 0).sum()} steps of 30. Online clamps nothing, ever")
    assert jump.saturated[at, 1] > entries / 2 and jump.saturated[at + 1:, 1].max() < entries / 1000
    assert not jump.saturated[:, 0].any() and not growth.saturated[:, 0].any() and growth.saturated[:, 1].any()
    for fmt, height in ((E4M3, 1e3), (E4M3, 1e5), (E2M1, 8)):
        size = np.ones(30)
        size[at] = height
        run = drift(size, n=n, fmt=fmt)
        error, wasted = np.median(run.error[after], axis=0), np.flatnonzero(run.scale[:, 1] > height / 2 * run.scale[:, 0])
        print(f"          {height:7,.0f} times in step {at} only, {fmt.name}: delayed wastes range for {len(wasted)} steps, error {error[1]:.4f} "
              f"(online {error[0]:.4f}), {run.vanished[after, 1].mean() / entries:.1%} of the entries vanish")
        assert wasted.tolist() == list(range(30))[after] and not run.saturated[:, 0].any()


if __name__ == "__main__":
    from minideepseek.precision.online import demo  # the imported copy, so that every name exists once
    demo()
