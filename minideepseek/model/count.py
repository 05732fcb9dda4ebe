"""Exact counts of any configuration, without a byte of it in memory: parameters, flops per token, cache bytes per token.

    python -m minideepseek.model.count v3

Derivation: whiteboard/model/count.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import sys

from minideepseek.attention.kv_cache import cached_floats
from minideepseek.autograd.params import flatten
from minideepseek.model.block import CONSTANT
from minideepseek.model.presets import PRESETS, PUBLISHED, preset
from minideepseek.model.transformer import model_outline


def parameters(config):
    """{part: how many trained numbers} of the model and its prediction modules. Selection biases are not trained.

    Parts: embedding, head, attention, dense, router, routed, shared, norms (outside attention), mtp (all modules).
    """
    parts = dict.fromkeys(("embedding", "head", "attention", "dense", "router", "routed", "shared", "norms", "mtp"), 0)
    for name, leaf in flatten(model_outline(config)).items():
        if name.split(".")[-1] not in CONSTANT:
            parts[_part(name, leaf)] += leaf.size
    return parts


def total(config):
    """All trained numbers of the main model: the number in a model's name."""
    parts = parameters(config)
    return sum(parts.values()) - parts["mtp"]                                               # eq. 1


def active(config, *, embedding=True, head=True):
    """The numbers that one token uses: top_k of the routed experts, and everything else of the main model.

    embedding, head: whether to count the two tables. Reports differ in this; say which. V3's "37B" is nearest without
    the embedding, which is looked up and not multiplied.
    """
    parts = parameters(config)
    unused = parts["routed"] // config.n_routed * (config.n_routed - config.top_k)          # eq. 2
    return total(config) - unused - (not embedding) * parts["embedding"] - (not head) * parts["head"]   # eq. 3


def flops_per_token(config, context=4_096):
    """Floating-point operations of one token's forward pass, an add and a multiply counted as two, with `context` keys to see.

    Two for every active number that is multiplied (the embedding is looked up), and per layer, head and key the scores
    and the weighted sum. Keys and values unpacked, as in training; a gain counts like a weight, softmax not at all.
    The mean context of a text is half its length. Backward: twice as much.
    """
    pair = 2 * (config.d_nope + config.d_rope + config.d_value)                             # eq. 4
    return 2 * active(config, embedding=False) + config.n_layers * config.n_heads * pair * context   # eq. 5


def cache_bytes_per_token(config, bytes_per_number=2):
    """What one token leaves in the caches of the main model's layers, in bytes. bytes_per_number: 2 for bfloat16."""
    floats = cached_floats(config.attention, n_heads=config.n_heads, d_key=config.d_nope + config.d_rope, d_value=config.d_value,
                           n_kv_heads=config.n_kv_heads, kv_rank=config.kv_rank, d_rope=config.d_rope)
    return config.n_layers * floats * bytes_per_number                                      # eq. 6


def _part(name, leaf):
    """The part that a leaf belongs to, by its name in the tree."""
    if name.startswith("mtp."):
        return "mtp"
    if ".attention." in name:
        return "attention"
    leaf_name = name.split(".")[-1]
    if ".ffn." in name:
        if leaf_name == "W_router":
            return "router"
        return "shared" if "_shared_" in leaf_name else "routed" if leaf.ndim == 3 else "dense"
    return {"E": "embedding", "W_head": "head"}.get(leaf_name, "norms")


def report(name, config):
    """Print every count of a configuration."""
    parts = parameters(config)
    print(f"{name}: {total(config):,} parameters")
    for part, size in parts.items():
        if part != "mtp":
            print(f"  {part:28s} {size:>18,}  {size / total(config):6.1%}")
    print(f"  {'active':28s} {active(config):>18,}  {active(config) / total(config):6.1%}")
    print(f"  {'active without embedding':28s} {active(config, embedding=False):>18,}")
    print(f"  {'... and without head':28s} {active(config, embedding=False, head=False):>18,}")
    for k in range(config.n_mtp):
        print(f"  {f'prediction module {k}':28s} {parts['mtp'] // config.n_mtp:>18,}  not in the total; shares embedding and head")
    print(f"  {'flops per token, 4,096 keys':28s} {flops_per_token(config):>18,}")
    print(f"  {'cache bytes per token, bf16':28s} {cache_bytes_per_token(config):>18,}")


def demo():
    """Print the counts of the presets named on the command line, or of all, and hold them against the published ones."""
    for name in sys.argv[1:] or PUBLISHED:
        try:
            report(name, preset(name))
        except ValueError as error:
            raise SystemExit(f"error: {error}") from None
    counts = [total(PRESETS[name]) for name in ("v3", "v2", "v2-lite")]
    print("claim     the public implementation counts 671,026,404,352, 235,741,434,880 and 15,706,484,224:", counts == [671_026_404_352, 235_741_434_880, 15_706_484_224])
    assert counts == [671_026_404_352, 235_741_434_880, 15_706_484_224]


if __name__ == "__main__":
    from minideepseek.model.count import demo  # the imported copy, so that every name exists once
    demo()
