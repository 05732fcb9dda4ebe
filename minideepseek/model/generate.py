"""Generation: one token after another, greedy or drawn, each handed out as soon as it is chosen.

Derivation: whiteboard/model/generate.md     Source: Holtzman et al. 2019, arXiv:1904.09751, for top-p
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import numpy as np

from minideepseek.autograd.params import arrays
from minideepseek.basics.softmax import softmax_forward
from minideepseek.model.config import Config
from minideepseek.model.decode import new_caches, transformer_decode
from minideepseek.model.transformer import check_ids, init, transformer


def generate(prompt, weights, config, *, max_new_tokens, temperature=0.0, top_k=None, top_p=None, stop=(), seed=0, use_cache=True, chunk=256):
    """An iterator over the tokens that follow a prompt.

    prompt: (T,) integers   weights: ModelWeights   temperature: 0 is greedy, the largest logit, the lowest id of equals
    top_k, top_p: see `distribution`   stop: ids after which nothing follows; the stop token itself is handed out
    seed: of the draws; equal seeds give equal texts   use_cache: False recomputes everything for each token, as models
    without latent attention always do
    chunk: how many tokens of the prompt are read at once

    Raises ValueError at the call, before the first token, for an empty prompt, one that leaves no room in the
    position table, or an option out of range.
    """
    options = (temperature, top_k, top_p)
    ids = check_request(prompt, config, max_new_tokens, options, chunk=chunk)
    return _tokens(ids, arrays(weights), config, max_new_tokens, options, set(stop), seed, use_cache and config.attention == "mla", chunk)


def distribution(logits, temperature=1.0, top_k=None, top_p=None):
    """What the next token is drawn from: (..., U) logits -> (..., U) probabilities.

    temperature: divides the logits; 0 puts everything on the largest   top_k: only the k most likely tokens
    top_p: only the most likely tokens that together reach this probability; of equals the lower ids come first
    Both cuts are taken from softmax(logits / temperature), and what is left is scaled to sum to 1.
    """
    if temperature == 0:
        return np.eye(logits.shape[-1], dtype=logits.dtype)[logits.argmax(axis=-1)]                 # eq. 1
    with np.errstate(over="ignore"):                                                                # a tiny temperature: -inf is meant
        z = (logits - logits.max(axis=-1, keepdims=True)) / temperature                             # (..., U)
    p, _ = softmax_forward(z)                                                                       # (..., U)   # eq. 2
    order = np.argsort(-p, axis=-1, kind="stable")                                                  # (..., U)   most likely first
    sorted_p = np.take_along_axis(p, order, axis=-1)                                                # (..., U)
    keep = np.ones(p.shape, bool)                                                                   # (..., U)   in sorted order
    if top_k is not None:
        keep[..., top_k:] = False                                                                   # eq. 3
    if top_p is not None and top_p < 1:
        keep[..., 1:] &= np.cumsum(sorted_p, axis=-1)[..., :-1] < top_p     # not yet reached by those before   # eq. 4
    kept = np.zeros_like(p)                                                                         # (..., U)
    np.put_along_axis(kept, order, np.where(keep, sorted_p, 0), axis=-1)
    return kept / kept.sum(axis=-1, keepdims=True)                                                  # eq. 5


def draw(p, rng):
    """One token from probabilities (U,), by inverting their running sum. Raises ValueError when they hold nan."""
    total = np.cumsum(p)
    if not np.isfinite(total[-1]):
        raise ValueError("the probabilities hold nan: so do the logits they were made from")
    return int(min(np.searchsorted(total, rng.random() * total[-1], side="right"), np.flatnonzero(p)[-1]))     # eq. 6


def check_request(prompt, config, max_new_tokens, options, **positive):
    """The door of generation: a prompt as ids (1, T). options: those of `distribution`   positive: whole numbers above 0, by name

    Raises ValueError that names what cannot be.
    """
    prompt = np.asarray(prompt)
    if prompt.ndim != 1 or prompt.size == 0:
        raise ValueError(f"prompt has shape {prompt.shape}: it must be a row of at least one token")
    _check(max_new_tokens=(max_new_tokens, _whole(max_new_tokens) and max_new_tokens >= 0, "must be a whole number, not negative"),
           **{name: (value, _whole(value) and value > 0, "must be a positive whole number") for name, value in positive.items()})
    check_options(*options)
    if len(prompt) + max_new_tokens > config.max_positions:
        raise ValueError(f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones exceed max_positions = {config.max_positions}")
    check_ids(prompt[None], config)
    return prompt[None].astype(np.int64)


def check_options(temperature, top_k, top_p):
    """Raises ValueError that names the option out of range."""
    _check(temperature=(temperature, 0 <= temperature < np.inf, "must be 0 or a positive number"),
           top_k=(top_k, top_k is None or _whole(top_k) and top_k >= 1, "must be a whole number of at least 1"),
           top_p=(top_p, top_p is None or 0 < top_p <= 1, "must be above 0 and at most 1"))


def _tokens(ids, weights, config, max_new_tokens, options, stop, seed, use_cache, chunk):
    rng = np.random.default_rng(seed)
    caches = new_caches(config, 1, ids.shape[1] + max_new_tokens, weights.E.dtype) if use_cache else None
    new = ids
    for _ in range(max_new_tokens):
        if use_cache:
            for start in range(0, new.shape[1], chunk):
                logits, _ = transformer_decode(new[:, start:start + chunk], weights, config, caches)
        else:
            logits = transformer(ids, weights, config).logits.data
        token = draw(distribution(logits[0, -1].astype(np.float64), *options), rng)
        yield token
        if token in stop:
            return
        new = np.array([[token]])
        ids = np.concatenate([ids, new], axis=1)


def _whole(value):
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _check(**options):
    for name, (value, holds, message) in options.items():
        if not holds:
            raise ValueError(f"{name} = {value!r} {message}")


def demo():
    """Cuts by hand, and the same text with and without a cache."""
    p = np.array([0.5, 0.2, 0.2, 0.1])
    print("shapes    logits (4,) -> probabilities (4,)")
    print("by hand   of .5 .2 .2 .1:", "top_k 2", distribution(np.log(p), top_k=2).round(3), " top_p 0.6", distribution(np.log(p), top_p=0.6).round(3),
          " temperature 0", distribution(np.log(p), 0.0))
    config = Config(vocab_size=50, d_model=24, n_layers=2, n_dense_layers=1, d_ff=20, max_positions=64, n_heads=2, q_rank=8, kv_rank=6, d_nope=4,
                    d_rope=4, d_value=4, n_routed=4, top_k=2, d_expert=8, n_groups=1, n_groups_kept=1, n_mtp=0)
    weights = init(config, np.random.default_rng(0), std=0.3, dtype=np.float64)
    texts = {}
    for temperature in (0.0, 1.0):
        for use_cache in (True, False):
            texts[temperature, use_cache] = list(generate([1, 2, 3], weights, config, max_new_tokens=20, temperature=temperature, use_cache=use_cache, chunk=2))
    same = all(texts[t, True] == texts[t, False] for t in (0.0, 1.0))
    print("greedy   ", *texts[0.0, True])
    print(f"claim     20 tokens with and without a cache, greedy and drawn: the same: {same}")
    assert same and np.allclose(distribution(np.log(p), top_p=0.6), [5 / 7, 2 / 7, 0, 0])


if __name__ == "__main__":
    from minideepseek.model.generate import demo  # the imported copy, so that every name exists once
    demo()
