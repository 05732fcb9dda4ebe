import json

import numpy as np
import pytest

from minideepseek.interop.public_config import read_blocks, read_config, write_config
from minideepseek.interop.safetensors import CheckpointError
from minideepseek.model.block import position_tables
from minideepseek.model.config import Config
from tests.house import ROOT

FIXTURES = ROOT / "tests/fixtures"


def edited(tmp_path, fixture, **changes):
    """config.json of a fixture with some keys changed; a key set to ... is deleted."""
    public = json.loads((FIXTURES / fixture / "config.json").read_text()) | changes
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value for key, value in public.items() if value is not ...}))
    return path


@pytest.mark.parametrize("changes, message", [
    ({"hiden_size": 3, "layers": 2}, "unknown keys: hiden_size, layers"),
    ({"hidden_size": ..., "v_head_dim": ...}, "missing keys: hidden_size, v_head_dim"),
    ({"model_type": "llama"}, "model_type 'llama' is neither deepseek_v3 nor deepseek_v2"),
    ({"num_experts_per_tok": 5}, "top_k = 5 exceeds the 4 experts a token can reach: 1 of 2 groups of 4 (top_k is its num_experts_per_tok)"),
    ({"n_group": 3}, "n_groups = 3 does not divide n_routed = 8 (n_groups is its n_group)"),
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
    ({"rope_parameters": {"rope_type": "yarn", "factor": 1, "original_max_position_embeddings": 64, "attention_factor": 2}}, "attention_factor = 2 without a stretch"),
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
    rope = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
    for extra, amplitude in (({}, 0.1 * np.log(8) + 1), ({"attention_factor": 1.3}, 1.3), ({"mscale": 0.5, "mscale_all_dim": 0.5}, 1)):
        config = read_config(edited(tmp_path, "v3-2", rope_parameters=rope | extra))
        cos, sin = position_tables(config, np.array([5]), np.float64)
        np.testing.assert_allclose(np.hypot(cos, sin), amplitude, rtol=1e-14)


def test_more_dense_layers_than_layers_means_all(tmp_path):
    assert read_config(edited(tmp_path, "v3-11", first_k_dense_replace=7, num_hidden_layers=2)).n_dense_layers == 2


@pytest.mark.parametrize("name", sorted(path.name for path in FIXTURES.glob("v*")))
def test_out_to_the_public_keys_and_back(tmp_path, name):
    config = read_config(FIXTURES / name / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(write_config(config)))
    assert read_config(tmp_path / "config.json") == config


def test_conventions_that_a_public_file_cannot_say(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(write_config(Config(mtp_embedding_first=False))))
    assert read_config(tmp_path / "config.json") == Config(mtp_embedding_first=False)
    with pytest.raises(CheckpointError, match="attention = 'mha'"):
        write_config(Config(attention="mha"))
    for field, value in (("mtp_reads_normed", False),):
        with pytest.raises(CheckpointError, match=f"{field} = {value}: the public V3 layout has no such model"):
            write_config(Config(**{field: value}))
    v2 = dict(scoring="softmax", normalise=False, n_mtp=0, balance="aux")
    for field, value in (("normalise", True), ("n_mtp", 1), ("rope_interleaved", False)):
        with pytest.raises(CheckpointError, match=f"{field} = {value}: the public V2 layout has no such model"):
            write_config(Config(**v2 | {field: value}))


def test_an_amplitude_without_two_mscales_is_written_out(tmp_path):
    config = Config(mscale=0.5, mscale_all_dim=0.0)
    (tmp_path / "config.json").write_text(json.dumps(write_config(config)))
    back = read_config(tmp_path / "config.json")
    np.testing.assert_allclose(back.mscale, 0.5, rtol=1e-14)
    assert back == Config(mscale=back.mscale, mscale_all_dim=0.0)


def test_the_blocks_of_an_fp8_checkpoint(tmp_path):
    assert read_blocks(FIXTURES / "v3fp8-1/config.json") == (128, 128) and read_blocks(FIXTURES / "v3-2/config.json") is None
    for wrong in ({"quant_method": "gptq", "weight_block_size": [128, 128]}, {"quant_method": "fp8"}, "fp8", [1],
                  {"quant_method": "fp8", "weight_block_size": [128, 0]}, {"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [1, 1]}):
        with pytest.raises(CheckpointError, match="quantization_config is"):
            read_blocks(edited(tmp_path, "v3-2", quantization_config=wrong))
