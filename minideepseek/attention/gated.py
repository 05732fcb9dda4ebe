"""The gated attention unit: attention and feed-forward layer in one, a single head, no softmax. NOT part of DeepSeek-V3.

The quadratic, causal form, without position. "FLASH" in the title of its paper is not FlashAttention.
Derivation: whiteboard/attention/gated.md     Source: Hua et al. 2022, arXiv:2202.10447
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from minideepseek.attention.causal import visible
from minideepseek.autograd.gradcheck import report
from minideepseek.autograd.tape import op
from minideepseek.basics.linear import linear_backward, linear_forward, matmul
from minideepseek.basics.swiglu import silu_mul_backward, silu_mul_forward


class GatedWeights(NamedTuple):
    """The weights in the order of gated_attention's arguments."""
    W_u: np.ndarray   # (D, F)   the gate
    W_v: np.ndarray   # (D, F)   the values
    W_z: np.ndarray   # (D, K)   what queries and keys are both made of
    g_q: np.ndarray   # (K,)     the query: z g_q + b_q
    b_q: np.ndarray   # (K,)
    g_k: np.ndarray   # (K,)     the key: z g_k + b_k
    b_k: np.ndarray   # (K,)
    W_o: np.ndarray   # (F, D)   back to the model width


def relu2_attention_forward(q, k, v, *, scale):
    """Average over the visible keys without a softmax: o_i = 1/n_i sum_j relu(scale q_i k_j)^2 v_j, n_i of them visible.

    q: (B, T, K)   k: (B, S, K)   v: (B, S, F)   ->   o: (B, T, F)

    scale: multiplies the scores, 1 / sqrt(K) as a rule. A query that sees no key gets zeros.
    Source: Hua et al. 2022, arXiv:2202.10447; differs by the divisor, n_i of each row instead of one for all.
    """
    seen = visible(q.shape[1], k.shape[1])                              # (T, S)
    n = np.maximum(seen.sum(axis=-1, keepdims=True), 1)                 # (T, 1)
    share = (seen / n).astype(q.dtype)                                  # (T, S)           # eq. 1
    q_scaled = q * scale                                                # (B, T, K)
    r = np.maximum(q_scaled @ k.swapaxes(-1, -2), 0)                    # (B, T, S)        # eq. 2
    a = share * r * r                                                   # (B, T, S)        # eq. 3
    o = a @ v                                                           # (B, T, F)        # eq. 4
    return o, (q_scaled, k, v, share, r, a, scale)


def relu2_attention_backward(do, cache):
    """No row is normalised by its sum, so no score pays for another: entry by entry, 2 r. At r = 0 the slope is 0."""
    q_scaled, k, v, share, r, a, scale = cache
    dv = a.swapaxes(-1, -2) @ do                                        # (B, S, F)        # eq. 5
    da = do @ v.swapaxes(-1, -2)                                        # (B, T, S)        # eq. 6
    dscores = da * share * 2 * r                                        # (B, T, S)        # eq. 7
    dq = dscores @ k * scale                                            # (B, T, K)        # eq. 8
    dk = dscores.swapaxes(-1, -2) @ q_scaled                            # (B, S, K)        # eq. 9
    return dq, dk, dv


def gated_attention_forward(x, W_u, W_v, W_z, g_q, b_q, g_k, b_k, W_o, *, scale, gemm=matmul):
    """Let a gate read what attention brought: y = (u * (a v)) W_o, u = silu(x W_u), v = silu(x W_v), z = silu(x W_z).

    x: (B, T, D)   W_u: (D, F)   W_v: (D, F)   W_z: (D, K)   g_q: (K,)   b_q: (K,)   g_k: (K,)   b_k: (K,)
    W_o: (F, D)   ->   y: (B, T, D)

    a: relu2_attention of q = z g_q + b_q and k = z g_k + b_k, one head. scale: see there. gemm: see linear.
    Source: Hua et al. 2022, arXiv:2202.10447; without its norm, residual, position and linear-time chunks.
    """
    cache = SimpleNamespace(g_q=g_q, g_k=g_k)
    u_raw, cache.W_u = linear_forward(x, W_u, gemm=gemm)                # (B, T, F)        # eq. 10
    v_raw, cache.W_v = linear_forward(x, W_v, gemm=gemm)                # (B, T, F)        # eq. 11
    z_raw, cache.W_z = linear_forward(x, W_z, gemm=gemm)                # (B, T, K)        # eq. 12
    v, cache.silu_v = silu_mul_forward(v_raw, 1.0)                      # (B, T, F)        # eq. 13
    z, cache.silu_z = silu_mul_forward(z_raw, 1.0)                      # (B, T, K)        # eq. 14
    q = z * g_q + b_q                                                   # (B, T, K)        # eq. 15
    k = z * g_k + b_k                                                   # (B, T, K)        # eq. 16
    o, cache.attention = relu2_attention_forward(q, k, v, scale=scale)  # (B, T, F)        # eq. 17
    h, cache.silu_u = silu_mul_forward(u_raw, o)                        # (B, T, F)        # eq. 18
    y, cache.W_o = linear_forward(h, W_o, gemm=gemm)                    # (B, T, D)        # eq. 19
    cache.z = z
    return y, cache


