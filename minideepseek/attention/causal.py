"""Causal attention: the core that every attention layer of this package shares.

Derivation: whiteboard/attention/causal.md     Source: Vaswani et al. 2017, arXiv:1706.03762
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import numpy as np

from minideepseek.autograd.gradcheck import report
from minideepseek.autograd.tape import op
from minideepseek.basics.softmax import softmax_backward, softmax_forward


def visible(T, S):
    """Which of S keys each of the last T queries may see: key j is visible to query i iff j <= i + S - T.

    -> bool (T, S). With S > T the first S - T keys come from a cache; with S < T the first T - S queries see nothing.
    """
    return np.arange(S) <= np.arange(T)[:, None] + (S - T)


def causal_attention_forward(q, k, v, *, scale):
    """Average the values of the visible keys, weighted by how well each key answers the query: o = softmax(scale q k^T) v.

    q: (B, H, T, K)   k: (B, H, S, K)   v: (B, H, S, V)   ->   o: (B, H, T, V)

    scale: multiplies the scores, 1 / sqrt(K) as a rule. S is at least 1. A query that sees no key gets zeros.
    Source: DeepSeek-V3, arXiv:2412.19437, eq. 10.
    """
    T, S = q.shape[2], k.shape[2]
    blind = max(T - S, 0)                                               # the first queries, that see no key
    mask = np.where(visible(T, S), 0, -np.inf).astype(q.dtype)          # (T, S)         # eq. 1
    q_scaled = q * scale                    # fewer numbers than scores # (B, H, T, K)
    scores = q_scaled @ k.swapaxes(-1, -2) + mask                       # (B, H, T, S)   # eq. 2
    p_seeing, _ = softmax_forward(scores[:, :, blind:])                                  # eq. 3
    p = np.pad(p_seeing, [(0, 0), (0, 0), (blind, 0), (0, 0)]) if blind else p_seeing    # (B, H, T, S)
    o = p @ v                                                           # (B, H, T, V)   # eq. 4
    return o, (q_scaled, k, v, p, scale)


def causal_attention_backward(do, cache):
    """Back through the average, the softmax, the scores. Where p is 0 the softmax passes nothing: no mask is needed."""
    q_scaled, k, v, p, scale = cache
    dv = p.swapaxes(-1, -2) @ do                                        # (B, H, S, V)   # eq. 5
    dp = do @ v.swapaxes(-1, -2)                                        # (B, H, T, S)   # eq. 6
    dscores = softmax_backward(dp, p)                                   # (B, H, T, S)   # eq. 7
    dq = dscores @ k * scale                                            # (B, H, T, K)   # eq. 8
    dk = dscores.swapaxes(-1, -2) @ q_scaled                            # (B, H, S, K)   # eq. 9
    return dq, dk, dv


causal_attention = op(causal_attention_forward, causal_attention_backward)


def causal_attention_examples(rng):
    def draw(B, H, T, S, K, V):
        return tuple(rng.standard_normal(shape) for shape in [(B, H, T, K), (B, H, S, K), (B, H, S, V)])

    return {
        "a whole sequence": (draw(2, 3, 4, 4, 5, 6), {"scale": 0.4}),
        "the last queries of a cache": (draw(2, 1, 3, 5, 4, 6), {"scale": 0.5}),
        "more queries than keys": (draw(1, 2, 5, 3, 4, 6), {"scale": 0.5}),
    }


def demo():
    """Two tokens by hand, the gradients, and a token that changes nothing before it."""
    q, k, v = np.zeros((1, 1, 2, 1)), np.zeros((1, 1, 2, 1)), np.array([[[[2.0], [4.0]]]])
    o, _ = causal_attention_forward(q, k, v, scale=1.0)
    print("shapes    q (1, 1, 2, 1), k (1, 1, 2, 1), v (1, 1, 2, 1) -> o (1, 1, 2, 1)")
    print("by hand   equal scores: token 0 sees 2; token 1 sees the mean of 2 and 4; o =", o.ravel())
    report(causal_attention_forward, causal_attention_backward, causal_attention_examples)

    rng = np.random.default_rng(0)
    q, k, v = [rng.standard_normal((1, 4, 32, 16)) for _ in range(3)]
    before, _ = causal_attention_forward(q, k, v, scale=0.25)
    k[:, :, 20], v[:, :, 20] = 9.0, -9.0
    after, _ = causal_attention_forward(q, k, v, scale=0.25)
    changed = (before != after).any(axis=(0, 1, 3))
    print(f"claim     token 20 of 32 replaced: outputs that changed in any bit: {changed.nonzero()[0].min()} .. {changed.nonzero()[0].max()}")
    from minideepseek.plots.attention import attention_map
    from minideepseek.plots.canvas import plot_path
    if path := plot_path():            # equal words have equal queries and keys here: the second "the" finds the first
        words = q[:, :1, [0, 1, 2, 3, 0, 4]]
        _, (_, _, _, p, _) = causal_attention_forward(words, words, words, scale=0.1)
        attention_map(p[0, 0], "the cat sat on the mat".split(), mask=visible(6, 6), path=path)
    assert changed.nonzero()[0].tolist() == list(range(20, 32))


if __name__ == "__main__":
    from minideepseek.attention.causal import demo  # the imported copy, so that every name exists once
    demo()
