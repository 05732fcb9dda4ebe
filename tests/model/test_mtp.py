import numpy as np
import pytest

from minideepseek.autograd.gradcheck import gradcheck
from minideepseek.autograd.params import count, flatten, unflatten
from minideepseek.autograd.tape import Tape, Tensor, op
from minideepseek.basics.cross_entropy import cross_entropy
from minideepseek.basics.linear import linear
from minideepseek.basics.rmsnorm import rmsnorm, rmsnorm_forward
from minideepseek.corpus.batches import IGNORE
from minideepseek.model.block import position_tables
from minideepseek.model.config import Config
from minideepseek.model.mtp import MTPWeights, mtp_module, mtp_outline, mtp_projection, mtp_projection_backward, mtp_projection_examples, mtp_projection_forward
from minideepseek.model.transformer import init, losses, next_token_targets, trainable, transformer

SMALL = dict(vocab_size=9, d_model=6, n_layers=1, n_dense_layers=0, d_ff=7, n_heads=2, q_rank=None, kv_rank=4, d_nope=4, d_rope=2, d_value=3,
             n_routed=4, top_k=2, d_expert=5, n_groups=1, n_groups_kept=1)


def head_slice_forward(h, *, n):
    """The first n states.

    h: (B, S, D)   ->   y: (B, T, D)
    """
    return h[:, :n].copy(), h.shape


def head_slice_backward(dy, shape):
    dh = np.zeros(shape)
    dh[:, :dy.shape[1]] = dy
    return dh


def join_forward(a, b):
    """Side by side.

    a: (B, T, D)   b: (B, T, D)   ->   y: (B, T, 2*D)
    """
    return np.concatenate([a, b], axis=-1), a.shape[-1]


def join_backward(dy, D):
    return dy[..., :D].copy(), dy[..., D:].copy()


@pytest.mark.parametrize("case", ["embedding first", "hidden first"])
def test_three_ways_to_the_same_gradient(case):
    """Fused backward = the same network op by op on the tape = finite differences."""
    args, config = mtp_projection_examples(np.random.default_rng(0))[case]
    y, cache = mtp_projection_forward(*args, **config)
    dy = np.random.default_rng(1).standard_normal(y.shape)
    fused = mtp_projection_backward(dy, cache)

    head_slice, join = op(head_slice_forward, head_slice_backward), op(join_forward, join_backward)
    h, e, g_hidden, g_embedding, W = leaves = [Tensor(a) for a in args]
    with Tape() as tape:
        n_h = rmsnorm(head_slice(h, n=e.data.shape[1]), g_hidden)
        n_e = rmsnorm(e, g_embedding)
        out = linear(join(n_e, n_h) if case == "embedding first" else join(n_h, n_e), W)
    tape.backward({out: dy})
    assert np.abs(out.data - y).max() <= 1e-12
    for leaf, gradient in zip(leaves, fused, strict=True):
        assert np.abs(leaf.grad - gradient).max() <= 1e-12
    gradcheck(mtp_projection_forward, mtp_projection_backward, args, config)


def test_the_order_of_the_two_halves():
    """Bug 4: [embedding; hidden] by default, as public checkpoints have it."""
    rng = np.random.default_rng(0)
    h, e, W = rng.standard_normal((1, 2, 3)), rng.standard_normal((1, 1, 3)), rng.standard_normal((6, 3))
    g = np.ones(3)
    n_h, n_e = rmsnorm_forward(h[:, :1], g)[0], rmsnorm_forward(e, g)[0]
    np.testing.assert_allclose(mtp_projection_forward(h, e, g, g, W)[0], n_e @ W[:3] + n_h @ W[3:], atol=1e-14)
    np.testing.assert_allclose(mtp_projection_forward(h, e, g, g, W, embedding_first=False)[0], n_h @ W[:3] + n_e @ W[3:], atol=1e-14)


def test_the_last_states_are_not_read():
    args, config = mtp_projection_examples(np.random.default_rng(0))["embedding first"]
    y, _ = mtp_projection_forward(*args, **config)
    other = args[0].copy()
    other[:, -1] = 99
    assert np.array_equal(mtp_projection_forward(other, *args[1:], **config)[0], y)


