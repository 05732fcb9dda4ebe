import dataclasses
import tracemalloc

import numpy as np
import pytest

from minideepseek.autograd.gradcheck import gradcheck
from minideepseek.autograd.params import count, flatten, tensors, unflatten
from minideepseek.autograd.shapes import ShapeError
from minideepseek.autograd.tape import Tape, Tensor
from minideepseek.basics.cross_entropy import cross_entropy, cross_entropy_forward
from minideepseek.corpus.batches import IGNORE
from minideepseek.model.block import CONSTANT, position_tables
from minideepseek.model.config import Config
from minideepseek.model.mtp import mtp_outline
from minideepseek.model.parallel_heads import (HeadWeights, further, head_by_head, op_by_op, parallel_head, parallel_head_outline, parallel_losses,
                                               parallel_losses_backward, parallel_losses_examples, parallel_losses_forward, peak_matrices)
from minideepseek.model.transformer import init, losses, next_token_targets, trainable, transformer

DENSE = Config(vocab_size=9, d_model=6, n_layers=1, n_dense_layers=1, d_ff=7, max_positions=16, n_heads=2, q_rank=None, kv_rank=4, d_nope=4,
               d_rope=2, d_value=3, n_mtp=2)
EXPERTS = dataclasses.replace(DENSE, n_layers=2, n_routed=4, top_k=2, d_expert=5, n_groups=1, n_groups_kept=1)
LN3 = np.log(3)


def example(case="three heads"):
    return parallel_losses_examples(np.random.default_rng(0))[case][0]


def random_heads(config, n, seed=1):
    rng, form = np.random.default_rng(seed), tuple(parallel_head_outline(config) for _ in range(n))
    return unflatten({name: rng.standard_normal(leaf.shape) for name, leaf in flatten(form).items()}, form)


def tables(config, T, dtype=np.float64):
    return position_tables(config, np.arange(T), dtype)


# ---- targets

def test_the_targets_of_head_k_are_k_places_further_on():
    targets = np.array([[1, 2, 3, 4], [5, IGNORE, 7, 8]])
    assert further(targets, 0).tolist() == targets.tolist()
    assert further(targets, 1).tolist() == [[2, 3, 4, IGNORE], [IGNORE, 7, 8, IGNORE]]
    assert further(targets, 3).tolist() == [[4, IGNORE, IGNORE, IGNORE], [8, IGNORE, IGNORE, IGNORE]]
    assert (further(targets, 4) == IGNORE).all() and (further(targets, 9) == IGNORE).all()
    assert further(targets, 1, ignore_index=0).tolist() == [[2, 3, 4, 0], [IGNORE, 7, 8, 0]]
    assert targets[0].tolist() == [1, 2, 3, 4]                      # the caller's array is left alone


@pytest.mark.parametrize("ids_bring_the_next", [False, True])
def test_the_mean_is_the_one_of_the_models_modules(ids_bring_the_next):
    """transformer.losses cuts the logits, further() ignores the rest: the same terms, the same mean."""
    rng = np.random.default_rng(0)
    ids, z = rng.integers(0, 9, (3, 6)), rng.standard_normal((3, 6, 9))
    targets = rng.integers(0, 9, (3, 6)) if ids_bring_the_next else next_token_targets(ids)
    targets[1, 3] = IGNORE
    for k in range(1, 4):
        cut, _ = cross_entropy_forward(z[:, :6 - k], targets[:, k:], ignore_index=IGNORE)
        padded, _ = cross_entropy_forward(z, further(targets, k), ignore_index=IGNORE)
        assert padded == pytest.approx(cut, rel=1e-14)


# ---- the linear heads, by hand

def by_hand():
    h, W_own = np.ones((1, 2, 2)), np.array([np.eye(2), np.diag([1.0, -1.0])])
    return h, W_own, np.ones((2, 2)), np.array([[0.0, 0.0], [LN3, 0.0]]), np.array([[0, 1]])


