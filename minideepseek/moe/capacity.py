"""Capacity: a fixed number of seats per expert, and what happens to the tokens that find none. V3 does without.

Derivation: whiteboard/moe/capacity.md     Source: Fedus et al. 2021, arXiv:2101.03961; DeepSeek-V2, arXiv:2405.04434, sec. 2.2
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import math
from fractions import Fraction

import numpy as np

from minideepseek.autograd.gradcheck import report
from minideepseek.autograd.tape import op
from minideepseek.moe.bias_balance import expert_counts
from minideepseek.moe.router import best

ORDERS = ("arrival", "affinity")


def capacity(n_tokens, n_routed, top_k, factor):
    """Seats of one expert: ceil(factor * n_tokens * top_k / n_routed). For seats of one device, count devices, not experts.

    factor: 1 is an equal part exactly; rounded up, so that a balanced batch never drops. Read as the decimal it is
    written as: 1.1 times 50 is 55 seats, not 56.
    Raises ValueError for sizes or a factor that are not positive.
    """
    for name, value in (("n_tokens", n_tokens), ("n_routed", n_routed), ("top_k", top_k), ("factor", factor)):
        _rule(value > 0 and math.isfinite(value), f"{name} = {value} must be positive and finite")
    return math.ceil(Fraction(str(factor)) * n_tokens * top_k / n_routed)                       # eq. 1


def keep_within(chosen, score, limit, n_routed, *, order, n_devices=None, protected=None):
    """Give away the seats, and say who got one: bool (..., K).

    chosen: int (..., K)   score: (..., K), of the chosen, unbiased; None will do for arrival   limit: seats
    order: "arrival" is Switch's, token after token, first come, first served; "affinity" is V2's, the highest scores first, over
    the whole batch. n_devices: seats belong to a device and all its experts, as in V2; None: to each expert.
    protected: bool (...), tokens that are never dropped, even where that exceeds the limit; they are seated first.
    Raises ValueError for an unknown order, shapes that do not fit, ids that are no experts, or a negative limit.
    """
    owner, n_owners = _owners(chosen, n_routed, n_devices)
    A, shape = owner.size, np.shape(chosen)
    _rule(order in ORDERS, f"order = {order!r} must be one of {', '.join(ORDERS)}")
    _rule(limit >= 0, f"limit = {limit} must not be negative")
    _rule(order == "arrival" or np.shape(score) == shape, f"score has shape {np.shape(score)}, chosen has shape {shape}")
    if protected is None:
        protected = np.zeros(shape[:-1], bool)
    _rule(np.shape(protected) == shape[:-1], f"protected has shape {np.shape(protected)}, chosen has {shape[:-1]} tokens")
    exempt = np.repeat(np.asarray(protected, bool).reshape(-1), shape[-1])                      # (A,)
    worth = np.reshape(score, A).astype(float) if order == "affinity" else np.zeros(A)                        # (A,)
    queue = np.lexsort((-worth, ~exempt, owner))    # by owner; in it the exempt, then by worth; of equals, first come   # eq. 2
    counts = np.bincount(owner, minlength=n_owners)                                             # (E,) or (devices,)
    first = counts.cumsum() - counts                # where the queue of each owner begins
    rank = np.empty(A, int)
    rank[queue] = np.arange(A) - first[owner[queue]]                                            # eq. 3
    kept = (rank < limit) | exempt                                                              # eq. 4
    return kept.reshape(shape)


def drop_forward(gate, *, kept):
    """Silence the assignments that found no seat: their gate becomes exactly 0, the others stay as they are.

    gate: (..., K)   kept: (..., K)   ->   gate_kept: (..., K)

    kept: True where an assignment has a seat, from keep_within. A token without any seat gets nothing from the
    routed experts; the residual stream carries it on. Never called in evaluation.
    """
    gate_kept = np.where(kept, gate, 0)                                     # (..., K)   # eq. 5
    return gate_kept, kept


def drop_backward(dgate_kept, kept):
    """A dropped gate had no say, so it hears nothing; who has a seat is a constant."""
    dgate = np.where(kept, dgate_kept, 0)                                   # (..., K)   # eq. 8
    return dgate


drop = op(drop_forward, drop_backward)


def drop_examples(rng):
    kept = np.array([[[True, False], [False, False], [True, True]], [[True, True], [False, True], [True, True]]])
    return {
        "one token without a seat": ((rng.random((3, 2)) + 0.5,), {"kept": kept[0]}),
        "a batch": ((rng.random((4, 3, 2)) + 0.5,), {"kept": np.concatenate([kept, ~kept])}),
    }


def dropped_and_empty(chosen, kept, limit, n_routed, *, n_devices=None):
    """(share of the assignments that were dropped, share of the seats that stayed empty): the two prices of a limit.

    chosen, kept: (..., K)   limit, n_devices: as in keep_within.
    Raises ValueError for shapes that do not fit, ids that are no experts, no assignment at all, or no seat.
    """
    owner, n_owners = _owners(chosen, n_routed, n_devices)
    kept = np.asarray(kept, bool)
    _rule(kept.shape == np.shape(chosen), f"kept has shape {kept.shape}, chosen has shape {np.shape(chosen)}")
    _rule(owner.size > 0, f"chosen has shape {np.shape(chosen)}: there is nothing to drop")
    _rule(limit > 0, f"limit = {limit} must be positive: there is no seat")
    used = np.bincount(owner[kept.reshape(-1)], minlength=n_owners)
    dropped = 1 - kept.mean()                                                                   # eq. 6
    empty = np.maximum(limit - used, 0).sum() / (limit * n_owners)                              # eq. 7
    return float(dropped), float(empty)


def _owners(chosen, n_routed, n_devices):
    """Who owns the seat each assignment wants: int (A,), and how many owners there are: experts, or devices."""
    n_owners = n_routed if n_devices is None else n_devices
    _rule(n_owners > 0 and n_routed % n_owners == 0, f"n_devices = {n_devices} must be positive and divide n_routed = {n_routed}")
    expert_counts(chosen, n_routed)                 # its door: integers of 0 .. n_routed - 1
    return np.reshape(chosen, -1) // (n_routed // n_owners), n_owners


def _rule(holds, message):
    if not holds:
        raise ValueError(message)


def demo():
    """Four tokens by hand, the gradient, and what a limit costs a balanced and a skewed router."""
    chosen, score = np.array([[0], [0], [0], [1]]), np.array([[0.5], [0.6], [0.9], [0.7]])
    seats = capacity(4, 2, 1, 1.0)
    by = {order: keep_within(chosen, score, seats, 2, order=order)[:, 0].astype(int) for order in ORDERS}
    print("shapes    chosen (4, 1), score (4, 1) -> kept (4, 1);  gate (..., K), kept (..., K) -> gate (..., K)")
    print(f"by hand   experts 0 0 0 1, scores .5 .6 .9 .7, {seats} seats each: by arrival kept", by["arrival"], " by affinity", by["affinity"])
    report(drop_forward, drop_backward, drop_examples)

    rng = np.random.default_rng(0)
    M, E, K, factors = 4_096, 64, 6, (1.0, 1.25, 1.5, 2.0)
    lost = {}
    for name, lean in (("balanced", 0), ("skewed", 1)):             # the later an expert, the likelier
        score = rng.standard_normal((M, E)) + lean * np.linspace(-1, 1, E)
        chosen, row = best(score, K), []
        for factor in factors:
            limit = capacity(M, E, K, factor)
            kept = keep_within(chosen, None, limit, E, order="arrival")
            row.append(dropped_and_empty(chosen, kept, limit, E))
        lost[name] = [dropped for dropped, _ in row]
        print(f"          {name:9s}", "   ".join(f"x{factor}: {dropped:5.1%} dropped, {empty:5.1%} empty" for factor, (dropped, empty) in zip(factors, row)))
    print(f"claim     {E} experts, {K} a token: 25 % more seats than needed save a balanced router ({lost['balanced'][1]:.1%} dropped), not a skewed one ({lost['skewed'][1]:.1%})")
    assert lost["balanced"][0] > 0.01 and lost["balanced"][1] < 1e-4 and lost["skewed"][1] > 0.2


if __name__ == "__main__":
    from minideepseek.moe.capacity import demo  # the imported copy, so that every name exists once
    demo()
