"""Grouped-query attention: several query heads read one head of keys and values; with a single one, multi-query attention.

Derivation: whiteboard/attention/grouped_query.md     Source: Ainslie et al. 2023, arXiv:2305.13245; Shazeer 2019, arXiv:1911.02150
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import math
from types import SimpleNamespace

import numpy as np

from minideepseek.attention.causal import causal_attention_backward, causal_attention_forward
from minideepseek.attention.kv_cache import cached_floats
from minideepseek.attention.mla import flat_heads, heads_first, heads_last
from minideepseek.attention.multi_head import MHAWeights
from minideepseek.attention.rope import frequencies, rope_backward, rope_forward, rope_tables
from minideepseek.autograd.gradcheck import report
from minideepseek.autograd.tape import op
from minideepseek.basics.linear import linear_backward, linear_forward, matmul


def grouped_query_forward(x, W_Q, W_K, W_V, W_O, *, n_heads, n_kv_heads, scale=None, cos=None, sin=None, interleaved=True, gemm=matmul):
    """Attend with H query heads on G key-value heads: query head h reads group h // (H // G).

    x: (B, T, D)   W_Q: (D, H*K)   W_K: (D, G*K)   W_V: (D, G*V)   W_O: (H*V, D)
    n_heads: H   n_kv_heads: G   cos: (T, K/2) or None   sin: (T, K/2) or None   ->   y: (B, T, D)

    G divides H; G = H is multi_head, G = 1 is multi-query. scale, cos, sin, interleaved, gemm: see multi_head.
    Source: Ainslie et al. 2023, arXiv:2305.13245; Shazeer 2019, arXiv:1911.02150, for G = 1.
    """
    B, T, _ = x.shape
    H, G = n_heads, n_kv_heads
    scale = 1 / math.sqrt(W_Q.shape[1] // H) if scale is None else scale
    cache = SimpleNamespace(n_heads=n_heads, n_kv_heads=n_kv_heads)

    q_flat, cache.W_Q = linear_forward(x, W_Q, gemm=gemm)                       # (B, T, H*K)    # eq. 1
    k_flat, cache.W_K = linear_forward(x, W_K, gemm=gemm)                       # (B, T, G*K)    # eq. 2
    v_flat, cache.W_V = linear_forward(x, W_V, gemm=gemm)                       # (B, T, G*V)    # eq. 3
    q_heads, k_heads = q_flat.reshape(B, T, H, -1), k_flat.reshape(B, T, G, -1)     # (B, T, H, K) (B, T, G, K)
    if cos is None:
        q_turned, k_turned = q_heads, k_heads                                   # (B, T, H, K) (B, T, G, K)
    else:
        q_turned, cache.rope_q = rope_forward(q_heads, cos=cos, sin=sin, interleaved=interleaved)   # (B, T, H, K)   # eq. 4
        k_turned, cache.rope_k = rope_forward(k_heads, cos=cos, sin=sin, interleaved=interleaved)   # (B, T, G, K)   # eq. 5
    q, k_group, v_group = q_turned.swapaxes(1, 2), k_turned.swapaxes(1, 2), heads_first(v_flat, G)     # (B, H, T, K) (B, G, T, K) (B, G, T, V)
    k = np.repeat(k_group, H // G, axis=1)          # 0, 0, 1, 1: repeat        # (B, H, T, K)   # eq. 6
    v = np.repeat(v_group, H // G, axis=1)          # never 0, 1, 0, 1: tile    # (B, H, T, V)   # eq. 7
    o, cache.attention = causal_attention_forward(q, k, v, scale=scale)         # (B, H, T, V)   # eq. 8
    y, cache.W_O = linear_forward(heads_last(o), W_O, gemm=gemm)                # (B, T, D)      # eq. 9
    return y, cache


def grouped_query_backward(dy, cache):
    """The forward read from the bottom up. Roads meet in every shared key and value (H / G heads), and in x."""
    H, G = cache.n_heads, cache.n_kv_heads
    do, dW_O = linear_backward(dy, cache.W_O)                                   # (B, T, H*V) (H*V, D)   # eq. 10
    dq, dk, dv = causal_attention_backward(heads_first(do, H), cache.attention)     # (B, H, T, K) (B, H, T, K) (B, H, T, V)   # eq. 11
    B, _, T, _ = dk.shape
    dv_group = dv.reshape(B, G, H // G, T, -1).sum(axis=2)      # its heads: add    # (B, G, T, V)   # eq. 12
    dk_group = dk.reshape(B, G, H // G, T, -1).sum(axis=2)      # its heads: add    # (B, G, T, K)   # eq. 13
    if hasattr(cache, "rope_q"):
        dk_heads = rope_backward(dk_group.swapaxes(1, 2), cache.rope_k)         # (B, T, G, K)   # eq. 14
        dq_heads = rope_backward(dq.swapaxes(1, 2), cache.rope_q)               # (B, T, H, K)   # eq. 15
    else:
        dk_heads, dq_heads = dk_group.swapaxes(1, 2), dq.swapaxes(1, 2)         # (B, T, G, K) (B, T, H, K)
    dx_v, dW_V = linear_backward(heads_last(dv_group), cache.W_V)               # (B, T, D) (D, G*V)   # eq. 16
    dx_k, dW_K = linear_backward(flat_heads(dk_heads), cache.W_K)               # (B, T, D) (D, G*K)   # eq. 17
    dx_q, dW_Q = linear_backward(flat_heads(dq_heads), cache.W_Q)               # (B, T, D) (D, H*K)   # eq. 18
    dx = dx_q + dx_k + dx_v                         # x fed three roads: add    # (B, T, D)      # eq. 19
    return dx, dW_Q, dW_K, dW_V, dW_O


grouped_query = op(grouped_query_forward, grouped_query_backward)


def grouped_query_examples(rng):
    def case(B, T, D, H, G, K, V, **config):
        shapes = MHAWeights((D, H * K), (D, G * K), (D, G * V), (H * V, D))
        weights = [rng.standard_normal(shape) / shape[0] ** 0.5 for shape in shapes]
        return (rng.standard_normal((B, T, D)), *weights), {"n_heads": H, "n_kv_heads": G} | config

    cos, sin = rope_tables(np.arange(3), frequencies(4))
    return {
        "two groups of three heads": case(2, 4, 5, 6, 2, 4, 3),
        "two groups of two heads, turned": case(1, 3, 5, 4, 2, 4, 3, cos=cos, sin=sin),
        "one group, half-split": case(2, 3, 5, 3, 1, 4, 6, cos=cos, sin=sin, interleaved=False, scale=0.3),
    }


def demo():
    """Four heads on two groups by hand, the gradients, and what a token leaves in the cache."""
    args, config = grouped_query_examples(np.random.default_rng(0))["two groups of three heads"]
    y, _ = grouped_query_forward(*args, **config)
    print("shapes    x", args[0].shape, " ".join(f"{name} {w.shape}" for name, w in zip(MHAWeights._fields, args[1:])), "-> y", y.shape)
    one, values, mix = np.ones((1, 1)), np.array([[10.0, 20.0]]), np.array([[1.0], [2.0], [3.0], [4.0]])
    y, _ = grouped_query_forward(one[None], np.ones((1, 4)), np.ones((1, 2)), values, mix, n_heads=4, n_kv_heads=2)
    print(f"by hand   one token; heads 0 to 3 read 10, 10, 20, 20: y = 1 * 10 + 2 * 10 + 3 * 20 + 4 * 20 = {y.item():g} (tile would say 160)")
    report(grouped_query_forward, grouped_query_backward, grouped_query_examples)

    made = args[2].shape[1] + args[3].shape[1]              # columns of W_K and W_V: the keys and values of one token
    assert made == cached_floats("gqa", n_heads=6, n_kv_heads=2, d_key=4, d_value=3)
    v3 = dict(n_heads=128, d_key=192, d_value=128)
    mha, gqa, mqa = cached_floats("mha", **v3), cached_floats("gqa", n_kv_heads=8, **v3), cached_floats("mqa", **v3)
    print(f"claim     V3's 128 heads would cache {mha:,} floats per token and layer; in 8 groups {gqa:,} ({mha // gqa} times fewer), in one {mqa}")
    assert y.item() == 170 and (mha, gqa, mqa) == (40_960, 2_560, 320)


if __name__ == "__main__":
    from minideepseek.attention.grouped_query import demo  # the imported copy, so that every name exists once
    demo()