def test_two_heads_by_hand():
    """Head 0 gives 3/4 and 1/4 at both positions, head 1 gives 1/4 and 3/4; the tokens 0 and 1 follow."""
    found, cache = parallel_losses_forward(*by_hand(), eps=0.0)
    np.testing.assert_allclose(found, [(np.log(4 / 3) + np.log(4)) / 2, np.log(4 / 3)], rtol=1e-14)
    dh, dW_own, dg, dW_head, none = parallel_losses_backward(np.ones(2), cache)
    np.testing.assert_allclose(dW_head, [[0.5, -0.5], [0, 0]], atol=1e-15)          # row 1: 1/4 of head 0, -1/4 of head 1
    np.testing.assert_allclose(dh, [[[3 * LN3 / 16, -3 * LN3 / 16], [-3 * LN3 / 16, 3 * LN3 / 16]]], atol=1e-15)
    assert none is None


@pytest.mark.parametrize("case", parallel_losses_examples(np.random.default_rng(0)))
def test_equal_to_a_loop_over_texts_positions_and_heads(case):
    (h, W_own, g, W_head, targets), config = parallel_losses_examples(np.random.default_rng(0))[case]
    found, _ = parallel_losses_forward(h, W_own, g, W_head, targets, **config)
    for k in range(len(g)):
        terms = []
        for b, i in np.ndindex(targets.shape):
            if i + k < targets.shape[1] and targets[b, i + k] != IGNORE:
                x = h[b, i] @ W_own[k]
                z = (g[k] * x / np.sqrt(np.mean(x * x) + config.get("eps", 1e-6))) @ W_head
                terms.append(np.log(np.exp(z).sum()) - z[targets[b, i + k]])
        assert found[k] == pytest.approx(np.mean(terms), rel=1e-13)


@pytest.mark.parametrize("case", parallel_losses_examples(np.random.default_rng(0)))
def test_three_ways_to_the_same_gradient(case):
    """Fused = the same heads op by op on one tape, where the engine adds = finite differences."""
    args, config = parallel_losses_examples(np.random.default_rng(0))[case]
    gradcheck(parallel_losses_forward, parallel_losses_backward, args, config)
    h, W_own, g, W_head, targets = args                                            # op_by_op has the usual eps
    found, cache = parallel_losses_forward(*args)
    seeds = np.random.default_rng(1).standard_normal(len(g))
    fused = parallel_losses_backward(seeds, cache)
    leaves = Tensor(h), [Tensor(W) for W in W_own], [Tensor(gain) for gain in g], Tensor(W_head)
    with Tape() as tape:
        separate = op_by_op(*leaves, targets)
    tape.backward(dict(zip(separate, seeds)))
    np.testing.assert_allclose(found, [loss.data for loss in separate], rtol=0, atol=1e-12)
    for leaf, gradient in zip(leaves, fused):
        grads = np.array([one.grad for one in leaf]) if isinstance(leaf, list) else leaf.grad
        np.testing.assert_allclose(gradient, grads, rtol=0, atol=1e-12)


def test_n_roads_meet_in_the_state_and_in_the_matrix_and_nowhere_else():
    *_, cache = parallel_losses_forward(*example())
    seeds = np.array([1.0, -0.5, 0.25])
    together = parallel_losses_backward(seeds, cache)
    alone = [parallel_losses_backward(seeds * one, cache) for one in np.eye(3)]
    for k in range(3):
        for own in (1, 2):                                                          # dW_own, dg
            others = [j for j in range(3) if j != k]
            assert not alone[k][own][others].any() and np.array_equal(alone[k][own][k], together[own][k]) and together[own][k].any()
    for shared in (0, 3):                                                           # dh, dW_head
        assert all(np.abs(road[shared]).max() > 1e-3 for road in alone)
        np.testing.assert_allclose(together[shared], sum(road[shared] for road in alone), rtol=0, atol=1e-15)


def test_the_last_k_positions_hear_nothing_from_head_k():
    _, cache = parallel_losses_forward(*example())
    for k, one in enumerate(np.eye(3)):
        dh = parallel_losses_backward(one, cache)[0]
        assert not dh[:, 5 - k:].any() and dh[:, :5 - k].all()


