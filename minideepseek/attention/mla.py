"""Multi-head latent attention: keys and values of all heads from one small latent, position in one shared key.

Derivation: whiteboard/attention/mla.md     Source: DeepSeek-V3, arXiv:2412.19437, sec. 2.1.1
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from minideepseek.attention.causal import causal_attention_backward, causal_attention_forward
from minideepseek.attention.flash import flash_attention_backward, flash_attention_forward
from minideepseek.attention.rope import frequencies, rope_backward, rope_forward, rope_tables
from minideepseek.autograd.gradcheck import report
from minideepseek.autograd.tape import op
from minideepseek.basics.linear import linear_backward, linear_forward, matmul
from minideepseek.basics.rmsnorm import rmsnorm_backward, rmsnorm_forward


class MLAWeights(NamedTuple):
    """The weights in the order of mla's arguments. Without a query latent W_DQ and g_q are None and W_UQ, W_QR read x."""
    W_DQ: np.ndarray | None      # (D, Q)      down to the query latent
    g_q: np.ndarray | None       # (Q,)        its norm
    W_UQ: np.ndarray             # (Q, H*N)    up to the queries without position; (D, H*N) without a latent
    W_QR: np.ndarray             # (Q, H*R)    up to the queries with position;    (D, H*R) without a latent
    W_DKV: np.ndarray            # (D, C)      down to the key-value latent
    W_KR: np.ndarray             # (D, R)      the key with position, one for all heads
    g_kv: np.ndarray             # (C,)        the latent's norm
    W_UK: np.ndarray             # (C, H*N)    up to the keys without position
    W_UV: np.ndarray             # (C, H*V)    up to the values
    W_O: np.ndarray              # (H*V, D)    back to the model width


def heads_first(x, n_heads):
    """(B, T, H*K) -> (B, H, T, K)."""
    B, T, _ = x.shape
    return x.reshape(B, T, n_heads, -1).swapaxes(1, 2)


def heads_last(x):
    """(B, H, T, K) -> (B, T, H*K): the inverse, which is also its gradient."""
    return flat_heads(x.swapaxes(1, 2))


def flat_heads(x):
    """(B, T, H, K) -> (B, T, H*K)."""
    B, T, H, K = x.shape
    return x.reshape(B, T, H * K)


