import numpy as np
import pytest

from minideepseek.autograd import params
from minideepseek.interop.layout import layout
from minideepseek.model.config import Config
from minideepseek.model.transformer import init, model_outline

SMALL = dict(vocab_size=11, d_model=8, n_layers=2, n_dense_layers=1, d_ff=6, n_heads=2, q_rank=4, kv_rank=4, d_nope=4, d_rope=2, d_value=3,
             n_routed=4, top_k=2, d_expert=5, n_groups=2, n_groups_kept=1, n_mtp=2)


@pytest.mark.parametrize("fields", [{}, {"q_rank": None}, {"n_shared": 0}, {"n_mtp": 0, "scoring": "softmax", "normalise": False}])
def test_out_and_back_leaves_every_number_where_it_was(fields):
    weights = init(Config(**SMALL | fields), np.random.default_rng(0), std=1.0, dtype=np.float64)
    flat, entries = params.flatten(weights), layout(weights)
    back = {name: np.full_like(leaf, np.nan) for name, leaf in flat.items()}
    for entry in entries:
        public = entry.pack(flat)
        assert public.shape == entry.public_shape(flat)
        entry.unpack(public, back)
    assert all(np.array_equal(back[name], leaf) for name, leaf in flat.items())
    assert len({entry.name for entry in entries}) == len(entries)


def test_the_names_of_v3_without_its_memory():
    names = {entry.name: entry for entry in layout(model_outline(Config()))}
    assert len(names) == 2 + 1 + 61 * 10 - 61 + 3 * 3 + 58 * (2 + 3 + 3 * 256) + (4 + 9 + 2 + 3 + 3 * 256)
    outline = params.flatten(model_outline(Config()))
    shape = lambda name: names[name].public_shape(outline)
    assert shape("model.layers.0.self_attn.q_b_proj.weight") == (24_576, 1_536)
    assert shape("model.layers.60.self_attn.kv_b_proj.weight") == (32_768, 512)
    assert shape("model.layers.60.self_attn.kv_a_proj_with_mqa.weight") == (576, 7_168)
    assert shape("model.layers.60.mlp.experts.255.down_proj.weight") == (7_168, 2_048)
    assert shape("model.layers.61.eh_proj.weight") == (7_168, 14_336)
    assert shape("model.layers.60.mlp.gate.e_score_correction_bias") == (256,)


def test_a_public_matrix_is_the_transpose():
    weights = init(Config(**SMALL), np.random.default_rng(0), std=1.0)
    flat = params.flatten(weights)
    entries = {entry.name: entry for entry in layout(weights)}
    np.testing.assert_array_equal(entries["lm_head.weight"].pack(flat), weights.W_head.T)
    np.testing.assert_array_equal(entries["model.embed_tokens.weight"].pack(flat), weights.E)
    np.testing.assert_array_equal(entries["model.layers.1.mlp.experts.2.up_proj.weight"].pack(flat), weights.layers[1].ffn.W_up[2].T)
    np.testing.assert_array_equal(entries["model.layers.2.eh_proj.weight"].pack(flat), weights.mtp[0].W_merge.T)
