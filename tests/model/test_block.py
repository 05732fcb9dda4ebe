import numpy as np
import pytest

from minideepseek.autograd.params import flatten, unflatten
from minideepseek.autograd.tape import Tape, Tensor
from minideepseek.attention.yarn import temperature
from minideepseek.model.block import BlockWeights, block, block_outline, position_tables
from minideepseek.model.config import Config

SMALL = dict(d_model=8, n_heads=2, q_rank=6, kv_rank=4, d_nope=4, d_rope=2, d_value=3, n_routed=4, top_k=2, d_expert=5, d_ff=9, n_groups=1,
             n_groups_kept=1, n_layers=1, n_dense_layers=0)


def random_weights(config, dense, seed=0):
    form, rng = block_outline(config, dense), np.random.default_rng(seed)
    return unflatten({name: rng.standard_normal(leaf.shape) for name, leaf in flatten(form).items()}, form)


@pytest.mark.parametrize("dense, fifth", [(True, "swiglu"), (False, "deepseek_moe")])
def test_a_block_is_six_records(dense, fifth):
    config = Config(**SMALL)
    cos, sin = position_tables(config, np.arange(3), np.float64)
    with Tape() as tape:
        y, routed = block(Tensor(np.ones((2, 3, 8))), random_weights(config, dense), config, cos, sin)
    assert [r.name for r in tape.records] == ["rmsnorm", "mla", "add", "rmsnorm", fifth, "add"]
    assert y.data.shape == (2, 3, 8) and (routed is None if dense else routed.chosen.data.shape == (2, 3, 2) and routed.x is tape.records[3].outputs[0])


def test_each_residual_is_added_once():
    """With an attention that answers zero, y - x is the feed-forward layer alone; and the other way round."""
    config, x = Config(**SMALL), np.random.default_rng(1).standard_normal((1, 3, 8))
    w = random_weights(config, dense=True)
    cos, sin = position_tables(config, np.arange(3), np.float64)
    no_attention = w._replace(attention=w.attention._replace(W_O=0 * w.attention.W_O))
    no_ffn = w._replace(ffn=w.ffn._replace(W_down=0 * w.ffn.W_down))
    neither = no_attention._replace(ffn=no_ffn.ffn)
    assert np.array_equal(block(x, neither, config, cos, sin)[0].data, x)
    for one in (no_attention, no_ffn):
        doubled = one._replace(attention=one.attention._replace(W_O=2 * one.attention.W_O), ffn=one.ffn._replace(W_down=2 * one.ffn.W_down))
        single, double = [block(x, v, config, cos, sin)[0].data - x for v in (one, doubled)]
        np.testing.assert_allclose(double, 2 * single, rtol=0, atol=1e-13)


def test_a_gemm_of_its_own_reaches_every_projection():
    config, roles = Config(**SMALL), []

    def counting(A, B, *, role):
        roles.append(role)
        return A @ B

    cos, sin = position_tables(config, np.arange(3), np.float64)
    block(np.ones((1, 3, 8)), random_weights(config, dense=True), config, cos, sin, gemm=counting)
    assert roles == ["forward"] * (8 + 3)          # eight projections of attention, three of the feed-forward layer


def test_the_outline_follows_the_configuration():
    with_latent, without = block_outline(Config(**SMALL), False), block_outline(Config(**SMALL | {"q_rank": None, "n_shared": 0}), False)
    assert with_latent.attention.W_DQ.shape == (8, 6) and without.attention.W_DQ is None and without.attention.W_UQ.shape == (8, 8)
    assert with_latent.ffn.W_shared_up.shape == (8, 5) and without.ffn.W_shared_up is None
    assert block_outline(Config(**SMALL), True).b_select is None
    assert block_outline(Config(**SMALL | {"scoring": "softmax"}), False).b_select is None
    assert isinstance(with_latent, BlockWeights) and with_latent.b_select.shape == (4,)


def test_position_tables_carry_the_ratio_of_the_temperatures():
    plain = Config(**SMALL | {"d_rope": 8, "yarn_factor": 40.0})
    cos, _ = position_tables(plain, np.arange(3), np.float64)
    loud, _ = position_tables(Config(**SMALL | {"d_rope": 8, "yarn_factor": 40.0, "mscale_all_dim": 0.707}), np.arange(3), np.float64)
    np.testing.assert_allclose(loud, cos * temperature(40) / temperature(40, 0.707))
    assert cos[0].tolist() == [1, 1, 1, 1]
    assert position_tables(plain, np.arange(3), np.float32)[0].dtype == np.float32


def test_without_a_stretch_no_yarn_is_computed():
    off = Config(**SMALL | {"d_rope": 8, "yarn_factor": 1.0, "mscale_all_dim": 0.5})
    cos, sin = position_tables(off, np.array([1]), np.float64)
    np.testing.assert_allclose(np.arctan2(sin, cos)[0], [1, 0.1, 0.01, 0.001])
