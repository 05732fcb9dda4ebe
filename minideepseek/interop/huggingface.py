"""Checkpoints in the public layout: config.json and the weights of DeepSeek-V3 and V2, into our tree, and back out.

Derivation: whiteboard/interop/huggingface.md     Source: transformers 5.23, models deepseek_v3 and deepseek_v2
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import math
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from minideepseek.attention.yarn import temperature
from minideepseek.autograd import params
from minideepseek.interop.safetensors import CheckpointError, open_folder, read_json
from minideepseek.model.config import Config, ConfigError
from minideepseek.model.transformer import init, model_outline

FIELDS = {               # ours: theirs
    "vocab_size": "vocab_size", "d_model": "hidden_size", "n_layers": "num_hidden_layers", "d_ff": "intermediate_size",
    "max_positions": "max_position_embeddings", "eps": "rms_norm_eps", "n_heads": "num_attention_heads", "q_rank": "q_lora_rank",
    "kv_rank": "kv_lora_rank", "d_nope": "qk_nope_head_dim", "d_rope": "qk_rope_head_dim", "d_value": "v_head_dim",
    "n_routed": "n_routed_experts", "n_shared": "n_shared_experts", "top_k": "num_experts_per_tok", "d_expert": "moe_intermediate_size",
    "scaling": "routed_scaling_factor",
}
YARN = {"yarn_factor": "factor", "yarn_original": "original_max_position_embeddings", "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow", "mscale": "mscale", "mscale_all_dim": "mscale_all_dim"}
READ = {"model_type", "first_k_dense_replace", "n_group", "topk_group", "norm_topk_prob", "topk_method", "rope_interleave",
        "num_nextn_predict_layers", "rope_parameters", "rope_scaling", "rope_theta", "num_key_value_heads", *FIELDS.values()}
FIXED = {                # keys with the one value that this model has
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "moe_layer_freq": 1,
}
WITHOUT_EFFECT = {       # on what the model computes
    "architectures", "auto_map", "attention_dropout", "aux_loss_alpha", "bos_token_id", "dtype", "eos_token_id", "ep_size", "head_dim",
    "initializer_range", "output_router_logits", "pad_token_id", "pretraining_tp", "qk_head_dim", "router_aux_loss_coef", "scoring_func",
    "seq_aux", "torch_dtype", "transformers_version", "use_cache", "_name_or_path",
}
FLOATS = [np.dtype(d) for d in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)]


def load(folder, dtype=np.float32):
    """A checkpoint folder -> (Config, ModelWeights of arrays).

    dtype: of the arrays, float32 or float64; the values of the file are converted.
    Raises CheckpointError for a configuration we cannot have, or tensors that are missing, unexpected or of another
    shape, each listed by name; OSError when a file cannot be opened.
    """
    config = read_config(Path(folder) / "config.json")
    tensors = open_folder(folder)
    form = model_outline(config)
    entries = {entry.name: entry for entry in layout(form)}
    _compare_names(folder, entries.keys(), {name for name in tensors if tensors[name].size and not _belongs_to_mtp(name, config)})
    outlines = params.flatten(form)
    flat = {name: np.empty(leaf.shape, dtype) for name, leaf in outlines.items()}
    for name, entry in entries.items():
        array, expected = tensors[name], entry.public_shape(outlines)
        if array.shape != expected:
            raise CheckpointError(f"{folder}: {name} has shape {array.shape}, expected {expected}")
        if array.dtype not in FLOATS:
            raise CheckpointError(f"{folder}: {name} is of dtype {array.dtype}, expected one of {', '.join(d.name for d in FLOATS)}")
        entry.unpack(array, flat)
    return config, params.unflatten(flat, form)


def gradients(weights):
    """{checkpoint name: gradient} of weights on which a tape was replayed, in the orientation of the checkpoint.

    weights: ModelWeights of Tensors. A weight that nothing reached has zeros; selection biases have no gradient.
    """
    flat = params.gradients(weights)
    return {entry.name: entry.pack(flat) for entry in layout(params.arrays(weights)) if entry.parts[0] in flat}


class Entry(NamedTuple):
    """One tensor of a checkpoint: which of our arrays it holds, and how.

    A public matrix is the transpose of ours, (out, in), and may stack several of ours: head by head, its rows are those
    of the first part, then those of the second. Vectors and the embedding table are as they are here.
    """
    name: str                    # model.layers.0.self_attn.kv_b_proj.weight
    parts: tuple                 # (layers.0.attention.W_UK, layers.0.attention.W_UV)
    heads: int = 1
    expert: int | None = None    # the index into our stacked experts

    def public_shape(self, flat):
        first, *others = self._ours(flat)
        if self._as_it_is(first):
            return first.shape
        return first.shape[1] + sum(part.shape[1] for part in others), first.shape[0]

    def pack(self, flat):
        """Our arrays -> the public one."""
        first, *others = self._ours(flat)
        if self._as_it_is(first):
            return first
        rows = [part.T.reshape(self.heads, -1, len(first)) for part in (first, *others)]      # (H, rows of the part, in)
        return np.concatenate(rows, axis=1).reshape(-1, len(first))

    def unpack(self, array, flat):
        """The public array -> written into ours."""
        first, *others = self._ours(flat)
        if self._as_it_is(first):
            first[...] = array
            return
        rows, start = array.reshape(self.heads, -1, len(first)), 0
        for part in (first, *others):
            width = part.shape[1] // self.heads
            part[...] = rows[:, start:start + width].reshape(-1, len(first)).T
            start += width

    def _ours(self, flat):
        return [flat[name] if self.expert is None else flat[name][self.expert] for name in self.parts]

    def _as_it_is(self, array):
        return array.ndim == 1 or self.parts == ("E",)


def layout(weights):
    """Every tensor of the checkpoint that these weights make, as Entries. weights: ModelWeights of arrays or outlines."""
    entries = [Entry("model.embed_tokens.weight", ("E",))]
    for i, layer in enumerate(weights.layers):
        entries += _block_layout(f"model.layers.{i}.", f"layers.{i}.", layer)
    return [*entries, Entry("model.norm.weight", ("g_final",)), Entry("lm_head.weight", ("W_head",))]


def _block_layout(public, ours, block):
    """The tensors of one layer; `public` and `ours` are what its names begin with."""
    a, m = ours + "attention.", ours + "ffn."
    heads = block.attention.W_QR.shape[1] // block.attention.W_KR.shape[1]
    named = {"input_layernorm": ours + "g_attention", "post_attention_layernorm": ours + "g_ffn",
             "self_attn.kv_a_layernorm": a + "g_kv", "self_attn.o_proj": a + "W_O"}
    query = "q_proj"
    if block.attention.W_DQ is not None:
        named |= {"self_attn.q_a_proj": a + "W_DQ", "self_attn.q_a_layernorm": a + "g_q"}
        query = "q_b_proj"
    stacked = [Entry(f"{public}self_attn.{query}.weight", (a + "W_UQ", a + "W_QR"), heads),
               Entry(f"{public}self_attn.kv_a_proj_with_mqa.weight", (a + "W_DKV", a + "W_KR")),
               Entry(f"{public}self_attn.kv_b_proj.weight", (a + "W_UK", a + "W_UV"), heads)]
    if hasattr(block.ffn, "W_router"):
        named["mlp.gate"] = m + "W_router"
        for part in ("gate", "up", "down"):
            stacked += [Entry(f"{public}mlp.experts.{e}.{part}_proj.weight", (f"{m}W_{part}",), expert=e) for e in range(len(block.ffn.W_gate))]
            if block.ffn.W_shared_gate is not None:
                named[f"mlp.shared_experts.{part}_proj"] = f"{m}W_shared_{part}"
    else:
        named |= {f"mlp.{part}_proj": f"{m}W_{part}" for part in ("gate", "up", "down")}
    if block.b_select is not None:
        stacked.append(Entry(public + "mlp.gate.e_score_correction_bias", (ours + "b_select",)))
    return [Entry(f"{public}{name}.weight", (part,)) for name, part in named.items()] + stacked


def read_config(path):
    """config.json of a public DeepSeek-V3 or V2 -> Config.

    Raises CheckpointError for another model, keys that do not exist or are missing, or values no model can have.
    """
    public = read_json(path)
    kind = public.get("model_type")
    if kind not in ("deepseek_v3", "deepseek_v2"):
        raise CheckpointError(f"{path}: model_type {kind!r} is neither deepseek_v3 nor deepseek_v2")
    unknown = sorted(public.keys() - READ - FIXED.keys() - WITHOUT_EFFECT)
    if unknown:
        raise CheckpointError(f"{path}: unknown keys: {', '.join(unknown)}")
    missing = sorted(set(FIELDS.values()) - public.keys())
    if missing:
        raise CheckpointError(f"{path}: missing keys: {', '.join(missing)}")
    for key, value in FIXED.items():
        if public.get(key, value) != value:
            raise CheckpointError(f"{path}: {key} = {public[key]!r}, this model has {value!r} only")
    if public.get("num_key_value_heads") not in (None, public["num_attention_heads"]):
        raise CheckpointError(f"{path}: num_key_value_heads = {public['num_key_value_heads']!r} must equal num_attention_heads "
                              f"= {public['num_attention_heads']!r}: latent attention has no groups")
    fields = {ours: public[theirs] for ours, theirs in FIELDS.items()}
    fields |= _routing(public, path, v3=kind == "deepseek_v3") | _rope(public, path)
    fields["n_mtp"] = public.get("num_nextn_predict_layers", 0)
    fields["rope_interleaved"] = public.get("rope_interleave", True)
    fields["n_dense_layers"] = _at_most(public.get("first_k_dense_replace", 0), public["num_hidden_layers"])
    try:
        return Config(**fields)
    except ConfigError as error:
        ours = str(error).split(" ")[0]
        theirs = (FIELDS | YARN).get(ours)
        raise CheckpointError(f"{path}: {error}" + (f" ({ours} is its {theirs})" if theirs not in (None, ours) else "")) from None


def _routing(public, path, v3):
    """The router's fields. V2's public code never normalises, and its greedy choice knows no groups."""
    allowed = (None, "noaux_tc") if v3 else ("greedy", "group_limited_greedy")
    method = public.get("topk_method", None if v3 else "greedy")
    if method not in allowed:
        raise CheckpointError(f"{path}: topk_method {method!r} is not one of {', '.join(map(str, allowed))}")
    scoring = "sigmoid" if v3 else "softmax"
    if public.get("scoring_func", scoring) != scoring:
        raise CheckpointError(f"{path}: scoring_func {public['scoring_func']!r}, {public['model_type']} has {scoring!r}")
    grouped = v3 or method == "group_limited_greedy"
    absent = sorted({"n_group", "topk_group", *(["norm_topk_prob"] if v3 else [])} - public.keys()) if grouped else []
    if absent:
        raise CheckpointError(f"{path}: missing keys: {', '.join(absent)}")
    return {"scoring": scoring, "normalise": public["norm_topk_prob"] if v3 else False, "balance": "bias" if v3 else "aux",
            "n_groups": public["n_group"] if grouped else 1, "n_groups_kept": public["topk_group"] if grouped else 1}


def _rope(public, path):
    """RoPE's fields, from `rope_parameters` or from the older `rope_scaling` and `rope_theta`."""
    rope = public.get("rope_parameters") or {**(public.get("rope_scaling") or {}), "rope_theta": public.get("rope_theta", 10_000.0)}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{path}: rope_parameters is {rope!r}, expected a table")
    kind = rope.get("rope_type", rope.get("type", "default"))
    unknown = sorted(rope.keys() - {"rope_type", "type", "rope_theta"} - ({*YARN.values(), "attention_factor"} if kind == "yarn" else set()))
    if kind not in ("default", "yarn") or unknown:
        raise CheckpointError(f"{path}: RoPE of type {kind!r}" + (f" with unknown keys: {', '.join(unknown)}" if unknown else "")
                              + "; default and yarn are built")
    if kind == "default":
        return {"rope_base": rope.get("rope_theta", 10_000.0), "yarn_factor": 1.0}
    fields = {ours: rope[theirs] for ours, theirs in YARN.items() if rope.get(theirs) is not None}
    missing = sorted({"factor", "original_max_position_embeddings"} - {key for key in rope if rope[key] is not None})
    if missing:
        raise CheckpointError(f"{path}: RoPE of type 'yarn' lacks {', '.join(missing)}")
    fields = {"mscale": 0.0, "mscale_all_dim": 0.0} | fields
    return fields | {"rope_base": rope.get("rope_theta", 10_000.0), "mscale": _mscale(rope.get("attention_factor"), fields, path)}


