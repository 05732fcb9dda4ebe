"""Pictures of attention: who looks at whom, how positions turn, what is cached, which tiles are computed.

Derivation: whiteboard/plots/attention.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import numpy as np

from minideepseek.plots.canvas import (BLUE, GREEN, HIDDEN, ORANGE, heat, matrix, new_axes, panels, save, style, token_ticks, try_out, vector,
                                       write_cells)


def attention_map(p, words_q, words_k=None, *, mask=None, title="who looks at whom", ax=None, path=None):
    """The weights as a table of colours: a row for each query, a column for each key, the number in a small table's cells.

    p: (T, S)   words_q: T tokens   words_k: S tokens, those of the queries by default   mask: (T, S), True where seen
    Raises ValueError when they do not fit together. A nan in p is grey, as is what the mask hides.
    """
    p, words_k = matrix("p", p, "(T, S)"), words_q if words_k is None else words_k
    for name, words, n in (("words_q", words_q, p.shape[0]), ("words_k", words_k, p.shape[1])):
        if len(words) != n:
            raise ValueError(f"{name} has {len(words)} tokens, but p of shape {p.shape} wants {n}")
    if mask is not None and (np.shape(mask) != p.shape or np.asarray(mask).dtype != bool):
        raise ValueError(f"mask has shape {np.shape(mask)} and dtype {np.asarray(mask).dtype}, p wants booleans of shape {p.shape}")
    seen = np.isfinite(p) if mask is None else np.isfinite(p) & mask
    if ax is None:
        ax = new_axes(size=[min(max(0.55 * n + extra, 3.5), 14) for n, extra in zip(p.shape[::-1], (2.6, 1.2))])[0]
    image = heat(ax, p, seen, label="attention weight")
    if p.size <= 100:
        write_cells(image, {(i, j): f"{p[i, j]:.2f}" for i, j in np.argwhere(seen)})
    token_ticks(ax.xaxis, words_k)
    token_ticks(ax.yaxis, words_q)
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
        angles = positions * theta[pair]
        ax.plot(positions, angles if angle else np.cos(angles), **style(n), linewidth=0.9 if n == 0 else 1.8,
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
        ax.plot(distances, line, **style(n), linewidth=1.3, label=labels[n] if labels is not None else None)
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
    width, height, size = try_out(lambda path: panels(path, *draws))
    print(f"shapes    p {p.shape}, theta {theta.shape}, scores {distances.shape} -> {len(draws)} panels, {width} x {height} pixels")
    print(f"claim     it is a picture, and not an empty one: {size:,} bytes of PNG")
    assert (width, height) == (1408, 1452) and size > 30_000


if __name__ == "__main__":
    from minideepseek.plots.attention import demo  # the imported copy, so that every name exists once
    demo()
