"""What changes while a model trains, as pure functions of the step: learning rate, balancing speed, MTP weight, batch size.

    python minideepseek/training/schedule.py --plot schedules.png

    DeepSeek-V3       value                                                                   here
    learning rate     0 to 2.2e-4 over 2,000 steps; constant until 10T tokens; cosine to      learning_rate, without
                      2.2e-5 over 4.3T; then 2.2e-5 for 333B and 7.3e-6 for the last 167B     the last two plateaus
    balancing speed   0.001 until 14.3T of 14.8T tokens, then 0                               balance_speed
    MTP weight        0.3 for 10T tokens, then 0.1                                            mtp_weight
    batch size        3,072 to 15,360 sequences of 4K over the first 469B tokens              batch_size

Derivation: whiteboard/training/schedule.md     Source: DeepSeek-V3, arXiv:2412.19437, sec. 4.2
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import argparse
import math
from numbers import Integral, Real


def learning_rate(step, *, peak, total, warmup, decay, floor):
    """Linear up, constant, cosine down: of step 0 peak / warmup, of step warmup - 1 peak, of the last step floor.

    step: 0 to total - 1   warmup, decay: how many steps of the `total` rise and fall; 0 for none, then floor is unused
    Raises ValueError that names the argument. Source: DeepSeek-V3, arXiv:2412.19437, sec. 4.2; differs by step 0,
    which learns already, and by the end, which is at the floor.
    """
    _check_step(step, total)
    _check_whole(0, warmup=warmup, decay=decay)
    _check_finite(peak=peak, floor=floor)
    _rule(warmup + decay <= total, "warmup", warmup, f"and decay = {decay} do not fit into total = {total}")
    _rule(floor <= peak, "floor", floor, f"exceeds peak = {peak}")
    if step < warmup:
        return float(peak * ((step + 1) / warmup))                                      # eq. 1
    if step < total - decay:
        return float(peak)
    progress = (step + 1 - (total - decay)) / decay     # 1 / decay, ..., 1             # eq. 2
    return float(floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2)       # eq. 3


def balance_speed(step, *, gamma, total, off):
    """How far a step moves the selection biases of the router: gamma, and 0 in the last `off` of `total` steps.

    Raises ValueError that names the argument. Source: DeepSeek-V3, arXiv:2412.19437, sec. 4.2: 0.001, then 0.
    """
    _check_step(step, total)
    _check_whole(0, off=off)
    _check_finite(gamma=gamma)
    _rule(off <= total, "off", off, f"exceeds total = {total}")
    return float(gamma) if step < total - off else 0.0                                  # eq. 4


def mtp_weight(step, *, first, then, total, change):
    """Lambda, the weight of the multi-token-prediction loss: `first` before the step `change`, `then` from it on.

    Raises ValueError that names the argument. Source: DeepSeek-V3, arXiv:2412.19437, sec. 4.2: 0.3, then 0.1.
    """
    _check_step(step, total)
    _check_whole(0, change=change)
    _check_finite(first=first, then=then)
    _rule(change <= total, "change", change, f"exceeds total = {total}")
    return float(first) if step < change else float(then)                               # eq. 5


def batch_size(step, *, first, last, ramp):
    """Sequences of a step: `first` at step 0, a straight line, `last` from step `ramp` on; whole, rounded down.

    Raises ValueError that names the argument. Source: DeepSeek-V3, arXiv:2412.19437, sec. 4.2; the form of its ramp is
    not given there, and its length is in tokens.
    """
    _check_whole(1, first=first, last=last)
    _check_whole(0, step=step, ramp=ramp)
    _rule(first <= last, "first", first, f"exceeds last = {last}: the batch grows")
    if step >= ramp:
        return int(last)
    return int(first + (last - first) * step // ramp)                                   # eq. 6


def _rule(holds, name, value, message):
    if not holds:
        raise ValueError(f"{name} = {value!r} {message}")


def _check_whole(least, **arguments):
    for name, value in arguments.items():
        right = isinstance(value, Integral) and not isinstance(value, bool) and value >= least
        _rule(right, name, value, f"must be a whole number of at least {least}")


def _check_finite(**arguments):
    for name, value in arguments.items():
        right = isinstance(value, Real) and not isinstance(value, bool) and 0 <= value < math.inf
        _rule(right, name, value, "must be a finite number, not negative")


def _check_step(step, total):
    _check_whole(1, total=total)
    _check_whole(0, step=step)
    _rule(step < total, "step", step, f"is past the last step: total = {total}")


def plot(path, total=1_000):
    """Draw the four schedules with V3's values and its shares of the tokens; warm-up and ramp wide enough to be seen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg    # draws into a file, needs no window
    from matplotlib.figure import Figure

    steps = range(total)
    share = {tokens: round(tokens / 14.8 * total) for tokens in (10, 4.3, 0.5)}    # trillions of tokens -> steps
    lr = [learning_rate(s, peak=2.2e-4, total=total, warmup=total // 50, decay=share[4.3], floor=2.2e-5) for s in steps]
    speed = [balance_speed(s, gamma=0.001, total=total, off=share[0.5]) for s in steps]
    weight = [mtp_weight(s, first=0.3, then=0.1, total=total, change=share[10]) for s in steps]
    batch = [batch_size(s, first=3_072, last=15_360, ramp=total // 20) for s in steps]
    panels = ((lr, "learning rate (per update)", "#0072B2"), (speed, "balancing speed (per update)", "#D55E00"),
              (weight, "MTP weight (no unit)", "#009E73"), (batch, "batch size (sequences)", "#CC79A7"))    # told apart by every eye

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (values, label, colour) in zip(figure.subplots(2, 2).flat, panels):
        axes.step(steps, values, where="post", color=colour, linewidth=2)
        axes.set(xlabel="time (training steps)", ylabel=label, ylim=(-0.03 * max(values), None))
    figure.savefig(path, dpi=120)


def demo():
    """Ten steps by hand, no jump at the seams of a long run, and on request a picture."""
    parser = argparse.ArgumentParser(description="Schedules of a training run.")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the four schedules into a file")
    options = parser.parse_args()

    print("shapes    one step number -> one number, four times")
    by_hand = [learning_rate(s, peak=1.0, total=10, warmup=2, decay=4, floor=0.1) for s in range(10)]
    print("by hand   peak 1, warm-up 2, decay 4, floor 0.1:", *[f"{lr:.3g}" for lr in by_hand])
    print("          batch of 4 to 10 over 3 steps:", *[batch_size(s, first=4, last=10, ramp=3) for s in range(5)],
          "  balancing, off 2:", *[balance_speed(s, gamma=0.001, total=5, off=2) for s in range(5)],
          "  MTP, change 2:", *[mtp_weight(s, first=0.3, then=0.1, total=4, change=2) for s in range(4)])

    run = {"peak": 2.2e-4, "total": 10_000, "warmup": 2_000, "decay": 2_900, "floor": 2.2e-5}
    lr = [learning_rate(s, **run) for s in range(run["total"])]
    rise = max(b - a for a, b in zip(lr, lr[1:])) / (run["peak"] / run["warmup"])
    fall = max(a - b for a, b in zip(lr, lr[1:])) / ((run["peak"] - run["floor"]) * math.pi / 2 / run["decay"])
    print(f"claim     {run['total']:,} steps, no jump: steepest rise {rise:.6f} of the line's slope, steepest fall {fall:.6f} of the cosine's")
    if options.plot:
        plot(options.plot)
        print("drawn     " + options.plot)
    assert abs(rise - 1) < 1e-9 and abs(fall - 1) < 1e-5 and lr[-1] == run["floor"] and max(lr) == run["peak"]


if __name__ == "__main__":
    from minideepseek.training.schedule import demo  # the imported copy, so that every name exists once
    demo()
