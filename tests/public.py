"""Random tiny models of the public implementation, lifted to float64: what ours is compared with. Needs torch and transformers."""
import contextlib
import json
from pathlib import Path

import numpy as np


@contextlib.contextmanager
def float64_throughout():
    """The public code computes router, norms and rotary tables in float32 whatever the model's dtype: lift these too."""
    import torch

    saved = torch.float32, torch.float, torch.Tensor.float
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = saved


def random_config(kind, seed):
    """A random public configuration: "deepseek_v3" or "deepseek_v2"."""
    from transformers import DeepseekV2Config, DeepseekV3Config

    rng = np.random.default_rng(seed)
    pick = lambda *values: values[rng.integers(len(values))]
    heads, groups, per_group = pick(1, 2, 4), pick(1, 2, 4), pick(2, 3)
    kept = int(rng.integers(1, groups + 1))
    experts = groups * per_group
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if rng.random() < 0.6:
        rope = {"rope_type": "yarn", "rope_theta": pick(10000.0, 1000.0), "factor": pick(4.0, 8.0, 40.0), "beta_fast": pick(32, 8), "beta_slow": 1,
                "mscale": pick(1.0, 0.707), "mscale_all_dim": pick(1.0, 0.707), "original_max_position_embeddings": pick(32, 64, 4096)}
        for key in ("mscale", "mscale_all_dim"):
            if rng.random() < 0.2:
                del rope[key]
        if rng.random() < 0.1:
            rope["attention_factor"] = 1.3
    fields = dict(
        vocab_size=61, hidden_size=heads * 4 * int(rng.integers(2, 5)), intermediate_size=20, moe_intermediate_size=pick(6, 9),
        num_hidden_layers=pick(1, 2, 3), rms_norm_eps=pick(1e-6, 1e-5, 1e-3), num_attention_heads=heads, num_key_value_heads=heads, n_shared_experts=pick(1, 2),
        n_routed_experts=experts, num_experts_per_tok=int(rng.integers(1, kept * per_group + 1)), n_group=groups, topk_group=kept,
        q_lora_rank=pick(None, 10), kv_lora_rank=pick(8, 12), qk_nope_head_dim=pick(4, 8), qk_rope_head_dim=pick(2, 4, 8), v_head_dim=pick(4, 6),
        first_k_dense_replace=pick(0, 1, 2), routed_scaling_factor=pick(1.0, 2.5), max_position_embeddings=128,
        rope_parameters=rope, initializer_range=0.2, attn_implementation="eager", experts_implementation="eager", bos_token_id=0, eos_token_id=1)
    if kind == "deepseek_v2":
        return DeepseekV2Config(**fields, topk_method=pick("greedy", "group_limited_greedy"), norm_topk_prob=False)
    return DeepseekV3Config(**fields, num_nextn_predict_layers=0, norm_topk_prob=pick(True, False), rope_interleave=pick(True, False))


def make(folder, kind, seed):
    """Write a random public checkpoint with its golden.npz into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    with float64_throughout():
        model = AutoModelForCausalLM.from_config(random_config(kind, seed), dtype=torch.float64)
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if "norm" in name:
                    tensor.copy_(1 + 0.1 * torch.randn(tensor.shape))
                elif "e_score_correction_bias" in name:
                    tensor.copy_(0.2 * torch.randn(tensor.shape))
                elif name.endswith("weight"):
                    tensor.copy_((0.2 * torch.randn(tensor.shape)).to(torch.float16).to(torch.float64))
        ids = torch.tensor(rng.integers(0, 61, (2, 17)))
        model.eval()
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        golden = {"ids": ids.numpy(), "logits": out.logits.detach().numpy(), "loss": out.loss.detach().numpy()}
    model.save_pretrained(folder)
    golden |= {f"grad/{name}": gradient for name, gradient in public_gradients(model).items()}
    np.savez(Path(folder) / "golden.npz", **golden)
    return json.loads((Path(folder) / "config.json").read_text())


def public_gradients(model):
    """{checkpoint name: gradient}; the public code keeps its experts stacked, as (E, 2F, D) and (E, D, F)."""
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = np.zeros(tuple(parameter.shape)) if parameter.grad is None else parameter.grad.numpy()
        head, _, tail = name.rpartition(".experts.")
        for e in range(len(gradient) if head else 0):
            if tail == "gate_up_proj":
                gate, up = np.split(gradient[e], 2)
                gradients |= {f"{head}.experts.{e}.gate_proj.weight": gate, f"{head}.experts.{e}.up_proj.weight": up}
            else:
                gradients[f"{head}.experts.{e}.{tail}.weight"] = gradient[e]
        if not head:
            gradients[name] = gradient
    return gradients
