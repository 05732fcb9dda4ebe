"""Named configurations: the published shapes of DeepSeek-V2-Lite, V2 and V3, and small ones to train on a laptop.

Derivation: whiteboard/model/presets.md     Source: DeepSeek-V3's released configs; DeepSeek-V2, arXiv:2405.04434, sec. 3.1 and app. B
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

from minideepseek.model.config import Config

# The mscale of 0.707 is V2-Lite's; public copies of V2's own configuration disagree (0.707 or 1.0).
V2_FAMILY = dict(scoring="softmax", normalise=False, balance="aux", n_shared=2, n_dense_layers=1, vocab_size=102_400, mscale=0.707, mscale_all_dim=0.707, n_mtp=0)
SMALL = dict(n_dense_layers=1, n_groups=1, n_groups_kept=1, scaling=1.0, max_positions=1_024, yarn_factor=1.0)     # V3's ways at small sizes
PRESETS = {
    "v2-lite": Config(**V2_FAMILY, d_model=2_048, n_layers=27, d_ff=10_944, n_heads=16, q_rank=None, n_routed=64, top_k=6, d_expert=1_408,
                      n_groups=1, n_groups_kept=1, scaling=1.0),
    "v2": Config(**V2_FAMILY, d_model=5_120, n_layers=60, d_ff=12_288, n_routed=160, top_k=6, d_expert=1_536, n_groups_kept=3, scaling=16.0),
    "v3": Config(),
    "micro": Config(**SMALL, vocab_size=512, d_model=64, n_layers=3, d_ff=192, n_heads=4, q_rank=32, kv_rank=16, d_nope=16, d_rope=8, d_value=16,
                    n_routed=8, top_k=2, d_expert=32),
    "tiny": Config(**SMALL, vocab_size=512, d_model=128, n_layers=4, d_ff=384, n_heads=4, q_rank=64, kv_rank=32, d_nope=32, d_rope=16, d_value=32,
                   n_routed=8, top_k=2, d_expert=64),
    "small": Config(**SMALL, vocab_size=4_096, d_model=256, n_layers=6, d_ff=704, n_heads=8, q_rank=128, kv_rank=64, d_nope=32, d_rope=16, d_value=32,
                    n_routed=16, top_k=4, d_expert=128),
}
PUBLISHED = ("v2-lite", "v2", "v3")


def preset(name):
    """The configuration of a name. Raises ValueError that lists the names there are."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} does not exist; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def demo():
    """The presets side by side."""
    fields = ("d_model", "n_layers", "n_heads", "q_rank", "kv_rank", "n_routed", "top_k", "d_expert", "scoring")
    print("preset   ", " ".join(f"{field:>9s}" for field in fields))
    for name, config in PRESETS.items():
        print(f"{name:9s}", " ".join(f"{getattr(config, field)!s:>9s}" for field in fields))
    try:
        preset("v5")
        refused = False
    except ValueError as error:
        refused = True
        print("claim    ", error)
    assert refused and preset("v3") == Config()


if __name__ == "__main__":
    from minideepseek.model.presets import demo  # the imported copy, so that every name exists once
    demo()
