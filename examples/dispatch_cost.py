"""Does it cost more to choose among more experts? The layer's time as E grows, 2 experts a token throughout.

    python examples/dispatch_cost.py [--repeats 15] [--plot FILE.png]

The same 4,096 tokens, evenly dealt out, forward and backward, float32. `layer`: all of it; its multiply-adds are the same
for every E. `products`: the experts' networks alone, one after another on rows that are sorted already. `dispatch`: the
difference of the two, that is sorting, copying and adding up. `dense`: every expert on every token, which the dispatch
saves. Medians of interleaved repeats.
"""
import os
import sys

sys.path[0:1] = [os.path.abspath(__file__ + "/../..")]   # run as a script: take the package from this repository
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import statistics
import time

import numpy as np

from minideepseek.basics.swiglu import swiglu_backward, swiglu_forward
from minideepseek.moe.experts import experts_backward, experts_forward
from minideepseek.training.allocator import keep_freed_memory

M, D, K, WIDTH = 4_096, 128, 2, 64
COUNTS, DENSE_UP_TO = (8, 16, 32, 64, 128, 256), 32
KINDS = ("layer", "products", "dispatch", "dense")


def case(E, rng):
    """Arguments of experts_forward with every expert equally busy, and a dy."""
    chosen = np.stack([rng.permutation(np.arange(M) % E), np.zeros(M, np.int64)], axis=1)
    chosen[:, 1] = (chosen[:, 0] + E // 2) % E                  # two different experts
    arrays = [rng.standard_normal(shape, np.float32) / 10 for shape in [(M, D), (M, K), (E, D, WIDTH), (E, D, WIDTH), (E, WIDTH, D), (M, D)]]
    x, gate, *W, dy = arrays
    return (x, gate, chosen, *W), dy


def layer(args, dy):
    experts_backward(dy, experts_forward(*args)[1])


def products(args, dy):
    """Each expert on as many rows as it has in the layer, forward and backward, and gradients put where the layer puts them."""
    x, _, _, *W = args
    E = len(W[0])
    grads, rows = [np.zeros_like(w) for w in W], M * K // E
    for e in range(E):
        mine = slice(e * rows % M, e * rows % M + rows)
        _, grads[0][e], grads[1][e], grads[2][e] = swiglu_backward(dy[mine], swiglu_forward(x[mine], *[w[e] for w in W])[1])


def dense(args, dy):
    """Every expert, every token: forward and backward, without even the gates."""
    x, _, _, *W = args
    for weights in zip(*W):
        swiglu_backward(dy, swiglu_forward(x, *weights)[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--plot", metavar="FILE.png")
    options = parser.parse_args()
    keep_freed_memory()
    rng = np.random.default_rng(0)
    cases = {E: case(E, rng) for E in COUNTS}
    jobs = {(f.__name__, E): (f, cases[E]) for E in COUNTS for f in (layer, products, dense) if f is not dense or E <= DENSE_UP_TO}
    times = {job: [] for job in jobs}
    for repeat in range(options.repeats + 1):
        for job, (function, case_) in jobs.items():
            began = time.perf_counter()
            function(*case_)
            if repeat:                                          # the first one warms up
                times[job].append((time.perf_counter() - began) * 1e3)
    times |= {("dispatch", E): [a - b for a, b in zip(times["layer", E], times["products", E])] for E in COUNTS}
    middle = {job: statistics.median(values) for job, values in times.items()}
    print(f"{M:,} tokens, width {D}, {K} experts a token, forward and backward\n")
    print(f"{'experts':>8s}" + "".join(f"{kind + ' ms':>13s}{'ratio':>7s}" for kind in KINDS))
    for E in COUNTS:
        cells = [(middle.get((kind, E)), middle[kind, COUNTS[0]]) for kind in KINDS]
        print(f"{E:8d}" + "".join(f"{ms:13.1f}{ms / first:7.2f}" if ms else f"{'-':>13s}{'-':>7s}" for ms, first in cells))
    if options.plot:
        draw(options.plot, middle)
    return 0


def draw(path, middle):
    """Time against the number of experts."""
    from minideepseek.plots.canvas import STYLES, new_axes, save

    ax = new_axes()[0]
    for kind, (colour, dashes) in zip(KINDS, STYLES):
        counts = [E for E in COUNTS if (kind, E) in middle]
        ax.plot(counts, [middle[kind, E] for E in counts], color=colour, linestyle=dashes, marker="o", markersize=4, label=kind)
    ax.set(xscale="log", yscale="log", xlabel="experts in the layer", ylabel="milliseconds, forward and backward", title=f"{K} experts a token")
    ax.set_xticks(COUNTS, COUNTS)
    ax.legend()
    save(ax, path)


if __name__ == "__main__":
    raise SystemExit(main())