def test_an_ignored_target_takes_one_term_from_each_head_and_leaves_the_others():
    h, W_own, g, W_head, targets = example()
    silent = targets.copy()
    silent[1, 3] = IGNORE
    before, after = [[parallel_losses_forward(h[b:b + 1], W_own, g, W_head, t[b:b + 1])[0] for b in (0, 1)] for t in (targets, silent)]
    assert np.array_equal(before[0], after[0])
    _, cache = parallel_losses_forward(h, W_own, g, W_head, silent)
    for k, one in enumerate(np.eye(3)):
        x = h[1, 3 - k] @ W_own[k]
        z = (g[k] * x / np.sqrt(np.mean(x * x) + 1e-6)) @ W_head
        term, n = np.log(np.exp(z).sum()) - z[targets[1, 3]], 5 - k                  # head k's place for it is 3 - k
        assert after[1][k] == pytest.approx((n * before[1][k] - term) / (n - 1), rel=1e-13)
        dh = parallel_losses_backward(one, cache)[0]
        assert not dh[1, 3 - k].any() and dh[0, 3 - k].all()


def test_without_any_target_everything_is_zero():
    h, W_own, g, W_head, targets = example()
    found, cache = parallel_losses_forward(h, W_own, g, W_head, np.full_like(targets, IGNORE))
    assert not found.any() and not any(gradient.any() for gradient in parallel_losses_backward(np.ones(3), cache)[:4])


def test_one_matrix_of_logits_at_a_time():
    """Op by op each head keeps two: its logits and their log-probabilities."""
    one, four = [peak_matrices(True, H) for H in (1, 4)]
    assert four < 1.1 * one < 5
    one, four = [peak_matrices(False, H) for H in (1, 4)]
    assert four - one > 5.9


def test_the_shared_matrix_is_never_quantised_and_the_own_ones_are():
    roles = []

    def gemm(A, B, *, role):
        roles.append((role, B.shape))
        return A @ B

    _, cache = parallel_losses_forward(*example(), gemm=gemm)
    parallel_losses_backward(np.ones(3), cache)
    assert roles == 3 * [("forward", (4, 4))] + 3 * [("dx", (4, 4)), ("dW", (10, 4))]


def test_a_target_out_of_range_is_named():
    *arrays, targets = example()
    targets[1, 2] = 13
    with pytest.raises(ShapeError, match=r"parallel_losses: targets\[1, 2\] = 13 is not in 0 .. 12"):
        parallel_losses(*arrays, targets)


# ---- heads with a layer of their own

def influence(predict, T):
    """[moved (T, positions) bool for each array that predict gives]: does another token at j change what is said at i, by one bit?"""
    ids = np.arange(T)[None]
    before, moved = predict(ids), []
    for j in range(T):
        changed = ids.copy()
        changed[0, j] = 8
        moved.append([(new[0] != old[0]).any(axis=-1) for new, old in zip(predict(changed), before, strict=True)])
    return [np.array(of_one) for of_one in zip(*moved)]


def test_what_a_head_sees_and_what_a_module_of_the_chain_sees():
    """Both at position i, both predict token i + k + 1: the head knows tokens up to i, the module up to i + k. Bit for bit."""
    weights, heads = init(DENSE, np.random.default_rng(0), std=0.5, dtype=np.float64), random_heads(DENSE, 3)

    def all_heads(ids):
        stream = transformer(ids, weights, DENSE).stream
        return [parallel_head(stream, head, weights.W_head, DENSE, *tables(DENSE, 6))[0].data for head in heads]

    def chain(ids):
        return [prediction.logits.data for prediction in losses(ids, next_token_targets(ids), weights, DENSE).predictions]

    j, i = np.arange(6)[:, None], np.arange(6)
    for moved in influence(all_heads, 6):
        assert np.array_equal(moved, j <= i)
    for k, moved in enumerate(influence(chain, 6), start=1):
        assert np.array_equal(moved, j <= i[:6 - k] + k)