def _mscale(amplitude, fields, path):
    """The mscale that gives both rotary tables their public amplitude, temperature(mscale) / temperature(mscale_all_dim).

    The public code has two special cases: an explicit attention_factor is the amplitude; and without both mscales the
    amplitude is temperature(1), while the softmax scale still follows mscale_all_dim.
    """
    factor, mscale, all_dim = [fields[name] for name in ("yarn_factor", "mscale", "mscale_all_dim")]
    if not all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in (factor, mscale, all_dim, amplitude or 1.0)):
        raise CheckpointError(f"{path}: factor, mscale, mscale_all_dim and attention_factor must be numbers")
    if (amplitude is None and mscale and all_dim) or (not factor > 1 and amplitude in (None, 1)):
        return mscale
    if not factor > 1:
        raise CheckpointError(f"{path}: attention_factor = {amplitude!r} without a stretch is not built")
    wanted = (temperature(factor) if amplitude is None else amplitude) * temperature(factor, all_dim)
    return (wanted - 1) / (0.1 * math.log(factor))


def _at_most(value, most):
    return min(value, most) if type(value) is int and type(most) is int else value


def _belongs_to_mtp(name, config):
    """The multi-token-prediction modules stand in the checkpoint as layers after the last."""
    return any(name.startswith(f"model.layers.{config.n_layers + k}.") for k in range(config.n_mtp))