def run(weights, config, seed=0):
    rng = np.random.default_rng(seed)
    cos, sin = position_tables(config, np.arange(3), np.float64)
    hidden, E, W_head = Tensor(rng.standard_normal((2, 4, 6)), "hidden"), Tensor(rng.standard_normal((9, 6)), "E"), Tensor(rng.standard_normal((6, 9)), "W_head")
    tensors = unflatten({name: Tensor(leaf, name) if "b_select" not in name else leaf for name, leaf in flatten(weights).items()}, weights)
    with Tape() as tape:
        prediction = mtp_module(hidden, rng.integers(0, 9, (2, 3)), tensors, E, W_head, config, cos, sin)
    tape.backward({prediction.logits: rng.standard_normal(prediction.logits.data.shape)})
    return prediction, tensors, hidden, E, W_head


def random_module(config, seed=1):
    form, rng = mtp_outline(config), np.random.default_rng(seed)
    return unflatten({name: rng.standard_normal(leaf.shape) for name, leaf in flatten(form).items()}, form)


def test_the_head_reads_the_output_of_the_block():
    """Bug 2: with the head on the incoming state the gradient of the module's own block would be exactly zero."""
    config = Config(**SMALL)
    prediction, tensors, hidden, E, W_head = run(random_module(config), config)
    assert prediction.logits.data.shape == (2, 3, 9)
    for name, leaf in flatten(tensors).items():
        assert "b_select" in name or leaf.grad.any(), name
    assert not hidden.grad[:, -1].any() and hidden.grad[:, :-1].any()


def test_embedding_and_head_are_the_main_models():
    """Bug 3: their gradients arrive in the tables that were passed in, and the module has none of its own."""
    config = Config(**SMALL)
    prediction, tensors, hidden, E, W_head = run(random_module(config), config)
    assert E.grad.any() and W_head.grad.any()
    assert set(MTPWeights._fields) == {"g_hidden", "g_embedding", "W_merge", "block", "g_final"}


def test_what_the_next_module_reads():
    """After the final norm, as the public code does it; before it when the configuration says so."""
    config = Config(**SMALL)
    weights = random_module(config)
    normed, raw = [run(weights, Config(**SMALL, mtp_reads_normed=flag))[0] for flag in (True, False)]
    np.testing.assert_allclose(normed.logits.data, raw.logits.data)
    np.testing.assert_allclose(rmsnorm_forward(raw.hidden.data, weights.g_final)[0], normed.hidden.data, atol=1e-14)


def test_v3s_module_has_11_610_067_968_weights():
    outline = mtp_outline(Config())
    assert count(outline) - 256 == 11_610_067_968          # the selection biases are not trained


def test_a_model_without_experts_has_modules_without_experts():
    assert not hasattr(mtp_outline(Config(**SMALL | {"n_dense_layers": 1})).block.ffn, "W_router")


def test_its_op_is_one_record():
    args, config = mtp_projection_examples(np.random.default_rng(0))["embedding first"]
    with Tape() as tape:
        mtp_projection(*args, **config)
    assert [record.name for record in tape.records] == ["mtp_projection"]


# ---- two modules behind a model: who hears whom

TEXT = np.array([[0, 1, 2, 3, 4, 5], [6, 7, 8, 0, 1, 2]])
BROUGHT = np.array([[1, 2, 3, 4, 5, 8], [7, 8, 0, 1, 2, 4]])          # the batch brings the token after the text: no IGNORE
DENSE = Config(**SMALL | {"n_dense_layers": 1, "n_mtp": 2})


def weights_of(config, seed=0):
    return init(config, np.random.default_rng(seed), std=0.5, dtype=np.float64)


def gradient_of(seed_of, config=DENSE, ids=TEXT, targets=BROUGHT):
    """The gradients of one forward, and its losses. seed_of: (main, module 0, module 1)."""
    trained = trainable(weights_of(config))
    with Tape() as tape:
        found = losses(ids, targets, trained, config)
    tape.backward(dict(zip([found.main, *found.mtp], seed_of)), keep=True)
    return trained, found


def nats(prediction, token, b, i):
    z = prediction.logits.data[b, i]
    return np.log(np.exp(z).sum()) - z[token]


