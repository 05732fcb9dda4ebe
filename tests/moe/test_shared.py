import math

import numpy as np
import pytest

from minideepseek.basics.swiglu import swiglu_backward, swiglu_forward
from minideepseek.model import count
from minideepseek.model.config import Config
from minideepseek.moe.deepseek_moe import deepseek_moe_forward
from minideepseek.moe.experts import experts_forward
from minideepseek.moe.shared import (Shape, active_parameters, combinations, flops_per_token, isolate, parameters, segment,
                                     split_expert)

COARSE = Shape(n_routed=4, n_shared=0, top_k=2, d_expert=12)
V3 = Shape(n_routed=256, n_shared=1, top_k=8, d_expert=2048)


def expert(D=5, F=12, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(s) / s[0] ** 0.5 for s in [(D, F), (D, F), (F, D)]]


def config_of(shape, d_model=6, n_layers=3):
    """A small model whose every layer has this mixture of experts."""
    return Config(vocab_size=13, d_model=d_model, n_layers=n_layers, n_dense_layers=0, d_ff=10, n_heads=2, q_rank=6, kv_rank=5, d_nope=4,
                  d_rope=2, d_value=3, n_routed=shape.n_routed, n_shared=shape.n_shared, top_k=shape.top_k, d_expert=shape.d_expert,
                  n_groups=1, n_groups_kept=1, n_mtp=0)


def test_the_papers_way_by_hand():
    """16 experts, 2 at work -> 64 of a quarter, 8 at work -> 63 and a shared one: the shape of its validation model."""
    fine = segment(Shape(16, 0, 2, 4096), 4)
    assert fine == Shape(64, 0, 8, 1024) and isolate(fine, 1) == Shape(63, 1, 7, 1024)
    assert segment(Shape(16, 1, 2, 12), 3) == Shape(48, 3, 6, 4) and isolate(Shape(48, 3, 6, 4), 2) == Shape(46, 5, 4, 4)
    assert segment(V3, 1) == V3 == isolate(V3, 0)


def test_the_number_of_combinations():
    assert combinations(Shape(16, 0, 2, 1)) == 120 and combinations(Shape(64, 0, 8, 1)) == 4_426_165_368
    assert combinations(V3) == 409_663_695_276_000 == math.prod(range(249, 257)) // math.factorial(8)


@pytest.mark.parametrize("m", (2, 3, 6))
def test_cutting_never_loses_a_combination(m):
    """Vandermonde: choosing K in each of m copies is one way of choosing mK of mN."""
    assert combinations(segment(COARSE, m)) >= combinations(COARSE) ** m


def test_v3_by_hand():
    assert parameters(V3, 7168) == {"router": 7168 * 256, "routed": 256 * 3 * 7168 * 2048, "shared": 3 * 7168 * 2048}
    assert active_parameters(V3, 7168) == {"router": 1_835_008, "routed": 352_321_536, "shared": 44_040_192}
    assert flops_per_token(V3, 7168) == {"router": 3_670_016, "routed": 704_643_072, "shared": 88_080_384}


@pytest.mark.parametrize("m", (1, 2, 3, 4))
@pytest.mark.parametrize("n_shared", (0, 1))
def test_matched_in_parameters_and_in_work_but_for_the_router(m, n_shared):
    other = isolate(segment(COARSE, m), n_shared)
    for counted in (parameters, active_parameters, flops_per_token):
        before, after = counted(COARSE, 6), counted(other, 6)
        assert before["routed"] + before["shared"] == after["routed"] + after["shared"]
        assert after["router"] * COARSE.n_routed == before["router"] * (m * COARSE.n_routed - n_shared)


@pytest.mark.parametrize("shape", (COARSE, segment(COARSE, 3), isolate(segment(COARSE, 3), 2)))
def test_the_counts_are_those_of_a_model(shape):
    config = config_of(shape)
    of_model = count.parameters(config)
    assert {part: 3 * size for part, size in parameters(shape, 6).items()} == {part: of_model[part] for part in ("router", "routed", "shared")}
    unused = sum(parameters(shape, 6).values()) - sum(active_parameters(shape, 6).values())
    assert count.total(config) - count.active(config) == 3 * unused


def test_the_work_of_a_model_grows_by_its_routers_only():
    coarse, fine = COARSE, isolate(segment(COARSE, 3), 1)
    grown = flops_per_token(fine, 6)["router"] - flops_per_token(coarse, 6)["router"]
    assert count.flops_per_token(config_of(fine)) - count.flops_per_token(config_of(coarse)) == 3 * grown == 3 * 2 * 6 * (11 - 4)


def test_the_work_against_a_layer_that_counts():
    shape, D, flops = Shape(6, 2, 3, 4), 5, 0

    def counting(A, B, *, role):
        nonlocal flops
        flops += 2 * A.shape[0] * A.shape[1] * B.shape[1]
        return A @ B

    rng = np.random.default_rng(0)
    L = shape.n_shared * shape.d_expert
    sizes = [(7, D), (D, 6), (6, D, 4), (6, D, 4), (6, 4, D), (D, L), (D, L), (L, D)]
    deepseek_moe_forward(*[rng.standard_normal(s) for s in sizes], top_k=shape.top_k, gemm=counting)
    expected = flops_per_token(shape, D)
    assert flops == 7 * (expected["routed"] + expected["shared"]) and expected["router"] == 2 * D * 6


