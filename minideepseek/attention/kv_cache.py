"""The cache of latent attention: one latent and one key with position per token, and what every kind of attention caches.

Derivation: whiteboard/attention/kv_cache.md     Source: DeepSeek-V2, arXiv:2405.04434, table 1
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import numpy as np


def cached_floats(attention, *, n_heads, d_key, d_value, n_kv_heads=None, kv_rank=None, d_rope=None):
    """How many numbers one token leaves in the cache of one layer.

    attention: mha, gqa, mqa or mla   d_key: of a whole key, with and without position   n_kv_heads: for gqa
    kv_rank, d_rope: for mla, which keeps a latent and one key with position for all heads, never keys or values.
    Raises ValueError for another kind, or when one of its numbers is missing.
    """
    wanted = {"mla": {"kv_rank": kv_rank, "d_rope": d_rope}, "gqa": {"n_kv_heads": n_kv_heads}, "mha": {}, "mqa": {}}
    if attention not in wanted:
        raise ValueError(f"attention = {attention!r} must be one of {', '.join(wanted)}")
    if None in wanted[attention].values():
        raise ValueError(f"attention = {attention!r} needs {' and '.join(wanted[attention])}, got {wanted[attention]}")
    if attention == "mla":
        return kv_rank + d_rope                                         # eq. 1
    heads = {"mha": n_heads, "gqa": n_kv_heads, "mqa": 1}[attention]
    return heads * (d_key + d_value)                                    # eq. 2


class LatentCache:
    """What one layer remembers of the tokens so far.

    c_kv: (B, capacity, C), after its norm   k_rope: (B, capacity, R), turned to its position   length: tokens filled
    """

    def __init__(self, batch, capacity, kv_rank, d_rope, dtype=np.float32):
        self.c_kv = np.zeros((batch, capacity, kv_rank), dtype)
        self.k_rope = np.zeros((batch, capacity, d_rope), dtype)
        self.length = 0

    def append(self, c_kv, k_rope):
        """Remember T more tokens, (B, T, C) and (B, T, R); return views of all so far, (B, S, C) and (B, S, R).

        Raises ValueError when they do not fit; the cache is then as it was.
        """
        batch, capacity, _ = self.c_kv.shape
        end = self.length + c_kv.shape[1]
        if c_kv.shape != (*c_kv.shape[:2], self.c_kv.shape[2]) or k_rope.shape != (*c_kv.shape[:2], self.k_rope.shape[2]):
            raise ValueError(f"c_kv {c_kv.shape} and k_rope {k_rope.shape} must be (B, T, {self.c_kv.shape[2]}) and (B, T, {self.k_rope.shape[2]})")
        if len(c_kv) != batch or end > capacity:
            raise ValueError(f"the cache holds {batch} sequences of {capacity} tokens, {self.length} are filled: "
                             f"{c_kv.shape[1]} more of {len(c_kv)} sequences do not fit")
        self.c_kv[:, self.length:end], self.k_rope[:, self.length:end] = c_kv, k_rope
        self.length = end
        return self.c_kv[:, :end], self.k_rope[:, :end]

    def truncate(self, length):
        """Forget all but the first `length` tokens. Raises ValueError when there are fewer."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length = {length}: the cache holds {self.length} tokens")
        self.length = length


def demo():
    """Fill, forget, overfill; and the sizes of V3."""
    cache = LatentCache(batch=1, capacity=4, kv_rank=3, d_rope=2)
    c_kv, k_rope = cache.append(np.ones((1, 2, 3)), np.ones((1, 2, 2)))
    print("shapes    two tokens appended -> c_kv", c_kv.shape, "k_rope", k_rope.shape)
    cache.truncate(1)
    try:
        cache.append(np.ones((1, 4, 3)), np.ones((1, 4, 2)))
        refused = False
    except ValueError as error:
        refused = True
        print("by hand  ", error)
    v3 = dict(n_heads=128, d_key=192, d_value=128, n_kv_heads=8, kv_rank=512, d_rope=64)
    sizes = {kind: cached_floats(kind, **v3) for kind in ("mha", "gqa", "mqa", "mla")}
    print("claim     V3's heads, floats per token and layer: " + ", ".join(f"{kind} {size:,}" for kind, size in sizes.items()))
    from minideepseek.plots.attention import cache_bars
    from minideepseek.plots.canvas import plot_path
    if path := plot_path():
        cache_bars(sizes, path=path)
    assert refused and cache.length == 1 and sizes == {"mha": 40_960, "gqa": 2_560, "mqa": 320, "mla": 576}


if __name__ == "__main__":
    from minideepseek.attention.kv_cache import demo  # the imported copy, so that every name exists once
    demo()
