"""The curves of a run: loss against its floor, learning rate, and how evenly the experts are used.

Derivation: whiteboard/plots/curves.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import numpy as np

from minideepseek.plots.canvas import BLUE, GREEN, GREY, ORANGE, new_axes, save, try_out


def plot_run(path, steps, *, train_bits, held_steps=(), held_bits=(), floor=None, learning_rate=None, violation=None):
    """Write a PNG with up to three panels over the step.

    steps: (n,)   train_bits, learning_rate, violation: (n,)   held_steps, held_bits: (m,)   bits per byte; MaxVio
    floor: bits per byte, or None when nobody knows it
    """
    n_panels = 1 + (learning_rate is not None) + (violation is not None)
    axes = list(new_axes(n_panels, 1, (7, 2.6), sharex=True))
    ax = axes.pop(0)
    ax.plot(steps, train_bits, color=BLUE, linewidth=0.8, label="training batch")
    if len(held_steps) or len(held_bits):
        ax.plot(held_steps, held_bits, color=ORANGE, marker="o", markersize=3, label="held-out")
    if floor is not None:
        ax.axhline(floor, color=GREY, linestyle="--", label=f"floor {floor:.3f}")
    ax.set_ylabel("loss (bits per byte)")
    ax.set_yscale("log")
    ax.legend()
    if learning_rate is not None:
        ax = axes.pop(0)
        ax.plot(steps, learning_rate, color=GREEN)
        ax.set_ylabel("learning rate")
    if violation is not None:
        ax = axes.pop(0)
        ax.plot(steps, violation, color=BLUE, linewidth=0.8)
        ax.set_ylabel("MaxVio of a batch\n(0: all experts alike)")
        ax.set_ylim(bottom=0)
    ax.set_xlabel("step")
    save(ax, path)


def demo():
    """A made-up run. --plot FILE.png keeps the picture."""
    steps = np.arange(0, 500, 10)
    bits = 0.22 + 6 * np.exp(-steps / 60)
    width, height, size = try_out(lambda path: plot_run(path, steps, train_bits=bits, held_steps=steps[::10], held_bits=bits[::10] + 0.02, floor=0.22,
                                                        learning_rate=np.minimum(steps / 100, 1) * 1e-3, violation=2 * np.exp(-steps / 100)))
    print(f"shapes    {len(steps)} points -> three panels, {width} x {height} pixels")
    print(f"claim     it is a picture, and not an empty one: {size:,} bytes of PNG")
    assert (width, height) == (770, 858) and size > 10_000


if __name__ == "__main__":
    from minideepseek.plots.curves import demo  # the imported copy, so that every name exists once
    demo()
