"""Pictures of attention: who looks at whom, how positions turn, what is cached, which tiles are computed.

Derivation: whiteboard/plots/attention.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import sys
import tempfile
from pathlib import Path

import numpy as np

BLUE, ORANGE, GREEN, PINK, SKY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9"     # Okabe and Ito's colours
HIDDEN = "#BBBBBB"                                                       # what cannot be seen is grey in every picture
STYLES = list(zip((BLUE, ORANGE, GREEN, PINK, SKY), ("-", "--", "-.", (0, (5, 1)), ":")))  # lines differ in grey print too


def plot_path():
    """The FILE.png after --plot on the command line, or None without one. Ends the program when the file is missing."""
    if sys.argv[-1:] == ["--plot"]:
        sys.exit("--plot needs the name of a file: --plot FILE.png")
    return sys.argv[sys.argv.index("--plot") + 1] if "--plot" in sys.argv else None


def new_axes(rows=1, columns=1, size=(6.4, 4.0)):
    """Axes (rows * columns,) of a new figure that needs no window and no pyplot; size in inches, of one panel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure.subplots(rows, columns, squeeze=False).ravel()


def save(ax, path):
    """Write the figure that holds `ax` as a PNG when there is a path; return the axes."""
    if path is not None:
        ax.figure.savefig(path, dpi=110, format="png")
    return ax


def panels(path, *draws, columns=2, size=(6.4, 4.4)):
    """One PNG of several pictures: each of `draws` is called with the axes of its panel."""
    rows = -(-len(draws) // columns)
    axes = new_axes(rows, min(columns, len(draws)), size)
    for ax, draw in zip(axes, draws):
        draw(ax)
    for ax in axes[len(draws):]:
        ax.set_visible(False)
    return save(axes[0], path)


def vector(name, values):
    """`values` as a float64 vector. Raises ValueError when it is none, or empty."""
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"{name} has shape {values.shape}, it must be a vector of at least one number")
    return values


def attention_map(p, words_q, words_k=None, *, mask=None, title="who looks at whom", ax=None, path=None):
    """The weights as a table of colours: a row for each query, a column for each key, the number in a small table's cells.

    p: (T, S)   words_q: T tokens   words_k: S tokens, those of the queries by default   mask: (T, S), True where seen
    Raises ValueError when they do not fit together. A nan in p is grey, as is what the mask hides.
    """
    from matplotlib.colors import LinearSegmentedColormap

    p, words_k = np.asarray(p, np.float64), words_q if words_k is None else words_k
    if p.ndim != 2 or not p.size:
        raise ValueError(f"p has shape {p.shape}, it must be (T, S) with a query and a key at least")
    for name, words, n in (("words_q", words_q, p.shape[0]), ("words_k", words_k, p.shape[1])):
        if len(words) != n:
            raise ValueError(f"{name} has {len(words)} tokens, but p of shape {p.shape} wants {n}")
    if mask is not None and (np.shape(mask) != p.shape or np.asarray(mask).dtype != bool):
        raise ValueError(f"mask has shape {np.shape(mask)} and dtype {np.asarray(mask).dtype}, p wants booleans of shape {p.shape}")
    seen = np.isfinite(p) if mask is None else np.isfinite(p) & mask
    top = max(p[seen].max(initial=0.0), 1e-12)
    colours = LinearSegmentedColormap.from_list("white to blue", ["white", BLUE]).with_extremes(bad=HIDDEN)
    if ax is None:
        ax = new_axes(size=[min(max(0.55 * n + extra, 3.5), 14) for n, extra in zip(p.shape[::-1], (2.6, 1.2))])[0]
    image = ax.imshow(np.ma.array(p, mask=~seen), cmap=colours, vmin=0, vmax=top)
    ax.figure.colorbar(image, ax=ax, shrink=0.9, label="attention weight")
    if p.size <= 100:
        for i, j in np.argwhere(seen):
            ax.text(j, i, f"{p[i, j]:.2f}", ha="center", va="center", fontsize=8, color="white" if p[i, j] > 0.75 * top else "black")
    for axis, words in ((ax.xaxis, words_k), (ax.yaxis, words_q)):
        axis.set_ticks(range(len(words)), [str(word).replace("\n", "\\n").replace(" ", "\u2423") for word in words], parse_math=False)
    ax.tick_params(axis="x", rotation=90 if len(words_k) > 15 or max(map(len, map(str, words_k))) > 3 else 0)
    ax.set(xlabel="key: looked at", ylabel="query: looks", title=title + (" (grey: not seen)" if not seen.all() else ""))
    return save(ax, path)


