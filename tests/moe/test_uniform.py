import math

import numpy as np
import pytest

from minideepseek.autograd.shapes import ShapeError
from minideepseek.autograd.tape import Tape, Tensor
from minideepseek.moe.bias_balance import expert_counts, max_violation
from minideepseek.moe.experts import experts, experts_examples
from minideepseek.moe.router import router_backward, router_forward
from minideepseek.moe.uniform import (fixed_router, fixed_router_backward, fixed_router_examples, fixed_router_forward,
                                      hash_chosen, hash_table, round_robin)

SIZES = [(1000, 16, 2), (97, 8, 3), (50, 7, 7), (60, 7, 1), (3, 16, 4), (40, 9, 8), (11, 6, 4)]


@pytest.mark.parametrize("U, E, K", SIZES)
def test_a_table_gives_every_word_k_different_experts_and_every_expert_as_many_words(U, E, K):
    for seed in range(5):
        table = hash_table(U, E, K, np.random.default_rng(seed))
        assert table.shape == (U, K) and table.dtype.kind == "i"
        assert (np.diff(np.sort(table, axis=1), axis=1) > 0).all()
        counts = expert_counts(table, E)
        assert counts.sum() == U * K and counts.max() - counts.min() <= 1


def test_a_table_is_drawn_once_from_its_seed():
    first, again, other = [hash_table(60, 8, 3, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert (first == again).all() and (first != other).any()


def test_a_table_mixes_its_teams():
    """Dealing without shuffling the pack again would give 8 teams; 500 words find nearly all the pairs of 16."""
    teams = {tuple(sorted(row)) for row in hash_table(500, 16, 2, np.random.default_rng(0)).tolist()}
    assert len(teams) > 0.9 * math.comb(16, 2)


def test_neighbouring_words_share_experts_as_often_as_any():
    """Hands are dealt in order, and then given to words at random: the ids of a tokenizer are ordered by frequency."""
    table = hash_table(4000, 16, 2, np.random.default_rng(0))
    share = (table[:-1, :, None] == table[1:, None, :]).any(axis=(1, 2)).mean()
    assert share == pytest.approx(1 - 14 * 13 / (16 * 15), abs=0.03)


def test_a_table_of_the_size_of_v4_is_a_matter_of_a_moment():
    table = hash_table(129_280, 256, 6, np.random.default_rng(0))
    counts = expert_counts(table, 256)
    assert counts.min() == counts.max() == 129_280 * 6 // 256


def test_the_same_word_meets_the_same_experts_whatever_stands_around_it():
    table = hash_table(20, 8, 3, np.random.default_rng(0))
    ids = np.array([[4, 7, 4], [0, 19, 7]])
    chosen = hash_chosen(ids, table)
    assert chosen.shape == (2, 3, 3)
    for place in np.ndindex(ids.shape):
        assert (chosen[place] == table[ids[place]]).all()
    assert hash_chosen(np.uint8(4), table).tolist() == table[4].tolist() and hash_chosen(np.zeros((0, 2), int), table).shape == (0, 2, 3)


def test_round_robin_by_hand():
    assert round_robin(4, 4, 3).tolist() == [[0, 1, 2], [3, 0, 1], [2, 3, 0], [1, 2, 3]]
    assert round_robin(3, 4, 4).tolist() == [[0, 1, 2, 3]] * 3 and round_robin(0, 4, 2).shape == (0, 2)


@pytest.mark.parametrize("M, E, K", [(8, 16, 2), (4096, 16, 2), (7, 7, 3), (5, 6, 4), (1, 9, 2), (100, 7, 5)])
def test_round_robin_is_as_balanced_as_whole_numbers_allow(M, E, K):
    chosen = round_robin(M, E, K)
    counts = expert_counts(chosen, E)
    assert counts.max() - counts.min() <= 1 and (np.diff(np.sort(chosen, axis=1), axis=1) > 0).all()
    if M * K % E == 0:
        assert max_violation(counts) == 0


def test_in_turns_the_teams_are_few():
    """With K a divisor of E, E / K fixed teams: fewer and wider experts in disguise. Without, E / gcd(E, K)."""
    for E, K, teams in ((16, 2, 8), (9, 6, 3), (7, 3, 7)):
        assert len({tuple(sorted(row)) for row in round_robin(200, E, K).tolist()}) == teams == E // math.gcd(E, K)


def test_a_balanced_table_is_not_a_balanced_text():
    """The commonest word alone fills its experts: MaxVio is at least p E / K - 1, p being its part of the text."""
    rng = np.random.default_rng(0)
    U, E, K, M = 500, 32, 2, 4000
    zipf = 1 / np.arange(1, U + 1)
    ids = rng.choice(U, size=M, p=zipf / zipf.sum())
    p = np.bincount(ids).max() / M
    for seed in range(5):
        table = hash_table(U, E, K, np.random.default_rng(seed))
        of_text = max_violation(expert_counts(hash_chosen(ids, table), E))
        assert max_violation(expert_counts(table, E)) < 0.05 and of_text >= p * E / K - 1 > 1
        even = max_violation(expert_counts(hash_chosen(np.tile(np.arange(U), 8), table), E))
        assert even < 0.05                                  # all words equally often: then it is the table's own


@pytest.mark.parametrize("normalise", (True, False))
@pytest.mark.parametrize("scoring", ("sigmoid", "softmax"))
def test_handed_the_choice_of_the_router_it_is_the_router(scoring, normalise):
    rng = np.random.default_rng(0)
    x, W_router = rng.standard_normal((2, 3, 5)), rng.standard_normal((5, 8))
    config = dict(scoring=scoring, normalise=normalise, scaling=2.5)
    (gate, chosen), cache = router_forward(x, W_router, top_k=3, **config)
    fixed, fixed_cache = fixed_router_forward(x, W_router, chosen, **config)
    assert (fixed == gate).all()
    dgate = rng.standard_normal(gate.shape)
    *gradients, dchosen = fixed_router_backward(dgate, fixed_cache)
    for one, other in zip(gradients, router_backward(dgate, cache), strict=True):
        assert (one == other).all()
    assert dchosen is None


@pytest.mark.parametrize("case", fixed_router_examples(np.random.default_rng(0)))
def test_against_the_definition_token_by_token(case):
    (x, W_router, chosen), config = fixed_router_examples(np.random.default_rng(0))[case]
    gate, _ = fixed_router_forward(x, W_router, chosen, **config)
    for place in np.ndindex(x.shape[:-1]):
        z = x[place] @ W_router
        s = np.exp(z) / np.exp(z).sum() if config.get("scoring") == "softmax" else 1 / (1 + np.exp(-z))
        picked = s[chosen[place]]
        expected = picked / (picked.sum() if config.get("normalise", True) else 1) * config.get("scaling", 1.0)
        np.testing.assert_allclose(gate[place], expected, rtol=1e-13)


def test_the_choice_is_fixed_and_the_gates_are_not():
    """One word in two sentences: the same experts, other weights; and a learned router would have chosen otherwise."""
    rng = np.random.default_rng(0)
    x, W_router = rng.standard_normal((2, 5)), rng.standard_normal((5, 8))
    chosen = hash_chosen(np.array([3, 3]), hash_table(11, 8, 2, rng))
    gate, _ = fixed_router_forward(x, W_router, chosen)
    (_, learned), _ = router_forward(x, W_router, top_k=2)
    assert (chosen[0] == chosen[1]).all() and np.abs(gate[0] - gate[1]).max() > 0.01
    assert (np.sort(learned) != np.sort(chosen)).any() and (np.sort(learned[0]) != np.sort(learned[1])).any()


def test_one_fixed_expert_and_normalised_leaves_the_router_nothing_to_learn():
    rng = np.random.default_rng(0)
    args = rng.standard_normal((3, 5)), rng.standard_normal((5, 8)), np.array([[1], [7], [1]])
    gate, cache = fixed_router_forward(*args)
    dx, dW_router, _ = fixed_router_backward(rng.standard_normal(gate.shape), cache)
    assert (gate == 1).all() and not dx.any() and not dW_router.any()


def test_on_the_tape_with_the_experts():
    x, _, chosen, *W = experts_examples(np.random.default_rng(0))["tokens"][0]
    leaves = [Tensor(x), Tensor(np.random.default_rng(1).standard_normal((5, 4))), *map(Tensor, W)]
    with Tape() as tape:
        gate = fixed_router(leaves[0], leaves[1], chosen)
        y = experts(leaves[0], gate, chosen, *leaves[2:])
    assert len(tape.records) == 2
    tape.backward({y: np.ones(y.data.shape)})
    assert all(leaf.grad.any() for leaf in leaves)
    chosen[1, 0] = 4
    with pytest.raises(ShapeError, match=r"fixed_router: chosen\[1, 0\] = 4 is not in 0 .. 3"):
        fixed_router(x, leaves[1].data, chosen)


TABLE = np.array([[0, 1], [2, 0], [1, 1]])


@pytest.mark.parametrize("call, message", [
    (lambda: hash_table(10, 4, 5, np.random.default_rng(0)), "top_k = 5 must be from 1 to n_routed = 4"),
    (lambda: hash_table(10, 4, 0, np.random.default_rng(0)), "top_k = 0 must be from 1 to n_routed = 4"),
    (lambda: hash_table(0, 4, 2, np.random.default_rng(0)), "vocab_size = 0 must be positive"),
    (lambda: hash_chosen(np.array([0, 3]), TABLE), "the id 3, which is not in 0 .. 2: the table has 3 rows"),
    (lambda: hash_chosen(np.array([-1, 2]), TABLE), "the id -1, which is not in 0 .. 2"),
    (lambda: hash_chosen(np.array([0.0]), TABLE), "ids has dtype float64, expected integer ids"),
    (lambda: hash_chosen(np.array([0]), TABLE[0]), r"table has shape \(2,\) and dtype int64"),
    (lambda: hash_chosen(np.array([0]), TABLE * 1.0), r"table has shape \(3, 2\) and dtype float64"),
    (lambda: hash_chosen(np.array([[0, 1], [2, 0]]), TABLE), r"table\[2\] = \[1, 1\] names an expert twice"),
    (lambda: round_robin(5, 4, 5), "top_k = 5 must be from 1 to n_routed = 4"),
    (lambda: round_robin(-1, 4, 2), "n_tokens = -1 must not be negative"),
])
def test_what_cannot_be_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
