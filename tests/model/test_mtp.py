import numpy as np
import pytest

from minideepseek.autograd.gradcheck import gradcheck
from minideepseek.autograd.params import count, flatten, unflatten
from minideepseek.autograd.tape import Tape, Tensor, op
from minideepseek.basics.linear import linear
from minideepseek.basics.rmsnorm import rmsnorm, rmsnorm_forward
from minideepseek.model.block import position_tables
from minideepseek.model.config import Config
from minideepseek.model.mtp import MTPWeights, mtp_module, mtp_outline, mtp_projection, mtp_projection_backward, mtp_projection_examples, mtp_projection_forward

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
