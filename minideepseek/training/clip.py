"""Gradient clipping: when all gradients together are longer than a bound, scale them all by one number.

Derivation: whiteboard/training/clip.md     Source: DeepSeek-V3, arXiv:2412.19437, sec. 4.2, for the bound of 1.0
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import math

import numpy as np


def global_norm(gradients):
    """The length of all gradients as one long vector: the root of the sum of all squares, a Python float.

    gradients: {name: array}. Squares and sums are float64, whatever the arrays are. One nan anywhere gives nan, one
    inf gives inf: whoever trains looks at this number before taking a step. The norm of no gradients is 0.
    """
    squares = [float(np.square(g, dtype=np.float64).sum()) for g in gradients.values()]
    return math.sqrt(sum(squares))                                                  # eq. 1


def clip_by_global_norm(gradients, most):
    """Gradients of a length of at most `most`, in the same direction; and the length before clipping.

    gradients: {name: array}   most: V3 takes 1.0; infinity only measures   ->   clipped: {name: array}   norm: float

    Short enough, they come back as they are, the same arrays; else scaled copies of the same dtypes. A nan norm makes
    every clipped gradient nan, so that it cannot be overlooked. The gradients given are never written to.
    Raises ValueError when `most` is not positive.
    """
    if not most > 0:  # this way round, because nan must be refused
        raise ValueError(f"most = {most!r} must be positive: it is the longest that the gradients may be")
    norm = global_norm(gradients)
    if norm <= most:
        return gradients, norm
    scale = float(most) / norm          # a Python float: float32 stays float32     # eq. 2
    clipped = {name: g * scale for name, g in gradients.items()}                    # eq. 3
    return clipped, norm


def demo():
    """Clip (3, 4) by hand, and compare with cutting every entry for itself."""
    gradients = {"a": np.array([3.0]), "b": np.array([[4.0]])}
    clipped, norm = clip_by_global_norm(gradients, 1.0)
    print("shapes    a (1,), b (1, 1) -> the same; norm: one number")
    print(f"by hand   the length of (3, 4) is {norm}; cut to 1 it is ({clipped['a'].item():.1f}, {clipped['b'].item():.1f})")

    rng = np.random.default_rng(0)
    gradients = {f"W{i}": rng.standard_normal((20, 30)) * 10.0 ** rng.integers(-4, 1) for i in range(10)}
    clipped, norm = clip_by_global_norm(gradients, 1.0)
    each = {name: np.clip(g, -0.01, 0.01) for name, g in gradients.items()}
    cosine = {label: sum(float((gradients[name] * g).sum()) for name, g in other.items()) / norm / global_norm(other)
              for label, other in (("global", clipped), ("each", each))}
    print(f"claim     from length {norm:.1f} to {global_norm(clipped):.15f}, the direction kept: 1 - cosine = {abs(1 - cosine['global']):.0e}; "
          f"cutting every entry for itself: {1 - cosine['each']:.2f}")
    assert abs(global_norm(clipped) - 1) < 1e-14 and abs(1 - cosine["global"]) < 1e-14 and 1 - cosine["each"] > 0.1


if __name__ == "__main__":
    from minideepseek.training.clip import demo  # the imported copy, so that every name exists once
    demo()