def test_each_road_into_the_tables_on_its_own():
    """One copy of each table for each use: what arrives in the copies adds up to what arrives in the shared table.

    E: read by the main model (its own loss and the modules', through the trunk), shown to module 0, shown to module 1.
    """
    shared, _ = gradient_of((1.0, 0.15, 0.15))
    trained = trainable(weights_of(DENSE))
    E, W_head = [[Tensor(table.data.copy()) for _ in range(3)] for table in (trained.E, trained.W_head)]
    cos, sin = position_tables(DENSE, np.arange(6), np.float64)
    with Tape() as tape:
        out = transformer(TEXT, trained._replace(E=E[0], W_head=W_head[0]), DENSE)
        seeds, hidden = {cross_entropy(out.logits, BROUGHT): 1.0}, out.hidden
        for k, module in enumerate(trained.mtp):
            one = mtp_module(hidden, TEXT[:, k + 1:], module, E[k + 1], W_head[k + 1], DENSE, cos[:5 - k], sin[:5 - k])
            seeds[cross_entropy(one.logits, BROUGHT[:, k + 1:])], hidden = 0.15, one.hidden
    tape.backward(seeds)
    for copies, table in ((E, shared.E), (W_head, shared.W_head)):
        assert all(np.abs(copy.grad).max() > 1e-3 for copy in copies)
        np.testing.assert_allclose(sum(copy.grad for copy in copies), table.grad, rtol=0, atol=1e-13)
    shown = [[set(np.flatnonzero(copy.grad.any(axis=1))) for copy in E[1:]], [set(TEXT[:, 1:].ravel()), set(TEXT[:, 2:].ravel())]]
    assert shown[0] == shown[1] == [set(range(9)) - {6}, set(range(9)) - {6, 7}]            # 6 and 7 stand too early to be shown


def test_who_meets_in_a_state_and_that_the_last_one_hears_its_own_head_alone():
    (_, main), (_, first), (_, second), (_, all_three) = [gradient_of(seeds) for seeds in ([1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1])]
    trunk = [found.out.hidden.grad for found in (main, first, second, all_three)]
    assert trunk[0].all() and not trunk[1][:, -1].any() and trunk[1][:, :-1].all()          # nobody shows module 0 the token after the last
    assert not trunk[2][:, -2:].any() and trunk[2][:, :-2].all()                            # module 1 reads one state less, through module 0
    np.testing.assert_allclose(trunk[3], trunk[0] + trunk[1] + trunk[2], rtol=0, atol=1e-14)
    state_0 = [found.predictions[0].hidden.grad for found in (first, second, all_three)]
    assert state_0[0].all() and not state_0[1][:, -1].any() and state_0[1][:, :-1].all()
    np.testing.assert_allclose(state_0[2], state_0[0] + state_0[1], rtol=0, atol=1e-14)
    state_1 = [found.predictions[1].hidden.grad for found in (first, second)]
    assert not state_1[0].any() and state_1[1].all()                                        # nobody reads the last module


@pytest.mark.parametrize("module", [0, 1])
def test_the_loss_of_a_module_goes_on_into_every_layer_of_the_model(module):
    """Nothing is detached; and what stands behind a module does not hear it."""
    config = Config(**SMALL | {"n_layers": 3, "n_dense_layers": 3, "n_mtp": 2})
    trained, _ = gradient_of([0, 1 - module, module], config)
    assert all(leaf.grad.any() for leaf in flatten((trained.layers, trained.g_final, trained.E, trained.mtp[:module + 1])).values())
    assert not any(leaf.grad is not None and leaf.grad.any() for leaf in flatten(trained.mtp[module + 1:]).values())


@pytest.mark.parametrize("normed", [True, False])
def test_without_its_own_loss_a_module_learns_from_the_one_behind_it(normed):
    """Exercise 3 of the page: all its weights do, but for the final norm where the state is handed on before it."""
    config = Config(**SMALL | {"n_dense_layers": 1, "n_mtp": 2, "mtp_reads_normed": normed})
    trained, _ = gradient_of([1, 0, 0.3], config)
    silent = {name for name, leaf in flatten(trained.mtp[0]).items() if leaf.grad is None or not leaf.grad.any()}
    assert silent == (set() if normed else {"g_final"})


def test_the_paper_divides_by_the_length_of_the_text_and_we_by_the_terms():
    """Eq. 24: T - p terms over T for its module p = k + 1. Position i of module k is scored on token i + k + 2."""
    _, found = gradient_of([1, 1, 1])
    tokens = np.concatenate([TEXT, BROUGHT[:, -1:]], axis=1)                                # T + 1 = 7 of them
    for k, (loss, prediction) in enumerate(zip(found.mtp, found.predictions)):
        terms = [nats(prediction, tokens[b, i + k + 2], b, i) for b in range(2) for i in range(6 - 1 - k)]
        assert len(terms) == prediction.logits.data[..., 0].size == 2 * (6 - (k + 1))
        assert loss.data == pytest.approx(np.mean(terms), rel=1e-13)
        assert sum(terms) / 2 / 6 == pytest.approx(loss.data * (1 - (k + 1) / 6), rel=1e-13)
    without, _ = [losses(TEXT, targets, weights_of(DENSE), DENSE).mtp[0].data for targets in (next_token_targets(TEXT), BROUGHT)]
    seen = [nats(found.predictions[0], tokens[b, i + 2], b, i) for b in range(2) for i in range(4)]
    assert without == pytest.approx(np.mean(seen), rel=1e-13)                               # "?" is no term and is not divided by


