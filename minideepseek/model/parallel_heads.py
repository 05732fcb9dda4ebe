"""Parallel heads: several tokens ahead from one state of the trunk, each by a head that does not see the tokens in between.

Derivation: whiteboard/model/parallel_heads.md     Source: Gloeckle et al. 2024, arXiv:2404.19737; not part of DeepSeek-V3
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import tracemalloc
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from minideepseek.autograd.gradcheck import report
from minideepseek.autograd.params import outline
from minideepseek.autograd.tape import Tape, Tensor, op
from minideepseek.basics.cross_entropy import cross_entropy, cross_entropy_backward, cross_entropy_forward
from minideepseek.basics.linear import linear, linear_backward, linear_forward, matmul
from minideepseek.basics.rmsnorm import rmsnorm, rmsnorm_backward, rmsnorm_forward
from minideepseek.corpus.batches import IGNORE
from minideepseek.model.block import BlockWeights, block, block_outline


def further(targets, k, ignore_index=IGNORE):
    """The targets of head k, k places further on than those of the next token; the last k positions have none.

    targets: (B, T) int, targets[:, i] the token after position i
    """
    wanted = np.full_like(targets, ignore_index)
    wanted[:, :max(targets.shape[1] - k, 0)] = targets[:, k:]                               # eq. 4
    return wanted


def parallel_losses_forward(h, W_own, g, W_head, targets, *, eps=1e-6, ignore_index=IGNORE, gemm=matmul):
    """The losses of H linear heads: head k scores token i + k + 1 by norm(h_i W_own[k]) W_head.

    h: (B, T, D)   W_own: (H, D, D)   g: (H, D)   W_head: (D, U)   targets: (B, T) int < U or ignore_index   ->   losses: (H,)

    In nats per token, each the mean over its own valid targets. No logits are kept: the backward makes them again, head by
    head. gemm: see linear; not used by the shared matrix, as in the model.
    Source: arXiv:2404.19737, the linear variant; the norm is the one that a head of ours has.
    """
    losses = np.empty(len(g), h.dtype)                                                      # (H,)
    cache = SimpleNamespace(arrays=(h, W_own, g, W_head), heads=[], ignore_index=ignore_index)
    for k in range(len(g)):
        x, own = linear_forward(h, W_own[k], gemm=gemm)                                     # (B, T, D)   # eq. 1
        s, norm = rmsnorm_forward(x, g[k], eps=eps)                                         # (B, T, D)   # eq. 2
        z, shared = linear_forward(s, W_head)                                               # (B, T, U)   # eq. 3
        wanted = further(targets, k, ignore_index)                                          # (B, T)
        losses[k] = cross_entropy_forward(z, wanted, ignore_index=ignore_index)[0]          # eq. 5
        cache.heads.append(SimpleNamespace(own=own, norm=norm, shared=shared, wanted=wanted))
    return losses, cache


def parallel_losses_backward(dlosses, cache):
    """Head by head: its logits once more, then its forward from the bottom up. Two sums collect what the heads send back."""
    dh, dW_own, dg, dW_head = [np.zeros_like(array) for array in cache.arrays]
    for k, head in enumerate(cache.heads):
        s, W_head, _ = head.shared
        z, _ = linear_forward(s, W_head)                                                    # (B, T, U)   # eq. 3, again
        _, entropy = cross_entropy_forward(z, head.wanted, ignore_index=cache.ignore_index)
        dz, _ = cross_entropy_backward(dlosses[k], entropy)                                 # (B, T, U)   # eq. 6
        ds, dW_k = linear_backward(dz, head.shared)                                         # (B, T, D) (D, U)   # eq. 7
        del z, entropy, dz                           # nothing as wide as the vocabulary outlives its turn
        dx, dg[k] = rmsnorm_backward(ds, head.norm)                                         # (B, T, D) (D,)     # eq. 8
        dh_k, dW_own[k] = linear_backward(dx, head.own)                                     # (B, T, D) (D, D)   # eq. 9
        dW_head += dW_k                              # the matrix served every head: add    # eq. 10
        dh += dh_k                                   # and so did the state                 # eq. 11
    return dh, dW_own, dg, dW_head, None


parallel_losses = op(parallel_losses_forward, parallel_losses_backward)


class HeadWeights(NamedTuple):
    """The weights of one head with a layer of its own. The output matrix is the model's: passed in, not copied."""
    block: BlockWeights
    g_final: np.ndarray          # (D,)      norm before the shared output matrix


def parallel_head(hidden, weights, W_head, config, cos, sin, *, gemm=matmul):
    """One head on the tape: its own layer on the trunk's stream, its own norm, the shared output matrix.

    hidden: (B, T, D), the stream before any final norm   W_head: (D, U)   cos, sin: (T, R/2)
    -> logits: (B, T, U)   routed: block.Routed, or None; which token position i is scored on is a matter of the targets

    Source: arXiv:2404.19737, its main form.
    """
    x, routed = block(hidden, weights.block, config, cos, sin, gemm=gemm)                   # eq. 12
    return linear(rmsnorm(x, weights.g_final, eps=config.eps), W_head), routed              # eq. 13


