"""The sequence-wise balance loss: a price on a sequence whose tokens all want the same few experts.

Derivation: whiteboard/moe/balance_loss.md     Source: DeepSeek-V3, arXiv:2412.19437, eq. 17-20
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import numpy as np

from minideepseek.autograd.gradcheck import report
from minideepseek.autograd.tape import op
from minideepseek.basics.linear import linear_backward, linear_forward
from minideepseek.basics.softmax import softmax_backward, softmax_forward
from minideepseek.basics.swiglu import sigmoid
from minideepseek.moe.router import best, wide_gaps


def sequence_balance_forward(x, W_router, *, top_k, scoring="sigmoid"):
    """The mean over sequences of sum_i f_i P_i: how often expert i is wanted, times its mean share of the scores.

    x: (B, T, D)   W_router: (D, E)   top_k: K   ->   loss: ()

    Exactly 1 when every expert is wanted equally often, E / top_k at worst. Without alpha: the caller multiplies
    (V3: 1e-4). x is what the router reads; its scores are computed again, one thin product.
    scoring: "sigmoid" is V3's, "softmax" is V2's, whose scores sum to 1 already.
    Source: DeepSeek-V3, arXiv:2412.19437, eq. 17-20; a token wants the top_k of its *unbiased* scores among *all* experts,
    as written there. Whether the training code counted these or the biased, grouped choices is not public.
    """
    logits, linear_cache = linear_forward(x, W_router)                          # (B, T, E)   # eq. 1
    if scoring == "sigmoid":
        score = sigmoid(logits)                                                 # (B, T, E)   # eq. 2
        total = score.sum(axis=-1, keepdims=True) + 1e-20                       # (B, T, 1)
        share = score / total                                                   # (B, T, E)   # eq. 3
    else:
        share, _ = softmax_forward(logits)                                      # (B, T, E)   # eq. 4
        score = total = None                                    # these shares need no division
    wanted = np.zeros_like(share)                                               # (B, T, E)
    np.put_along_axis(wanted, best(share, top_k), 1, axis=-1)   # dividing kept the order     # eq. 5
    B, T, E = share.shape
    f = wanted.sum(axis=1) * E / (top_k * T)                    # fair: 1       # (B, E)      # eq. 6
    P = share.mean(axis=1)                                                      # (B, E)      # eq. 7
    loss = (f * P).sum(axis=-1).mean()                                          # ()          # eq. 8
    return loss, (linear_cache, score, total, share, f, scoring)


def sequence_balance_backward(dloss, cache):
    """f counts, and a count is flat: a constant. The only road is P, and it reaches every expert, wanted or not."""
    linear_cache, score, total, share, f, scoring = cache
    B, T, _ = share.shape
    dP = f * (dloss / B)                                                        # (B, E)      # eq. 9
    dshare = (dP / T)[:, None, :]                       # the same every token  # (B, 1, E)   # eq. 10
    if scoring == "sigmoid":
        common = np.sum(dshare * share, axis=-1, keepdims=True)                 # (B, T, 1)
        dscore = (dshare - common) / total              # numerator and total   # (B, T, E)   # eq. 11
        dlogits = dscore * score * (1 - score)                                  # (B, T, E)   # eq. 12
    else:
        dlogits = softmax_backward(dshare, share)                               # (B, T, E)   # eq. 13
    dx, dW_router = linear_backward(dlogits, linear_cache)                      # (B, T, D) (D, E)   # eq. 14
    return dx, dW_router


sequence_balance = op(sequence_balance_forward, sequence_balance_backward)


def sequence_balance_examples(rng):
    def case(B, T, D, E, **config):
        draw = lambda: (rng.standard_normal((B, T, D)), rng.standard_normal((D, E)))
        return wide_gaps(draw, config), config      # f jumps where a choice flips: keep away from there

    return {
        "V3": case(2, 4, 5, 6, top_k=3),
        "V3: one sequence, one expert a token": case(1, 5, 3, 4, top_k=1),
        "V2: softmax": case(3, 5, 4, 7, top_k=2, scoring="softmax"),
    }


def demo():
    """Two tokens by hand, the gradients, and the loss of a balanced, a collapsed and a two-sided batch."""
    logits = np.log([[[3.0, 1 / 3], [3.0, 1.0]]])                  # sigmoid: (3/4, 1/4), (3/4, 1/2)
    loss, _ = sequence_balance_forward(logits, np.eye(2), top_k=1)
    print("shapes    x (1, 2, 2), W_router (2, 2) -> loss ()")
    print(f"by hand   both tokens want expert 0: f = (2, 0); its shares are 3/4 and 3/5, P_0 = 0.675: loss = 2 * 0.675 = {loss:.4f}")
    report(sequence_balance_forward, sequence_balance_backward, sequence_balance_examples)

    E, K, T = 8, 2, 4
    turns = np.full((1, T, E), -30.0)                              # token t wants experts 2t and 2t + 1
    turns[0, np.arange(T)[:, None], np.arange(E).reshape(T, K)] = 30
    same = turns[:, [0] * T]                                       # every token wants experts 0 and 1
    batches = {"taking turns": turns, "all alike": same, "two sequences, each alike": np.concatenate([same, same[..., ::-1]])}
    losses = {name: float(sequence_balance_forward(x, np.eye(E), top_k=K)[0]) for name, x in batches.items()}
    print(f"claim     {E} experts, {K} a token: " + ", ".join(f"{name} {loss:.6f}" for name, loss in losses.items()) + f"; E / top_k = {E / K}")
    assert np.allclose([*losses.values()], [1, E / K, E / K], rtol=0, atol=1e-9)


if __name__ == "__main__":
    from minideepseek.moe.balance_loss import demo  # the imported copy, so that every name exists once
    demo()
