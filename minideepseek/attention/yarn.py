"""YaRN: stretch the slow pairs of RoPE so that a model trained on short texts can read long ones.

Derivation: whiteboard/attention/yarn.md     Source: Peng et al. 2023, arXiv:2309.00071, as DeepSeek's code does it
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import math

import numpy as np

from minideepseek.attention.rope import frequencies


def yarn_range(R, base, original, beta_fast=32.0, beta_slow=1.0):
    """The pairs between which the stretching sets in: (lo, hi), whole numbers.

    A pair that turns more than beta_fast times within `original` positions is left alone, one that turns less than
    beta_slow times is stretched in full.
    With an original length of a few tokens hi falls below lo; the public code then stretches nothing, and so do we.
    """
    def pair_that_turns(n):
        return R * math.log(original / (2 * math.pi * n)) / (2 * math.log(base))        # eq. 1

    lo = max(math.floor(pair_that_turns(beta_fast)), 0)                                 # eq. 2
    hi = min(math.ceil(pair_that_turns(beta_slow)), R - 1)                              # eq. 3
    return lo, hi


def yarn_frequencies(R, base=10_000.0, *, factor, original, beta_fast=32.0, beta_slow=1.0):
    """RoPE's frequencies with the slow ones divided by `factor`: float64 (R/2,), radians per position.

    factor: how many times longer the texts become   original: the length, in tokens, the model was trained on
    Raises ValueError when factor < 1 or original is not positive.
    Source: DeepSeek-V3, arXiv:2412.19437, sec. 4.3, and its released code: the ramp is linear in the index of the pair.
    """
    if not (factor >= 1 and math.isfinite(factor)):
        raise ValueError(f"factor = {factor} must be a finite number of at least 1")
    if not original > 0:
        raise ValueError(f"original = {original} tokens must be positive")
    theta = frequencies(R, base)
    lo, hi = yarn_range(R, base, original, beta_fast, beta_slow)
    width = hi - lo if hi != lo else 0.001                      # the public code's guard against a ramp of no width
    ramp = np.clip((np.arange(R // 2) - lo) / width, 0, 1)                              # eq. 4
    stretched = theta * (1 - ramp) + theta / factor * ramp                              # eq. 5
    return stretched


def temperature(factor, mscale=1.0):
    """m = 0.1 mscale ln(factor) + 1, and 1 without a stretch. The softmax scale is multiplied by m^2."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0                   # eq. 6


def softmax_scale(d_qk, factor=1.0, mscale=1.0):
    """What the scores are multiplied by: m^2 / sqrt(d_qk), over all query channels, with and without position.

    d_qk: channels of a query, d_nope + d_rope
    """
    return temperature(factor, mscale) ** 2 / math.sqrt(d_qk)                           # eq. 7


def demo():
    """The published numbers of DeepSeek-V3."""
    theta, stretched = frequencies(64), yarn_frequencies(64, factor=40, original=4096)
    lo, hi = yarn_range(64, 10_000.0, 4096)
    print("shapes    64 channels -> 32 pairs -> theta (32,)")
    print(f"by hand   V3: 4,096 tokens stretched 40 times; the ramp runs from pair {lo} to pair {hi}")
    print("          theta' / theta at pairs 10, 11, 12, 22, 23:", (stretched / theta)[[10, 11, 12, 22, 23]].round(4))
    scale = softmax_scale(192, 40, 1.0)
    print(f"claim     V3's softmax scale is {scale:.6f}; without the temperature it is {softmax_scale(192):.7f}")
    from minideepseek.plots.attention import yarn_ramp
    from minideepseek.plots.canvas import plot_path
    if path := plot_path():
        yarn_ramp(theta, stretched, path=path)
    assert (lo, hi) == (10, 23) and abs(scale - 0.135234) < 5e-7 and abs(softmax_scale(192) - 0.0721688) < 5e-8


if __name__ == "__main__":
    from minideepseek.attention.yarn import demo  # the imported copy, so that every name exists once
    demo()
