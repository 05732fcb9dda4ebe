"""Absorbed latent attention: decode on the latent itself, without ever rebuilding a key or a value.

Derivation: whiteboard/attention/mla_absorb.md     Source: DeepSeek-V2, arXiv:2405.04434, sec. 2.1.3
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import numpy as np

from minideepseek.attention.causal import causal_attention_forward
from minideepseek.attention.kv_cache import LatentCache
from minideepseek.attention.mla import flat_heads, mla_examples, mla_forward
from minideepseek.attention.rope import rope_forward
from minideepseek.basics.rmsnorm import rmsnorm_forward


def mla_decode(x, W_DQ, g_q, W_UQ, W_QR, W_DKV, W_KR, g_kv, W_UK, W_UV, W_O, *, cache, n_heads, cos, sin, scale, eps=1e-6, interleaved=True):
    """Attend from T new tokens to everything in the cache and to each other; the new tokens join the cache.

    x: (B, T, D), the new tokens   weights: those of `mla`   cache: LatentCache of S - T tokens, changed
    cos, sin: (T, R/2), for positions S - T to S - 1   scale, eps, interleaved: those of `mla`
    -> y: (B, T, D), equal to the last T rows of `mla` on the whole sequence

    W_UK moves to the query and W_UV behind the sum, each head by itself; the scale stays 1 / sqrt(N + R).
    Plain arrays, no gradient: training uses `mla`, which is cheaper when all tokens are there at once.
    Raises ValueError when the tokens do not fit into the cache.
    """
    B, T, _ = x.shape
    H, C = n_heads, W_UK.shape[0]
    c_q = x if W_DQ is None else rmsnorm_forward(x @ W_DQ, g_q, eps=eps)[0]                         # (B, T, L)
    q_nope = (c_q @ W_UQ).reshape(B, T, H, -1)                                                      # (B, T, H, N)
    q_rope, _ = rope_forward((c_q @ W_QR).reshape(B, T, H, -1), cos=cos, sin=sin, interleaved=interleaved)     # (B, T, H, R)

    c_new, _ = rmsnorm_forward(x @ W_DKV, g_kv, eps=eps)                                            # (B, T, C)
    k_new, _ = rope_forward((x @ W_KR)[:, :, None], cos=cos, sin=sin, interleaved=interleaved)      # (B, T, 1, R)
    c_kv, k_rope = cache.append(c_new, k_new[:, :, 0])                                              # (B, S, C) (B, S, R)

    W_UK_heads = W_UK.reshape(C, H, -1).transpose(1, 2, 0)                                          # (H, N, C)
    W_UV_heads = W_UV.reshape(C, H, -1).swapaxes(0, 1)                                              # (H, C, V)
    q_latent = q_nope.swapaxes(1, 2) @ W_UK_heads                                                   # (B, H, T, C)     # eq. 1
    q = np.concatenate([q_latent, q_rope.swapaxes(1, 2)], axis=-1)                                  # (B, H, T, C+R)   # eq. 2
    k = np.concatenate([c_kv, k_rope], axis=-1)[:, None]                                            # (B, 1, S, C+R)   # eq. 3
    o_latent, _ = causal_attention_forward(q, k, c_kv[:, None], scale=scale)                        # (B, H, T, C)     # eq. 4
    o = o_latent @ W_UV_heads                                                                       # (B, H, T, V)     # eq. 5
    return flat_heads(o.swapaxes(1, 2)) @ W_O                                                       # eq. 6


def demo():
    """Shapes, the whole sequence against every way to cut it, and the price."""
    worst = 0.0
    for args, options in mla_examples(np.random.default_rng(0)).values():
        x, *weights = args
        config = {name: value for name, value in options.items() if name != "tile"}      # decoding has one row of scores: no tiles
        B, T, _ = x.shape
        C, R = weights[7].shape[0], weights[5].shape[1]
        whole, _ = mla_forward(*args, **config)
        for cuts in ([T], [1] * T, [2, 1], [1, 2]):
            cache, rows, start = LatentCache(B, T, C, R, x.dtype), [], 0
            for n in cuts:
                piece = slice(start, start + n)
                rows.append(mla_decode(x[:, piece], *weights, cache=cache, **config | {"cos": config["cos"][piece], "sin": config["sin"][piece]}))
                start += n
            worst = max(worst, np.abs(np.concatenate(rows, axis=1) - whole).max())
    print("shapes    x", x.shape, f"-> y {whole.shape}; the cache holds c_kv {cache.c_kv.shape}, k_rope {cache.k_rope.shape}")
    naive, absorbed = 2 * (192 + 128), 2 * (576 + 512)
    print(f"by hand   V3, per query, key and head: {naive} flops with keys and values, {absorbed} on the latent: {absorbed / naive:.1f} times more")
    print(f"claim     absorbed = naive at every chunking: max difference {worst:.0e}")
    assert worst < 1e-13 and absorbed / naive == 3.4


if __name__ == "__main__":
    from minideepseek.attention.mla_absorb import demo  # the imported copy, so that every name exists once
    demo()
