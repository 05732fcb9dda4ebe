"""Step 5: latent attention. Remember one small vector per token, and make the keys and values of all heads from it.

    python examples/05_latent_attention.py [--plot FILE.png]

To write the next token a model looks back at every token before it, so it keeps something of each: the cache. Plain
attention keeps the keys and the values of all heads. DeepSeek's latent attention keeps a latent, from which they can be
made, and one key with the position. It even attends on the latent itself, without making them: the absorbed form.
Pages: whiteboard/attention/mla.md, whiteboard/attention/kv_cache.md, whiteboard/attention/mla_absorb.md
"""
import os
import sys

sys.path[0:1] = [os.path.abspath(__file__ + "/../..")]   # run as a script: take the package from this repository

import argparse

import numpy as np

from minideepseek.attention.kv_cache import LatentCache, cached_floats
from minideepseek.attention.mla import mla_forward
from minideepseek.attention.mla_absorb import mla_decode
from minideepseek.autograd.params import flatten, unflatten
from minideepseek.model.block import attention_options, block_outline, position_tables
from minideepseek.model.presets import preset
from minideepseek.plots.canvas import BLUE, GREY, ORANGE
from minideepseek.tokenizer.bpe import train

SENTENCE = "Sarah visits the bank to deposit money while Zarah visits the bank to sit by the water"
BYTES = 2                                                # of one number in bfloat16
LONG = 131_072                                           # tokens: the length to which V3's training was extended


def floats_per_token(config):
    """{kind of attention: how many numbers a token leaves in the cache of one layer}, for the heads of a configuration."""
    sizes = dict(n_heads=config.n_heads, d_key=config.d_nope + config.d_rope, d_value=config.d_value, n_kv_heads=8,
                 kv_rank=config.kv_rank, d_rope=config.d_rope)
    return {kind: cached_floats(kind, **sizes) for kind in ("mha", "gqa", "mqa", "mla")}


