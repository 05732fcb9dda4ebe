"""The expert balancer: copy the busiest experts, then pack all copies onto the GPUs so that each has about as much to do.

Derivation: whiteboard/moe/expert_balancer.md     Source: github.com/deepseek-ai/EPLB; DeepSeek-V3, arXiv:2412.19437, sec. 3.4
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import numpy as np

from minideepseek.moe.bias_balance import expert_counts, max_violation


def balanced_packing(weight, n_packs):
    """Share out items among packs, equally many to each: the heaviest first, each to the lightest pack with room.

    weight: (N,)   -> pack: (N,) of each item, place: (N,) of each item in its pack
    Of equals the first item, and the first pack. One item a pack: item i goes to pack i, there is nothing to balance.
    Raises ValueError for weights that are negative or not finite, or packs that do not divide the items.
    """
    weight = _load("weight", weight, 1)
    N = len(weight)
    _divides("n_packs", n_packs, "len(weight)", N)
    if N == n_packs:
        return np.arange(N), np.zeros(N, int)
    pack, place = np.zeros((2, N), int)
    load, filled = np.zeros(n_packs), np.zeros(n_packs, int)
    for i in np.argsort(-weight, kind="stable"):
        open_load = np.where(filled < N // n_packs, load, np.inf)                       # eq. 1
        p = np.argmin(open_load)                                                        # eq. 2
        pack[i], place[i] = p, filled[p]
        load[p] += weight[i]
        filled[p] += 1
    return pack, place


def replicate_experts(weight, n_replicas):
    """Start with one copy of every expert; each further copy goes to the expert whose copies are busiest.

    weight: (E,)   -> expert: (n_replicas,) of each copy, copy: (n_replicas,) its number among that expert's, count: (E,)
    Of equals the first.
    Raises ValueError for weights that are negative or not finite, or fewer replicas than experts.
    """
    weight = _load("weight", weight, 1)
    E = len(weight)
    _enough(n_replicas, E)
    expert, copy, count = np.arange(n_replicas), np.zeros(n_replicas, int), np.ones(E, int)
    for i in range(E, n_replicas):
        busiest = np.argmax(weight / count)                                             # eq. 3
        expert[i], copy[i] = busiest, count[busiest]
        count[busiest] += 1
    return expert, copy, count


def rebalance(weight, n_replicas, n_groups, n_nodes, n_gpus):
    """Which expert goes to which place: slot s is on GPU s // (n_replicas / n_gpus), GPU g on node g // (n_gpus / n_nodes).

    weight: (L, E) the load of each expert in each of L layers
    -> physical_to_logical: (L, n_replicas) the expert of each slot
       logical_to_physical: (L, E, C) the slots of each expert, copy by copy, -1 where it has fewer than C
       count: (L, E) copies of each expert

    Hierarchical if the nodes divide the groups: a group stays on one node, as node-limited routing wants it. Otherwise global.
    Raises ValueError for loads that are negative or not finite, numbers that do not divide as they must, too few replicas.
    """
    weight = _load("weight", weight, 2)
    L, E = weight.shape
    _enough(n_replicas, E)
    _divides("n_groups", n_groups, "the experts", E)
    _divides("n_nodes", n_nodes, "n_gpus", n_gpus)
    _divides("n_gpus", n_gpus, "n_replicas", n_replicas)
    if n_groups % n_nodes:
        n_groups, n_nodes = 1, 1                                                        # global
    placed = [place_layer(w, n_replicas, n_groups, n_nodes, n_gpus) for w in weight]
    physical_to_logical, copies, count = map(np.stack, zip(*placed))
    logical_to_physical = np.full((L, E, count.max()), -1)
    logical_to_physical[np.arange(L)[:, None], physical_to_logical, copies] = np.arange(n_replicas)
    return physical_to_logical, logical_to_physical, count


def place_layer(weight, n_replicas, n_groups, n_nodes, n_gpus):
    """One layer: groups to nodes, copies within each node, copies to the node's GPUs.

    weight: (E,)   -> the expert in each slot, its copy's number there, both (n_replicas,), and count: (E,)
    """
    group = np.arange(len(weight)).reshape(n_groups, -1)                                # the experts of each group
    node, place = balanced_packing(weight[group].sum(axis=1), n_nodes)                  # eq. 4
    experts_at, copy_at, count = [], [], np.zeros(len(weight), int)
    for n in range(n_nodes):
        here = np.flatnonzero(node == n)
        mine = group[here[np.argsort(place[here])]].reshape(-1)                         # this node's experts, heaviest group first
        expert, copy, n_copies = replicate_experts(weight[mine], n_replicas // n_nodes)
        load = weight[mine][expert] / n_copies[expert]                                  # eq. 5
        gpu, seat = balanced_packing(load, n_gpus // n_nodes)                           # eq. 6
        in_slots = np.lexsort((seat, gpu))                                              # GPU by GPU, seat by seat
        experts_at.append(mine[expert][in_slots])
        copy_at.append(copy[in_slots])
        count[mine] = n_copies
    return np.concatenate(experts_at), np.concatenate(copy_at), count


def gpu_load(weight, physical_to_logical, n_gpus):
    """What each GPU has to do when the copies of an expert share its load equally: (L, n_gpus).

    weight: (L, E)   physical_to_logical: (L, slots), equally many slots on each GPU
    Raises ValueError for loads, ids or numbers that cannot be, and for an expert without a copy.
    """
    weight, experts = _load("weight", weight, 2), np.asarray(physical_to_logical)
    if experts.ndim != 2 or len(experts) != len(weight):
        raise ValueError(f"physical_to_logical has shape {experts.shape}, weight {weight.shape}: one line per layer each")
    _divides("n_gpus", n_gpus, "the slots", experts.shape[1])
    loads = []
    for layer, (w, expert) in enumerate(zip(weight, experts)):
        count = expert_counts(expert, len(w))
        if not count.all():
            raise ValueError(f"physical_to_logical[{layer}] has no copy of expert {np.argmin(count)}: who serves its tokens?")
        share = w / count                                                               # eq. 7
        loads.append(share[expert].reshape(n_gpus, -1).sum(axis=1))                     # eq. 8
    return np.array(loads)


def _load(name, weight, ndim):
    """The loads in float64. Raises ValueError unless they have ndim axes, and finite entries that are not negative."""
    weight = np.asarray(weight, np.float64)
    if weight.ndim != ndim or not weight.size:
        raise ValueError(f"{name} has shape {weight.shape}, expected {'(L, E)' if ndim == 2 else 'one axis'}, not empty")
    wrong = ~((weight >= 0) & np.isfinite(weight))                                      # written this way round: nan must fail
    if wrong.any():
        first = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(f"{name}[{', '.join(map(str, first))}] = {weight[first]}: a load is finite and not negative")
    return weight


def _enough(n_replicas, E):
    if not (isinstance(n_replicas, (int, np.integer)) and n_replicas >= E):
        raise ValueError(f"n_replicas = {n_replicas} must be a whole number, at least {E}: every expert needs a copy")


def _divides(name, n, whole, N):
    if not (isinstance(n, (int, np.integer)) and n >= 1 and N % n == 0):
        raise ValueError(f"{name} = {n} must be a whole number from 1 on that divides {whole} = {N}")


def demo():
    """The published example, then V3's deployments on skewed loads, before and after, and when the loads have moved on."""
    weight = np.array([[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]])
    slots, _, _ = rebalance(weight, n_replicas=16, n_groups=4, n_nodes=2, n_gpus=8)
    print("shapes    weight (2, 12), 16 replicas, 4 groups, 2 nodes, 8 GPUs -> physical_to_logical (2, 16), logical_to_physical (2, 12, 2), count (2, 12)")
    print("by hand   layer 0, GPU by GPU:", *slots[0].reshape(8, 2).tolist(), f": expert 5 has two copies, GPU 0 does 165/2 + 39 = {gpu_load(weight, slots, 8)[0, 0]}")
    assert slots[1].tolist() == [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]

    rng = np.random.default_rng(0)
    L, E = 10, 256
    weight = rng.lognormal(0, 1, (L, E))
    later = weight * rng.lognormal(0, 0.3, (L, E))
    plans = {"256 slots on  32 GPUs, in order": (np.tile(np.arange(E), (L, 1)), 32)}
    for name, sizes in {"8 groups on 4 nodes": (8, 4, 32), "global": (1, 1, 32), "decoding, global": (8, 18, 144)}.items():
        for n_slots in (256, 288) if sizes[2] == 32 else (288,):
            plans[f"{n_slots} slots on {sizes[2]:3d} GPUs, {name}"] = rebalance(weight, n_slots, *sizes)[0], sizes[2]
    found = {name: [np.mean([1 + max_violation(load) for load in gpu_load(w, *plan)]) for w in (weight, later)] for name, plan in plans.items()}
    for name, (now, moved) in found.items():
        print(f"          {name:43s} busiest GPU / mean {now:.3f}, when every load has moved by about 30 % {moved:.3f}")
    before, after = found["256 slots on  32 GPUs, in order"][0], found["288 slots on  32 GPUs, 8 groups on 4 nodes"][0]
    print(f"claim     {E} experts on 32 GPUs, skewed loads: busiest / mean {before:.2f} -> {after:.2f} with one more expert on each GPU")
    assert after < 1.2 < 2 < before


if __name__ == "__main__":
    from minideepseek.moe.expert_balancer import demo  # the imported copy, so that every name exists once
    demo()