def head_by_head(hidden, heads, W_head, targets, config, cos, sin, *, seeds=None, gemm=matmul):
    """The paper's order: forward and backward of a head, and only then the next head. One head's logits live at a time.

    hidden: Tensor (B, T, D) of the trunk's tape   heads: HeadWeights of Tensors, head 0 the ordinary one
    targets: (B, T) int, of the next token, or IGNORE   seeds: the weight of each loss; None: 1
    -> losses (H,) and dhidden (B, T, D), with which the trunk goes on: `tape.backward({hidden: dhidden})`
    The gradients of heads and W_head are added to their .grad. What layers with experts chose is not handed back.

    Raises ValueError for more heads than tokens in a row, or not one seed for each head.
    """
    if not 0 < len(heads) <= targets.shape[1]:
        raise ValueError(f"heads has {len(heads)} heads: {targets.shape[1]} tokens in a row have targets for 1 to {targets.shape[1]}")
    if seeds is None:
        seeds = [1.0] * len(heads)
    if len(seeds) != len(heads):
        raise ValueError(f"seeds has {len(seeds)} weights for {len(heads)} heads")
    meeting = Tensor(hidden.data, "hidden")          # a leaf: here the trunk's tape is cut
    losses = np.empty(len(heads), hidden.data.dtype)
    for k, (head, seed) in enumerate(zip(heads, seeds)):
        with Tape() as tape:
            logits, _ = parallel_head(meeting, head, W_head, config, cos, sin, gemm=gemm)
            loss = cross_entropy(logits, further(targets, k), ignore_index=IGNORE)          # eq. 14
        tape.backward({loss: seed})                  # adds to meeting.grad                 # eq. 15
        losses[k] = loss.data
    return losses, meeting.grad


def parallel_head_outline(config):
    """The weights of a head as arrays with a shape and no memory. Its layer has experts, unless all layers are dense."""
    return HeadWeights(block_outline(config, dense=config.n_dense_layers == config.n_layers), outline(config.d_model))


def parallel_losses_examples(rng):
    def case(B, T, D, H, U, ignored=(), **config):
        targets = rng.integers(0, U, (B, T))
        for place in ignored:
            targets[place] = IGNORE
        weights = rng.standard_normal((H, D, D)), rng.standard_normal((H, D)), rng.standard_normal((D, U)) / 2
        return (rng.standard_normal((B, T, D)), *weights, targets), config

    return {
        "three heads": case(2, 5, 4, 3, 13),
        "two heads, some ignored": case(3, 5, 4, 2, 9, ((0, 1), (1, 4), (2, 0))),
        "one head": case(2, 3, 4, 1, 7, eps=0.5),
    }


def op_by_op(h, W_own, g, W_head, targets):
    """The losses of parallel_losses as ops of their own: an active tape keeps the logits of every head."""
    return [cross_entropy(linear(rmsnorm(linear(h, W), gain), W_head), further(targets, k), ignore_index=IGNORE)
            for k, (W, gain) in enumerate(zip(W_own, g))]


def peak_matrices(fused, H, *, B=2, T=32, D=8, U=2048):
    """The most memory that a forward and backward of H linear heads hold at a time, in matrices of B T U numbers."""
    rng = np.random.default_rng(0)
    h, W_own, g, W_head = [rng.standard_normal(shape) for shape in [(B, T, D), (H, D, D), (H, D), (D, U)]]
    targets = rng.integers(0, U, (B, T))
    tracemalloc.start()
    with Tape() as tape:
        losses = (parallel_losses if fused else op_by_op)(h, W_own, g, W_head, targets)
    tape.backward({losses: np.ones(H)} if fused else dict.fromkeys(losses, 1.0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak / (8 * B * T * U)


def demo():
    """Two heads by hand, the gradients, and the memory against that of the same heads op by op."""
    h, W_own, W_head = np.ones((1, 2, 2)), np.array([np.eye(2), np.diag([1.0, -1.0])]), np.array([[0.0, 0.0], [np.log(3), 0.0]])
    losses, _ = parallel_losses_forward(h, W_own, np.ones((2, 2)), W_head, np.array([[0, 1]]), eps=0.0)
    print("shapes    h", h.shape, "W_own", W_own.shape, "g (2, 2) W_head", W_head.shape, "targets (1, 2) -> losses", losses.shape)
    print(f"by hand   head 0 says 3/4, 1/4 at both positions, head 1 says 1/4, 3/4; tokens 0, 1 follow: "
          f"(ln 4/3 + ln 4) / 2 = {losses[0]:.4f} and, for one position, ln 4/3 = {losses[1]:.4f}")
    report(parallel_losses_forward, parallel_losses_backward, parallel_losses_examples)

    kept, fused = [[peak_matrices(way, H) for H in (1, 4)] for way in (False, True)]
    print(f"claim     1 -> 4 heads, peak in matrices of logits: op by op {kept[0]:.1f} -> {kept[1]:.1f}, parallel_losses {fused[0]:.1f} -> {fused[1]:.1f}")
    assert np.allclose(losses, [np.log(16 / 3) / 2, np.log(4 / 3)]) and fused[1] < 1.1 * fused[0] and kept[1] > 2 * fused[1]


if __name__ == "__main__":
    from minideepseek.model.parallel_heads import demo  # the imported copy, so that every name exists once
    demo()
