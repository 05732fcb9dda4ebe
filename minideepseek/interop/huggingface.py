"""Checkpoints in the public layout: load one into our tree of weights, give gradients its names, save one.

Derivation: whiteboard/interop/huggingface.md     Source: transformers 5.23; DeepSeek-V3's README_WEIGHTS for FP8
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import json
import os
import shutil
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np

from minideepseek.autograd import params
from minideepseek.interop.layout import SHARED, layout
from minideepseek.interop.public_config import read_blocks, read_config, write_config
from minideepseek.interop.safetensors import CheckpointError, open_folder, replacing, sync_folder, write
from minideepseek.model.config import Config
from minideepseek.model.transformer import init, model_outline
from minideepseek.precision.tiles import FLOAT8, dequantise_blocks, quantise_blocks

FLOATS = [np.dtype(d) for d in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)]
SCALES = [*FLOATS, np.dtype(ml_dtypes.float8_e8m0fnu)]
HIGH_PRECISION = ("norm", "embed_tokens", "lm_head", "mlp.gate.", "eh_proj")     # what an FP8 checkpoint does not quantise


def load(folder, dtype=np.float32):
    """A checkpoint folder -> (Config, ModelWeights of arrays).

    dtype: of the arrays, float32 or float64; the values of the file are converted, FP8 blocks multiplied by their scales.
    Raises CheckpointError for a configuration we cannot have, or tensors that are missing, unexpected or of another
    shape or dtype, listed by name; OSError when a file cannot be opened.
    """
    if np.dtype(dtype) not in (np.float32, np.float64):
        raise ValueError(f"dtype = {np.dtype(dtype)} must be float32 or float64")
    path = Path(folder) / "config.json"
    config, blocks, tensors = read_config(path), read_blocks(path), open_folder(folder)
    form = model_outline(config)
    outlines, entries = params.flatten(form), layout(form)
    _compare_names(folder, {entry.name for entry in entries}, tensors, config)
    flat = {name: np.empty(leaf.shape, dtype) for name, leaf in outlines.items()}
    for entry in entries:
        entry.unpack(_read(folder, entry.name, tensors, entry.public_shape(outlines), blocks, dtype), flat)
    return config, params.unflatten(flat, form)


def save(folder, config, weights, *, dtype=np.float32, fp8=False, overwrite=False):
    """Write config.json and model.safetensors into a new folder, whole or not at all.

    weights: ModelWeights of arrays or Tensors   dtype: of the stored numbers   fp8: matrices of attention and
    feed-forward layers as float8_e4m3fn in blocks of 128 x 128 with their scales; the rest stays in dtype.
    overwrite: replace a folder that exists.
    Raises FileExistsError for a folder that exists; CheckpointError for a model the public layout cannot describe;
    OSError (a full disk) after removing what was begun.
    """
    folder, weights = Path(folder), params.arrays(weights)
    if folder.exists() and not (overwrite and folder.is_dir() and not folder.is_symlink()):
        raise FileExistsError(f"{folder} exists: choose another folder, or say overwrite=True" if not overwrite else f"{folder} exists and is no folder")
    if np.dtype(dtype) not in FLOATS:
        raise ValueError(f"dtype = {np.dtype(dtype)} must be one of {', '.join(d.name for d in FLOATS)}")
    try:
        params.unflatten(params.flatten(weights), model_outline(config))
    except ValueError as error:
        raise CheckpointError(f"these weights are not those of this configuration: {error}") from None
    blocks = (128, 128) if fp8 else None
    public = write_config(config, dtype=np.dtype(dtype).name, blocks=blocks)
    folder.parent.mkdir(parents=True, exist_ok=True)
    begun = folder.with_name(f".{folder.name}.{os.getpid()}.begun")
    begun.mkdir()
    try:
        with replacing(begun / "config.json") as file:
            file.write(json.dumps(public, indent=2).encode("utf-8"))
        write(begun / "model.safetensors", public_tensors(weights, dtype, blocks))
        _put_in_place(begun, folder)
    except BaseException:
        shutil.rmtree(begun, ignore_errors=True)
        raise


def _put_in_place(begun, folder):
    """Give a finished folder its name. A folder that has the name steps aside first, and comes back when this fails."""
    aside = begun.with_name(begun.name + ".replaced")
    try:
        if folder.exists():
            os.replace(folder, aside)
        os.replace(begun, folder)
    except BaseException:
        if aside.exists() and not folder.exists():
            os.replace(aside, folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)
    sync_folder(folder.parent)


def public_tensors(weights, dtype=np.float32, blocks=None):
    """{checkpoint name: array} of weights; with blocks, matrices as FP8 and beside each its weight_scale_inv."""
    flat, tensors = params.flatten(weights), {}
    for entry in layout(weights):
        array = entry.pack(flat)
        if blocks is None or array.ndim != 2 or any(part in entry.name for part in HIGH_PRECISION):
            wide = np.promote_types(dtype, np.float32) if entry.name.endswith("_bias") else dtype       # a small step of a bias would be lost
            tensors[entry.name] = array.astype(wide)
        else:
            tensors[entry.name], tensors[entry.name + "_scale_inv"] = quantise_blocks(array, blocks)
    return tensors


def gradients(weights):
    """{checkpoint name: gradient} of weights on which a tape was replayed, in the orientation of the checkpoint.

    weights: ModelWeights of Tensors. A weight that nothing reached has zeros; selection biases have no gradient.
    """
    flat = params.gradients(weights)
    return {entry.name: entry.pack(flat) for entry in layout(params.arrays(weights)) if entry.parts[0] in flat}


def _read(folder, name, tensors, shape, blocks, dtype):
    """One tensor as an array of floats; FP8 is multiplied by the scales of its blocks, wherever they are stored."""
    array = tensors[name]
    if array.shape != shape:
        raise CheckpointError(f"{folder}: {name} has shape {array.shape}, expected {shape}")
    if array.dtype == FLOAT8 and blocks is not None:
        if name + "_scale_inv" not in tensors:
            raise CheckpointError(f"{folder}: {name} is stored in FP8, but its scales {name}_scale_inv are missing")
        scale = tensors[name + "_scale_inv"]
        if scale.dtype not in SCALES:
            raise CheckpointError(f"{folder}: {name}_scale_inv is of dtype {scale.dtype}, expected one of {', '.join(d.name for d in SCALES)}")
        try:
            return dequantise_blocks(array, scale, blocks, dtype)
        except ValueError as error:
            raise CheckpointError(f"{folder}: {name}: {error}") from None
    if array.dtype not in FLOATS:
        known = ", ".join(d.name for d in FLOATS)
        raise CheckpointError(f"{folder}: {name} is of dtype {array.dtype}, expected one of {known}"
                              + (", or float8_e4m3fn with a quantization_config in config.json" if array.dtype == FLOAT8 else ""))
    return array


def _compare_names(folder, expected, tensors, config):
    """Every expected tensor is there, and nothing else: but a scale beside FP8, and a module's copies of shared tables."""
    held = sum(name.endswith(".eh_proj.weight") for name in tensors)
    if held != config.n_mtp:
        raise CheckpointError(f"{folder}: config.json announces {config.n_mtp} prediction modules (num_nextn_predict_layers), the weights hold {held}"
                              + ("; write 0 there to load the main model alone" if held == 0 else ""))
    copies = {f"model.layers.{config.n_layers + k}.{name}": original for k in range(config.n_mtp) for name, original in SHARED.items()}
    found = {name for name in tensors if not (
        name in copies or name.endswith("_scale_inv") and tensors.get(name.removesuffix("_scale_inv"), np.empty(0)).dtype == FLOAT8)}
    missing, extra = sorted(expected - found), sorted(name for name in found - expected if tensors[name].size)
    if missing or extra:
        lists = [f"{what}: {', '.join(names[:20])}" + (f" and {len(names) - 20} more" if len(names) > 20 else "")
                 for what, names in (("missing tensors", missing), ("unexpected tensors", extra)) if names]
        raise CheckpointError(f"{folder}: {'; '.join(lists)}")
    for name, original in copies.items():
        if name in tensors and not np.array_equal(tensors[name], tensors[original]):
            raise CheckpointError(f"{folder}: {name} differs from {original}, which the prediction modules share")


