"""Balance losses: a price on tokens that all want the same few experts; V3's by sequence, the earlier ones by batch.

Derivation: whiteboard/moe/balance_loss.md     Source: DeepSeek-V3, arXiv:2412.19437, eq. 17-20; DeepSeek-V2, arXiv:2405.04434
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import numpy as np

from minideepseek.autograd.gradcheck import report
from minideepseek.autograd.tape import op
from minideepseek.basics.linear import linear_backward, linear_forward
from minideepseek.basics.softmax import softmax_backward, softmax_forward
from minideepseek.basics.swiglu import sigmoid
from minideepseek.moe.router import best, choose, wide_gaps


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


def counted_by_switch(chosen, n_routed, *_):
    """Of how many tokens is expert e the FIRST choice? The part of them, times E.

    chosen: int (M, K), each token's experts, best first   n_routed: E   ->   f: (E,), one number per expert; so for all five
    """
    first = np.bincount(chosen[:, 0], minlength=n_routed)                       # (E,)
    return first * n_routed / len(chosen)                       # fair: 1                     # eq. 18


def counted_by_gshard(chosen, n_routed, *_):
    """The same question, but the part of the tokens is divided by E, where Switch multiplies."""
    first = np.bincount(chosen[:, 0], minlength=n_routed)                       # (E,)
    return first / (n_routed * len(chosen))                     # fair: 1 / E**2              # eq. 19


def counted_by_expert(chosen, n_routed, *_):
    """DeepSeek's expert-level count: of the K M places handed out, how many fell to expert e, times E."""
    served = np.bincount(chosen.reshape(-1), minlength=n_routed)                # (E,)
    return served * n_routed / chosen.size                      # fair: 1                     # eq. 20


