"""Only the first token: decoding with a cache starts well and then goes astray.

    python examples/bugs/04_only_the_first_token.py            # the symptom
    python examples/bugs/04_only_the_first_token.py --fix      # without the bug

The same eight tokens go through one attention layer twice: all at once, and one by one with the keys in a cache. Both must
give the same. Token 0 agrees in every bit, all later ones do not. What does token 0 not need to know?

A path to the cause, at the prompt:

    $ MINIDEEPSEEK_BREAK=rope.forward python examples/bugs/04_only_the_first_token.py
    p cos.shape                the whole sequence: one row of angles per position
    c                          its keys
    c                          the first token alone
    c                          and its key
    c                          the second token: it stands at position 1
    p cos, sin                 cos 1, sin 0: of which position are these?

Derivation: whiteboard/attention/kv_cache.md     Bug 14 of the museum
"""
import os
import sys

sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]   # run as a script: take the package from this repository

import numpy as np

from minideepseek.attention.causal import causal_attention_forward
from minideepseek.attention.rope import frequencies, rope_forward, rope_tables

T, R = 8, 6


def attend(x, cached):
    """One head: new tokens x (T, R) see the keys of the cache (S, R) and each other. -> o (T, R), the keys of all."""
    positions = np.arange(len(x))
    cos, sin = rope_tables(positions, frequencies(R))
    q, _ = rope_forward(x[None, :, None], cos=cos, sin=sin)
    k, _ = rope_forward(x[None, :, None], cos=cos, sin=sin)
    keys = np.concatenate([cached, k[0, :, 0]])
    o, _ = causal_attention_forward(q.swapaxes(1, 2), keys[None, None], keys[None, None], scale=R ** -0.5)
    return o[0, 0], keys


def main():
    x, nothing = np.random.default_rng(0).standard_normal((T, R)), np.zeros((0, R))
    at_once, _ = attend(x, nothing)
    keys, worst = nothing, []
    for i in range(T):
        o, keys = attend(x[i:i + 1], keys)
        worst.append(np.abs(o[0] - at_once[i]).max())
    print("token     " + "".join(f"{i:9d}" for i in range(T)))
    print("difference" + "".join(f"{w:9.0e}" for w in worst))
    print("symptom:", "here" if max(worst) > 1e-12 else "gone")


if __name__ == "__main__":
    if "--fix" in sys.argv:                            # the answer: find your own first
        def attend(x, cached):
            positions = np.arange(len(cached), len(cached) + len(x))
            cos, sin = rope_tables(positions, frequencies(R))
            q, _ = rope_forward(x[None, :, None], cos=cos, sin=sin)
            k, _ = rope_forward(x[None, :, None], cos=cos, sin=sin)
            keys = np.concatenate([cached, k[0, :, 0]])
            o, _ = causal_attention_forward(q.swapaxes(1, 2), keys[None, None], keys[None, None], scale=R ** -0.5)
            return o[0, 0], keys
    main()
