"""One transformer layer: attention and a feed-forward layer, each on a normed copy, each added back to the stream.

Derivation: whiteboard/model/block.md     Source: DeepSeek-V3, arXiv:2412.19437, sec. 2.1, fig. 2
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

from typing import NamedTuple

import numpy as np

from minideepseek.attention.grouped_query import grouped_query
from minideepseek.attention.mla import MLAWeights, mla
from minideepseek.attention.multi_head import MHAWeights
from minideepseek.attention.rope import frequencies, rope_tables
from minideepseek.attention.yarn import softmax_scale, temperature, yarn_frequencies
from minideepseek.autograd.params import count, flatten, outline, tensors, unflatten
from minideepseek.autograd.tape import Tape, Tensor
from minideepseek.basics.linear import matmul
from minideepseek.basics.residual import add
from minideepseek.basics.rmsnorm import rmsnorm
from minideepseek.basics.swiglu import SwiGLUWeights, swiglu
from minideepseek.model.config import Config
from minideepseek.moe.deepseek_moe import MoEWeights, deepseek_moe


class BlockWeights(NamedTuple):
    """The weights of one layer."""
    g_attention: np.ndarray              # (D,)   the norm before attention
    attention: MLAWeights | MHAWeights
    g_ffn: np.ndarray                    # (D,)   the norm before the feed-forward layer
    ffn: SwiGLUWeights | MoEWeights      # dense, or experts
    b_select: np.ndarray | None          # (E,)   only selects experts; moved by the balancing rule, never by a gradient


class Routed(NamedTuple):
    """What balancing wants to know of a layer with experts."""
    chosen: object                       # Tensor (B, T, top_k) int: the experts of every token
    x: object                            # Tensor (B, T, D): what the router read


CONSTANT = ("b_select",)                 # the leaves of the weights that are never trained by a gradient


def block(x, weights, config, cos, sin, *, gemm=matmul):
    """One layer, six records on the tape: norm, attention, add, norm, feed-forward, add.

    x: (B, T, D)   weights: BlockWeights   cos, sin: (T, R/2), of `position_tables`
    -> x: (B, T, D)   routed: Routed, or None in a dense layer

    Source: DeepSeek-V3, arXiv:2412.19437, fig. 2; pre-norm, no dropout, no bias in any projection.
    """
    n = rmsnorm(x, weights.g_attention, eps=config.eps)                                                             # eq. 1
    a = attend(n, weights.attention, config, cos, sin, gemm=gemm)                                                   # eq. 2
    h = add(x, a)                                                                                                   # eq. 3
    m = rmsnorm(h, weights.g_ffn, eps=config.eps)                                                                   # eq. 4
    if isinstance(weights.ffn, MoEWeights):
        f, chosen = deepseek_moe(m, *weights.ffn, **routing_options(config), b_select=weights.b_select, gemm=gemm)  # eq. 5
        routed = Routed(chosen, m)
    else:
        f, routed = swiglu(m, *weights.ffn, gemm=gemm), None                                                        # eq. 6
    return add(h, f), routed                                                                                        # eq. 7


def attend(n, weights, config, cos, sin, *, gemm=matmul):
    """The attention of a configuration: V3's latent one, or a rung below it (mha, gqa, mqa) with RoPE over whole heads."""
    if config.attention == "mla":
        return mla(n, *weights, **attention_options(config), cos=cos, sin=sin, tile=config.flash_tile, gemm=gemm)
    return grouped_query(n, *weights, n_heads=config.n_heads, n_kv_heads=config.kv_heads, scale=attention_options(config)["scale"],
                         cos=cos, sin=sin, interleaved=config.rope_interleaved, gemm=gemm)


def attention_options(config):
    """What `mla` wants to know of a configuration, beside the position tables.

    Not config.eps: the norms of its latents keep their 1e-6 in the public code, whatever rms_norm_eps says.
    """
    return {"n_heads": config.n_heads, "interleaved": config.rope_interleaved,
            "scale": softmax_scale(config.d_nope + config.d_rope, config.yarn_factor, config.mscale_all_dim)}


def routing_options(config):
    """What `deepseek_moe` wants to know of a configuration."""
    return {"top_k": config.top_k, "scoring": config.scoring, "n_groups": config.n_groups,
            "n_groups_kept": config.n_groups_kept, "normalise": config.normalise, "scaling": config.scaling}