def draw(path, floats, n_layers):
    """Left: numbers kept per token and layer. Right: the whole cache against the length of the text."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = {"mha": "every head its own\nkeys and values", "gqa": "8 groups of heads", "mqa": "one for all heads", "mla": "latent and one\nkey with position"}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    bars = left.barh([names[kind] for kind in floats], floats.values(), color=[ORANGE if kind == "mla" else BLUE for kind in floats])
    left.bar_label(bars, [f"{n:,}" for n in floats.values()], padding=4)
    left.set(xlim=(0, 48_000), xlabel="numbers kept per token and layer", title="the heads of DeepSeek-V3")
    left.invert_yaxis()
    lengths = 2.0 ** np.arange(10, 18)
    for kind, color, marker in (("mha", BLUE, "o"), ("mla", ORANGE, "s")):
        right.loglog(lengths, floats[kind] * n_layers * BYTES * lengths / 1e9, color=color, marker=marker, label=names[kind].replace("\n", " "))
    right.axhline(80, color=GREY, linestyle="--", label="80 GB: the memory of one large GPU")
    right.set(ylim=(0.02, 20_000), xlabel="length of the text (tokens)", ylabel="cache of one text (GB)",
              title=f"all {n_layers} layers, {BYTES} bytes a number")
    right.legend(loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", metavar="FILE.png", help="write the picture")
    options = parser.parse_args()

    micro, v3 = preset("micro"), preset("v3")
    print("1. What one token leaves in the cache of one layer, in numbers:")
    for name, config in (("a toy model", micro), ("DeepSeek-V3", v3)):
        floats = floats_per_token(config)
        print(f"   {name}: all keys and values {floats['mha']:6,d}; latent {config.kv_rank} + key with position {config.d_rope} = "
              f"{floats['mla']}: {floats['mha'] / floats['mla']:.1f} times fewer")
    full, latent = [floats[kind] * v3.n_layers * BYTES for kind in ("mha", "mla")]
    print(f"   V3, {v3.n_layers} layers, {BYTES} bytes each: {full:,} against {latent:,} bytes per token; "
          f"a text of {LONG:,} tokens: {full * LONG / 1e9:.0f} GB against {latent * LONG / 1e9:.1f} GB")

    rng, tokenizer = np.random.default_rng(0), train((SENTENCE + "\n") * 2, 1000)      # trained on nothing else: one token a word
    ids = tokenizer.encode(SENTENCE)
    T, D, H, N, C = len(ids), micro.d_model, micro.n_heads, micro.d_nope, micro.kv_rank
    form = block_outline(micro, dense=True).attention
    weights = unflatten({name: rng.standard_normal(leaf.shape) / leaf.shape[0]**0.5 for name, leaf in flatten(form).items()}, form)
    E, how = rng.standard_normal((tokenizer.vocab_size, D)), attention_options(micro)
    tables = position_tables(micro, np.arange(len(E)), np.float64)
    _, kept = mla_forward(E[None], *weights, cos=tables[0], sin=tables[1], **how)        # every token of the vocabulary, once
    c_kv = kept.W_UK[0][0]                                                              # (U, C)   what W_UK multiplied: the latents
    keys = c_kv @ weights.W_UK                                                          # (U, H*N)
    rank = np.linalg.matrix_rank(keys)
    print(f"\n2. The price: the {H} heads' keys are {keys.shape[1]} numbers per token, but made from {C}. "
          f"The keys of {len(keys)} different tokens have rank {rank}, not {keys.shape[1]}.")

    q, W = rng.standard_normal(N), weights.W_UK[:, :N]                                  # one query and the matrix of one head
    made, absorbed = q @ (c_kv[0] @ W), (q @ W.T) @ c_kv[0]
    print("\n3. Absorbing is moving a bracket. One score of one head, for a query q and a cached latent c:")
    print(f"   make the key, then multiply:  q . (c W) = {made:+.12f}")
    print(f"   move W to the query, once:    (q W') . c = {absorbed:+.12f}")

    x, cos, sin = E[ids][None], tables[0][:T], tables[1][:T]                            # (1, T, D), (T, R/2) both
    naive, _ = mla_forward(x, *weights, cos=cos, sin=sin, **how)
    cache, rows = LatentCache(1, T, C, micro.d_rope, np.float64), []
    print("\n4. The sentence again, a token at a time. Only the new token is computed; what came before is in the cache:")
    for t in range(T):
        y = mla_decode(x[:, t:t + 1], *weights, cache=cache, cos=cos[t:t + 1], sin=sin[t:t + 1], **how)
        rows.append(y)
        if t in (0, 3, 11, 16):
            held = (C + micro.d_rope) * cache.length
            print(f"   {tokenizer.token_bytes(ids[t]).decode('utf-8').strip():6s} at {t:2d}: cache holds {cache.length:2d} tokens, {held:3d} numbers; "
                  f"difference to the whole sentence at once {np.abs(y - naive[:, t:t + 1]).max():.0e}")
    worst = np.abs(np.concatenate(rows, axis=1) - naive).max()

    N, R, V, C = v3.d_nope, v3.d_rope, v3.d_value, v3.kv_rank
    work, reading = (C + R + C) / (N + R + V), floats["mha"] / floats["mla"]
    print(f"\n5. V3's absorbed attention does {work:.1f} times the arithmetic for every query, key and head, and reads {reading:.0f} times less than plain")
    print("   attention. Writing a text waits for memory more than for arithmetic: a good bargain. In training the keys are made.")

    if options.plot:
        draw(options.plot, floats, v3.n_layers)
    print("\nTo think about: why must the key with the position be kept beside the latent? (Try to move the bracket past a rotation.)")
    print("One key with position serves all heads. What would one for each head cost? (next: 06_mixture_of_experts.py)")
    right = worst < 1e-12 and abs(made - absorbed) < 1e-12 and floats["mha"] == 40_960 and floats["mla"] == 576 and rank == micro.kv_rank
    print(f"\nclaim     absorbed, token by token = naive, all at once: difference {worst:.0e}; V3 keeps {floats['mla']} numbers for {floats['mha']:,}: {right}")
    return int(not right)


if __name__ == "__main__":
    raise SystemExit(main())