def _compare_names(folder, expected, found):
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing or extra:
        lists = [f"{what}: {', '.join(names[:20])}" + (f" and {len(names) - 20} more" if len(names) > 20 else "")
                 for what, names in (("missing tensors", missing), ("unexpected tensors", extra)) if names]
        raise CheckpointError(f"{folder}: {'; '.join(lists)}")


def demo():
    """Where the numbers of one head stand in a public matrix, and a model through the layout and back."""
    config = Config(vocab_size=7, d_model=6, n_layers=2, n_dense_layers=1, d_ff=5, n_heads=2, q_rank=None, kv_rank=3, d_nope=2, d_rope=2,
                    d_value=1, n_routed=2, top_k=1, d_expert=4, n_groups=1, n_groups_kept=1)
    weights = init(config, np.random.default_rng(0), std=1.0)
    flat, entries = params.flatten(weights), {entry.name: entry for entry in layout(weights)}
    print(f"shapes    {len(flat)} arrays of ours, {len(entries)} tensors of the checkpoint")
    attention = weights.layers[0].attention
    public = entries["model.layers.0.self_attn.kv_b_proj.weight"].pack(flat)
    by_hand = [attention.W_UK[:, 0], attention.W_UK[:, 1], attention.W_UV[:, 0], attention.W_UK[:, 2], attention.W_UK[:, 3], attention.W_UV[:, 1]]
    print(f"by hand   kv_b_proj {public.shape}: rows [k k v] of head 0, then [k k v] of head 1: {np.array_equal(public, by_hand)}")
    back = {name: np.empty_like(leaf) for name, leaf in flat.items()}
    for entry in entries.values():
        entry.unpack(entry.pack(flat), back)
    same = all(np.array_equal(back[name], leaf) for name, leaf in flat.items())
    print(f"claim     out to the public layout and back: every one of {params.count(weights)} numbers where it was: {same}")
    assert same and np.array_equal(public, by_hand)


if __name__ == "__main__":
    from minideepseek.interop.huggingface import demo  # the imported copy, so that every name exists once
    demo()
