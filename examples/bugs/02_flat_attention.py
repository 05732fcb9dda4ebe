"""Flat attention: every gradient is right, and the layer is not the one of the paper.

    python examples/bugs/02_flat_attention.py            # the symptom
    python examples/bugs/02_flat_attention.py --fix      # without the bug

Queries and keys are Gaussian, of V3's size. The scale of the scores is there to give them a standard deviation of 1. Here
it is 0.58, so the attention is spread over too many keys. The gradient check finds nothing. Why can it not? Where does the
number 0.58 come from?

A path to the cause, at the prompt:

    $ MINIDEEPSEEK_BREAK=causal_attention.forward python examples/bugs/02_flat_attention.py
    p q.shape[-1]              as many products are added up in a score
    p round(scale ** -2)       as many the scale believes in
    up 2                       to the script
    p N + R, C + R             where have you seen these two numbers?

Derivation: whiteboard/attention/mla.md     Bug 7 of the museum
"""
import os
import sys

sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]   # run as a script: take the package from this repository

import numpy as np

from minideepseek.attention.causal import causal_attention, causal_attention_backward, causal_attention_forward
from minideepseek.autograd.gradcheck import gradcheck

N, R, C = 128, 64, 512        # d_nope, d_rope, kv_rank of V3: a query has N + R channels, the latent has C
SCALE = (C + R) ** -0.5


def main():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((1, 1, 256, N + R)), rng.standard_normal((1, 1, 256, N + R)), np.eye(256)[None, None]
    p = causal_attention(q, k, v, scale=SCALE).data[0, 0, -1]           # the values are unit vectors: this is the attention itself
    spread = (SCALE * q[0, 0] @ k[0, 0].T).std()
    small = [rng.standard_normal((1, 2, 3, n)) for n in (4, 4, 5)]
    worst = max(gradcheck(causal_attention_forward, causal_attention_backward, small, {"scale": SCALE}).values())
    print(f"gradient check    worst error {worst:.0e}: nothing to find")
    print(f"scores            standard deviation {spread:.2f}, where 1 is meant")
    print(f"last token        spreads its attention over about {np.exp(-(p * np.log(p)).sum()):.0f} of 256 keys")
    print("symptom:", "here" if spread < 0.8 else "gone")


if __name__ == "__main__":
    if "--fix" in sys.argv:                            # the answer: find your own first
        SCALE = (N + R) ** -0.5
    main()
