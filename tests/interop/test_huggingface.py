import dataclasses
import errno
import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest

from minideepseek.autograd import params
from minideepseek.autograd.tape import Tape
from minideepseek.interop.huggingface import gradients, load, save
from minideepseek.interop.layout import layout
from minideepseek.interop.safetensors import CheckpointError, SafeTensors, write
from minideepseek.model.transformer import losses, next_token_targets, trainable, transformer
from minideepseek.precision.tiles import FLOAT8
from tests.house import ROOT

FIXTURES = ROOT / "tests/fixtures"


def respelt(tmp_path, fixture, change):
    """A fixture's folder whose tensors went through `change(dict)`."""
    shutil.copy(FIXTURES / fixture / "config.json", tmp_path)
    tensors = dict(SafeTensors(FIXTURES / fixture / "model.safetensors"))
    change(tensors)
    write(tmp_path / "model.safetensors", tensors)
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
        loss = losses(ids, next_token_targets(ids), trained, config).main
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


def test_module_layers_that_disagree_with_the_configuration(tmp_path):
    folder = respelt(tmp_path, "v3mtp-1", lambda t: [t.pop(name) for name in list(t) if name.startswith("model.layers.3.")])
    with pytest.raises(CheckpointError, match=r"announces 2 prediction modules \(num_nextn_predict_layers\), the weights hold 1"):
        load(folder)


def test_a_module_may_repeat_the_shared_tables_but_not_change_them(tmp_path):
    def repeat(tensors):
        tensors["model.layers.2.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.3.shared_head.head.weight"] = tensors["lm_head.weight"]

    load(respelt(tmp_path, "v3mtp-1", repeat))
    with pytest.raises(CheckpointError, match="model.layers.2.embed_tokens.weight differs from model.embed_tokens.weight"):
        load(respelt(tmp_path, "v3mtp-1", lambda t: t.update({"model.layers.2.embed_tokens.weight": t["model.embed_tokens.weight"] + 1})))


