"""FlashAttention-2: exact causal attention, one tile of scores at a time, so that no T x S array ever exists.

The algorithm and its memory; the speed belongs to GPU kernels.
Derivation: whiteboard/attention/flash.md     Source: Dao 2023, arXiv:2307.08691
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import tracemalloc
from types import SimpleNamespace

import numpy as np

from minideepseek.attention.causal import causal_attention_backward, causal_attention_forward
from minideepseek.autograd.gradcheck import report
from minideepseek.autograd.tape import op


def tiles(start, stop, size):
    """Slices that cover start .. stop - 1, `size` at a time; the last one may be shorter, or there is none."""
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def keys_seen_by(rows, cache):
    """Tiles of the keys that some query of `rows` sees: they end at the last one its last query sees, on the diagonal."""
    return tiles(0, rows.stop + cache.k.shape[2] - cache.q.shape[2], cache.tile)


def rows_that_see(keys, cache):
    """Tiles of the queries that see some key of `keys`: they begin at the first query that sees the first of them."""
    return tiles(max(0, keys.start + cache.q.shape[2] - cache.k.shape[2]), cache.q.shape[2], cache.tile)


def tile_scores(rows, keys, cache):
    """The scores of one tile, minus infinity where a key is hidden. Forward and backward both ask here, and get the same."""
    offset = cache.k.shape[2] - cache.q.shape[2]
    scores = (cache.q[:, :, rows] * cache.scale) @ cache.k[:, :, keys].swapaxes(-1, -2)                     # eq. 1
    if keys.stop - 1 > rows.start + offset:                             # the diagonal cuts through this tile
        hidden = np.arange(keys.start, keys.stop) > np.arange(rows.start, rows.stop)[:, None] + offset
        scores[:, :, hidden] = -np.inf
    return scores


def flash_attention_forward(q, k, v, *, scale, tile=64):
    """Attend as causal_attention does, o = softmax(scale q k^T) v, but keep only o and L = log(sum(exp(scale q k^T))).

    q: (B, H, T, K)   k: (B, H, S, K)   v: (B, H, S, V)   ->   o: (B, H, T, V)

    scale: multiplies the scores, 1 / sqrt(K) as a rule. tile: queries, and keys, at a time. S is at least 1.
    A query that sees no key gets o = 0 and L = -inf.
    Source: FlashAttention-2, arXiv:2307.08691; tiles of one size for queries and keys.
    """
    cache = SimpleNamespace(q=q, k=k, v=v, scale=scale, tile=tile)
    T, S = q.shape[2], k.shape[2]
    o = np.zeros((*q.shape[:3], v.shape[3]), q.dtype)                   # (B, H, T, V)
    L = np.full(q.shape[:3], -np.inf, q.dtype)                          # (B, H, T)
    for rows in tiles(max(T - S, 0), T, tile):                          # those before see no key
        m = np.full_like(q[:, :, rows, :1], -np.inf)                    # running maximum, one per query
        l = np.zeros_like(m)                                            # running sum of exp(scores - m)
        total = np.zeros_like(o[:, :, rows])                            # the same sum, each term times its value
        for keys in keys_seen_by(rows, cache):
            scores = tile_scores(rows, keys, cache)                     # rows x keys
            m_new = np.maximum(m, scores.max(axis=-1, keepdims=True))   # finite: every row here sees key 0   # eq. 2
            shrink = np.exp(m - m_new)                                  # at most 1; 0 at the first tile   # eq. 3
            p = np.exp(scores - m_new)                                                                     # eq. 4
            l = l * shrink + p.sum(axis=-1, keepdims=True)                                                 # eq. 5
            total = total * shrink + p @ v[:, :, keys]                                                     # eq. 6
            m = m_new
        o[:, :, rows] = total / l                                       # one division, at the end         # eq. 7
        L[:, :, rows] = (m + np.log(l))[..., 0]                                                            # eq. 8
    cache.o, cache.L = o, L
    return o, cache


def flash_attention_backward(do, cache):
    """One tile of keys after the other, its p made again from L. Roads meet in dv and dk (all queries) and dq (all keys)."""
    q, k, v = cache.q, cache.k, cache.v
    mean_dp = np.vecdot(do, cache.o)[..., None]         # sum_j p_j dp_j, without p     # (B, H, T, 1)     # eq. 9
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)                   # (B, H, T, K) (B, H, S, K) (B, H, S, V)
    for keys in tiles(0, k.shape[2], cache.tile):
        for rows in rows_that_see(keys, cache):
            p = np.exp(tile_scores(rows, keys, cache) - cache.L[:, :, rows, None])                         # eq. 10
            dv[:, :, keys] += p.swapaxes(-1, -2) @ do[:, :, rows]                                          # eq. 11
            dp = do[:, :, rows] @ v[:, :, keys].swapaxes(-1, -2)                                           # eq. 12
            dscores = p * (dp - mean_dp[:, :, rows])                                                       # eq. 13
            dq[:, :, rows] += dscores @ k[:, :, keys] * cache.scale                                        # eq. 14
            dk[:, :, keys] += dscores.swapaxes(-1, -2) @ q[:, :, rows] * cache.scale                       # eq. 15
    return dq, dk, dv


flash_attention = op(flash_attention_forward, flash_attention_backward)


def merge_partial(o_a, L_a, o_b, L_b):
    """Attention over two disjoint sets of keys from the attention over each: exact, and in any order.

    o_a, o_b: (B, H, T, V)   L_a, L_b: (B, H, T), log of the sum of exp(scores)   ->   o, L

    A part without a key, o = 0 and L = -inf, changes nothing.
    """
    L = np.logaddexp(L_a, L_b)                                                                             # eq. 16
    finite = np.where(np.isneginf(L), 0, L)             # no key in either: exp(-inf - 0) = 0, not nan
    weight_a, weight_b = np.exp(L_a - finite)[..., None], np.exp(L_b - finite)[..., None]
    o = weight_a * o_a + weight_b * o_b                                                                    # eq. 17
    return o, L


def flash_attention_examples(rng):
    def draw(B, H, T, S, K, V):
        return tuple(rng.standard_normal(shape) for shape in [(B, H, T, K), (B, H, S, K), (B, H, S, V)])

    return {
        "a whole sequence": (draw(2, 1, 5, 5, 3, 4), {"scale": 0.6, "tile": 2}),
        "the last queries of a cache": (draw(1, 2, 4, 7, 3, 5), {"scale": 0.5, "tile": 3}),
        "more queries than keys": (draw(1, 2, 6, 4, 5, 3), {"scale": 0.4, "tile": 2}),
        "one tile holds all": (draw(2, 1, 3, 4, 5, 6), {"scale": 0.5}),
    }


def there_and_back(forward, backward, q, k, v, do):
    """o, dq, dk and dv of one forward and backward, at the usual scale."""
    o, cache = forward(q, k, v, scale=q.shape[-1] ** -0.5)
    return o, *backward(do, cache)


def peak_bytes(forward, backward, T):
    """The most memory that there_and_back holds at a time, beyond q, k, v and do: two heads of 32, float64."""
    q, k, v, do = np.random.default_rng(0).standard_normal((4, 1, 2, T, 32))
    tracemalloc.start()
    there_and_back(forward, backward, q, k, v, do)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def demo():
    """Two keys by hand, the gradients, and the memory against that of causal_attention."""
    q, k, v = np.ones((1, 1, 1, 1)), np.log([1.0, 3.0]).reshape(1, 1, 2, 1), np.array([2.0, 4.0]).reshape(1, 1, 2, 1)
    o, cache = flash_attention_forward(q, k, v, scale=1.0, tile=1)
    print("shapes    q", q.shape, "k", k.shape, "v", v.shape, "-> o", o.shape, "and L", cache.L.shape)
    print(f"by hand   scores log 1, log 3, values 2, 4, one key at a time: o = (2/3 + 4) / (1/3 + 1) = {o.item():g}, exp(L) = {np.exp(cache.L.item()):g}")
    report(flash_attention_forward, flash_attention_backward, flash_attention_examples)

    dense, flash = (causal_attention_forward, causal_attention_backward), (flash_attention_forward, flash_attention_backward)
    arrays = np.random.default_rng(1).standard_normal((4, 1, 2, 200, 32))
    worst = max(np.abs(a - b).max() for a, b in zip(there_and_back(*dense, *arrays), there_and_back(*flash, *arrays)))
    print(f"claim     200 tokens in tiles of 64: output and gradients are those of causal_attention, max difference {worst:.0e}")
    d, f = [[peak_bytes(*pair, T) / 2**20 for T in (512, 1024)] for pair in (dense, flash)]
    print(f"claim     512 -> 1,024 tokens: dense holds {d[0]:.1f} -> {d[1]:.1f} MiB, {d[1] / d[0]:.1f} times; "
          f"flash {f[0]:.1f} -> {f[1]:.1f} MiB, {f[1] / f[0]:.1f} times")
    from minideepseek.plots.attention import flash_tiles
    from minideepseek.plots.canvas import plot_path
    if path := plot_path():
        flash_tiles(200, 200, 64, path=path)
    assert np.isclose(o.item(), 3.5) and worst < 1e-12 and d[1] > 3.8 * d[0] and f[1] < 2.1 * f[0]


if __name__ == "__main__":
    from minideepseek.attention.flash import demo  # the imported copy, so that every name exists once
    demo()
