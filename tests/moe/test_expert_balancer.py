from itertools import product

import numpy as np
import pytest

from minideepseek.moe.bias_balance import max_violation
from minideepseek.moe.expert_balancer import balanced_packing, gpu_load, rebalance, replicate_experts

PUBLISHED = np.array([[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]])


def loads_of(kind, rng, *shape):
    """Loads of many characters: even, skewed, with ties, mostly zero."""
    return {"even": rng.random(shape) + 1, "skewed": rng.lognormal(0, 1.5, shape), "ties": rng.integers(0, 4, shape).astype(float),
            "idle": rng.integers(0, 9, shape) * (rng.random(shape) < 0.3)}[kind]


def sizes(rng):
    """(n_replicas, n_groups, n_nodes, n_gpus, E) that divide as they must; about half of them hierarchical."""
    n_groups, n_nodes = int(rng.choice([1, 2, 4, 6])), int(rng.choice([1, 2, 3]))
    E, n_gpus = n_groups * int(rng.integers(1, 6)), n_nodes * int(rng.integers(1, 4))
    return n_gpus * (-(-E // n_gpus) + int(rng.integers(0, 3))), n_groups, n_nodes, n_gpus, E


def test_the_published_example():
    """README of github.com/deepseek-ai/EPLB: two layers, hierarchical."""
    slots, _, count = rebalance(PUBLISHED, n_replicas=16, n_groups=4, n_nodes=2, n_gpus=8)
    assert slots.tolist() == [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]
    assert count.tolist() == [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1], [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1]]
    np.testing.assert_allclose(gpu_load(PUBLISHED, slots, 8)[0], [121.5, 86.5, 125, 113, 147.5, 131.5, 156, 152], rtol=1e-15)


def test_packing_by_hand():
    """9 5 4 3 2 1 into two: 9 | 5, 4; at 9 to 9 the 3 goes to the first; then 12 | 9, 2, which is full; so the 1 goes to the 12."""
    pack, place = balanced_packing([4, 9, 3, 5, 1, 2], 2)
    assert pack.tolist() == [1, 0, 0, 1, 0, 1] and place.tolist() == [1, 0, 1, 0, 2, 2]
    pack, _ = balanced_packing([10, 1, 1, 1, 1, 1], 2)
    assert pack.tolist() == [0, 1, 1, 1, 0, 0]                       # the light pack is full: the heavy one takes the rest


def test_one_item_a_pack_stays_where_it_is():
    pack, place = balanced_packing([1, 3, 2], 3)
    assert pack.tolist() == [0, 1, 2] and not place.any()


@pytest.mark.parametrize("kind", ("even", "skewed", "ties", "idle"))
@pytest.mark.parametrize("seed", range(25))
def test_packs_are_full_and_apart_by_no_more_than_two_items_are(kind, seed):
    rng = np.random.default_rng(seed)
    n_packs, room = int(rng.integers(1, 7)), int(rng.integers(1, 8))
    weight = loads_of(kind, rng, n_packs * room)
    pack, place = balanced_packing(weight, n_packs)
    assert sorted(zip(pack, place)) == list(product(range(n_packs), range(room)))
    load = np.bincount(pack, weights=weight, minlength=n_packs)
    assert np.ptp(load) <= np.ptp(weight) + 1e-9


def test_copies_by_hand():
    """6 5 1: the 6 is halved, then the 5, then 3 and 2.5 are left and the first of the 6's thirds comes."""
    expert, copy, count = replicate_experts([5, 1, 6], 6)
    assert expert.tolist() == [0, 1, 2, 2, 0, 2] and copy.tolist() == [0, 0, 0, 1, 1, 2] and count.tolist() == [2, 1, 3]
    assert replicate_experts([2, 2, 2], 5)[2].tolist() == [2, 2, 1]     # of equals the first


@pytest.mark.parametrize("kind", ("even", "skewed", "ties", "idle"))
@pytest.mark.parametrize("seed", range(5))
def test_no_other_counts_have_a_smaller_largest_share(kind, seed):
    rng = np.random.default_rng(seed)
    E, R = 4, 9
    weight = loads_of(kind, rng, E)
    _, _, count = replicate_experts(weight, R)
    best = min(max(weight / n) for n in product(range(1, R), repeat=E) if sum(n) == R)
    assert max(weight / count) == best
    assert best <= weight.sum() / (R - E + 1) + 1e-12


@pytest.mark.parametrize("kind", ("even", "skewed", "ties", "idle"))
@pytest.mark.parametrize("seed", range(30))
def test_what_every_plan_keeps(kind, seed):
    rng = np.random.default_rng(seed)
    R, n_groups, n_nodes, n_gpus, E = sizes(rng)
    weight = loads_of(kind, rng, 3, E)
    slots, where, count = rebalance(weight, R, n_groups, n_nodes, n_gpus)
    assert slots.shape == (3, R) and count.shape == (3, E) and where.shape == (3, E, count.max())
    assert count.min() >= 1 and (count.sum(axis=1) == R).all()
    load = gpu_load(weight, slots, n_gpus)
    np.testing.assert_allclose(load.sum(axis=1), weight.sum(axis=1), rtol=1e-12)
    for layer in range(3):
        assert (np.bincount(slots[layer], minlength=E) == count[layer]).all()
        for e in range(E):                                           # the two maps are inverse to each other, -1 elsewhere
            n = count[layer, e]
            assert (slots[layer, where[layer, e, :n]] == e).all() and (where[layer, e, n:] == -1).all()
        assert sorted(where[layer][where[layer] >= 0]) == list(range(R))
        share = (weight[layer] / count[layer])[slots[layer]].reshape(n_gpus, -1)
        np.testing.assert_allclose(load[layer], share.sum(axis=1), rtol=1e-12)
        if n_groups % n_nodes == 0:
            nodes = slots[layer].reshape(n_nodes, -1)
            groups_on = [set(node // (E // n_groups)) for node in nodes]
            assert sum(map(len, groups_on)) == n_groups              # no group is on two nodes
            assert len({len(groups) for groups in groups_on}) == 1
            of_node = load[layer].reshape(n_nodes, -1)
            for gpus, copies in zip(of_node, share.reshape(n_nodes, -1)):
                assert np.ptp(gpus) <= np.ptp(copies) + 1e-9
            assert np.ptp(of_node.sum(axis=1)) <= np.ptp(weight[layer].reshape(n_groups, -1).sum(axis=1)) + 1e-9
        else:
            assert np.ptp(load[layer]) <= np.ptp(share) + 1e-9


def test_when_nodes_do_not_divide_groups_the_plan_is_the_global_one():
    weight = np.random.default_rng(0).lognormal(0, 1, (2, 24))
    for a, b in zip(rebalance(weight, 36, 4, 3, 6), rebalance(weight, 36, 1, 1, 6)):
        assert (a == b).all()
    assert (rebalance(weight, 36, 6, 3, 6)[0] != rebalance(weight, 36, 1, 1, 6)[0]).any()


def test_a_node_lists_its_heaviest_group_first():
    """One slot a GPU: the copies stay in the order in which the node lists them, as in the released code."""
    assert rebalance([[1, 2, 5, 4]], 4, 2, 1, 4)[0].tolist() == [[2, 3, 0, 1]]
    assert rebalance([[5, 4, 1, 2]], 4, 2, 1, 4)[0].tolist() == [[0, 1, 2, 3]]


def test_layers_do_not_know_each_other():
    weight = np.random.default_rng(0).lognormal(0, 1, (3, 8))
    together = rebalance(weight, 12, 2, 2, 4)
    for layer in range(3):
        alone = rebalance(weight[[layer]], 12, 2, 2, 4)
        assert (alone[0][0] == together[0][layer]).all() and (alone[2][0] == together[2][layer]).all()


def test_the_unit_of_the_loads_does_not_matter():
    weight = np.random.default_rng(0).integers(1, 1000, (2, 16))
    for a, b in zip(rebalance(weight, 24, 4, 2, 4), rebalance(weight / 1024, 24, 4, 2, 4)):
        assert (a == b).all()


@pytest.mark.parametrize("n_groups, n_nodes, bound", ((8, 4, 1.25), (1, 1, 1.02)))
def test_v3s_prefill_unit_on_skewed_loads(n_groups, n_nodes, bound):
    """256 experts and 32 more copies on 32 GPUs: from more than 1.7 times the mean to nearly the mean."""
    weight = np.random.default_rng(1).lognormal(0, 1, (3, 256))
    before = gpu_load(weight, np.tile(np.arange(256), (3, 1)), 32)
    after = gpu_load(weight, rebalance(weight, 288, n_groups, n_nodes, 32)[0], 32)
    for a, b in zip(before, after):
        assert 1 + max_violation(a) > 1.7 and 1 + max_violation(b) < bound


def test_what_was_handed_in_stays_as_it_was():
    weight = PUBLISHED.copy()
    weight.flags.writeable = False
    slots, _, _ = rebalance(weight, 16, 4, 2, 8)
    slots.flags.writeable = False
    gpu_load(weight, slots, 8)
    assert (weight == PUBLISHED).all()


def test_nobody_asked_for_anything():
    slots, _, count = rebalance(np.zeros((1, 4)), 8, 1, 1, 2)
    assert sorted(set(slots[0])) == [0, 1, 2, 3] and count.sum() == 8 and not gpu_load(np.zeros((1, 4)), slots, 2).any()


W = PUBLISHED


@pytest.mark.parametrize("call, message", [
    (lambda: rebalance(W, 11, 4, 2, 8), "n_replicas = 11 must be a whole number, at least 12"),
    (lambda: rebalance(W, 16.0, 4, 2, 8), "n_replicas = 16.0 must be a whole number"),
    (lambda: rebalance(W, 18, 4, 2, 8), "n_gpus = 8 must be a whole number from 1 on that divides n_replicas = 18"),
    (lambda: rebalance(W, 16, 5, 2, 8), "n_groups = 5 must be .* divides the experts = 12"),
    (lambda: rebalance(W, 16, 4, 3, 8), "n_nodes = 3 must be .* divides n_gpus = 8"),
    (lambda: rebalance(W, 16, 4, 2, 0), "n_gpus = 0 must be"),
    (lambda: rebalance(W, 16, 4, 0, 8), "n_nodes = 0 must be"),
    (lambda: rebalance(W, 16, -4, 2, 8), "n_groups = -4 must be"),
    (lambda: rebalance(W[0], 16, 4, 2, 8), r"weight has shape \(12,\), expected \(L, E\)"),
    (lambda: rebalance(np.zeros((0, 12)), 16, 4, 2, 8), r"weight has shape \(0, 12\)"),
    (lambda: rebalance(np.where(W == 4, np.nan, W), 16, 4, 2, 8), r"weight\[0, 7\] = nan: a load is finite and not negative"),
    (lambda: rebalance(np.where(W == 27, np.inf, W), 16, 4, 2, 8), r"weight\[1, 11\] = inf"),
    (lambda: rebalance(W - 20, 16, 4, 2, 8), r"weight\[0, 7\] = -16.0"),
    (lambda: balanced_packing([1, 2, 3], 2), r"n_packs = 2 must be .* divides len\(weight\) = 3"),
    (lambda: balanced_packing([1, 2, 3], 0), "n_packs = 0"),
    (lambda: balanced_packing([1, -2, 3], 3), r"weight\[1\] = -2.0"),
    (lambda: balanced_packing(W, 2), r"weight has shape \(2, 12\), expected one axis"),
    (lambda: replicate_experts([1, 2], 1), "n_replicas = 1 must be a whole number, at least 2"),
    (lambda: replicate_experts([1, np.nan], 3), r"weight\[1\] = nan"),
    (lambda: gpu_load(W, np.tile(np.arange(12), (2, 1)), 5), "n_gpus = 5 must be .* divides the slots = 12"),
    (lambda: gpu_load(W, np.tile(np.arange(12), (3, 1)), 4), r"physical_to_logical has shape \(3, 12\), weight \(2, 12\)"),
    (lambda: gpu_load(W, np.tile(np.arange(1, 13), (2, 1)), 4), "the id 12, which is not in 0 .. 11"),
    (lambda: gpu_load(W, np.zeros((2, 12), int), 4), r"physical_to_logical\[0\] has no copy of expert 1"),
    (lambda: gpu_load([[1, np.nan]], [[0, 1]], 1), r"weight\[0, 1\] = nan"),
])
def test_what_cannot_be_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
