"""Speculative decoding: prediction modules draft a few tokens, one forward of the model judges them all; the text's distribution stays the model's.

Derivation: whiteboard/model/speculative.md     Source: Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

from typing import NamedTuple

import numpy as np

from minideepseek.autograd.params import arrays
from minideepseek.model.config import Config
from minideepseek.model.decode import module_decode, new_caches, transformer_decode
from minideepseek.model.generate import check_request, distribution, draw, generate
from minideepseek.model.transformer import init


class Round(NamedTuple):
    """What one forward of the main model brought."""
    tokens: list         # the accepted drafts and one token of the model's own; nothing behind a stop token
    drafts: list         # what the modules proposed
    n_accepted: int      # how many of them the model accepted


def verify(drafts, q, p, rng):
    """Keep the drafts up to the first rejection, and put one token of the target behind them: n_accepted, token.

    drafts: (n,) int   q: (n, U), the distributions they were really drawn from   p: (n+1, U), the target's at the same
    places, and at the place behind the last
    The tokens kept are distributed as if each had been drawn from its p. Greedy decoding is the case of one-hot p and q.

    Raises ValueError for shapes that do not fit, or a draft that q cannot have given.
    Source: Leviathan et al. 2023, arXiv:2211.17192, algorithm 1.
    """
    n = len(drafts)
    if q.shape != (n, p.shape[-1]) or p.shape != (n + 1, p.shape[-1]):
        raise ValueError(f"q has shape {q.shape}, p has shape {p.shape}: {n} drafts need (n, U) and (n + 1, U) with n = {n}")
    for i, x in enumerate(drafts):
        if not (0 <= x < q.shape[1] and q[i, x] > 0):
            raise ValueError(f"drafts[{i}] = {x} has probability {q[i, x] if 0 <= x < q.shape[1] else 0.0} in q: it was not drawn from q")
        if not rng.random() * q[i, x] < p[i, x]:                        # stays with probability min(1, p / q); never if p is nan   # eq. 1
            return i, draw(residual(p[i], q[i]), rng)                   # those behind it rested on it: discarded
    return n, draw(p[n], rng)                                           # all accepted: one more for nothing   # eq. 3


def residual(p, q):
    """What the target gives more often than the draft did, scaled to sum to 1: (U,) and (U,) -> (U,)."""
    excess = np.maximum(p - q, 0)                                       # (U,)
    total = excess.sum()
    return excess / total if total > 0 else p                           # p = q but for rounding: nothing is in excess   # eq. 2


def acceptance(p, q):
    """The probability that a draft is accepted, 1 - TV(p, q): (..., U) and (..., U) -> (...)."""
    return np.minimum(p, q).sum(axis=-1)                                # eq. 4


def expected_tokens(rate, n):
    """Tokens per forward with n drafts, each accepted with the same probability: (1 - rate^(n+1)) / (1 - rate)."""
    return sum(rate ** i for i in range(n + 1))                         # also at rate 1   # eq. 5


def speculation_report(rounds):
    """What a list of Rounds came to, in words: '120 tokens in 71 forwards, 1.69 each; 49 of 70 drafts accepted (70%)'.

    A draft behind a rejected one counts as not accepted. Without drafts there is no share.
    """
    n_tokens, n_drafts, n_accepted = np.sum([(0, 0, 0), *[(len(one.tokens), len(one.drafts), one.n_accepted) for one in rounds]], axis=0).tolist()
    share = f" ({n_accepted / n_drafts:.0%})" if n_drafts else ""
    return f"{n_tokens} tokens in {len(rounds)} forwards, {n_tokens / max(len(rounds), 1):.2f} each; {n_accepted} of {n_drafts} drafts accepted{share}"


def speculate(prompt, weights, config, *, max_new_tokens, depth=1, temperature=0.0, top_k=None, top_p=None, stop=(), seed=0, chunk=256):
    """An iterator over Rounds, one for each forward of the main model; their tokens in a row are the text.

    depth: how many tokens are drafted at a time; beyond the number of modules the last one goes on from its own output
    the rest: as in `generate`. Greedy, the text is that of `generate`; drawn, it has the same distribution, and another
    text for the same seed. Round 0 reads the prompt and drafts nothing.

    Raises ValueError at the call for what `generate` refuses, a depth below 1, or a model without latent attention or modules.
    """
    options = (temperature, top_k, top_p)
    ids = check_request(prompt, config, max_new_tokens, options, chunk=chunk, depth=depth)
    if config.attention != "mla":
        raise ValueError(f"attention = {config.attention!r}: rejected drafts are cut from latent caches, which are those of 'mla'; use generate")
    if not weights.mtp:
        raise ValueError("weights.mtp is empty: without a prediction module there is nobody to draft; use generate")
    return _rounds(ids, arrays(weights), config, max_new_tokens, depth, options, set(stop), seed, chunk)


def _rounds(ids, weights, config, max_new_tokens, depth, options, stop, seed, chunk):
    rng, capacity, dtype = np.random.default_rng(seed), ids.shape[1] + max_new_tokens, weights.E.dtype
    caches = new_caches(config, 1, capacity, dtype)
    module_caches = new_caches(config, 1, capacity, dtype, min(depth, len(weights.mtp)))
    states = np.zeros((len(module_caches), 1, capacity, config.d_model), dtype)
    P, left = 0, max_new_tokens                                         # P tokens are read and will not be taken back
    while left:
        n = min(depth, left - 1) if P else 0                            # a round brings n + 1 tokens at most
        drafts, q = draft(ids, n, states, weights, config, module_caches, options, rng, chunk)
        new = np.concatenate([ids[:, P:], drafts[None]], axis=1)        # round 0: the prompt; then the last token and the drafts
        piece = max(chunk, n + 1)                                       # only a prompt is cut
        for start in range(0, new.shape[1], piece):
            logits, hidden = transformer_decode(new[:, start:start + piece], weights, config, caches)
            states[0, :, P + start:P + start + hidden.shape[1]] = hidden
        p = distribution(logits[0, -1 - n:].astype(np.float64), *options)       # row i has read draft i - 1 and judges draft i   # eq. 9
        n_accepted, token = verify(drafts, q, p, rng)
        tokens = [*drafts[:n_accepted].tolist(), token]
        ids = np.concatenate([ids, [tokens]], axis=1)
        P = ids.shape[1] - 1                                            # all but the last   # eq. 10
        for cache in caches:
            cache.truncate(P)                                           # rejected drafts are forgotten
        count = next((i for i, x in enumerate(tokens, 1) if x in stop), len(tokens))
        yield Round(tokens[:count], drafts.tolist(), n_accepted)
        left = 0 if tokens[count - 1] in stop else left - count


def draft(ids, n, states, weights, config, caches, options, rng, chunk):
    """n tokens that may follow a text, and what each was drawn from.

    ids: (1, P+1), of which the main model has read P   caches: one for each module that is used
    states: (modules, 1, capacity, D); states[k, :, i] is what module k reads at position i, written here for k > 0
    -> drafts: (n,) int   q: (n, U). The caches then hold what rests on ids alone.
    """
    P = ids.shape[1] - 1
    text = np.concatenate([ids, np.zeros((1, n), ids.dtype)], axis=1)
    q = np.zeros((n, config.vocab_size))                                # (n, U)
    for s in range(n):
        k = min(s, len(caches) - 1)                                     # a module for each step; then the last again and again   # eq. 6
        end = P + s - k                                                 # it reads up to this position
        for start in range(caches[k].length, end, chunk):
            upto = min(start + chunk, end)
            ahead = text[:, start + k + 1:upto + k + 1]                 # position i is shown token i + k + 1   # eq. 7
            logits, hidden = module_decode(states[k, :, start:upto], ahead, weights.mtp[k], weights, config, caches[k])
            if k + 1 < len(caches):
                states[k + 1, :, start:upto] = hidden
        states[k, :, end] = hidden[:, -1]                               # if k goes on: in place of a state not there yet   # eq. 8
        q[s] = distribution(logits[0, -1].astype(np.float64), *options)
        text[0, P + 1 + s] = draw(q[s], rng)
    for k in range(min(n, len(caches))):
        caches[k].truncate(max(P - k, 0))                               # positions that were shown a draft are forgotten   # eq. 11
    return text[0, P + 1:], q


def demo():
    """The rule by hand, greedy texts against plain decoding, and what three drafts bring."""
    p, q, n = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5]), 3
    alpha = acceptance(p, q)
    print("shapes    drafts (n,), q (n, U), p (n+1, U) -> n_accepted, token")
    print(f"by hand   p {p}, q {q}: accepted 1, 1, 2/5 of the time, {alpha:.1f} in all; after a rejection {residual(p, q)}")

    config = Config(vocab_size=12, d_model=12, n_layers=2, n_dense_layers=1, d_ff=10, max_positions=48, n_heads=2, q_rank=6, kv_rank=5, d_nope=4,
                    d_rope=2, d_value=3, n_routed=4, top_k=2, d_expert=5, n_groups=1, n_groups_kept=1, n_mtp=2)
    weights = init(config, np.random.default_rng(0), std=0.25, head_std=0.5, dtype=np.float64)
    guess = 1.3 * np.eye(2 * 12, 12)                                    # untrained, so let them guess: the last layer on the token shown
    weights = weights._replace(E=5 * weights.E, mtp=tuple(module._replace(W_merge=guess, block=weights.layers[-1]) for module in weights.mtp))
    prompts, same = ([1, 2, 3], [4], [10, 9, 8, 7]), True
    plain = [list(generate(prompt, weights, config, max_new_tokens=16)) for prompt in prompts]
    for depth in (1, 2, 3):
        runs = [list(speculate(prompt, weights, config, max_new_tokens=16, depth=depth)) for prompt in prompts]
        same &= [[token for one in run for token in one.tokens] for run in runs] == plain
        rounds = sum(runs, [])
        print(f"depth {depth}   {sum(map(len, plain))} tokens in {len(rounds)} forwards, {sum(one.n_accepted for one in rounds)} of "
              f"{sum(len(one.drafts) for one in rounds)} drafts accepted; the texts of greedy decoding: {same}")

    rng, times = np.random.default_rng(0), 5_000
    drafts = rng.choice(3, (times, n), p=q)
    kept, token = np.array([verify(row, np.stack([q] * n), np.stack([p] * (n + 1)), rng) for row in drafts]).T
    first = np.bincount(np.where(kept > 0, drafts[:, 0], token), minlength=3) / times
    share = kept.sum() / np.minimum(kept + 1, n).sum()                  # of the drafts that were looked at
    print(f"claim     {times:,} rounds of {n} drafts: accepted {share:.3f} (sum of min(p, q): {alpha:.3f}), tokens per forward {kept.mean() + 1:.2f} "
          f"({expected_tokens(alpha, n):.2f}), first tokens {first.round(2)} (p)")
    assert same and abs(share - alpha) < 0.02 and abs(kept.mean() + 1 - expected_tokens(alpha, n)) < 0.05 and np.abs(first - p).max() < 0.02


if __name__ == "__main__":
    from minideepseek.model.speculative import demo  # the imported copy, so that every name exists once
    demo()