@pytest.mark.parametrize("m", (1, 2, 3, 4, 6, 12))
def test_the_pieces_add_up_to_the_whole(m):
    x, W = np.random.default_rng(1).standard_normal((2, 3, 5)), expert()
    whole, _ = swiglu_forward(x, *W)
    pieces = split_expert(*W, m)
    assert [piece.shape for piece in pieces] == [(m, 5, 12 // m), (m, 5, 12 // m), (m, 12 // m, 5)]
    added = sum(swiglu_forward(x, *piece)[0] for piece in zip(*pieces))
    assert np.abs(added - whole).max() <= 1e-15 * np.abs(whole).max() and np.abs(whole).max() > 0.5


def test_the_gradients_of_the_pieces_are_the_pieces_of_the_gradients():
    rng = np.random.default_rng(1)
    x, W, dy = rng.standard_normal((3, 5)), expert(), rng.standard_normal((3, 5))
    dx, *dW = swiglu_backward(dy, swiglu_forward(x, *W)[1])
    by_piece = [swiglu_backward(dy, swiglu_forward(x, *piece)[1]) for piece in zip(*split_expert(*W, 3))]
    np.testing.assert_allclose(sum(gradients[0] for gradients in by_piece), dx, rtol=0, atol=1e-14)
    for i, stacked in enumerate(split_expert(*dW, 3), 1):
        np.testing.assert_allclose(np.stack([gradients[i] for gradients in by_piece]), stacked, rtol=0, atol=1e-14)


def test_the_pieces_are_experts_and_own_their_memory():
    x, W = np.random.default_rng(1).standard_normal((3, 5)), expert()
    pieces = split_expert(*W, 4)
    assert not any(np.shares_memory(piece, w) for piece, w in zip(pieces, W))
    y, _ = experts_forward(x, np.ones((3, 4)), np.tile(np.arange(4), (3, 1)), *pieces)
    np.testing.assert_allclose(y, swiglu_forward(x, *W)[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("routing, scaling", [
    (dict(scoring="sigmoid"), 3.0),                             # gates of three times as many experts still sum to 1: three times as quiet
    (dict(scoring="softmax", normalise=False), 3.0),            # so do all the probabilities
    (dict(scoring="sigmoid", normalise=False), 1.0),            # each sigmoid stands alone
])
def test_the_fine_layer_holds_the_coarse_one(routing, scaling):
    """Give all pieces of an expert its own column of the router, and they are chosen together."""
    rng = np.random.default_rng(0)
    x, W_router, m = rng.standard_normal((7, 5)), rng.standard_normal((5, 4)), 3
    coarse = [expert(seed=e) for e in range(4)]
    (y, _), _ = deepseek_moe_forward(x, W_router, *map(np.stack, zip(*coarse)), None, None, None, top_k=2, **routing)
    fine = map(np.concatenate, zip(*[split_expert(*W, m) for W in coarse]))
    (y_fine, chosen), _ = deepseek_moe_forward(x, np.repeat(W_router, m, axis=1), *fine, None, None, None, top_k=2 * m, scaling=scaling, **routing)
    assert (np.sort(chosen // m) == np.repeat(np.sort(chosen // m)[:, ::m], m, axis=1)).all()
    np.testing.assert_allclose(y_fine, y, rtol=0, atol=1e-12)


def test_several_shared_experts_are_one_wide_one():
    """Read backwards, the cut joins: deepseek_moe keeps n_shared experts as one of n_shared times the width."""
    rng = np.random.default_rng(0)
    x, two = rng.standard_normal((4, 5)), [expert(F=3, seed=s) for s in (1, 2)]
    W_gate, W_up, W_down = zip(*two)
    joined = np.hstack(W_gate), np.hstack(W_up), np.vstack(W_down)
    (y, _), _ = deepseek_moe_forward(x, rng.standard_normal((5, 4)), *[np.zeros(s) for s in [(4, 5, 3), (4, 5, 3), (4, 3, 5)]], *joined, top_k=2)
    np.testing.assert_allclose(y, sum(swiglu_forward(x, *W)[0] for W in two), rtol=0, atol=1e-14)
    for piece, w in zip(split_expert(*joined, 2), (W_gate, W_up, W_down)):
        assert (piece == np.stack(w)).all()


@pytest.mark.parametrize("call, message", [
    (lambda: segment(COARSE, 5), "m = 5 must be positive and divide d_expert = 12"),
    (lambda: segment(COARSE, 0), "m = 0 must be positive"),
    (lambda: segment(COARSE, -2), "m = -2 must be positive"),
    (lambda: isolate(COARSE, 2), "n_shared = 2 must be from 0 to 1: top_k = 2"),
    (lambda: isolate(COARSE, -1), "n_shared = -1 must be from 0 to 1"),
    (lambda: split_expert(*expert(), 5), "m = 5 must be positive and divide the hidden width 12"),
    (lambda: split_expert(*expert(), 0), "m = 0 must be positive"),
])
def test_what_cannot_be_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