def test_fp8_without_its_scale_with_a_wrong_one_and_without_a_quantization_config(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    scale = name + "_scale_inv"
    for change, message in ((lambda t: t.pop(scale), f"{name} is stored in FP8, but its scales {scale} are missing"),
                            (lambda t: t.update({scale: t[scale][:1]}), f"{name}: a matrix (200, 160) in blocks of (128, 128) needs scales (2, 2), got (1, 2)"),
                            (lambda t: t.update({scale: np.ones((2, 2), np.int32)}), f"{scale} is of dtype int32"),
                            (lambda t: t.update({name: t[name].astype(np.float32)}), f"unexpected tensors: {scale}")):
        tensors = dict(SafeTensors(FIXTURES / "v3fp8-1/model.safetensors"))
        change(tensors)
        shutil.copy(FIXTURES / "v3fp8-1/config.json", tmp_path)
        write(tmp_path / "model.safetensors", tensors)
        with pytest.raises(CheckpointError) as caught:
            load(tmp_path)
        assert message in str(caught.value)
    public = json.loads((FIXTURES / "v3fp8-1/config.json").read_text())
    del public["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(public))
    shutil.copy(FIXTURES / "v3fp8-1/model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match="is of dtype float8_e4m3fn, .* or float8_e4m3fn with a quantization_config"):
        load(tmp_path)


def test_a_scale_in_another_shard(tmp_path):
    tensors = dict(SafeTensors(FIXTURES / "v3fp8-1/model.safetensors"))
    shutil.copy(FIXTURES / "v3fp8-1/config.json", tmp_path)
    shards = {"one.safetensors": {}, "two.safetensors": {}}
    for name, array in tensors.items():
        shards["two.safetensors" if name.endswith("_scale_inv") else "one.safetensors"][name] = array
    for shard, held in shards.items():
        write(tmp_path / shard, held)
    home = {name: shard for shard, held in shards.items() for name in held}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": home}))
    whole, sharded = load(FIXTURES / "v3fp8-1")[1], load(tmp_path)[1]
    for ours, theirs in zip(params.flatten(whole).values(), params.flatten(sharded).values(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["v3mtp-2", "v2-13"])
def test_saved_and_loaded_it_is_the_same_model(tmp_path, name):
    config, weights = load(FIXTURES / name)
    save(tmp_path / "saved", config, trainable(weights))
    again, back = load(tmp_path / "saved")
    assert again == config
    for ours, theirs in zip(params.flatten(weights).values(), params.flatten(back).values(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert sorted(os.listdir(tmp_path)) == ["saved"] and sorted(os.listdir(tmp_path / "saved")) == ["config.json", "model.safetensors"]


def test_saved_in_fp8_twice_it_does_not_change_again(tmp_path):
    config, weights = load(FIXTURES / "v3-2")
    save(tmp_path / "once", config, weights, fp8=True)
    save(tmp_path / "twice", *load(tmp_path / "once"), fp8=True)
    once, twice = [SafeTensors(tmp_path / name / "model.safetensors") for name in ("once", "twice")]
    assert {name for name in once if once[name].dtype == FLOAT8} == {name for name in once if name + "_scale_inv" in once}
    assert "lm_head.weight_scale_inv" not in once and "model.layers.1.mlp.gate.weight_scale_inv" not in once
    for name in once:
        if once[name].dtype == FLOAT8:
            np.testing.assert_array_equal(once[name].view(np.uint8), twice[name].view(np.uint8))


def test_a_folder_that_exists_is_not_overwritten_unless_told(tmp_path):
    config, weights = load(FIXTURES / "v3-11")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "precious").write_text("mine")
    with pytest.raises(FileExistsError, match="exists: choose another folder, or say overwrite=True"):
        save(folder, config, weights)
    assert (folder / "precious").read_text() == "mine"
    save(folder, config, weights, overwrite=True)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"] and sorted(os.listdir(tmp_path)) == ["model"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, existing):
    config, weights = load(FIXTURES / "v3-11")
    if existing:
        save(tmp_path / "model", config, weights)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("model/*")}

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path / "model", config, weights, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("model/*")} == before
    assert os.listdir(tmp_path) == (["model"] if existing else [])


def test_what_save_refuses_before_it_begins(tmp_path):
    config, weights = load(FIXTURES / "v3-11")
    with pytest.raises(ValueError, match="dtype = int32 must be one of float64"):
        save(tmp_path / "a", config, weights, dtype=np.int32)
    with pytest.raises(CheckpointError, match="these weights are not those of this configuration: E has shape"):
        save(tmp_path / "a", dataclasses.replace(config, vocab_size=5), weights)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is no folder"):
        save(tmp_path / "file", config, weights, overwrite=True)
    with pytest.raises(ValueError, match="dtype = float16 must be float32 or float64"):
        load(FIXTURES / "v3-11", np.float16)
    assert os.listdir(tmp_path) == ["file"]


def test_in_bfloat16_the_selection_bias_stays_in_float32(tmp_path):
    config, weights = load(FIXTURES / "v3-8")
    save(tmp_path / "narrow", config, weights, dtype=ml_dtypes.bfloat16)
    tensors = SafeTensors(tmp_path / "narrow/model.safetensors")
    assert {tensors[name].dtype.name for name in tensors if name.endswith("_bias")} == {"float32"}
    assert {tensors[name].dtype.name for name in tensors if not name.endswith("_bias")} == {"bfloat16"}
    np.testing.assert_array_equal(load(tmp_path / "narrow")[1].layers[1].b_select, weights.layers[1].b_select)


def test_when_the_last_step_fails_the_old_folder_comes_back(tmp_path, monkeypatch):
    config, weights = load(FIXTURES / "v3-11")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/precious").write_text("mine")
    rename = os.replace

    def failing(source, target):
        if str(target) == str(tmp_path / "model") and "replaced" not in str(source):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="no"):
        save(tmp_path / "model", config, weights, overwrite=True)
    assert os.listdir(tmp_path) == ["model"] and (tmp_path / "model/precious").read_text() == "mine"


def test_the_public_library_loads_what_we_save_and_agrees(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tests.public import float64_throughout

    for name in ("v3-8", "v3mtp-1", "v2-13"):
        config, weights = load(FIXTURES / name, np.float64)
        save(tmp_path / name, config, weights, dtype=np.float64)
        ids = np.load(FIXTURES / name / "golden.npz")["ids"]
        with float64_throughout():
            model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float64, attn_implementation="eager",
                                                                      experts_implementation="eager")
            theirs = model(torch.tensor(ids)).logits.detach().numpy()
        assert np.abs(transformer(ids, weights, config).logits.data - theirs).max() < 1e-12