def test_a_head_cannot_know_the_coin_in_between_and_a_linear_one_cannot_either():
    """0 c c with a fair coin c: the state at 0 is the same whatever the coin, so head 1 pays ln 2 at least."""
    rng = np.random.default_rng(0)
    ids = np.array([[0, 0, 0], [0, 1, 1]])
    config = dataclasses.replace(DENSE, vocab_size=2)
    weights, heads = init(config, rng, std=0.5, dtype=np.float64), random_heads(config, 2)
    stream = transformer(ids, weights, config).stream
    for scale in (0.0, 0.01, 1.0):
        found, _ = head_by_head(stream, tensors(heads), Tensor(scale * weights.W_head), next_token_targets(ids), config, *tables(config, 3))
        linear, _ = parallel_losses_forward(stream.data, rng.standard_normal((2, 6, 6)), np.ones((2, 6)), scale * weights.W_head, next_token_targets(ids))
        for loss in (found[1], linear[1]):
            assert loss >= np.log(2) - 1e-12 and (scale > 0 or loss == pytest.approx(np.log(2)))


def test_a_head_whose_layer_says_nothing_is_its_norm_and_the_shared_matrix():
    """The layer reads and keeps the stream as it is; the one norm after it is the head's own."""
    head, rng = random_heads(DENSE, 1)[0], np.random.default_rng(0)
    silent = head.block._replace(attention=head.block.attention._replace(W_O=0 * head.block.attention.W_O),
                                 ffn=head.block.ffn._replace(W_down=0 * head.block.ffn.W_down))
    h, W_head = rng.standard_normal((2, 3, 6)), rng.standard_normal((6, 9))
    logits, routed = parallel_head(h, head._replace(block=silent), W_head, DENSE, *tables(DENSE, 3))
    np.testing.assert_allclose(logits.data, (head.g_final * h / np.sqrt((h * h).mean(axis=-1, keepdims=True) + 1e-6)) @ W_head, rtol=1e-12)
    assert routed is None and parallel_head(h, random_heads(EXPERTS, 1)[0], W_head, EXPERTS, *tables(EXPERTS, 3))[1].chosen.data.shape == (2, 3, 2)


def all_on_one_tape(stream, heads, W_head, targets, config):
    cos, sin = tables(config, targets.shape[1], stream.data.dtype)
    return [cross_entropy(parallel_head(stream, head, W_head, config, cos, sin)[0], further(targets, k), ignore_index=IGNORE)
            for k, head in enumerate(heads)]


@pytest.mark.parametrize("config", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_head_by_head_is_one_tape_down_to_the_embedding(config):
    rng = np.random.default_rng(0)
    weights, ids, seeds = init(config, rng, std=0.5, dtype=np.float64), rng.integers(0, 9, (2, 6)), [1.0, 0.3, 0.1]
    targets, results = next_token_targets(ids), []
    for sequential in (False, True):
        trunk, heads = trainable(weights), tensors(random_heads(config, 3), constant=CONSTANT)
        with Tape() as tape:
            stream = transformer(ids, trunk, config).stream
            found = [] if sequential else all_on_one_tape(stream, heads, trunk.W_head, targets, config)
        if sequential:
            values, dhidden = head_by_head(stream, heads, trunk.W_head, targets, config, *tables(config, 6), seeds=seeds)
            tape.backward({stream: dhidden})
        else:
            values = [loss.data for loss in found]
            tape.backward(dict(zip(found, seeds)))
        grads = {name: leaf.grad for tree in (trunk.layers, heads) for name, leaf in flatten(tree).items() if isinstance(leaf, Tensor)}
        assert all(grad.any() for grad in grads.values())
        results.append([*values, trunk.E.grad, trunk.W_head.grad, *grads.values()])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-12)


