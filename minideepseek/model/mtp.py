"""Multi-token prediction: a module that reads the trunk's state and the next token, and predicts the one after it.

Derivation: whiteboard/model/mtp.md     Source: DeepSeek-V3, arXiv:2412.19437, sec. 2.2, eq. 21-25
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from minideepseek.autograd.gradcheck import report
from minideepseek.autograd.params import outline
from minideepseek.autograd.tape import op
from minideepseek.basics.embedding import embedding
from minideepseek.basics.linear import linear, linear_backward, linear_forward, matmul
from minideepseek.basics.rmsnorm import rmsnorm, rmsnorm_backward, rmsnorm_forward
from minideepseek.model.block import BlockWeights, block, block_outline


class MTPWeights(NamedTuple):
    """The weights of one module. Embedding and head are the main model's own: they are passed in, not copied."""
    g_hidden: np.ndarray         # (D,)      norm of the previous hidden state
    g_embedding: np.ndarray      # (D,)      norm of the next token's embedding
    W_merge: np.ndarray          # (2*D, D)
    block: BlockWeights
    g_final: np.ndarray          # (D,)      norm before the shared head


def mtp_projection_forward(h, e, g_hidden, g_embedding, W_merge, *, eps=1e-6, embedding_first=True, gemm=matmul):
    """Merge what is known at a position with the token that follows it: y = [norm(e); norm(h)] W_merge.

    h: (B, S, D)   e: (B, T, D)   g_hidden: (D,)   g_embedding: (D,)   W_merge: (2*D, D)   ->   y: (B, T, D)

    Position i merges h[:, i] with e[:, i], the embedding of a later token; the last S - T states have no such token
    and are not read. embedding_first: the order of public checkpoints; False is the order of the paper's equation.
    Source: DeepSeek-V3, arXiv:2412.19437, eq. 21; differs by the order.
    """
    cache = SimpleNamespace(n_states=h.shape[1], embedding_first=embedding_first)
    T = e.shape[1]
    n_h, cache.norm_h = rmsnorm_forward(h[:, :T], g_hidden, eps=eps)                            # (B, T, D)     # eq. 1
    n_e, cache.norm_e = rmsnorm_forward(e, g_embedding, eps=eps)                                # (B, T, D)     # eq. 2
    both = np.concatenate([n_e, n_h] if embedding_first else [n_h, n_e], axis=-1)               # (B, T, 2*D)   # eq. 3
    y, cache.W_merge = linear_forward(both, W_merge, gemm=gemm)                                 # (B, T, D)     # eq. 4
    return y, cache


def mtp_projection_backward(dy, cache):
    """The forward read from the bottom up; the states nobody read get zeros."""
    dboth, dW_merge = linear_backward(dy, cache.W_merge)                                        # (B, T, 2*D) (2*D, D)   # eq. 5
    first, second = np.split(dboth, 2, axis=-1)                                                 # (B, T, D) (B, T, D)    # eq. 6
    dn_e, dn_h = (first, second) if cache.embedding_first else (second, first)                  # (B, T, D) (B, T, D)
    de, dg_embedding = rmsnorm_backward(dn_e, cache.norm_e)                                     # (B, T, D) (D,)         # eq. 7
    dh_read, dg_hidden = rmsnorm_backward(dn_h, cache.norm_h)                                   # (B, T, D) (D,)         # eq. 8
    unread = cache.n_states - dh_read.shape[1]
    dh = np.pad(dh_read, [(0, 0), (0, unread), (0, 0)])                                         # (B, S, D)              # eq. 9
    return dh, de, dg_hidden, dg_embedding, dW_merge


mtp_projection = op(mtp_projection_forward, mtp_projection_backward)


class Prediction(NamedTuple):
    """What one module gives."""
    logits: object               # Tensor (B, T, U)
    hidden: object               # Tensor (B, T, D): what the next module reads
    routed: object               # block.Routed of its layer, or None


def mtp_module(hidden, ahead, weights, E, W_head, config, cos, sin, *, gemm=matmul):
    """One module, teacher forced: merge, one block, the shared head.

    hidden: (B, S, D) of the model or module before   ahead: (B, T) int, T < S: the token that follows each position,
    k + 1 places ahead for module k (0-based)   E, W_head: the main model's   cos, sin: (T, R/2)
    -> Prediction; position i predicts the token after ahead[:, i].

    Source: DeepSeek-V3, arXiv:2412.19437, eq. 21-23; the final norm of each module is in the released checkpoint.
    """
    e = embedding(ahead, E)                                                                                     # eq. 10
    merged = mtp_projection(hidden, e, weights.g_hidden, weights.g_embedding, weights.W_merge, eps=config.eps,
                            embedding_first=config.mtp_embedding_first, gemm=gemm)
    x, routed = block(merged, weights.block, config, cos, sin, gemm=gemm)                                       # eq. 11
    normed = rmsnorm(x, weights.g_final, eps=config.eps)                                                        # eq. 12
    logits = linear(normed, W_head)                                                                             # eq. 13
    return Prediction(logits, normed if config.mtp_reads_normed else x, routed)


def mtp_outline(config):
    """The weights of a module as arrays with a shape and no memory. Its block is one with experts, unless all layers are dense."""
    D = config.d_model
    return MTPWeights(outline(D), outline(D), outline(2 * D, D), block_outline(config, dense=config.n_dense_layers == config.n_layers), outline(D))


def mtp_projection_examples(rng):
    def case(S, T, **config):
        D = 5
        args = (rng.standard_normal((2, S, D)), rng.standard_normal((2, T, D)), rng.standard_normal(D), rng.standard_normal(D),
                rng.standard_normal((2 * D, D)))
        return args, config

    return {"embedding first": case(4, 3), "hidden first": case(4, 3, embedding_first=False)}


def demo():
    """Shapes, which token is where, the gradients, and the state that nobody reads."""
    args, config = mtp_projection_examples(np.random.default_rng(0))["embedding first"]
    y, cache = mtp_projection_forward(*args, **config)
    print("shapes    h", args[0].shape, "e", args[1].shape, "W_merge", args[4].shape, "-> y", y.shape)
    print("by hand   text a b c d, module 0: position 0 knows a, is shown b, predicts c; position 1 is shown c, predicts d")
    report(mtp_projection_forward, mtp_projection_backward, mtp_projection_examples)

    dh = mtp_projection_backward(np.ones_like(y), cache)[0]
    h, e = np.array([[[1.0, -1.0], [2.0, 2.0]]]), np.array([[[3.0, 4.0]]])
    keep_embedding = np.vstack([np.eye(2), 0 * np.eye(2)])
    y, _ = mtp_projection_forward(h, e, np.ones(2), np.ones(2), keep_embedding, eps=0.0)
    print(f"claim     the last state has no next token: its gradient is zero: {not dh[:, -1].any()}; "
          f"embedding first: y = norm(3, 4) = {y.ravel().round(4)}")
    assert not dh[:, -1].any() and dh[:, :-1].all() and np.allclose(y, e / 12.5 ** 0.5)


if __name__ == "__main__":
    from minideepseek.model.mtp import demo  # the imported copy, so that every name exists once
    demo()