def rope_pairs(theta, positions, *, shown=None, angle=False, ax=None, path=None):
    """Some pairs turning: the cosine of each one's angle against the position, or the angle itself on two logarithmic axes.

    theta: (R/2,), radians per position   positions: (n,)   shown: indices of pairs, five spread over all by default
    """
    theta, positions = vector("theta", theta), vector("positions", positions)
    shown = sorted(set(np.linspace(0, len(theta) - 1, 5).astype(int).tolist())) if shown is None else list(shown)
    if not shown or not all(0 <= pair < len(theta) for pair in shown):
        raise ValueError(f"shown = {shown} must be indices of pairs, theta has shape {theta.shape}")
    ax = new_axes()[0] if ax is None else ax
    for n, pair in enumerate(shown):
        angles, (colour, dashes) = positions * theta[pair], STYLES[n % len(STYLES)]
        ax.plot(positions, angles if angle else np.cos(angles), color=colour, linestyle=dashes, linewidth=0.9 if n == 0 else 1.8,
                label=f"pair {pair}: a turn in {2 * np.pi / theta[pair]:,.0f} tokens")
    if angle:
        ax.set(xscale="log", yscale="log")
    ax.set(xlabel="position (tokens)", ylabel="angle (radians)" if angle else "cosine of the angle", title="pairs of RoPE turn at their own speeds")
    ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    return save(ax, path)


def score_by_distance(distances, scores, *, labels=None, ylabel="score", ax=None, path=None):
    """A score between a query and a key against how far apart they stand.

    distances: (n,), tokens   scores: (n,) or (m, n) for m lines   labels: m names
    """
    distances, scores = vector("distances", distances), np.atleast_2d(np.asarray(scores, np.float64))
    if scores.ndim != 2 or scores.shape[1] != len(distances):
        raise ValueError(f"scores has shape {scores.shape}, distances has shape {distances.shape}: one score for each distance")
    if labels is not None and len(labels) != len(scores):
        raise ValueError(f"labels has {len(labels)} names for scores of shape {scores.shape}")
    ax = new_axes()[0] if ax is None else ax
    for n, line in enumerate(scores):
        ax.plot(distances, line, color=STYLES[n % 5][0], linestyle=STYLES[n % 5][1], linewidth=1.3, label=labels[n] if labels is not None else None)
    ax.axhline(0, color=HIDDEN, linewidth=1, zorder=0)
    ax.set(xlabel="distance (tokens)", ylabel=ylabel, title="the score depends on the distance")
    if labels is not None:
        ax.legend(fontsize=8)
    return save(ax, path)


def yarn_ramp(theta, stretched, *, ax=None, path=None):
    """How much of its speed each pair keeps: stretched / theta against the pair's index. Both (R/2,), radians per position."""
    theta, stretched = vector("theta", theta), vector("stretched", stretched)
    if theta.shape != stretched.shape:
        raise ValueError(f"stretched has shape {stretched.shape}, theta has shape {theta.shape}: one frequency for each pair")
    ratio = stretched / theta
    slow = ratio.min()
    ax = new_axes()[0] if ax is None else ax
    ax.plot(ratio, color=BLUE, marker="o", markersize=4)
    ax.axhline(1, color=GREEN, linestyle="--", linewidth=1, zorder=0, label="1: left alone")
    ax.axhline(slow, color=ORANGE, linestyle="-.", linewidth=1, zorder=0, label=f"{slow:.3g}: stretched {1 / slow:.3g} times")
    ax.set(xlabel="index of the pair (0: the fastest)", ylabel="stretched / original frequency", ylim=(0, 1.08), title="YaRN slows the slow pairs")
    ax.legend(fontsize=8, loc="center right")
    return save(ax, path)