def test_head_by_head_against_finite_differences():
    heads, targets = random_heads(DENSE, 2), np.array([[1, IGNORE, 8]])

    def as_dtype(dtype):
        return unflatten({name: leaf.astype(dtype) for name, leaf in flatten(heads).items()}, heads)

    def forward(h, W_head):
        found = all_on_one_tape(Tensor(h), as_dtype(h.dtype), Tensor(W_head), targets, DENSE)
        return found[0].data + h.dtype.type(0.3) * found[1].data, (h, W_head)

    def backward(dloss, cache):
        h, W_head = map(Tensor, cache)
        _, dh = head_by_head(h, tensors(as_dtype(h.data.dtype)), W_head, targets, DENSE, *tables(DENSE, 3, h.data.dtype), seeds=[dloss, 0.3 * dloss])
        return dh, W_head.grad

    rng = np.random.default_rng(0)
    gradcheck(forward, backward, (rng.standard_normal((1, 3, 6)), rng.standard_normal((6, 9))))


def test_head_by_head_holds_the_logits_of_one_head():
    config = dataclasses.replace(DENSE, vocab_size=2048)
    rng, peaks = np.random.default_rng(0), {}
    h, W_head, targets = rng.standard_normal((2, 16, 6)), rng.standard_normal((6, 2048)), rng.integers(0, 2048, (2, 16))
    for sequential in (False, True):
        for n in (1, 4):
            heads = random_heads(config, n)
            tracemalloc.start()
            if sequential:
                head_by_head(Tensor(h), tensors(heads), Tensor(W_head), targets, config, *tables(config, 16))
            else:
                with Tape() as tape:
                    found = all_on_one_tape(Tensor(h), tensors(heads), Tensor(W_head), targets, config)
                tape.backward(dict.fromkeys(found, 1.0))
            peaks[sequential, n] = tracemalloc.get_traced_memory()[1] / (8 * 2 * 16 * 2048)
            tracemalloc.stop()
    assert peaks[True, 4] < 1.15 * peaks[True, 1] and peaks[False, 4] > peaks[False, 1] + 5.9


def test_calling_it_leaves_the_trunks_tape_alone_and_gradients_add_up():
    heads, targets = tensors(random_heads(DENSE, 2)), np.array([[1, 8, 0]])
    stream, W_head = Tensor(np.random.default_rng(0).standard_normal((1, 3, 6))), Tensor(np.random.default_rng(1).standard_normal((6, 9)))
    with Tape() as outer:
        _, once = head_by_head(stream, heads, W_head, targets, DENSE, *tables(DENSE, 3))
    grad = W_head.grad.copy()
    assert not outer.records and stream.grad is None
    _, again = head_by_head(stream, heads, W_head, targets, DENSE, *tables(DENSE, 3))
    assert np.array_equal(once, again)
    np.testing.assert_allclose(W_head.grad, 2 * grad, rtol=1e-13)


def test_weights_of_a_head_against_those_of_a_module():
    """Of V3's sizes a module has the merge and two more norms; of any size, a wider head has as many weights as a module."""
    v3, D = Config(), 7_168
    head, module = [count(form(v3)) - 256 for form in (parallel_head_outline, mtp_outline)]        # the selection biases are not trained
    assert head == 11_507_286_016 + D == 11_507_293_184 and module - head == 2 * D * D + 2 * D == 102_774_784
    config = dataclasses.replace(DENSE, d_model=8)
    wider = dataclasses.replace(config, d_ff=config.d_ff + 2 * (8 + 1) // 3)
    assert count(parallel_head_outline(wider)) == count(mtp_outline(config))
    assert HeadWeights._fields == ("block", "g_final")                              # no output matrix of its own


def test_a_model_without_experts_has_heads_without_experts():
    assert hasattr(parallel_head_outline(EXPERTS).block.ffn, "W_router") and not hasattr(parallel_head_outline(DENSE).block.ffn, "W_router")


@pytest.mark.parametrize("n, seeds, message", [
    (4, None, "heads has 4 heads: 3 tokens in a row have targets for 1 to 3"),
    (0, None, "heads has 0 heads"),
    (2, [1.0], "seeds has 1 weights for 2 heads"),
])
def test_what_cannot_be_is_named(n, seeds, message):
    stream, W_head = Tensor(np.ones((1, 3, 6))), Tensor(np.ones((6, 9)))
    with pytest.raises(ValueError, match=message):
        head_by_head(stream, random_heads(DENSE, n), W_head, np.array([[1, 8, 0]]), DENSE, *tables(DENSE, 3), seeds=seeds)
