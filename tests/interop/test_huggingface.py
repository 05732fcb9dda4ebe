import json
import shutil

import numpy as np
import pytest

from minideepseek.autograd import params
from minideepseek.autograd.tape import Tape
from minideepseek.interop.huggingface import gradients, layout, load, read_config
from minideepseek.interop.safetensors import CheckpointError, SafeTensors
from minideepseek.model.transformer import next_token_loss, next_token_targets, trainable
from tests.house import ROOT

FIXTURES = ROOT / "tests/fixtures"


def edited(tmp_path, fixture, **changes):
    """config.json of a fixture with some keys changed; a key set to ... is deleted."""
    public = json.loads((FIXTURES / fixture / "config.json").read_text()) | changes
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value for key, value in public.items() if value is not ...}))
    return path


def respelt(tmp_path, fixture, change):
    """A fixture's folder whose tensors went through `change(dict)`."""
    shutil.copy(FIXTURES / fixture / "config.json", tmp_path)
    tensors = dict(SafeTensors(FIXTURES / fixture / "model.safetensors"))
    change(tensors)
    header, data = {}, b""
    for name, array in tensors.items():
        header[name] = {"dtype": {"float32": "F32", "int32": "I32"}[array.dtype.name], "shape": array.shape, "data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return tmp_path


def test_every_number_of_a_checkpoint_has_its_place():
    config, weights = load(FIXTURES / "v3-2")
    tensors, flat = SafeTensors(FIXTURES / "v3-2/model.safetensors"), params.flatten(weights)
    entries = layout(weights)
    assert {entry.name for entry in entries} == set(tensors) and params.count(weights) == sum(t.size for t in tensors.values())
    for entry in entries:
        np.testing.assert_array_equal(entry.pack(flat), tensors[entry.name])
    assert all(leaf.dtype == np.float32 for leaf in flat.values())


def test_rows_of_q_b_and_kv_b_alternate_head_by_head():
    config, weights = load(FIXTURES / "v3-2", np.float64)
    tensors, a = SafeTensors(FIXTURES / "v3-2/model.safetensors"), weights.layers[0].attention
    N, R, V, C = config.d_nope, config.d_rope, config.d_value, config.kv_rank
    q = tensors["model.layers.0.self_attn.q_b_proj.weight"]
    kv = tensors["model.layers.0.self_attn.kv_b_proj.weight"]
    kv_a = tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"]
    h = 2                                                            # the third head
    np.testing.assert_array_equal(a.W_UQ[:, h * N:(h + 1) * N].T, q[h * (N + R):h * (N + R) + N])
    np.testing.assert_array_equal(a.W_QR[:, h * R:(h + 1) * R].T, q[h * (N + R) + N:(h + 1) * (N + R)])
    np.testing.assert_array_equal(a.W_UV[:, h * V:(h + 1) * V].T, kv[h * (N + V) + N:(h + 1) * (N + V)])
    np.testing.assert_array_equal(a.W_KR.T, kv_a[C:])


def test_gradients_have_checkpoint_names_and_shapes():
    config, weights = load(FIXTURES / "v3-8", np.float64)
    trained, ids = trainable(weights), np.array([[1, 2, 3]])
    with Tape() as tape:
        loss = next_token_loss(ids, next_token_targets(ids), trained, config)
    tape.backward(loss)
    found, tensors = gradients(trained), SafeTensors(FIXTURES / "v3-8/model.safetensors")
    assert found.keys() == {name for name in tensors if not name.endswith("bias")}
    assert all(gradient.shape == tensors[name].shape for name, gradient in found.items())
    unchosen = [name for name, gradient in found.items() if not gradient.any()]
    assert unchosen and all(".experts." in name for name in unchosen)      # three tokens cannot reach sixteen experts


def test_missing_unexpected_and_misshapen_tensors_are_listed(tmp_path):
    def lose(tensors):
        tensors["model.extra.weight"] = tensors.pop("model.norm.weight")
        del tensors["model.layers.1.mlp.experts.1.up_proj.weight"]

    with pytest.raises(CheckpointError) as caught:
        load(respelt(tmp_path, "v3-11", lose))
    assert "missing tensors: model.layers.1.mlp.experts.1.up_proj.weight, model.norm.weight; unexpected tensors: model.extra.weight" in str(caught.value)


def test_a_wrong_shape_and_a_wrong_dtype(tmp_path):
    with pytest.raises(CheckpointError, match=r"lm_head.weight has shape \(3, 2\), expected \(96, "):
        load(respelt(tmp_path, "v3-11", lambda t: t.update({"lm_head.weight": np.zeros((3, 2), np.float32)})))
    with pytest.raises(CheckpointError, match="model.norm.weight is of dtype int32, expected one of float64"):
        load(respelt(tmp_path, "v3-11", lambda t: t.update({"model.norm.weight": t["model.norm.weight"].astype(np.int32)})))


def test_a_truncated_file(tmp_path):
    shutil.copy(FIXTURES / "v3-11/config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes((FIXTURES / "v3-11/model.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is it cut off"):
        load(tmp_path)


@pytest.mark.parametrize("changes, message", [
    ({"hiden_size": 3, "layers": 2}, "unknown keys: hiden_size, layers"),
    ({"hidden_size": ..., "v_head_dim": ...}, "missing keys: hidden_size, v_head_dim"),
    ({"model_type": "llama"}, "model_type 'llama' is neither deepseek_v3 nor deepseek_v2"),
    ({"num_experts_per_tok": 5}, "top_k = 5 exceeds the 4 experts a token can reach: 1 of 2 groups of 4 (top_k is its num_experts_per_tok)"),
    ({"n_group": 3}, "n_groups = 3 does not divide n_routed = 8"),
    ({"n_group": ...}, "missing keys: n_group"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu', this model has 'silu' only"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings = True, this model has False only"),
    ({"num_key_value_heads": 2}, "num_key_value_heads = 2 must equal num_attention_heads = 4"),
    ({"topk_method": "greedy"}, "topk_method 'greedy' is not one of"),
    ({"scoring_func": "softmax"}, "scoring_func 'softmax', deepseek_v3 has 'sigmoid'"),
    ({"hidden_size": "wide"}, "d_model = 'wide' must be a whole number (d_model is its hidden_size)"),
    ({"q_lora_rank": 0}, "q_rank = 0 must be positive, or None"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2}}, "RoPE of type 'linear'"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4}}, "lacks original_max_position_embeddings"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "truncate": False}}, "unknown keys: truncate"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": "x", "original_max_position_embeddings": 64}}, "must be numbers"),
    ({"rope_parameters": [1]}, "rope_parameters is [1], expected a table"),
])
def test_configurations_we_cannot_have(tmp_path, changes, message):
    with pytest.raises(CheckpointError) as caught:
        read_config(edited(tmp_path, "v3-2", **changes))
    assert message in str(caught.value)