def cache_bars(floats_by_kind, *, unit="floats", log=None, ax=None, path=None):
    """What one token leaves in the cache of a layer, a bar for each kind of attention, its number beside it.

    floats_by_kind: {name: number}   unit: floats or bytes   log: whether the axis is; None when the largest is 20 times the smallest
    """
    sizes = vector("floats_by_kind", list(floats_by_kind.values()))
    if not (np.isfinite(sizes) & (sizes > 0)).all():
        raise ValueError(f"floats_by_kind = {dict(floats_by_kind)} must be positive numbers")
    log = sizes.max() > 20 * sizes.min() if log is None else log
    ax = new_axes(size=(6.4, 1.4 + 0.5 * len(sizes)))[0] if ax is None else ax
    bars = ax.barh(list(floats_by_kind), sizes, color=BLUE, log=log)
    ax.bar_label(bars, [f"{size:,.6g}" if size < 1e6 else f"{size:,.0f}" for size in sizes], padding=4)
    ax.set_xlim(sizes.min() / 5 if log else 0, sizes.max() * (4 if log else 1.2))
    ax.invert_yaxis()
    ax.set(xlabel=f"{unit} per token and layer" + (", logarithmic axis" if log else ""), title="what is cached")
    return save(ax, path)


def flash_tiles(T, S, tile, *, ax=None, path=None):
    """Which tiles of the (T, S) scores causal attention computes whole, which the diagonal cuts, and which nobody computes.

    T queries, the last of S keys; tile: queries, and keys, at a time. The first T - S queries, if any, see nothing.
    """
    if min(T, S, tile) < 1:
        raise ValueError(f"T = {T}, S = {S}, tile = {tile} must be positive")
    ax = new_axes(size=(6.4, 4.8))[0] if ax is None else ax
    ax.set_facecolor(HIDDEN)                                            # so are the first T - S queries, when there are more than keys
    kinds = {"whole": (BLUE, ""), "on the diagonal": (ORANGE, "//"), "skipped": (HIDDEN, "")}
    counts, offset, first = dict.fromkeys(kinds, 0), S - T, max(T - S, 0)
    for top in range(first, T, tile):
        bottom = min(top + tile, T)
        for left in range(0, S, tile):
            right = min(left + tile, S)
            kind = "whole" if right - 1 <= top + offset else "skipped" if left > bottom - 1 + offset else "on the diagonal"
            counts[kind] += 1
            ax.bar(left, bottom - top, right - left, top, align="edge", color=kinds[kind][0], hatch=kinds[kind][1], edgecolor="white", linewidth=1)
    for kind, (colour, hatch) in kinds.items():
        ax.bar(0, 0, 0, color=colour, hatch=hatch, edgecolor="white", label=f"{kind}: {counts[kind]}")
    if T > 1 and S > 1:
        ax.plot([max(offset, 0), S], [first, T], color="black", linewidth=1, label="the diagonal")
    ax.set(xlim=(0, S), ylim=(T, 0), aspect="equal", anchor="W", xlabel=f"keys, S = {S}", ylabel=f"queries, T = {T}", title=f"tiles of {tile}")
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1))
    return save(ax, path)


def demo():
    """All the pictures of plain made-up arrays on one sheet. --plot FILE.png keeps it."""
    words = "the cat sat on the mat".split()
    scores = np.where(np.tri(6, dtype=bool), np.random.default_rng(0).standard_normal((6, 6)), -np.inf)
    p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    theta, distances = 10_000.0 ** (-np.arange(32) / 32), np.arange(512)
    stretched = theta * (1 - np.clip((np.arange(32) - 10) / 13, 0, 1) * (1 - 1 / 40))
    draws = [lambda ax: attention_map(p, words, mask=np.tri(6, dtype=bool), ax=ax),
             lambda ax: rope_pairs(theta, np.linspace(0, 128, 1025), ax=ax),
             lambda ax: score_by_distance(distances, np.cos(distances[:, None] * theta).mean(axis=1), ylabel="score of equal pairs / R", ax=ax),
             lambda ax: yarn_ramp(theta, stretched, ax=ax),
             lambda ax: cache_bars({"mha": 40_960, "gqa, 8": 2_560, "mqa": 320, "mla": 576}, ax=ax),
             lambda ax: flash_tiles(200, 200, 64, ax=ax)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(plot_path() or Path(folder, "attention.png"))
        figure = panels(path, *draws).figure
        size, start = path.stat().st_size, path.read_bytes()[:8]
    print(f"shapes    p {p.shape}, theta {theta.shape}, scores {distances.shape} -> {len(figure.axes)} axes, {size:,} bytes of PNG")
    print(f"claim     it is a picture: {start == bytes([137, 80, 78, 71, 13, 10, 26, 10]) and size > 30_000}")
    assert start[1:4] == b"PNG" and size > 30_000


if __name__ == "__main__":
    from minideepseek.plots.attention import demo  # the imported copy, so that every name exists once
    demo()