def counted_by_device(chosen, n_routed, n_groups, *_):
    """The mean of the expert-level counts of a device: its work. All experts of one device get the same number."""
    by_expert = counted_by_expert(chosen, n_routed)                             # (E,)
    work = by_expert.reshape(n_groups, -1).mean(axis=1)         # fair: 1       # (J,)        # eq. 21
    return np.repeat(work, n_routed // n_groups)                                # (E,)


def counted_by_communication(chosen, n_routed, n_groups, n_groups_kept):
    """How many tokens are SENT to a device, once however many of its experts they want there; again one number a device."""
    sent = np.zeros((len(chosen), n_groups))                                    # (M, J)
    np.put_along_axis(sent, chosen // (n_routed // n_groups), 1, axis=1)                      # eq. 22
    mail = sent.sum(axis=0) * n_groups / (n_groups_kept * len(chosen))          # (J,)        # eq. 23
    return np.repeat(mail, n_routed // n_groups)                                # (E,)


COUNTED_BY = {"switch": counted_by_switch, "gshard": counted_by_gshard, "expert": counted_by_expert,
              "device": counted_by_device, "communication": counted_by_communication}


def batch_balance_forward(x, W_router, *, count, top_k, n_groups=1, n_groups_kept=1):
    """sum_e f_e P_e over all tokens of the batch: P is the mean softmax score, f counts what `count` names.

    x: (..., D)   W_router: (D, E)   top_k: K   n_groups: J   ->   loss: ()

    count: "switch" | "gshard" | "expert" | "device" | "communication". A group of experts is a device; a token chooses
    as V2's router does, its top_k among the n_groups_kept best devices. Without alpha: the caller multiplies.
    A device's P is the sum of its experts' P, so its f, given to each of them, makes the same sum.
    Source: DeepSeek-V2, arXiv:2405.04434, up to eq. 31; Switch (arXiv:2101.03961) and GShard (arXiv:2006.16668) from memory.
    """
    logits, linear_cache = linear_forward(x.reshape(-1, x.shape[-1]), W_router)                         # (M, E)   # eq. 15
    score, _ = softmax_forward(logits)                                                                  # (M, E)   # eq. 16
    chosen = choose(score, None, top_k=top_k, n_groups=n_groups, n_groups_kept=n_groups_kept, scoring="softmax")   # (M, K)   # eq. 17
    f = COUNTED_BY[count](chosen, W_router.shape[1], n_groups, n_groups_kept).astype(score.dtype)       # (E,)
    P = score.mean(axis=0)                                                                              # (E,)     # eq. 24
    loss = f @ P                                                                                        # ()       # eq. 25
    return loss, (linear_cache, x.shape, score, f)


def batch_balance_backward(dloss, cache):
    """One backward for all five: f is a row of numbers, whatever it counted."""
    linear_cache, x_shape, score, f = cache
    dP = f * dloss                                                              # (E,)        # eq. 26
    dscore = dP / len(score)                            # the same every token  # (E,)        # eq. 27
    dlogits = softmax_backward(dscore, score)                                   # (M, E)      # eq. 28
    dx_rows, dW_router = linear_backward(dlogits, linear_cache)                 # (M, D) (D, E)   # eq. 29
    return dx_rows.reshape(x_shape), dW_router


batch_balance = op(batch_balance_forward, batch_balance_backward)


def batch_balance_examples(rng):
    def case(*shape, **config):
        draw = lambda: (rng.standard_normal(shape), rng.standard_normal((shape[-1], 6)))
        return wide_gaps(draw, config | {"scoring": "softmax"}), config

    devices = {"n_groups": 3, "n_groups_kept": 2}
    return {
        "Switch": case(7, 5, count="switch", top_k=1),
        "GShard": case(2, 4, 5, count="gshard", top_k=2),
        "DeepSeekMoE, by expert": case(2, 3, 5, count="expert", top_k=3),
        "V2, by expert": case(7, 4, count="expert", top_k=2, **devices),
        "V2, by device": case(2, 3, 5, count="device", top_k=2, **devices),
        "V2, communication": case(7, 5, count="communication", top_k=2, **devices),
    }


def demo():
    """Two tokens by hand, the gradients, and what every loss says of a balanced and of a collapsed batch."""
    logits = np.log([[[3.0, 1 / 3], [3.0, 1.0]]])                  # sigmoid: (3/4, 1/4), (3/4, 1/2)
    loss, _ = sequence_balance_forward(logits, np.eye(2), top_k=1)
    print("shapes    x (1, 2, 2), W_router (2, 2) -> loss ()")
    print(f"by hand   both tokens want expert 0: f = (2, 0); its shares are 3/4 and 3/5, P_0 = 0.675: loss = 2 * 0.675 = {loss:.4f}")
    report(sequence_balance_forward, sequence_balance_backward, sequence_balance_examples)
    report(batch_balance_forward, batch_balance_backward, batch_balance_examples)

    E, K, T = 8, 2, 4
    turns = np.full((1, T, E), -30.0)                              # token t wants experts 2t and 2t + 1
    turns[0, np.arange(T)[:, None], np.arange(E).reshape(T, K)] = 30
    same = turns[:, [0] * T]                                       # every token wants experts 0 and 1
    batches = {"taking turns": turns, "all alike": same, "two sequences, each alike": np.concatenate([same, same[..., ::-1]])}
    losses = {name: float(sequence_balance_forward(x, np.eye(E), top_k=K)[0]) for name, x in batches.items()}
    print(f"claim     {E} experts, {K} a token: " + ", ".join(f"{name} {loss:.6f}" for name, loss in losses.items()) + f"; E / top_k = {E / K}")
    assert np.allclose([*losses.values()], [1, E / K, E / K], rtol=0, atol=1e-9)

    J, kept, token = 4, 2, np.arange(E)                            # 4 devices of two experts, a token may use two
    fair, one_sided = np.zeros((2, E, E))
    fair[token, token], fair[token, (token + 2) % E] = 60, 30      # token t wants expert t, then t + 2, on the next device
    one_sided[:, 0], one_sided[:, 1] = 60, 30                      # every token wants experts 0 and 1, both on device 0
    pairs = {count: [float(batch_balance_forward(x, np.eye(E), count=count, top_k=K, n_groups=J, n_groups_kept=kept)[0])
                     for x in (fair, one_sided)] for count in COUNTED_BY}
    print("claim     fair and one-sided batch: " + ", ".join(f"{count} {low:g} and {high:g}" for count, (low, high) in pairs.items()))
    assert np.allclose([*pairs.values()], [(1, E), (1 / E**2, 1 / E), (1, E / K), (1, J), (1, J / kept)], rtol=1e-9)


if __name__ == "__main__":
    from minideepseek.moe.balance_loss import demo  # the imported copy, so that every name exists once
    demo()