@pytest.mark.parametrize("j", [0, 2, 5])
def test_an_ignored_target_takes_one_term_from_each_loss_and_leaves_the_others(j):
    """Packed documents: the first token of the next document is nobody's target. Module k loses its term at j - k - 1."""
    targets = BROUGHT.copy()
    targets[0, j] = IGNORE
    (_, before), (_, after) = gradient_of([0, 1, 0]), gradient_of([0, 1, 0], targets=targets)
    pairs = [(before.main, after.main, before.out), *zip(before.mtp, after.mtp, before.predictions)]
    for depth, (old, new, said) in enumerate(pairs):                                        # depth 0: the main model
        n, place = 2 * (6 - depth), j - depth
        if place < 0:
            assert new.data == old.data                                                     # no position of this depth is scored on it
        else:
            assert new.data == pytest.approx((n * old.data - nats(said, BROUGHT[0, j], 0, place)) / (n - 1), rel=1e-12)
    dz, dz_before = after.predictions[0].logits.grad, before.predictions[0].logits.grad
    counts = np.ones((2, 5), bool)
    counts[0, j - 1:j] = False
    assert not dz[~counts].any()
    np.testing.assert_allclose(dz[counts], dz_before[counts] * 10 / counts.sum(), rtol=1e-12)


def test_one_array_of_targets_cannot_silence_what_module_0_says_across_a_boundary():
    """Documents 0 1 2 | 3 4 5. At position 2 module 0 is shown 3 and scored on 4, the target of the main model at 3: the page says so."""
    targets = BROUGHT.copy()
    targets[0, 2] = IGNORE                                                                  # 3 is nobody's target
    _, found = gradient_of([1, 1, 0], targets=targets)
    assert not found.out.logits.grad[0, 2].any() and not found.predictions[0].logits.grad[0, 1].any()
    assert found.predictions[0].logits.grad[0, 2].any()
    targets[0, 3] = IGNORE
    _, found = gradient_of([1, 1, 0], targets=targets)
    assert not found.predictions[0].logits.grad[0, 2].any() and not found.out.logits.grad[0, 3].any()


def test_what_each_depth_sees_bit_for_bit():
    """Main: token j at positions from j on. Module k: from j - k - 1 on, as it is shown i + k + 1. Every entry of the table."""
    weights, ids = weights_of(DENSE), np.arange(6)[None]

    def said(ids):
        found = losses(ids, next_token_targets(ids), weights, DENSE)
        return [found.out.logits.data[0], *[prediction.logits.data[0] for prediction in found.predictions]]

    for j in range(6):
        for depth, (new, old) in enumerate(zip(said(np.where(ids == j, 8, ids)), said(ids), strict=True)):
            assert np.array_equal((new != old).any(axis=-1), np.arange(6 - depth) >= j - depth)


def test_the_token_shown_is_read_at_its_position_and_after():
    """The module alone, its states held fast: token ahead[j] moves the predictions from j on, and a state h[j] likewise."""
    rng = np.random.default_rng(0)
    module = random_module(DENSE)
    hidden, ahead, E, W_head = rng.standard_normal((1, 5, 6)), rng.integers(0, 8, (1, 4)), rng.standard_normal((9, 6)), rng.standard_normal((6, 9))
    tables = position_tables(DENSE, np.arange(4), np.float64)
    before = mtp_module(hidden, ahead, module, E, W_head, DENSE, *tables).logits.data[0]
    for j in range(5):
        moved = hidden.copy()
        moved[0, j] += 1
        after = mtp_module(moved, ahead, module, E, W_head, DENSE, *tables).logits.data[0]
        assert np.array_equal((after != before).any(axis=-1), np.arange(4) >= j)            # j = 4: nobody
        if j < 4:
            shown = ahead.copy()
            shown[0, j] = 8
            after = mtp_module(hidden, shown, module, E, W_head, DENSE, *tables).logits.data[0]
            assert np.array_equal((after != before).any(axis=-1), np.arange(4) >= j)
