"""Attention with a sink: one learned score per head that takes weight and gives nothing. NOT part of DeepSeek-V3; V4 has it.

Derivation: whiteboard/attention/sink.md     Source: DeepSeek-V4, arXiv:2606.19348, eq. 27
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import numpy as np

from minideepseek.attention.causal import causal_attention_forward, visible
from minideepseek.attention.flash import flash_attention_forward, merge_partial
from minideepseek.autograd.gradcheck import report
from minideepseek.autograd.tape import op
from minideepseek.basics.softmax import softmax_backward, softmax_forward


def sink_attention_forward(q, k, v, sink, *, scale):
    """Attend, with one more key whose score is learned and whose value is 0: o = softmax([scale q k^T; sink]) [v; 0].

    q: (B, H, T, K)   k: (B, H, S, K)   v: (B, H, S, V)   sink: (H,)   ->   o: (B, H, T, V)

    scale: multiplies the scores, not the sink. A query that sees no key gives all its weight to the sink, so o = 0.
    Source: DeepSeek-V4, arXiv:2606.19348, eq. 27. DeepSeek-V3 has no sink.
    """
    (B, H, T, _), S = q.shape, k.shape[2]
    mask = np.where(visible(T, S), 0, -np.inf).astype(q.dtype)          # (T, S)           # eq. 1
    q_scaled = q * scale                                                # (B, H, T, K)
    scores = q_scaled @ k.swapaxes(-1, -2) + mask                       # (B, H, T, S)     # eq. 2
    column = np.broadcast_to(sink[:, None, None], (B, H, T, 1))         # (B, H, T, 1)     # eq. 3
    p, _ = softmax_forward(np.concatenate([scores, column], axis=-1))   # (B, H, T, S+1)   # eq. 4
    o = p[..., :S] @ v                                                  # (B, H, T, V)     # eq. 5
    return o, (q_scaled, k, v, p, scale)


def sink_attention_backward(do, cache):
    """Back through the average, then the softmax over all S + 1 scores: one row at a time, the sink pays its share."""
    q_scaled, k, v, p, scale = cache
    dv = p[..., :-1].swapaxes(-1, -2) @ do                              # (B, H, S, V)     # eq. 6
    dp_keys = do @ v.swapaxes(-1, -2)                                   # (B, H, T, S)     # eq. 7
    dp = np.pad(dp_keys, [(0, 0)] * 3 + [(0, 1)])   # the sink gave 0   # (B, H, T, S+1)   # eq. 8
    dscores = softmax_backward(dp, p)                                   # (B, H, T, S+1)   # eq. 9
    dq = dscores[..., :-1] @ k * scale                                  # (B, H, T, K)     # eq. 10
    dk = dscores[..., :-1].swapaxes(-1, -2) @ q_scaled                  # (B, H, S, K)     # eq. 11
    dsink = dscores[..., -1].sum(axis=(0, 2))   # read by all queries   # (H,)             # eq. 12
    return dq, dk, dv, dsink


sink_attention = op(sink_attention_forward, sink_attention_backward)


def sink_attention_examples(rng):
    def draw(B, H, T, S, K, V):
        return tuple(rng.standard_normal(shape) for shape in [(B, H, T, K), (B, H, S, K), (B, H, S, V), (H,)])

    return {
        "a whole sequence": (draw(2, 3, 4, 4, 5, 6), {"scale": 0.4}),
        "the last queries of a cache": (draw(2, 1, 3, 5, 4, 6), {"scale": 0.5}),
        "more queries than keys": (draw(1, 2, 5, 3, 4, 6), {"scale": 0.5}),
    }


def demo():
    """One key by hand, the gradients, and the sink at its two ends."""
    q, k, v = np.zeros((1, 1, 1, 1)), np.zeros((1, 1, 1, 1)), np.full((1, 1, 1, 1), 8.0)
    halves = [sink_attention_forward(q, k, v, np.array([s]), scale=1.0)[0].item() for s in (0.0, np.log(3))]
    print("shapes    q (1, 1, 1, 1), k (1, 1, 1, 1), v (1, 1, 1, 1), sink (1,) -> o (1, 1, 1, 1)")
    print(f"by hand   one key, score 0, value 8: a sink of 0 leaves {halves[0]:g}, a sink of log 3 leaves {halves[1]:g}")
    report(sink_attention_forward, sink_attention_backward, sink_attention_examples)

    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 4, 32, 16))
    plain, _ = causal_attention_forward(q, k, v, scale=0.25)
    closed, _ = sink_attention_forward(q, k, v, np.full(4, -1e4), scale=0.25)
    sink = np.array([-2.0, 0.0, 1.0, 3.0])
    o, _ = sink_attention_forward(q, k, v, sink, scale=0.25)
    flash, cache = flash_attention_forward(q, k, v, scale=0.25)
    merged, _ = merge_partial(flash, cache.L, 0.0, np.broadcast_to(sink[:, None], cache.L.shape))
    print(f"claim     sink = -10,000: causal attention, max difference {np.abs(closed - plain).max():.0e}; "
          f"any sink: a part (o = 0, L = sink) merged into flash attention, {np.abs(merged - o).max():.0e}")
    assert np.abs(closed - plain).max() < 1e-14 and np.abs(merged - o).max() < 1e-14 and np.allclose(halves, [4, 2])


if __name__ == "__main__":
    from minideepseek.attention.sink import demo  # the imported copy, so that every name exists once
    demo()