def mla_forward(x, W_DQ, g_q, W_UQ, W_QR, W_DKV, W_KR, g_kv, W_UK, W_UV, W_O, *,
                n_heads, cos, sin, scale, eps=1e-6, interleaved=True, tile=None, gemm=matmul):
    """Attend through a latent: c_kv = norm(x W_DKV) holds every head's keys and values, k_rope the position.

    x: (B, T, D)   W_DQ: (D, Q) or None   g_q: (Q,) or None   W_UQ: (L, H*N)   W_QR: (L, H*R)   W_DKV: (D, C)
    W_KR: (D, R)   g_kv: (C,)   W_UK: (C, H*N)   W_UV: (C, H*V)   W_O: (H*V, D)
    n_heads: H   cos: (T, R/2)   sin: (T, R/2)   ->   y: (B, T, D)

    L is Q with a query latent, D without (V2-Lite). scale: 1 / sqrt(N + R), times YaRN's m^2. eps: of both norms.
    cos, sin, interleaved: see rope. tile: None for the dense core, else FlashAttention with tiles of that many tokens:
    the same numbers up to rounding, in less memory. gemm: see linear.
    Source: DeepSeek-V3, arXiv:2412.19437, eq. 1-11; the norms of both latents are in every released model, not there.
    """
    cache = SimpleNamespace(n_heads=n_heads, d_nope=W_UK.shape[1] // n_heads)
    H, N = n_heads, cache.d_nope

    if W_DQ is None:
        c_q = x
    else:
        c_q_raw, cache.W_DQ = linear_forward(x, W_DQ, gemm=gemm)                        # (B, T, Q)      # eq. 1
        c_q, cache.norm_q = rmsnorm_forward(c_q_raw, g_q, eps=eps)                      # (B, T, Q)      # eq. 2
    q_nope, cache.W_UQ = linear_forward(c_q, W_UQ, gemm=gemm)                           # (B, T, H*N)    # eq. 3
    q_raw, cache.W_QR = linear_forward(c_q, W_QR, gemm=gemm)                            # (B, T, H*R)    # eq. 4
    q_raw_heads = q_raw.reshape(*x.shape[:2], H, -1)                                    # (B, T, H, R)
    q_rope, cache.rope_q = rope_forward(q_raw_heads, cos=cos, sin=sin, interleaved=interleaved)    # (B, T, H, R)   # eq. 5

    c_kv_raw, cache.W_DKV = linear_forward(x, W_DKV, gemm=gemm)                         # (B, T, C)      # eq. 6
    c_kv, cache.norm_kv = rmsnorm_forward(c_kv_raw, g_kv, eps=eps)                      # (B, T, C)      # eq. 7
    k_nope, cache.W_UK = linear_forward(c_kv, W_UK, gemm=gemm)                          # (B, T, H*N)    # eq. 8
    v, cache.W_UV = linear_forward(c_kv, W_UV, gemm=gemm)                               # (B, T, H*V)    # eq. 9
    k_raw, cache.W_KR = linear_forward(x, W_KR, gemm=gemm)                              # (B, T, R)      # eq. 10
    k_rope, cache.rope_k = rope_forward(k_raw[:, :, None], cos=cos, sin=sin, interleaved=interleaved)   # (B, T, 1, R)   # eq. 11

    q = np.concatenate([heads_first(q_nope, H), q_rope.swapaxes(1, 2)], axis=-1)        # (B, H, T, N+R)   # eq. 12
    k = np.empty_like(q)                                                                # (B, H, T, N+R)
    k[..., :N] = heads_first(k_nope, H)
    k[..., N:] = k_rope.swapaxes(1, 2)      # one key with position, read by every head                  # eq. 13
    if tile is None:
        o, cache.attention = causal_attention_forward(q, k, heads_first(v, H), scale=scale)     # (B, H, T, V)   # eq. 14
    else:
        o, cache.flash = flash_attention_forward(q, k, heads_first(v, H), scale=scale, tile=tile)   # (B, H, T, V)
    y, cache.W_O = linear_forward(heads_last(o), W_O, gemm=gemm)                        # (B, T, D)      # eq. 15
    return y, cache


def mla_backward(dy, cache):
    """The forward read from the bottom up. Roads meet in k_rope (all heads), in both latents, and in x."""
    H, N = cache.n_heads, cache.d_nope
    do, dW_O = linear_backward(dy, cache.W_O)                                           # (B, T, H*V) (H*V, D)   # eq. 16
    if hasattr(cache, "flash"):
        dq, dk, dv = flash_attention_backward(heads_first(do, H), cache.flash)          # (B, H, T, N+R) (B, H, T, N+R) (B, H, T, V)
    else:
        dq, dk, dv = causal_attention_backward(heads_first(do, H), cache.attention)     # (B, H, T, N+R) (B, H, T, N+R) (B, H, T, V)   # eq. 17

    dk_rope = dk[..., N:].sum(axis=1)[:, :, None]   # it fed every head: add            # (B, T, 1, R)   # eq. 18
    dk_raw = rope_backward(dk_rope, cache.rope_k)[:, :, 0]                              # (B, T, R)      # eq. 19
    dx_kr, dW_KR = linear_backward(dk_raw, cache.W_KR)                                  # (B, T, D) (D, R)   # eq. 20
    dc_k, dW_UK = linear_backward(heads_last(dk[..., :N]), cache.W_UK)                  # (B, T, C) (C, H*N)   # eq. 21
    dc_v, dW_UV = linear_backward(heads_last(dv), cache.W_UV)                           # (B, T, C) (C, H*V)   # eq. 22
    dc_kv = dc_k + dc_v                             # the latent fed both: add          # (B, T, C)      # eq. 23
    dc_kv_raw, dg_kv = rmsnorm_backward(dc_kv, cache.norm_kv)                           # (B, T, C) (C,)   # eq. 24
    dx_kv, dW_DKV = linear_backward(dc_kv_raw, cache.W_DKV)                             # (B, T, D) (D, C)   # eq. 25

    dq_raw = rope_backward(dq[..., N:].swapaxes(1, 2), cache.rope_q)                    # (B, T, H, R)   # eq. 26
    dc_rope, dW_QR = linear_backward(flat_heads(dq_raw), cache.W_QR)                   # (B, T, L) (L, H*R)   # eq. 27
    dc_nope, dW_UQ = linear_backward(heads_last(dq[..., :N]), cache.W_UQ)               # (B, T, L) (L, H*N)   # eq. 28
    dc_q = dc_rope + dc_nope                        # the query latent fed both: add    # (B, T, L)      # eq. 29
    if hasattr(cache, "W_DQ"):
        dc_q_raw, dg_q = rmsnorm_backward(dc_q, cache.norm_q)                           # (B, T, Q) (Q,)   # eq. 30
        dx_q, dW_DQ = linear_backward(dc_q_raw, cache.W_DQ)                             # (B, T, D) (D, Q)   # eq. 31
    else:
        dx_q, dW_DQ, dg_q = dc_q, None, None
    dx = dx_q + dx_kv + dx_kr                       # x fed three roads: add            # (B, T, D)      # eq. 32
    return dx, dW_DQ, dg_q, dW_UQ, dW_QR, dW_DKV, dW_KR, dg_kv, dW_UK, dW_UV, dW_O


mla = op(mla_forward, mla_backward)


def mla_examples(rng):
    def case(query_latent, interleaved):
        B, T, D, Q, C, H, N, R, V = 2, 3, 8, 7, 5, 2, 3, 4, 6
        L = Q if query_latent else D
        shapes = MLAWeights((D, Q), (Q,), (L, H * N), (L, H * R), (D, C), (D, R), (C,), (C, H * N), (C, H * V), (H * V, D))
        weights = [rng.standard_normal(shape) / (len(shape) > 1 and shape[0] ** 0.5 or 1) for shape in shapes]
        weights[:2] = weights[:2] if query_latent else [None, None]
        cos, sin = rope_tables(np.arange(T), frequencies(R))
        config = {"n_heads": H, "cos": cos, "sin": sin, "scale": (N + R) ** -0.5, "interleaved": interleaved}
        return (rng.standard_normal((B, T, D)), *weights), config

    in_tiles = case(True, True)
    in_tiles[1]["tile"] = 2
    return {"query latent": case(True, True), "no query latent": case(False, True), "half-split": case(True, False), "in tiles": in_tiles}


def demo():
    """Shapes, one token by hand, the gradients, and the size of the cache."""
    args, config = mla_examples(np.random.default_rng(0))["query latent"]
    y, _ = mla_forward(*args, **config)
    print("shapes    x", args[0].shape, " ".join(f"{name} {w.shape}" for name, w in zip(MLAWeights._fields, args[1:])), "-> y", y.shape)
    one, cos, sin = np.ones((1, 1)), np.ones((1, 1)), np.zeros((1, 1))
    two = np.ones((1, 2))
    y, _ = mla_forward(np.full((1, 1, 1), 3.0), None, None, one, two, one, two, np.ones(1), one, 5 * one, one,
                       n_heads=1, cos=cos, sin=sin, scale=1.0, eps=0.0)
    print(f"by hand   one token sees only itself: c_kv = norm(3) = 1, v = 5 c_kv, y = {y.item():g}")
    report(mla_forward, mla_backward, mla_examples)
    latent, full = 512 + 64, 128 * (128 + 64) + 128 * 128
    print(f"claim     V3 caches {latent} floats per token and layer instead of {full:,}: {full / latent:.0f} times fewer")
    assert y.item() == 5 and full // latent == 71


if __name__ == "__main__":
    from minideepseek.attention.mla import demo  # the imported copy, so that every name exists once
    demo()