def gated_attention_backward(dy, cache):
    """The forward read from the bottom up. Roads meet in z (queries and keys) and in x (gate, values, z)."""
    dh, dW_o = linear_backward(dy, cache.W_o)                           # (B, T, F) (F, D)   # eq. 20
    du_raw, do = silu_mul_backward(dh, cache.silu_u)                    # (B, T, F) (B, T, F)   # eq. 21
    dq, dk, dv = relu2_attention_backward(do, cache.attention)          # (B, T, K) (B, T, K) (B, T, F)   # eq. 22
    dg_q, db_q = (dq * cache.z).sum(axis=(0, 1)), dq.sum(axis=(0, 1))   # (K,) (K,)        # eq. 23
    dg_k, db_k = (dk * cache.z).sum(axis=(0, 1)), dk.sum(axis=(0, 1))   # (K,) (K,)        # eq. 24
    dz = dq * cache.g_q + dk * cache.g_k    # z fed both: add           # (B, T, K)        # eq. 25
    dz_raw, _ = silu_mul_backward(dz, cache.silu_z)                     # (B, T, K)        # eq. 26
    dv_raw, _ = silu_mul_backward(dv, cache.silu_v)                     # (B, T, F)        # eq. 27
    dx_z, dW_z = linear_backward(dz_raw, cache.W_z)                     # (B, T, D) (D, K)   # eq. 28
    dx_v, dW_v = linear_backward(dv_raw, cache.W_v)                     # (B, T, D) (D, F)   # eq. 29
    dx_u, dW_u = linear_backward(du_raw, cache.W_u)                     # (B, T, D) (D, F)   # eq. 30
    dx = dx_z + dx_v + dx_u                 # x fed three roads: add    # (B, T, D)        # eq. 31
    return dx, dW_u, dW_v, dW_z, dg_q, db_q, dg_k, db_k, dW_o


relu2_attention = op(relu2_attention_forward, relu2_attention_backward)
gated_attention = op(gated_attention_forward, gated_attention_backward)


def away_from_zero(draw, scores, least=0.02):
    """Draw arguments until no visible score is within `least` of 0, and at least a third of them are positive.

    relu^2 has a slope everywhere, 0 at 0, but the slope has a corner there: a finite difference of step h that spans it is off by h / 3.
    And below 0 it is flat: a row of negative scores has no gradient to check.
    """
    while True:
        args = draw()
        s = scores(*args)
        s = s[:, visible(*s.shape[1:])]
        if np.abs(s).min() > least and np.mean(s > 0) > 1 / 3:
            return args


def relu2_attention_examples(rng):
    def case(B, T, S, K, F):
        draw = lambda: tuple(rng.standard_normal(shape) for shape in [(B, T, K), (B, S, K), (B, S, F)])
        return away_from_zero(draw, lambda q, k, v: 0.5 * q @ k.swapaxes(-1, -2)), {"scale": 0.5}

    return {
        "a whole sequence": case(2, 4, 4, 3, 5),
        "the last queries of a cache": case(2, 3, 5, 4, 6),
        "more queries than keys": case(1, 5, 3, 4, 2),
    }


def gated_attention_examples(rng):
    def scores(*args):
        q_scaled, k, *_ = gated_attention_forward(*args, scale=0.4)[1].attention
        return q_scaled @ k.swapaxes(-1, -2)

    B, T, D, F, K = 2, 4, 3, 6, 5
    shapes = (B, T, D), *GatedWeights((D, F), (D, F), (D, K), (K,), (K,), (K,), (K,), (F, D))
    return {"one head": (away_from_zero(lambda: tuple(rng.standard_normal(shape) for shape in shapes), scores), {"scale": 0.4})}


def demo():
    """Two tokens by hand, the gradients, and how loud attention is far from the start."""
    q, k, v = np.ones((1, 2, 1)), np.array([[[2.0], [-1.0]]]), np.array([[[1.0], [8.0]]])
    o, _ = relu2_attention_forward(q, k, v, scale=1.0)
    print("shapes    x (B, T, D), W_u, W_v (D, F), W_z (D, K), g_q, b_q, g_k, b_k (K,), W_o (F, D) -> y (B, T, D)")
    print("by hand   scores 2 and -1, values 1 and 8: token 0 reads 2^2 / 1, token 1 reads 2^2 / 2 and nothing of the 8: o =", o.ravel())
    report(relu2_attention_forward, relu2_attention_backward, relu2_attention_examples)
    report(gated_attention_forward, gated_attention_backward, gated_attention_examples)

    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 512, 64))
    o, _ = relu2_attention_forward(q, k, np.ones((1, 512, 1)), scale=64 ** -0.5)
    ours = o[0, -32:].mean()                              # values of 1: the total weight of a row, here of the last 32
    inside = (np.maximum(q @ k.swapaxes(-1, -2) / 512, 0) ** 2).sum(axis=-1)[0, -32:].mean()
    print(f"claim     512 tokens, total weight of the last rows: {ours:.2f} with relu(q k / sqrt(K))^2 / n_i, {inside:.2f} with relu(q k / T)^2")
    assert o.shape == (1, 512, 1) and 0.4 < ours < 0.6 and inside < 0.1


if __name__ == "__main__":
    from minideepseek.attention.gated import demo  # the imported copy, so that every name exists once
    demo()
