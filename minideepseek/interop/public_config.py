"""config.json of the public DeepSeek-V3 and V2, into our Config, and back out.

Derivation: whiteboard/interop/public_config.md     Source: transformers 5.23, models deepseek_v3 and deepseek_v2
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import json
import math
import tempfile
from pathlib import Path

from minideepseek.attention.yarn import temperature
from minideepseek.interop.safetensors import CheckpointError, read_json
from minideepseek.model.config import Config, ConfigError

FIELDS = {               # ours: theirs
    "vocab_size": "vocab_size", "d_model": "hidden_size", "n_layers": "num_hidden_layers", "d_ff": "intermediate_size",
    "max_positions": "max_position_embeddings", "eps": "rms_norm_eps", "n_heads": "num_attention_heads", "q_rank": "q_lora_rank",
    "kv_rank": "kv_lora_rank", "d_nope": "qk_nope_head_dim", "d_rope": "qk_rope_head_dim", "d_value": "v_head_dim",
    "n_routed": "n_routed_experts", "n_shared": "n_shared_experts", "top_k": "num_experts_per_tok", "d_expert": "moe_intermediate_size",
    "scaling": "routed_scaling_factor",
}
YARN = {"yarn_factor": "factor", "yarn_original": "original_max_position_embeddings", "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow", "mscale": "mscale", "mscale_all_dim": "mscale_all_dim"}
READ = {"model_type", "scoring_func", "first_k_dense_replace", "n_group", "topk_group", "norm_topk_prob", "topk_method", "rope_interleave",
        "num_nextn_predict_layers", "mtp_hidden_states_first", "quantization_config", "rope_parameters", "rope_scaling", "rope_theta", "num_key_value_heads", *FIELDS.values()}
OTHERS = {"n_groups": "n_group", "n_groups_kept": "topk_group", "n_dense_layers": "first_k_dense_replace", "n_mtp": "num_nextn_predict_layers",
          "rope_base": "rope_theta", "normalise": "norm_topk_prob", "rope_interleaved": "rope_interleave"}
FIXED = {                # keys with the one value that this model has
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "moe_layer_freq": 1,
}
WITHOUT_EFFECT = {       # on what the model computes (but the public code gives the embedding of pad_token_id no gradient)
    "architectures", "auto_map", "attention_dropout", "aux_loss_alpha", "bos_token_id", "dtype", "eos_token_id", "ep_size", "head_dim",
    "initializer_range", "output_router_logits", "pad_token_id", "pretraining_tp", "qk_head_dim", "router_aux_loss_coef", "seq_aux", "torch_dtype", "transformers_version", "use_cache", "_name_or_path",
}


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
    missing = sorted({"first_k_dense_replace", *FIELDS.values()} - public.keys())
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
    fields["mtp_embedding_first"] = not public.get("mtp_hidden_states_first", False)
    fields["rope_interleaved"] = public.get("rope_interleave", True) if kind == "deepseek_v3" else True      # V2 knows no other
    fields["n_dense_layers"] = _at_most(public["first_k_dense_replace"], public["num_hidden_layers"])
    try:
        return Config(**fields)
    except ConfigError as error:
        ours = str(error).split(" ")[0]
        theirs = (FIELDS | YARN | OTHERS).get(ours)
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
    rope = public.get("rope_parameters") or public.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{path}: rope_parameters is {rope!r}, expected a table")
    rope = {"rope_theta": public.get("rope_theta", 10_000.0)} | rope
    kind = rope.get("rope_type", rope.get("type", "default"))
    unknown = sorted(rope.keys() - {"rope_type", "type", "rope_theta"} - ({*YARN.values(), "attention_factor"} if kind == "yarn" else set()))
    if kind not in ("default", "yarn") or unknown:
        raise CheckpointError(f"{path}: RoPE of type {kind!r}" + (f" with unknown keys: {', '.join(unknown)}" if unknown else "")
                              + "; default and yarn are built")
    if kind == "default":
        return {"rope_base": rope["rope_theta"], "yarn_factor": 1.0}
    fields = {ours: rope[theirs] for ours, theirs in YARN.items() if rope.get(theirs) is not None}
    missing = sorted({"factor", "original_max_position_embeddings"} - {key for key in rope if rope[key] is not None})
    if missing:
        raise CheckpointError(f"{path}: RoPE of type 'yarn' lacks {', '.join(missing)}")
    fields = {"mscale": 0.0, "mscale_all_dim": 0.0} | fields
    return fields | {"rope_base": rope["rope_theta"], "mscale": _mscale(rope.get("attention_factor"), fields, path)}


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


def read_blocks(path):
    """The block size of a checkpoint whose matrices are stored in FP8, as (rows, columns); None for any other.

    Raises CheckpointError for a quantisation that is not this one.
    """
    stored = read_json(path).get("quantization_config")
    if stored is None:
        return None
    size = stored.get("weight_block_size") if isinstance(stored, dict) else None
    fits = isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
    if not fits or stored.get("quant_method") != "fp8" or stored.get("fmt", "e4m3") != "e4m3":
        raise CheckpointError(f"{path}: quantization_config is {stored!r}; built is quant_method fp8, fmt e4m3, with weight_block_size [rows, columns]")
    return tuple(size)


def write_config(config, *, dtype="float32", blocks=None):
    """Our Config -> the table of a public config.json.

    dtype: of the stored weights   blocks: (rows, columns) when matrices are stored in FP8
    Raises CheckpointError for a model that the public layout cannot describe.
    """
    if config.attention != "mla":
        raise CheckpointError(f"attention = {config.attention!r}: the public layout has latent attention only")
    v3 = config.scoring == "sigmoid"
    v2_cannot = {"normalise": config.normalise, "n_mtp": config.n_mtp > 0, "rope_interleaved": not config.rope_interleaved}
    for name, cannot in (v2_cannot if not v3 else {"mtp_reads_normed": config.n_mtp and not config.mtp_reads_normed}).items():
        if cannot:
            raise CheckpointError(f"{name} = {getattr(config, name)!r}: the public {'V3' if v3 else 'V2'} layout has no such model")
    public = {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()} | FIXED | {
        "architectures": ["DeepseekV3ForCausalLM" if v3 else "DeepseekV2ForCausalLM"], "model_type": "deepseek_v3" if v3 else "deepseek_v2",
        "dtype": dtype, "num_key_value_heads": config.n_heads, "first_k_dense_replace": config.n_dense_layers, "n_group": config.n_groups,
        "topk_group": config.n_groups_kept, "norm_topk_prob": config.normalise, "rope_parameters": _public_rope(config)}
    del public["moe_layer_freq"]
    if v3:
        del public["mlp_bias"]
        public |= {"rope_interleave": config.rope_interleaved, "num_nextn_predict_layers": config.n_mtp}
        if not config.mtp_embedding_first:
            public["mtp_hidden_states_first"] = True
    else:
        public["topk_method"] = "group_limited_greedy" if config.n_groups > 1 else "greedy"
    if blocks is not None:
        public["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(blocks)}
    return dict(sorted(public.items()))


def _public_rope(config):
    rope = {"rope_theta": float(config.rope_base), "rope_type": "default"}
    if config.yarn_factor > 1:
        rope |= {"rope_type": "yarn"} | {theirs: getattr(config, ours) for ours, theirs in YARN.items()}
        if not (config.mscale and config.mscale_all_dim):       # there the public code has a rule of its own: say what is meant
            rope["attention_factor"] = temperature(config.yarn_factor, config.mscale) / temperature(config.yarn_factor, config.mscale_all_dim)
    return rope


def demo():
    """V3's own configuration, out to the public keys and back, and three files that describe no model of ours."""
    config = Config()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")

        def read(**changes):
            path.write_text(json.dumps(write_config(config) | changes), encoding="utf-8")
            return read_config(path)

        print(f"shapes    {len(write_config(config))} public keys <-> {len(config.to_dict())} fields")
        print(f"by hand   kv_lora_rank {write_config(config)['kv_lora_rank']} is kv_rank {config.kv_rank}")
        refused = 0
        for wrong in ({"hiden_size": 1}, {"model_type": "llama"}, {"num_experts_per_tok": 200}):
            try:
                read(**wrong)
            except CheckpointError as error:
                refused += 1
                print("refused  ", str(error).removeprefix(str(path) + ": "))
        same = read() == config
    print(f"claim     {refused} of 3 refused; V3 through the public keys and back is the same configuration: {same}")
    assert refused == 3 and same


if __name__ == "__main__":
    from minideepseek.interop.public_config import demo  # the imported copy, so that every name exists once
    demo()
