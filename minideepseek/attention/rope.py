"""RoPE: write a token's position into its queries and keys by turning pairs of channels.

Derivation: whiteboard/attention/rope.md     Source: Su et al. 2021, arXiv:2104.09864
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import numpy as np

from minideepseek.autograd.gradcheck import report
from minideepseek.autograd.tape import op


def frequencies(R, base=10_000.0):
    """The angle, in radians per position, by which each pair turns: theta_p = base^(-2p / R), float64 (R/2,).

    Raises ValueError when R is odd or not positive.
    """
    if R < 2 or R % 2:
        raise ValueError(f"R = {R} channels do not make pairs: it must be even and positive")
    return base ** (-np.arange(0, R, 2) / R)


def rope_tables(positions, theta, dtype=np.float64):
    """Cosine and sine of every angle: positions (T,) of integers, theta (R/2,) -> cos, sin (T, R/2).

    Computed in float64 and then cast: at position 100,000 a float32 angle is off by thousandths of a radian.
    """
    angles = np.asarray(positions, np.float64)[:, None] * theta
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


def pairs(x, interleaved):
    """The two halves of every pair, as views: channels (2p, 2p+1) when interleaved, (p, p + R/2) when half-split."""
    half = x.shape[-1] // 2
    return (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])


def rope_forward(x, *, cos, sin, interleaved=True):
    """Turn each pair of channels by the angle of its position: (a, b) -> (a cos - b sin, a sin + b cos).

    x: (B, T, H, R)   cos: (T, R/2)   sin: (T, R/2)   ->   y: (B, T, H, R)

    interleaved: the pairs are channels (2p, 2p+1), as in DeepSeek's latent attention; else (p, p + R/2), as in the
    V3.2 indexer. The output keeps the layout of the input.
    Source: DeepSeek-V3, arXiv:2412.19437, eq. 3 and 8.
    """
    cos, sin = cos[:, None, :], sin[:, None, :]                 # (T, 1, R/2) (T, 1, R/2)
    a, b = pairs(x, interleaved)                                # (B, T, H, R/2) (B, T, H, R/2)
    y = np.empty_like(x)                                        # (B, T, H, R)
    y_a, y_b = pairs(y, interleaved)                            # (B, T, H, R/2) (B, T, H, R/2)
    y_a[...] = a * cos - b * sin                                # eq. 1
    y_b[...] = a * sin + b * cos                                # eq. 2
    return y, (cos, sin, interleaved)


def rope_backward(dy, cache):
    """A rotation is undone by the rotation the other way, and so is its gradient."""
    cos, sin, interleaved = cache
    dy_a, dy_b = pairs(dy, interleaved)                         # (B, T, H, R/2) (B, T, H, R/2)
    dx = np.empty_like(dy)                                      # (B, T, H, R)
    dx_a, dx_b = pairs(dx, interleaved)                         # (B, T, H, R/2) (B, T, H, R/2)
    dx_a[...] = dy_a * cos + dy_b * sin                         # eq. 3
    dx_b[...] = dy_b * cos - dy_a * sin                         # eq. 4
    return dx


rope = op(rope_forward, rope_backward)


def rope_examples(rng):
    def case(positions, interleaved):
        cos, sin = rope_tables(positions, frequencies(6))
        x = rng.standard_normal((2, len(positions), 4, 6))
        return (x,), {"cos": cos, "sin": sin, "interleaved": interleaved}

    return {"interleaved": case([0, 1, 2], True), "half-split": case([0, 1, 2], False), "far positions": case([7, 100, 5000], True)}


def demo():
    """A quarter turn by hand, the gradient, and a score that knows only the distance."""
    cos, sin = rope_tables([1], np.array([np.pi / 2]))
    y, _ = rope_forward(np.array([3.0, 4.0]).reshape(1, 1, 1, 2), cos=cos, sin=sin)
    print("shapes    x (1, 1, 1, 2), cos (1, 1), sin (1, 1) -> y (1, 1, 1, 2)")
    print("by hand   (3, 4) turned by a quarter:", y.ravel().round(12))
    report(rope_forward, rope_backward, rope_examples)

    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 1, 1, 64))

    def score(t, s):
        turned = [rope_forward(x, cos=c, sin=n)[0] for x, (c, n) in ((q, rope_tables([t], frequencies(64))), (k, rope_tables([s], frequencies(64))))]
        return float(np.vdot(*turned))

    print(f"claim     scores at distance 7: positions (7, 0) {score(7, 0):.9f}, (1007, 1000) {score(1007, 1000):.9f}")
    from minideepseek.plots.attention import rope_pairs, score_by_distance
    from minideepseek.plots.canvas import panels, plot_path
    if path := plot_path():            # on the right the query and the key are all ones: their score is the mean cosine, times R
        distances = np.arange(1024)
        ones = 64 * rope_tables(distances, frequencies(64))[0].mean(axis=1)
        panels(path, lambda ax: rope_pairs(frequencies(64), np.linspace(0, 128, 1025), ax=ax),
               lambda ax: score_by_distance(distances, ones, ylabel="score of all-ones q and k", ax=ax))
    assert abs(score(7, 0) - score(1007, 1000)) < 1e-10


if __name__ == "__main__":
    from minideepseek.attention.rope import demo  # the imported copy, so that every name exists once
    demo()
