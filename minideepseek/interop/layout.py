"""The public layout of a checkpoint: the name of every tensor, and which of our arrays it holds, and how.

Derivation: whiteboard/interop/layout.md     Source: transformers 5.23, models deepseek_v3 and deepseek_v2
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

from typing import NamedTuple

import numpy as np

from minideepseek.autograd import params
from minideepseek.model.config import Config
from minideepseek.model.transformer import init

MTP = {"enorm": "g_embedding", "hnorm": "g_hidden", "eh_proj": "W_merge", "shared_head.norm": "g_final"}
SHARED = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
"""What a module may store a second time: its name behind the module's prefix, and the tensor it repeats."""


class Entry(NamedTuple):
    """One tensor of a checkpoint: which of our arrays it holds, and how.

    A public matrix is the transpose of ours, (out, in), and may stack several of ours: head by head, its rows are those
    of the first part, then those of the second. Vectors and the embedding table are as they are here.
    """
    name: str                    # model.layers.0.self_attn.kv_b_proj.weight
    parts: tuple                 # (layers.0.attention.W_UK, layers.0.attention.W_UV)
    heads: int = 1
    expert: int | None = None    # the index into our stacked experts

    def public_shape(self, flat):
        first, *others = self._ours(flat)
        if self._as_it_is(first):
            return first.shape
        return first.shape[1] + sum(part.shape[1] for part in others), first.shape[0]

    def pack(self, flat):
        """Our arrays -> the public one."""
        first, *others = self._ours(flat)
        if self._as_it_is(first):
            return first
        rows = [part.T.reshape(self.heads, -1, len(first)) for part in (first, *others)]      # (H, rows of the part, in)
        return np.concatenate(rows, axis=1).reshape(-1, len(first))

    def unpack(self, array, flat):
        """The public array -> written into ours."""
        first, *others = self._ours(flat)
        if self._as_it_is(first):
            first[...] = array
            return
        rows, start = array.reshape(self.heads, -1, len(first)), 0
        for part in (first, *others):
            width = part.shape[1] // self.heads
            part[...] = rows[:, start:start + width].reshape(-1, len(first)).T
            start += width

    def _ours(self, flat):
        return [flat[name] if self.expert is None else flat[name][self.expert] for name in self.parts]

    def _as_it_is(self, array):
        return array.ndim == 1 or self.parts == ("E",)


def layout(weights):
    """Every tensor of the checkpoint that these weights make, as Entries. weights: ModelWeights of arrays or outlines."""
    entries = [Entry("model.embed_tokens.weight", ("E",))]
    for i, layer in enumerate(weights.layers):
        entries += _block_layout(f"model.layers.{i}.", f"layers.{i}.", layer)
    for k, module in enumerate(weights.mtp):                     # they stand behind the last layer
        public, ours = f"model.layers.{len(weights.layers) + k}.", f"mtp.{k}."
        entries += [Entry(f"{public}{name}.weight", (ours + part,)) for name, part in MTP.items()]
        entries += _block_layout(public, ours + "block.", module.block)
    return [*entries, Entry("model.norm.weight", ("g_final",)), Entry("lm_head.weight", ("W_head",))]


def _block_layout(public, ours, block):
    """The tensors of one layer; `public` and `ours` are what its names begin with."""
    a, m = ours + "attention.", ours + "ffn."
    heads = block.attention.W_QR.shape[1] // block.attention.W_KR.shape[1]
    named = {"input_layernorm": ours + "g_attention", "post_attention_layernorm": ours + "g_ffn",
             "self_attn.kv_a_layernorm": a + "g_kv", "self_attn.o_proj": a + "W_O"}
    query = "q_proj"
    if block.attention.W_DQ is not None:
        named |= {"self_attn.q_a_proj": a + "W_DQ", "self_attn.q_a_layernorm": a + "g_q"}
        query = "q_b_proj"
    stacked = [Entry(f"{public}self_attn.{query}.weight", (a + "W_UQ", a + "W_QR"), heads),
               Entry(f"{public}self_attn.kv_a_proj_with_mqa.weight", (a + "W_DKV", a + "W_KR")),
               Entry(f"{public}self_attn.kv_b_proj.weight", (a + "W_UK", a + "W_UV"), heads)]
    if hasattr(block.ffn, "W_router"):
        named["mlp.gate"] = m + "W_router"
        for part in ("gate", "up", "down"):
            stacked += [Entry(f"{public}mlp.experts.{e}.{part}_proj.weight", (f"{m}W_{part}",), expert=e) for e in range(len(block.ffn.W_gate))]
            if block.ffn.W_shared_gate is not None:
                named[f"mlp.shared_experts.{part}_proj"] = f"{m}W_shared_{part}"
    else:
        named |= {f"mlp.{part}_proj": f"{m}W_{part}" for part in ("gate", "up", "down")}
    if block.b_select is not None:
        stacked.append(Entry(public + "mlp.gate.e_score_correction_bias", (ours + "b_select",)))
    return [Entry(f"{public}{name}.weight", (part,)) for name, part in named.items()] + stacked


def demo():
    """Where the numbers of one head stand in a public matrix, and a model through the layout and back."""
    config = Config(vocab_size=7, d_model=6, n_layers=2, n_dense_layers=1, d_ff=5, n_heads=2, q_rank=None, kv_rank=3, d_nope=2, d_rope=2,
                    d_value=1, n_routed=2, top_k=1, d_expert=4, n_groups=1, n_groups_kept=1)
    weights = init(config, np.random.default_rng(0), std=1.0)
    flat, entries = params.flatten(weights), {entry.name: entry for entry in layout(weights)}
    print(f"shapes    {len(flat)} arrays of ours, {len(entries)} tensors of the checkpoint")
    attention = weights.layers[0].attention
    public = entries["model.layers.0.self_attn.kv_b_proj.weight"].pack(flat)
    by_hand = [attention.W_UK[:, 0], attention.W_UK[:, 1], attention.W_UV[:, 0], attention.W_UK[:, 2], attention.W_UK[:, 3], attention.W_UV[:, 1]]
    print(f"by hand   kv_b_proj {public.shape}: rows [k k v] of head 0, then [k k v] of head 1: {np.array_equal(public, by_hand)}")
    back = {name: np.empty_like(leaf) for name, leaf in flat.items()}
    for entry in entries.values():
        entry.unpack(entry.pack(flat), back)
    same = all(np.array_equal(back[name], leaf) for name, leaf in flat.items())
    print(f"claim     out to the public layout and back: every one of {params.count(weights)} numbers where it was: {same}")
    assert same and np.array_equal(public, by_hand)


if __name__ == "__main__":
    from minideepseek.interop.layout import demo  # the imported copy, so that every name exists once
    demo()
