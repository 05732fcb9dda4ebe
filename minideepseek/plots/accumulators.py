"""The picture of an accumulator: relative error of a sum of products against the number of products.

Derivation: whiteboard/plots/accumulators.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import numpy as np

from minideepseek.plots.canvas import GREY, new_axes, panels, save, style, try_out, vector


def error_by_length(lengths, errors, *, beside=None, limits=None, title="error of a sum of products", ax=None, path=None):
    """The relative error against K, both axes logarithmic: a line for each accumulator, grey ones for what it stands beside.

    lengths: (n,), the K   errors, beside: {name: (n,)}   all above 0   limits: (lowest, highest) error of the axis, so
    that panels can share it; by default what the lines need
    """
    lengths = _positive("lengths", lengths)
    lines = {name: _positive(f"errors of {name!r}", values, lengths) for name, values in (errors | (beside or {})).items()}
    ax = new_axes()[0] if ax is None else ax
    for n, (name, values) in enumerate(lines.items()):
        look = style(n) if name in errors else {"color": GREY, "linestyle": ":"}
        ax.plot(lengths, values, **look, linewidth=1.6, marker="o", markersize=3, label=name)
    ax.set_xscale("log", base=2)
    ax.set(yscale="log", ylim=limits, xlabel="products in a sum, K", ylabel="relative error", title=title)
    ax.legend(fontsize=8)
    return save(ax, path)


def _positive(name, values, lengths=None):
    """A vector of numbers above 0, as many as there are lengths. Raises ValueError: a logarithmic axis has no zero."""
    values = vector(name, values)
    if lengths is not None and len(values) != len(lengths):
        raise ValueError(f"{name} has shape {values.shape}, lengths has shape {lengths.shape}: one error for each length")
    if not ((values > 0) & np.isfinite(values)).all():                      # written this way round: nan must fail
        raise ValueError(f"{name} must be finite and above 0, got {values.tolist()}")
    return values


def demo():
    """Made-up errors, of sums with one sign and with both. --plot FILE.png keeps the picture."""
    K = 2.0 ** np.arange(7, 13)
    one_sign = {"never promoted": K * 2e-5, "promoted": np.full(6, 5e-4)}
    both_signs = {"never promoted": K ** 0.7 * 5e-6, "promoted": np.full(6, 1e-4)}
    width, height, size = try_out(lambda path: panels(
        path, lambda ax: error_by_length(K, one_sign, limits=(5e-5, 0.2), title="one sign", ax=ax),
        lambda ax: error_by_length(K, both_signs, beside={"inputs": np.full(6, 0.04)}, limits=(5e-5, 0.2), title="both signs", ax=ax)))
    print(f"shapes    two panels of lines with {len(K)} points -> {width} x {height} pixels")
    print(f"claim     it is a picture, and not an empty one: {size:,} bytes of PNG")
    assert (width, height) == (1408, 484) and size > 10_000


if __name__ == "__main__":
    from minideepseek.plots.accumulators import demo  # the imported copy, so that every name exists once
    demo()
