"""Pictures of experts: who serves whom, how evenly they are used, how the biases move, what travels, who is good at what.

Derivation: whiteboard/plots/experts.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import numpy as np

from minideepseek.plots.canvas import BLUE, HIDDEN, ORANGE, heat, matrix, new_axes, panels, save, style, token_ticks, try_out, vector, write_cells

UNITS = ("bytes", "kB", "MB", "GB", "TB")                                   # each 1000 of the one before


def _table_axes(shape, ax):
    """The axes to draw a table of colours on: those given, or new ones of a size that suits the table."""
    n, m = shape
    return new_axes(size=(min(max(0.5 * m + 3, 4.5), 14), min(max(0.35 * n + 1.6, 3.2), 14)))[0] if ax is None else ax


def _has_room(shape):
    """Whether the cells of a table are large enough for a number."""
    return shape[0] <= 24 and shape[1] <= 16


def _number_ticks(axis, n):
    """0 .. n - 1 as the labels of an axis; of many, some."""
    axis.set_ticks(range(0, n, -(-n // 32)))


def _unit(n):
    """The place in UNITS of the unit in which n bytes are a number below 1000."""
    return next((power for power in range(len(UNITS)) if n / 1000**power < 999.5), len(UNITS) - 1)


def _readable(n):
    """A number of bytes in words, such as 80.8 MB."""
    return f"{n / 1000 ** _unit(n):.3g} {UNITS[_unit(n)]}"


def _not_negative(name, values, letters):
    """`values` as a matrix. Raises ValueError when an entry is negative or not finite."""
    values = matrix(name, values, letters)
    wrong = ~((values >= 0) & np.isfinite(values))                          # written this way round: nan must fail
    if wrong.any():
        i, j = np.argwhere(wrong)[0]
        raise ValueError(f"{name}[{i}, {j}] = {values[i, j]}, but {name} of shape {values.shape} holds finite numbers that are not negative")
    return values


def _same_length(steps, name, values):
    """The steps as a vector. Raises ValueError unless there is one for each row of `values`."""
    steps = vector("steps", steps)
    if len(values) != len(steps):
        raise ValueError(f"{name} has shape {values.shape}, steps has shape {steps.shape}: one row for each step")
    return steps


def routing_map(score, chosen, words=None, *, gate=None, n_groups=1, kept=None, title="which experts serve a token", ax=None, path=None):
    """The scores as a table of colours, a row for each token; chosen cells are framed, the groups that are shut are grey.

    score: (T, E)   chosen: (T, K), ids of experts   words: T tokens   gate: (T, K), written into the frames of a small
    table   n_groups: J   kept: (T, J), True where a token may use the group
    Raises ValueError when they do not fit together, or when an expert of a shut group is chosen.
    """
    from matplotlib.patches import Rectangle

    score, chosen = matrix("score", score, "(T, E)"), np.asarray(chosen)
    T, E = score.shape
    if chosen.ndim != 2 or len(chosen) != T or chosen.dtype.kind not in "iu":
        raise ValueError(f"chosen has shape {chosen.shape} and dtype {chosen.dtype}, score of shape {score.shape} wants integers of shape ({T}, K)")
    if not ((chosen >= 0) & (chosen < E)).all():
        raise ValueError(f"chosen has ids from {chosen.min()} to {chosen.max()}, score of shape {score.shape} has experts 0 .. {E - 1}")
    if words is not None and len(words) != T:
        raise ValueError(f"words has {len(words)} tokens, but score of shape {score.shape} wants {T}")
    if gate is not None and np.shape(gate) != chosen.shape:
        raise ValueError(f"gate has shape {np.shape(gate)}, chosen has shape {chosen.shape}: one gate for each choice")
    if n_groups < 1 or E % n_groups:
        raise ValueError(f"n_groups = {n_groups} does not divide the {E} experts of score, which has shape {score.shape}")
    if kept is not None and (np.shape(kept) != (T, n_groups) or np.asarray(kept).dtype != bool):
        raise ValueError(f"kept has shape {np.shape(kept)} and dtype {np.asarray(kept).dtype}, expected booleans of shape ({T}, {n_groups})")
    open_to = np.ones((T, E), bool) if kept is None else np.repeat(kept, E // n_groups, axis=1)
    if not np.take_along_axis(open_to, chosen, axis=1).all():
        t = int(np.argmin(np.take_along_axis(open_to, chosen, axis=1).all(axis=1)))
        raise ValueError(f"chosen[{t}] = {chosen[t].tolist()} has an expert of a group that kept[{t}] = {np.asarray(kept)[t].tolist()} shuts")
    ax = _table_axes(score.shape, ax)
    seen = open_to & np.isfinite(score)
    image = heat(ax, score, seen, label="score")
    for t, k in np.ndindex(chosen.shape):
        ax.add_patch(Rectangle((chosen[t, k] - 0.45, t - 0.45), 0.9, 0.9, fill=False, edgecolor="black", linewidth=1.6))
    if gate is not None and _has_room(score.shape):
        write_cells(image, {(t, chosen[t, k]): f"{np.asarray(gate)[t, k]:.2f}" for t, k in np.ndindex(chosen.shape)})
    for j in range(1, n_groups):
        ax.axvline(j * E // n_groups - 0.5, color="black", linewidth=1, linestyle="--")
    _number_ticks(ax.xaxis, E)
    if words is None:
        _number_ticks(ax.yaxis, T)
    else:
        token_ticks(ax.yaxis, words)
    note = "framed: chosen" + (", with its gate" if ax.texts else "") + ("" if seen.all() else "; grey: group shut")
    ax.set(aspect="auto", xlabel="expert" + (f", {n_groups} groups" if n_groups > 1 else ""), ylabel="token", title=f"{title}\n({note})")
    return save(ax, path)


def _expert_lines(steps, values, ax):
    """A line for each expert; of more than nine, the three highest and the three lowest on average, the others thin and grey."""
    ax, E = new_axes()[0] if ax is None else ax, values.shape[1]
    ranked = np.argsort(-values.mean(axis=0), kind="stable")
    named = ranked if E <= 9 else np.concatenate([ranked[:3], ranked[-3:]])
    for e in np.setdiff1d(ranked, named):
        ax.plot(steps, values[:, e], color=HIDDEN, linewidth=0.6, zorder=1)
    for n, e in enumerate(named):
        ax.plot(steps, values[:, e], **style(n), linewidth=1.4, label=str(e))
    title = "expert, highest first" if E <= 9 else f"three highest and three lowest of {E} experts"
    ax.legend(fontsize=8, title_fontsize=8, title=title, ncols=9, columnspacing=1.2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    return ax


def load_over_training(steps, counts, *, ax=None, path=None):
    """What each expert serves, relative to its due: 1 is fair, 2 twice as much. steps: (n,)   counts: (n, E), choices at that step"""
    counts = _not_negative("counts", counts, "(n, E)")
    steps = _same_length(steps, "counts", counts)
    if not counts.any(axis=1).all():
        raise ValueError(f"counts of shape {counts.shape} has a row without any choice: {int(np.argmin(counts.any(axis=1)))}")
    ax = _expert_lines(steps, counts / counts.mean(axis=1, keepdims=True), ax)
    ax.axhline(1, color="black", linestyle="--", linewidth=1, zorder=3)
    ax.set(xlabel="step (dashed: fair)", ylabel="load / fair load", ylim=(0, None), title="how evenly the experts are used")
    return save(ax, path)


def bias_trajectories(steps, biases, *, ax=None, path=None):
    """The selection bias of each expert over training. steps: (n,)   biases: (n, E)"""
    biases = matrix("biases", biases, "(n, E)")
    ax = _expert_lines(_same_length(steps, "biases", biases), biases, ax)
    ax.axhline(0, color="black", linestyle="--", linewidth=1, zorder=0)
    ax.set(xlabel="step", ylabel="selection bias", title="the biases find their places")
    return save(ax, path)


def violation_curves(steps, violations_by_name, *, ax=None, path=None):
    """MaxVio of several methods side by side. violations_by_name: {name: (n,)}   steps: (n,), or {name: (n,)}"""
    if not violations_by_name:
        raise ValueError("violations_by_name is empty: there is nothing to draw")
    if isinstance(steps, dict) and steps.keys() != violations_by_name.keys():
        raise ValueError(f"steps has the names {list(steps)}, violations_by_name has {list(violations_by_name)}")
    lines = {}
    for name, values in violations_by_name.items():
        values = vector(f"violations_by_name[{name!r}]", values)
        lines[name] = _same_length(steps[name] if isinstance(steps, dict) else steps, f"violations_by_name[{name!r}]", values), values
    ax = new_axes()[0] if ax is None else ax
    drawn = [ax.plot(at, values, **style(n), linewidth=1.4, label=name)[0] for n, (name, (at, values)) in enumerate(lines.items())]
    ax.set(xlabel="step", ylabel="MaxVio (0: all experts alike)", ylim=(0, None), title="by how much the busiest expert exceeds its due")
    for text in ax.legend(drawn, lines, fontsize=8).get_texts():
        text.set_parse_math(False)
    return save(ax, path)


def link_bytes(sent, *, ranks_per_node=None, ax=None, path=None):
    """Bytes from rank to rank, a row for each sender; what a rank keeps is grey. Lines are the borders of nodes.

    sent: (R, R), bytes   ranks_per_node: neighbours that share a machine, None where that does not matter
    """
    sent = _not_negative("sent", sent, "(R, R)")
    R = len(sent)
    if sent.shape != (R, R):
        raise ValueError(f"sent has shape {sent.shape}, it must be square: from each rank to each rank")
    if ranks_per_node is not None and (ranks_per_node < 1 or R % ranks_per_node):
        raise ValueError(f"ranks_per_node = {ranks_per_node} does not divide the {R} ranks of sent, which has shape {sent.shape}")
    power, travels = _unit(sent.max()), ~np.eye(R, dtype=bool)
    ax = _table_axes(sent.shape, ax)
    image = heat(ax, sent / 1000**power, travels, label=UNITS[power])
    if _has_room(sent.shape):
        write_cells(image, {place: f"{n / 1000**power:.3g}" for place, n in np.ndenumerate(sent)})
    title = f"{_readable(sent[travels].sum())} leave their rank"
    if ranks_per_node is not None:
        node = np.arange(R) // ranks_per_node
        title += f", {_readable(sent[node[:, None] != node].sum())} their node"
        for border in range(ranks_per_node, R, ranks_per_node):
            ax.axvline(border - 0.5, color="black", linewidth=1.5)
            ax.axhline(border - 0.5, color="black", linewidth=1.5)
    _number_ticks(ax.xaxis, R)
    _number_ticks(ax.yaxis, R)
    ax.set(aspect="auto", xlabel="to rank", ylabel="from rank", title=f"{title}\n(grey: stays at home)")
    return save(ax, path)


def specialisation(counts, kinds, *, top_k=1, ax=None, path=None):
    """How much more (blue) or less (orange) of a kind of token an expert serves than of all tokens: the share over the overall share.

    counts: (n, E), how many choices of each kind of token fell on each expert   kinds: n names   top_k: choices of a token
    A ratio is 2 when tokens of the kind choose the expert twice as often as tokens in general. Grey: a kind without tokens, or
    an expert that serves nobody. Colours end at 8 and 1/8.
    """
    counts = _not_negative("counts", counts, "(kinds, E)")
    if len(kinds) != len(counts):
        raise ValueError(f"kinds has {len(kinds)} names, but counts of shape {counts.shape} wants {len(counts)}")
    if not counts.any():
        raise ValueError(f"counts of shape {counts.shape} is zero everywhere: nothing was counted")
    of_kind, of_expert = counts.sum(axis=1, keepdims=True), counts.sum(axis=0)
    seen = (of_kind > 0) & (of_expert > 0)
    share, overall = counts / np.where(of_kind > 0, of_kind, 1), of_expert / counts.sum()
    ratio = share / np.where(overall > 0, overall, 1)
    end = float(np.clip(np.ceil(np.abs(np.log2(ratio[seen & (ratio > 0)])).max()), 1, 3))
    ax = _table_axes(counts.shape, ax)
    image = heat(ax, np.log2(np.maximum(ratio, 2.0**-end)), seen, label="share / overall share", colours=(ORANGE, "white", BLUE), limits=(-end, end))
    image.colorbar.set_ticks(np.arange(-end, end + 1), labels=[f"{2**n:.0f}" if n >= 0 else f"1/{2**-n:.0f}" for n in np.arange(-end, end + 1)])
    note = "" if seen.all() else " (grey: nothing to compare)"
    if _has_room(counts.shape):
        write_cells(image, {(i, e): f"{ratio[i, e]:.1f}" for i, e in np.argwhere(seen)})
    else:                                                                   # in grey print orange looks like blue
        note += " (a dash: less than 3/4)"
        rows, columns = np.nonzero(seen & (ratio < 0.75))
        ax.plot(columns, rows, "_", color="black", markersize=5, markeredgewidth=1)
    _number_ticks(ax.xaxis, counts.shape[1])
    ax.set_yticks(range(len(kinds)), [f"{kind} ({n / top_k:,.0f})" for kind, n in zip(kinds, of_kind[:, 0])], parse_math=False)
    ax.set(aspect="auto", xlabel="expert", ylabel="kind (tokens)", title="who serves which kind of token" + note)
    return save(ax, path)


def demo():
    """All the pictures of plain made-up arrays on one sheet. --plot FILE.png keeps it."""
    rng, steps, E, J = np.random.default_rng(0), np.arange(0, 400, 5), 8, 4
    words = "the cat sat on the mat .".split()
    score = 1 / (1 + np.exp(-rng.standard_normal((7, E))))
    kept = np.argsort(np.argsort(-score.reshape(7, J, -1).sum(-1))) < 2              # the two best groups
    chosen = np.argsort(-np.where(np.repeat(kept, E // J, axis=1), score, 0))[:, :3]
    picked = np.take_along_axis(score, chosen, axis=1)
    wish, biases, counts = np.linspace(-0.8, 0.8, E), np.zeros((len(steps), E)), np.zeros((len(steps), E))
    for n in range(len(steps)):
        share = np.exp(wish + biases[n])
        counts[n] = rng.multinomial(2048, share / share.sum())
        biases[n + 1:] = biases[n] + 0.025 * np.sign(counts[n].mean() - counts[n])
    violation = counts.max(axis=1) / counts.mean(axis=1) - 1
    sent = rng.integers(200, 900, (4, 4)) * 4096 * np.kron([[3, 1], [1, 3]], np.ones((2, 2), int))     # two nodes of two ranks
    table = rng.multinomial([900, 400, 300, 120], rng.dirichlet(np.ones(E) * 1.5, 4))
    draws = [lambda ax: routing_map(score, chosen, words, gate=picked / picked.sum(1, keepdims=True), n_groups=J, kept=kept, ax=ax),
             lambda ax: load_over_training(steps, counts, ax=ax),
             lambda ax: bias_trajectories(steps, biases, ax=ax),
             lambda ax: violation_curves(steps, {"bias": violation, "nothing": violation[0] + 0.1 * rng.standard_normal(len(steps))}, ax=ax),
             lambda ax: link_bytes(sent, ranks_per_node=2, ax=ax),
             lambda ax: specialisation(table, ["names", "places", "verbs", "marks"], top_k=2, ax=ax)]
    width, height, size = try_out(lambda path: panels(path, *draws))
    drawn = [line.get_ydata()[0] for line in load_over_training([0], [[6, 3, 3, 0]]).lines[:4]]
    print(f"shapes    score {score.shape}, counts {counts.shape}, sent {sent.shape}, table {table.shape} -> "
          f"{len(draws)} panels, {width} x {height} pixels")
    print("by hand   loads of 6, 3, 3, 0, and 12 / 4 = 3 is fair: the lines are at", *drawn)
    print(f"claim     it is a picture, and not an empty one: {size:,} bytes of PNG")
    assert (width, height) == (1408, 1452) and size > 30_000 and drawn == [2, 1, 1, 0]


if __name__ == "__main__":
    from minideepseek.plots.experts import demo  # the imported copy, so that every name exists once
    demo()
