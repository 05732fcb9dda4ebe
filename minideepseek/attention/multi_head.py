"""Multi-head attention: several causal heads side by side, and a matrix that mixes what they read.

Derivation: whiteboard/attention/multi_head.md     Source: Vaswani et al. 2017, arXiv:1706.03762
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import math
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from minideepseek.attention.causal import causal_attention_backward, causal_attention_forward
from minideepseek.attention.mla import flat_heads, heads_first, heads_last
from minideepseek.attention.rope import frequencies, rope_backward, rope_forward, rope_tables
from minideepseek.autograd.gradcheck import report
from minideepseek.autograd.tape import op
from minideepseek.basics.linear import linear_backward, linear_forward, matmul


class MHAWeights(NamedTuple):
    """The weights in the order of the arguments of multi_head, and of grouped_query, which has G key-value heads, not H."""
    W_Q: np.ndarray      # (D, H*K)    to the queries
    W_K: np.ndarray      # (D, H*K)    to the keys;   (D, G*K) when heads share them
    W_V: np.ndarray      # (D, H*V)    to the values; (D, G*V) when heads share them
    W_O: np.ndarray      # (H*V, D)    back to the model width


def multi_head_forward(x, W_Q, W_K, W_V, W_O, *, n_heads, scale=None, cos=None, sin=None, interleaved=True, gemm=matmul):
    """Attend H times at once, each head with its own slice of the channels: y = [o_0; ...; o_(H-1)] W_O.

    x: (B, T, D)   W_Q: (D, H*K)   W_K: (D, H*K)   W_V: (D, H*V)   W_O: (H*V, D)
    n_heads: H   cos: (T, K/2) or None   sin: (T, K/2) or None   ->   y: (B, T, D)

    scale: multiplies the scores; None means 1 / sqrt(K). cos, sin, interleaved: see rope; None means no positions.
    gemm: see linear. Causal: a token sees itself and the ones before it.
    Source: DeepSeek-V2, arXiv:2405.04434, eq. 1-8; differs by RoPE over the whole head, when it is asked for.
    """
    B, T, _ = x.shape
    H = n_heads
    scale = 1 / math.sqrt(W_Q.shape[1] // H) if scale is None else scale
    cache = SimpleNamespace(n_heads=n_heads)

    q_flat, cache.W_Q = linear_forward(x, W_Q, gemm=gemm)                       # (B, T, H*K)    # eq. 1
    k_flat, cache.W_K = linear_forward(x, W_K, gemm=gemm)                       # (B, T, H*K)    # eq. 2
    v_flat, cache.W_V = linear_forward(x, W_V, gemm=gemm)                       # (B, T, H*V)    # eq. 3
    q_heads, k_heads = q_flat.reshape(B, T, H, -1), k_flat.reshape(B, T, H, -1)     # (B, T, H, K) (B, T, H, K)
    if cos is None:
        q_turned, k_turned = q_heads, k_heads                                   # (B, T, H, K) (B, T, H, K)
    else:
        q_turned, cache.rope_q = rope_forward(q_heads, cos=cos, sin=sin, interleaved=interleaved)   # (B, T, H, K)   # eq. 4
        k_turned, cache.rope_k = rope_forward(k_heads, cos=cos, sin=sin, interleaved=interleaved)   # (B, T, H, K)   # eq. 5
    q, k, v = q_turned.swapaxes(1, 2), k_turned.swapaxes(1, 2), heads_first(v_flat, H)     # (B, H, T, K) (B, H, T, K) (B, H, T, V)
    o, cache.attention = causal_attention_forward(q, k, v, scale=scale)         # (B, H, T, V)   # eq. 6
    y, cache.W_O = linear_forward(heads_last(o), W_O, gemm=gemm)                # (B, T, D)      # eq. 7
    return y, cache


def multi_head_backward(dy, cache):
    """The forward read from the bottom up. Below W_O every head is on its own; three roads meet in x."""
    do, dW_O = linear_backward(dy, cache.W_O)                                   # (B, T, H*V) (H*V, D)   # eq. 8
    dq, dk, dv = causal_attention_backward(heads_first(do, cache.n_heads), cache.attention)     # (B, H, T, K) (B, H, T, K) (B, H, T, V)   # eq. 9
    if hasattr(cache, "rope_q"):
        dk_heads = rope_backward(dk.swapaxes(1, 2), cache.rope_k)               # (B, T, H, K)   # eq. 10
        dq_heads = rope_backward(dq.swapaxes(1, 2), cache.rope_q)               # (B, T, H, K)   # eq. 11
    else:
        dk_heads, dq_heads = dk.swapaxes(1, 2), dq.swapaxes(1, 2)               # (B, T, H, K) (B, T, H, K)
    dx_v, dW_V = linear_backward(heads_last(dv), cache.W_V)                     # (B, T, D) (D, H*V)   # eq. 12
    dx_k, dW_K = linear_backward(flat_heads(dk_heads), cache.W_K)               # (B, T, D) (D, H*K)   # eq. 13
    dx_q, dW_Q = linear_backward(flat_heads(dq_heads), cache.W_Q)               # (B, T, D) (D, H*K)   # eq. 14
    dx = dx_q + dx_k + dx_v                         # x fed three roads: add    # (B, T, D)      # eq. 15
    return dx, dW_Q, dW_K, dW_V, dW_O


multi_head = op(multi_head_forward, multi_head_backward)


def multi_head_examples(rng):
    def case(B, T, D, H, K, V, **config):
        shapes = MHAWeights((D, H * K), (D, H * K), (D, H * V), (H * V, D))
        weights = [rng.standard_normal(shape) / shape[0] ** 0.5 for shape in shapes]
        return (rng.standard_normal((B, T, D)), *weights), {"n_heads": H} | config

    cos, sin = rope_tables(np.arange(3), frequencies(4))
    return {
        "no positions": case(2, 4, 7, 3, 5, 6),
        "turned": case(2, 3, 5, 2, 4, 3, cos=cos, sin=sin),
        "turned, half-split": case(1, 3, 5, 2, 4, 6, cos=cos, sin=sin, interleaved=False, scale=0.3),
    }


def demo():
    """Two heads by hand, the gradients, and the heads one by one."""
    args, config = multi_head_examples(np.random.default_rng(0))["no positions"]
    x, *weights = args
    y, cache = multi_head_forward(*args, **config)
    print("shapes    x", x.shape, " ".join(f"{name} {w.shape}" for name, w in zip(MHAWeights._fields, weights)), "-> y", y.shape)
    ones = np.ones((1, 2))
    two, _ = multi_head_forward(np.array([[[1.0], [3.0]]]), np.array([[0.0, 1.0]]), ones, ones, np.array([[1.0], [10.0]]),
                                n_heads=2, scale=math.log(3) / 6)
    print("by hand   tokens 1 and 3, token 1 looks back: head 0 weighs 1 : 1 and reads 2, head 1 weighs 1 : 3 and reads 2.5; y = o_0 + 10 o_1 =",
          two.ravel().round(12))
    report(multi_head_forward, multi_head_backward, multi_head_examples)

    W_Q, W_K, W_V, W_O = weights
    H = config["n_heads"]
    alone = [multi_head_forward(x, *[np.split(W, H, axis=1)[h] for W in (W_Q, W_K, W_V)], np.split(W_O, H)[h], n_heads=1)[0] for h in range(H)]
    difference = np.abs(sum(alone) - y).max()
    print(f"claim     {H} heads at once = {H} heads alone, each with its rows of W_O, added: max difference {difference:.0e}")
    assert np.allclose(two.ravel(), [11, 27]) and difference < 1e-13


if __name__ == "__main__":
    from minideepseek.attention.multi_head import demo  # the imported copy, so that every name exists once
    demo()