def test_the_older_spelling_of_rope_is_read(tmp_path):
    """As in the files released with V3 and V2-Lite."""
    old = {"type": "yarn", "factor": 8.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 32}
    path = edited(tmp_path, "v3-2", rope_parameters=..., rope_scaling=old, rope_theta=10000, topk_method="noaux_tc", scoring_func="sigmoid",
                  moe_layer_freq=1, ep_size=1, seq_aux=True, aux_loss_alpha=0.001, torch_dtype="bfloat16")
    assert read_config(path) == read_config(FIXTURES / "v3-2/config.json")


def test_v2_lite_has_no_groups_and_no_query_latent(tmp_path):
    path = edited(tmp_path, "v2-2", q_lora_rank=None, n_group=None, topk_group=None, rope_scaling=None)
    config = read_config(path)
    assert (config.q_rank, config.n_groups, config.n_groups_kept, config.scoring, config.normalise) == (None, 1, 1, "softmax", False)


def test_the_amplitude_of_the_rotary_tables(tmp_path):
    """No mscales: temperature(1). An explicit attention_factor: itself."""
    from minideepseek.model.block import position_tables

    rope = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
    for extra, amplitude in (({}, 0.1 * np.log(8) + 1), ({"attention_factor": 1.3}, 1.3), ({"mscale": 0.5, "mscale_all_dim": 0.5}, 1)):
        config = read_config(edited(tmp_path, "v3-2", rope_parameters=rope | extra))
        cos, sin = position_tables(config, np.array([5]), np.float64)
        np.testing.assert_allclose(np.hypot(cos, sin), amplitude, rtol=1e-14)


def test_more_dense_layers_than_layers_means_all(tmp_path):
    assert read_config(edited(tmp_path, "v3-11", first_k_dense_replace=7, num_hidden_layers=2)).n_dense_layers == 2