def position_tables(config, positions, dtype):
    """cos and sin for some positions, stretched by YaRN when the configuration asks for it: (T, R/2) each.

    With two mscales that differ, the public code multiplies both tables by the ratio of their temperatures.
    """
    theta = frequencies(config.rotary, config.rope_base)
    amplitude = 1.0
    if config.yarn_factor > 1:
        theta = yarn_frequencies(config.rotary, config.rope_base, factor=config.yarn_factor, original=config.yarn_original,
                                 beta_fast=config.yarn_beta_fast, beta_slow=config.yarn_beta_slow)
        amplitude = temperature(config.yarn_factor, config.mscale) / temperature(config.yarn_factor, config.mscale_all_dim)
    cos, sin = rope_tables(positions, theta)
    return (cos * amplitude).astype(dtype), (sin * amplitude).astype(dtype)


def block_outline(config, dense):
    """The weights of a layer as arrays with a shape and no memory; None where the configuration has no such weight."""
    D, C, Q, H, E, F = config.d_model, config.kv_rank, config.q_rank, config.n_heads, config.n_routed, config.d_expert
    N, R, V, L, S = config.d_nope, config.d_rope, config.d_value, config.q_rank or config.d_model, config.n_shared * config.d_expert
    if config.attention != "mla":
        K, G = N + R, config.kv_heads
        attention = MHAWeights(outline(D, H * K), outline(D, G * K), outline(D, G * V), outline(H * V, D))
    else:
        attention = MLAWeights(
            W_DQ=outline(D, Q) if Q else None, g_q=outline(Q) if Q else None, W_UQ=outline(L, H * N), W_QR=outline(L, H * R),
            W_DKV=outline(D, C), W_KR=outline(D, R), g_kv=outline(C), W_UK=outline(C, H * N), W_UV=outline(C, H * V), W_O=outline(H * V, D))
    if dense:
        ffn = SwiGLUWeights(outline(D, config.d_ff), outline(D, config.d_ff), outline(config.d_ff, D))
    else:
        shared = (outline(D, S), outline(D, S), outline(S, D)) if S else (None, None, None)
        ffn = MoEWeights(outline(D, E), outline(E, D, F), outline(E, D, F), outline(E, F, D), *shared)
    has_bias = not dense and config.scoring == "sigmoid"
    return BlockWeights(outline(D), attention, outline(D), ffn, outline(E) if has_bias else None)


def demo():
    """The six records of a layer with experts, and a layer that says nothing."""
    config = Config(d_model=8, n_heads=2, q_rank=6, kv_rank=4, d_nope=4, d_rope=2, d_value=3, n_routed=4, top_k=2, d_expert=5,
                    n_groups=2, n_groups_kept=1, n_layers=1, n_dense_layers=0)
    rng = np.random.default_rng(0)
    form = block_outline(config, dense=False)
    weights = unflatten({name: rng.standard_normal(leaf.shape) for name, leaf in flatten(form).items()}, form)
    cos, sin = position_tables(config, np.arange(3), np.float64)
    x = Tensor(rng.standard_normal((1, 3, 8)), "x")
    with Tape() as tape:
        y, routed = block(x, tensors(weights, constant=CONSTANT), config, cos, sin)
    print(f"shapes    x {x.data.shape}, {count(weights)} weights -> y {y.data.shape}, chosen {routed.chosen.data.shape}")
    print("records   " + ", ".join(record.name for record in tape.records))

    silent = weights._replace(attention=weights.attention._replace(W_O=0 * weights.attention.W_O),
                              ffn=weights.ffn._replace(W_down=0 * weights.ffn.W_down, W_shared_down=0 * weights.ffn.W_shared_down))
    y, _ = block(x, silent, config, cos, sin)
    same = np.array_equal(y.data, x.data)
    print(f"claim     with all output matrices zero the layer passes its input on, bit for bit: {same}")
    assert same and [record.name for record in tape.records] == ["rmsnorm", "mla", "add", "rmsnorm", "deepseek_moe", "add"]


if __name__ == "__main__":
    from minideepseek.model.block import demo  # the imported copy, so that every name exists once
    demo()
