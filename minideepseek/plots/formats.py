"""Pictures of small number formats: where their numbers lie, what rounding costs, how far an outlier's harm reaches, which split is best.

Derivation: whiteboard/plots/formats.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import numpy as np

from minideepseek.plots.canvas import BLUE, GREY, ORANGE, new_axes, panels, save, style, try_out, vector

LEAST = 2.0 ** -10         # relative errors below are counted here: a logarithmic axis has no zero


def number_lines(numbers, *, smallest_normal=None, within=None, title="the numbers of each format", ax=None, path=None):
    """A row of ticks for each format, one tick for each number; subnormals are orange and short.

    numbers: {name: (n,)}, finite   smallest_normal: {name: number}, below which they are subnormal; without it nothing is
    within: (low, high) of a linear axis; by default it is logarithmic, and shows the numbers above zero
    """
    rows = {name: np.unique(vector("numbers", values)) for name, values in numbers.items()}
    if not rows or not all(np.isfinite(values).all() for values in rows.values()):
        raise ValueError(f"numbers of {list(numbers)} must be finite, those of one format at least")
    ax = new_axes(size=(8, 1.2 + 0.5 * len(rows)))[0] if ax is None else ax
    for row, (name, values) in enumerate(rows.items()):
        values = values[values > 0] if within is None else values[(values >= within[0]) & (values <= within[1])]
        small = np.abs(values) < (smallest_normal or {}).get(name, 0)
        ax.vlines(values[~small], row - 0.35, row + 0.35, color=BLUE, linewidth=1)
        ax.vlines(values[small], row - 0.15, row + 0.15, color=ORANGE, linewidth=1)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set(ylim=(len(rows) - 0.5, -0.5), ylabel="format", title=title)
    note = " (short, orange: subnormal)" if smallest_normal else ""
    if within is None:
        ax.set_xscale("log", base=2)
        ax.set_xlabel("value above zero, logarithmic axis" + note)
    else:
        ax.set(xlim=within, xlabel="value" + note)
    return save(ax, path)


def error_histograms(errors, *, title="relative error of every entry", ax=None, path=None):
    """How many entries have which relative error |x_hat - x| / |x|: an outline for each way of scaling.

    errors: {name: (n,)}, not negative; those above 1/16, more than rounding to E4M3 costs a normal number, are counted in the legend
    """
    errors = {name: vector("errors", values) for name, values in errors.items()}
    for name, values in errors.items():
        if not ((values >= 0) & np.isfinite(values)).all():
            raise ValueError(f"errors[{name!r}] must be finite and not negative")
    ax = new_axes()[0] if ax is None else ax
    top = max([1.0, *(values.max() for values in errors.values())])
    edges = 2.0 ** np.arange(np.log2(LEAST), np.ceil(np.log2(top)) + 0.75, 0.5)
    for n, (name, values) in enumerate(errors.items()):
        counts, _ = np.histogram(np.maximum(values, LEAST), edges)
        ax.stairs(counts / len(values), edges, **style(n), linewidth=1.6, label=f"{name}: {(values > 1 / 16).mean():.1%} above 1/16")
    ax.axvline(1 / 16, color=GREY, linewidth=1, zorder=0)
    ax.set_xscale("log", base=2)
    ax.set(yscale="log", xlabel="relative error (1: nothing is left)", ylabel="share of the entries", title=title)
    ax.legend(fontsize=8, loc="upper left")
    return save(ax, path)


def error_by_outlier(sizes, errors, *, title="what one outlier does to all others", ax=None, path=None):
    """The relative error of the other entries against the size of one outlier, a line for each way of scaling.

    sizes: (n,), positive   errors: {name: (n,)}, positive
    """
    sizes = vector("sizes", sizes)
    ax = new_axes()[0] if ax is None else ax
    for n, (name, values) in enumerate(errors.items()):
        values = vector("errors", values)
        if len(values) != len(sizes):
            raise ValueError(f"errors[{name!r}] has shape {values.shape}, sizes has shape {sizes.shape}: one error for each size")
        ax.plot(sizes, values, **style(n), linewidth=1.6, marker="o", markersize=3, label=name)
    ax.axhline(1, color=GREY, linewidth=1, zorder=0)
    ax.set(xscale="log", yscale="log", xlabel="the outlier (the others have standard deviation 1)",
           ylabel="relative error of the others (1: nothing is left)", title=title)
    ax.legend(fontsize=8)
    return save(ax, path)


def error_by_split(formats, errors, *, beside=None, limits=None, title="one bit from the mantissa to the exponent", ax=None, path=None):
    """The relative error of the formats that share the same bits, few exponent bits first: a line for each kind of data.

    formats: n names   errors: {name: (n,)}, positive   beside: {name: (n,)}, what was expected of these data: grey dots
    limits: (lowest, highest) error of the axis, so that panels can share it; by default what the lines need
    """
    lines = {name: vector("errors", values) for name, values in errors.items()}
    grey = {name: vector("beside", values) for name, values in (beside or {}).items()}
    for name, values in [*lines.items(), *grey.items()]:
        if len(values) != len(formats) or not ((values > 0) & np.isfinite(values)).all():        # written this way round: nan must fail
            raise ValueError(f"errors of {name!r} must be one above 0 for each of {list(formats)}, got {values.tolist()}")
    ax = new_axes()[0] if ax is None else ax
    for n, (name, values) in enumerate(lines.items()):
        ax.plot(values, **style(n), linewidth=1.6, marker="o", markersize=3, label=name)
    for n, values in enumerate(grey.values()):
        ax.plot(values, color=GREY, linestyle="none", marker="x", markersize=5, zorder=0, label=None if n else "expected")
    ax.set_xticks(range(len(formats)), list(formats))
    ax.set(yscale="log", ylim=limits, xlabel="format: more mantissa on the left, more range on the right", ylabel="relative error", title=title)
    ax.legend(fontsize=8)
    return save(ax, path)


def demo():
    """All the pictures of made-up arrays on one sheet. --plot FILE.png keeps it."""
    rng = np.random.default_rng(0)
    tiny = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])                            # E2M1, the only one short enough to write down
    wider = np.concatenate([np.arange(4) / 16, 2.0 ** np.arange(-2, 5)[:, None].repeat(4, 1).ravel() * np.tile([1, 1.25, 1.5, 1.75], 7)])
    lines = {"E2M1": np.concatenate([-tiny, tiny]), "E3M2": np.concatenate([-wider, wider])}
    normal = {"E2M1": 1, "E3M2": 0.25}
    sizes = 10.0 ** np.arange(6)
    draws = [lambda ax: number_lines(lines, smallest_normal=normal, ax=ax),
             lambda ax: number_lines(lines, smallest_normal=normal, within=(-7, 7), ax=ax),
             lambda ax: error_histograms({"tensor": rng.random(4000) ** 2, "tile": rng.random(4000) / 16}, ax=ax),
             lambda ax: error_by_outlier(sizes, {"tensor": np.minimum(0.03 + 1e-4 * sizes, 1), "tile": np.full(6, 0.03)}, ax=ax),
             lambda ax: error_by_split(["E2M5", "E3M4", "E4M3"], {"tensor": [0.2, 0.02, 0.03], "tile": [0.006, 0.012, 0.025]},
                                       beside={"tensor": [0.22, 0.02, 0.025]}, ax=ax)]
    width, height, size = try_out(lambda path: panels(path, *draws))
    print(f"shapes    numbers (16,) and (64,), errors (4000,), sizes (6,) -> {len(draws)} panels, {width} x {height} pixels")
    print(f"claim     it is a picture, and not an empty one: {size:,} bytes of PNG")
    assert (width, height) == (1408, 1452) and size > 30_000


if __name__ == "__main__":
    from minideepseek.plots.formats import demo  # the imported copy, so that every name exists once
    demo()