def demo():
    """A model saved and loaded, in float32 and in FP8, and a folder that is not overwritten."""
    config = Config(vocab_size=11, d_model=8, n_layers=2, n_dense_layers=1, d_ff=6, n_heads=2, q_rank=4, kv_rank=4, d_nope=4, d_rope=2, d_value=4,
                    n_routed=4, top_k=2, d_expert=5, n_groups=2, n_groups_kept=1)
    weights = init(config, np.random.default_rng(0), std=0.1)
    with tempfile.TemporaryDirectory() as parent:
        folder, narrow = Path(parent, "model"), Path(parent, "fp8")
        save(folder, config, weights)
        save(narrow, config, weights, fp8=True)
        loaded_config, loaded = load(folder)
        _, rounded = load(narrow)
        print(f"shapes    {params.count(weights)} numbers in {len(params.flatten(weights))} arrays -> {len(public_tensors(weights))} public tensors")
        pairs = [[params.flatten(tree)[name] for tree in (weights, loaded, rounded)] for name in params.flatten(weights)]
        same = config == loaded_config and all(np.array_equal(ours, back) for ours, back, _ in pairs)
        worst = max(np.abs(fp8 - ours).max() / max(np.abs(ours).max(), 1e-9) for ours, _, fp8 in pairs)
        try:
            save(folder, config, weights)
            refused = False
        except FileExistsError:
            refused = True
    print(f"by hand   FP8 keeps 4 significant bits: worst error {worst:.3f} of a tensor's largest entry, at most 1/16 of its octave")
    print(f"claim     saved and loaded, every number is the same: {same}; a second save into the folder is refused: {refused}")
    assert same and refused and worst < 1 / 16


if __name__ == "__main__":
    from minideepseek.interop.huggingface import demo  # the imported copy, so that every name exists once
    demo()
