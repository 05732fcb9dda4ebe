"""Self-attention: every token of a sequence reads every token of it, with one head.

Derivation: whiteboard/attention/self_attention.md     Source: Vaswani et al. 2017, arXiv:1706.03762
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import math
from types import SimpleNamespace

import numpy as np

from minideepseek.autograd.gradcheck import report
from minideepseek.autograd.tape import op
from minideepseek.basics.linear import linear_backward, linear_forward, matmul
from minideepseek.basics.softmax import softmax_backward, softmax_forward


def self_attention_forward(x, W_Q, W_K, W_V, *, scale=None, gemm=matmul):
    """Ask, compare, average: o = softmax(scale q k^T) v, with queries, keys and values all made from x.

    x: (B, T, D)   W_Q: (D, K)   W_K: (D, K)   W_V: (D, V)   ->   o: (B, T, V)

    scale: multiplies the scores; None means 1 / sqrt(K). No mask: a token sees the ones after it too. gemm: see linear.
    Source: Vaswani et al. 2017, arXiv:1706.03762.
    """
    scale = 1 / math.sqrt(W_Q.shape[1]) if scale is None else scale
    cache = SimpleNamespace(scale=scale)
    q, cache.W_Q = linear_forward(x, W_Q, gemm=gemm)                    # (B, T, K)   # eq. 1
    k, cache.W_K = linear_forward(x, W_K, gemm=gemm)                    # (B, T, K)   # eq. 2
    v, cache.W_V = linear_forward(x, W_V, gemm=gemm)                    # (B, T, V)   # eq. 3
    q_scaled = q * scale                    # fewer numbers than scores # (B, T, K)
    scores = q_scaled @ k.swapaxes(-1, -2)                              # (B, T, T)   # eq. 4
    p, cache.softmax = softmax_forward(scores)                          # (B, T, T)   # eq. 5
    o = p @ v                                                           # (B, T, V)   # eq. 6
    cache.q_scaled, cache.k, cache.v, cache.p = q_scaled, k, v, p
    return o, cache


def self_attention_backward(do, cache):
    """The forward read from the bottom up: average, softmax, scores, projections. Three roads meet in x."""
    dv = cache.p.swapaxes(-1, -2) @ do                                  # (B, T, V)   # eq. 7
    dp = do @ cache.v.swapaxes(-1, -2)                                  # (B, T, T)   # eq. 8
    dscores = softmax_backward(dp, cache.softmax)                       # (B, T, T)   # eq. 9
    dk = dscores.swapaxes(-1, -2) @ cache.q_scaled                      # (B, T, K)   # eq. 10
    dq = dscores @ cache.k * cache.scale                                # (B, T, K)   # eq. 11
    dx_v, dW_V = linear_backward(dv, cache.W_V)                         # (B, T, D) (D, V)   # eq. 12
    dx_k, dW_K = linear_backward(dk, cache.W_K)                         # (B, T, D) (D, K)   # eq. 13
    dx_q, dW_Q = linear_backward(dq, cache.W_Q)                         # (B, T, D) (D, K)   # eq. 14
    dx = dx_q + dx_k + dx_v                 # x fed three roads: add    # (B, T, D)   # eq. 15
    return dx, dW_Q, dW_K, dW_V


self_attention = op(self_attention_forward, self_attention_backward)


def self_attention_examples(rng):
    def draw(B, T, D, K, V):
        return rng.standard_normal((B, T, D)), *[rng.standard_normal((D, n)) / D ** 0.5 for n in (K, K, V)]

    return {
        "1 / sqrt(K)": (draw(2, 4, 7, 5, 6), {}),
        "another scale": (draw(2, 3, 5, 6, 4), {"scale": 0.2}),
    }


def demo():
    """Two tokens by hand, the gradients, and a sequence that is shuffled."""
    ln3, one = np.full((1, 1), math.log(3)), np.ones((1, 1))
    o, _ = self_attention_forward(np.array([[[0.0], [1.0]]]), ln3, one, 4 * one)
    print("shapes    x (1, 2, 1), W_Q (1, 1), W_K (1, 1), W_V (1, 1) -> o", o.shape)
    print("by hand   values 0, 4; token 0 asks nothing: weights 1 : 1; token 1 has scores 0, ln 3: weights 1 : 3; o =", o.ravel().round(12))
    report(self_attention_forward, self_attention_backward, self_attention_examples)

    rng = np.random.default_rng(0)
    x, weights = rng.standard_normal((1, 32, 16)), rng.standard_normal((3, 16, 8)) / 4
    order = rng.permutation(32)
    shuffled, _ = self_attention_forward(x[:, order], *weights)
    difference = np.abs(shuffled - self_attention_forward(x, *weights)[0][:, order]).max()
    print(f"claim     32 tokens shuffled: the same outputs, shuffled alike; max difference {difference:.0e}")
    assert np.allclose(o.ravel(), [2, 3]) and difference < 1e-14


if __name__ == "__main__":
    from minideepseek.attention.self_attention import demo  # the imported copy, so that every name exists once
    demo()
