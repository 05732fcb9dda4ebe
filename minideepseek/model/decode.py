"""Decoding: the model on new tokens only, with everything before them in latent caches.

Derivation: whiteboard/model/decode.md     Source: DeepSeek-V2, arXiv:2405.04434, sec. 2.1
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import numpy as np

from minideepseek.attention.kv_cache import LatentCache
from minideepseek.attention.mla_absorb import mla_decode
from minideepseek.basics.rmsnorm import rmsnorm_forward
from minideepseek.basics.swiglu import swiglu_forward
from minideepseek.model.block import attention_options, position_tables, routing_options
from minideepseek.model.config import Config
from minideepseek.model.mtp import mtp_projection_forward
from minideepseek.model.transformer import check_ids, init, transformer
from minideepseek.moe.deepseek_moe import MoEWeights, deepseek_moe_forward


def new_caches(config, batch, capacity, dtype, n_caches=None):
    """One empty LatentCache for every layer of the main model, or as many as asked. Raises ValueError for a model without latent attention."""
    if config.attention != "mla":
        raise ValueError(f"attention = {config.attention!r}: latent caches are those of 'mla'; generate(..., use_cache=False) recomputes")
    return [LatentCache(batch, capacity, config.kv_rank, config.d_rope, dtype) for _ in range(config.n_layers if n_caches is None else n_caches)]


def transformer_decode(ids, weights, config, caches):
    """The new tokens of a text whose beginning is in the caches -> their logits. The caches grow by T tokens.

    ids: (B, T) int, the new tokens: a whole prompt, a piece of it, or one token   weights: ModelWeights of arrays
    caches: of `new_caches`, all of the same length S - T
    -> logits: (B, T, U)   hidden: (B, T, D), what prediction modules read: after the final norm if config.mtp_reads_normed, else before

    Equal to the last T positions of `transformer` on the whole text, whatever the pieces.
    Raises ValueError for ids the model refuses, caches that do not fit, or a text longer than they or the position table.
    """
    check_ids(ids, config)
    check_caches(caches, config, weights.E.dtype)
    start, T = caches[0].length, ids.shape[1]
    if start + T > config.max_positions:
        raise ValueError(f"{start} tokens in the cache and {T} new ones exceed the position table, max_positions = {config.max_positions}")
    cos, sin = position_tables(config, np.arange(start, start + T), weights.E.dtype)        # position = S - T + i   # eq. 1
    x = weights.E[ids]                                                                      # (B, T, D)
    for layer, cache in zip(weights.layers, caches, strict=True):
        x = block_decode(x, layer, config, cos, sin, cache)
    normed, _ = rmsnorm_forward(x, weights.g_final, eps=config.eps)                         # (B, T, D)
    return normed @ weights.W_head, normed if config.mtp_reads_normed else x


def module_decode(hidden, ahead, module, weights, config, cache):
    """`mtp_module` on plain arrays, with its attention on the cache, which grows by T positions.

    hidden: (B, T, D), the states at its next T positions   ahead: (B, T) int, the tokens shown there   module: of weights.mtp
    -> logits: (B, T, U)   hidden: (B, T, D), what the next module reads
    """
    start, T = cache.length, ahead.shape[1]
    cos, sin = position_tables(config, np.arange(start, start + T), weights.E.dtype)
    merged, _ = mtp_projection_forward(hidden, weights.E[ahead], module.g_hidden, module.g_embedding, module.W_merge, eps=config.eps,
                                       embedding_first=config.mtp_embedding_first)          # eq. 4
    x = block_decode(merged, module.block, config, cos, sin, cache)                         # (B, T, D)
    normed, _ = rmsnorm_forward(x, module.g_final, eps=config.eps)                          # (B, T, D)
    return normed @ weights.W_head, normed if config.mtp_reads_normed else x


def check_caches(caches, config, dtype):
    """Raises ValueError unless there is a cache for every layer, all of one length and of the weights' dtype."""
    lengths, dtypes = {cache.length for cache in caches}, {cache.c_kv.dtype for cache in caches}
    if len(caches) != config.n_layers or len(lengths) != 1 or dtypes != {dtype}:
        raise ValueError(f"caches: {len(caches)} of lengths {sorted(lengths)} and dtypes {sorted(map(str, dtypes))}; expected {config.n_layers}, "
                         f"one for each layer, of one length and of dtype {dtype}")


def block_decode(x, weights, config, cos, sin, cache):
    """`block` on plain arrays, with its attention on the cache. x: (B, T, D) -> (B, T, D)"""
    n, _ = rmsnorm_forward(x, weights.g_attention, eps=config.eps)
    h = x + mla_decode(n, *weights.attention, cache=cache, cos=cos, sin=sin, **attention_options(config))   # eq. 2
    m, _ = rmsnorm_forward(h, weights.g_ffn, eps=config.eps)
    if isinstance(weights.ffn, MoEWeights):
        (f, _), _ = deepseek_moe_forward(m, *weights.ffn, **routing_options(config), b_select=weights.b_select)
    else:
        f, _ = swiglu_forward(m, *weights.ffn)
    return h + f                                                                            # eq. 3


def demo():
    """A text decoded in pieces of every size, against the whole at once."""
    config = Config(vocab_size=13, d_model=12, n_layers=2, n_dense_layers=1, d_ff=10, max_positions=16, n_heads=2, q_rank=6, kv_rank=5, d_nope=4,
                    d_rope=2, d_value=3, n_routed=4, top_k=2, d_expert=5, n_groups=2, n_groups_kept=1, n_mtp=0)
    rng = np.random.default_rng(0)
    weights, ids = init(config, rng, std=0.4, dtype=np.float64), rng.integers(0, 13, (2, 7))
    whole = transformer(ids, weights, config).logits.data
    worst = {}
    for size in (7, 3, 2, 1):
        caches = new_caches(config, 2, 7, np.float64)
        pieces = [transformer_decode(ids[:, start:start + size], weights, config, caches)[0] for start in range(0, 7, size)]
        worst[size] = np.abs(np.concatenate(pieces, axis=1) - whole).max()
    print(f"shapes    ids {ids.shape} -> logits {whole.shape}; {config.n_layers} caches of {caches[0].c_kv.shape} and {caches[0].k_rope.shape}")
    print("claim     in pieces of " + ", ".join(f"{size}: difference {error:.0e}" for size, error in worst.items()))
    assert max(worst.values()) < 1e-12


if __name__ == "__main__":
    from minideepseek.model.decode import demo  # the imported copy, so that every name exists once
    demo()
