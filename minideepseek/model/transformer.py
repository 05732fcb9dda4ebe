"""The whole model: token ids to logits, and to the loss, on the tape.

Derivation: whiteboard/model/transformer.md     Source: DeepSeek-V3, arXiv:2412.19437, sec. 2.1, fig. 2
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import math
from typing import NamedTuple

import numpy as np

from minideepseek.autograd.gradcheck import gradcheck
from minideepseek.autograd.params import flatten, gradients, outline, tensors, unflatten
from minideepseek.autograd.tape import Tape, Tensor
from minideepseek.basics.cross_entropy import cross_entropy
from minideepseek.basics.embedding import embedding
from minideepseek.basics.linear import linear, matmul
from minideepseek.basics.rmsnorm import rmsnorm
from minideepseek.corpus.batches import IGNORE
from minideepseek.model.block import CONSTANT, BlockWeights, block, block_outline, position_tables
from minideepseek.model.config import Config
from minideepseek.model.mtp import MTPWeights, mtp_module, mtp_outline


class ModelWeights(NamedTuple):
    """All weights of a model. Embedding and head are two tables: DeepSeek does not tie them."""
    E: np.ndarray                        # (U, D)
    layers: tuple[BlockWeights, ...]
    g_final: np.ndarray                  # (D,)
    W_head: np.ndarray                   # (D, U)
    mtp: tuple[MTPWeights, ...] = ()     # multi-token-prediction modules


class Output(NamedTuple):
    """What one forward of the main model gives."""
    logits: Tensor                       # (B, T, U)   position i predicts token i+1
    stream: Tensor                       # (B, T, D)   before the final norm
    hidden: Tensor                       # (B, T, D)   after it: what the head reads
    routed: tuple                        # of each layer: block.Routed, or None when it is dense


class Losses(NamedTuple):
    """Mean cross entropies in nats per token: scalar Tensors, one for the main model and one for each module."""
    main: Tensor
    mtp: tuple
    out: Output
    predictions: tuple                   # of the modules, see mtp.Prediction

    def seeds(self, mtp_weight):
        """What `Tape.backward` wants: the gradient of main + mtp_weight * (mean of the modules' losses).

        Source: DeepSeek-V3, arXiv:2412.19437, eq. 25.
        """
        return {self.main: 1.0} | {loss: mtp_weight / len(self.mtp) for loss in self.mtp}


def transformer(ids, weights, config, *, gemm=matmul):
    """Token ids to logits; recorded when a Tape is active.

    ids: (B, T) int < U   weights: ModelWeights of arrays or Tensors   gemm: see linear; not used by the head, as in V3
    -> Output

    Raises ValueError for ids that are empty, of another form or out of range, or longer than the position table.
    Source: DeepSeek-V3, arXiv:2412.19437, fig. 2.
    """
    check_ids(ids, config)
    cos, sin = position_tables(config, np.arange(ids.shape[1]), _dtype(weights.E))
    x = embedding(ids, weights.E)                                                                                   # eq. 1
    routed = []
    for layer in weights.layers:
        x, route = block(x, layer, config, cos, sin, gemm=gemm)                                                    # eq. 2
        routed.append(route)
    hidden = rmsnorm(x, weights.g_final, eps=config.eps)                                                            # eq. 3
    logits = linear(hidden, weights.W_head)                                                                         # eq. 4
    return Output(logits, x, hidden, tuple(routed))


def predict_further(out, ids, weights, config, *, gemm=matmul):
    """The modules' predictions after a forward of the main model: a tuple of mtp.Prediction.

    Module k (0-based) at position i reads the state before it and token i+k+1, and predicts token i+k+2: its logits
    have k + 1 positions less than ids. Each reads the module before it, so the causal chain is kept.
    Raises ValueError when ids are too short for the modules.
    """
    if ids.shape[1] <= len(weights.mtp):
        raise ValueError(f"ids has {ids.shape[1]} tokens in a row: {len(weights.mtp)} modules need at least {len(weights.mtp) + 1}")
    cos, sin = position_tables(config, np.arange(ids.shape[1]), _dtype(weights.E))
    hidden = out.hidden if config.mtp_reads_normed else out.stream
    predictions = []
    for k, module in enumerate(weights.mtp):
        ahead = ids[:, k + 1:]                                                                                      # eq. 5
        T = ahead.shape[1]
        prediction = mtp_module(hidden, ahead, module, weights.E, weights.W_head, config, cos[:T], sin[:T], gemm=gemm)   # eq. 6
        hidden = prediction.hidden
        predictions.append(prediction)
    return tuple(predictions)


def losses(ids, targets, weights, config, *, gemm=matmul):
    """Every loss of a batch, on the tape: Losses. The sum that is trained: `tape.backward(losses.seeds(mtp_weight))`.

    ids, targets: (B, T) int, targets[:, i] the token after ids[:, i] (never the same token: that would be a leak); a target
    of IGNORE does not count.
    The mean of a module's loss is over its own positions, as in the public code; the paper divides by T.
    Source: DeepSeek-V3, arXiv:2412.19437, eq. 24 and 25.
    """
    check_targets(ids, targets, config)
    out = transformer(ids, weights, config, gemm=gemm)
    predictions = predict_further(out, ids, weights, config, gemm=gemm)
    main = cross_entropy(out.logits, targets, ignore_index=IGNORE)                                                  # eq. 7
    further = [cross_entropy(p.logits, targets[:, k + 1:], ignore_index=IGNORE) for k, p in enumerate(predictions)]     # eq. 8
    return Losses(main, tuple(further), out, predictions)


def routers(found, weights):
    """[(Routed, the BlockWeights it belongs to)] of every layer with experts, the modules' last. found: Losses."""
    blocks = [*weights.layers, *[module.block for module in weights.mtp]]
    routed = [*found.out.routed, *[prediction.routed for prediction in found.predictions]]
    return [(route, block) for route, block in zip(routed, blocks, strict=True) if route is not None]


def next_token_targets(ids):
    """The target of each position is the token after it; the last position has none: IGNORE."""
    targets = np.full_like(ids, IGNORE)
    targets[:, :-1] = ids[:, 1:]
    return targets


def check_ids(ids, config):
    """The door of the model. Raises ValueError that names what is wrong with the ids."""
    if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu" or ids.ndim != 2:
        form = f"{ids.dtype} {ids.shape}" if isinstance(ids, np.ndarray) else type(ids).__name__
        raise ValueError(f"ids must be an integer array (B, T), got {form}")
    if ids.size == 0:
        raise ValueError(f"ids has shape {ids.shape}: an empty batch has no tokens")
    if ids.shape[1] > config.max_positions:
        raise ValueError(f"ids has {ids.shape[1]} tokens in a row, the position table max_positions = {config.max_positions}")
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        where = tuple(int(i) for i in np.argwhere((ids < 0) | (ids >= config.vocab_size))[0])
        raise ValueError(f"ids{list(where)} = {ids[where]} is not a token: vocab_size = {config.vocab_size}")


def check_targets(ids, targets, config):
    """Raises ValueError unless targets are tokens or IGNORE, in the form of ids."""
    if not isinstance(targets, np.ndarray) or targets.dtype.kind not in "iu" or targets.shape != np.shape(ids):
        raise ValueError(f"targets must be integers in the form of ids, {np.shape(ids)}, got {getattr(targets, 'dtype', type(targets).__name__)} {np.shape(targets)}")
    wrong = (targets != IGNORE) & ((targets < 0) | (targets >= config.vocab_size))
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(f"targets{list(where)} = {targets[where]} is neither a token nor IGNORE = {IGNORE}: vocab_size = {config.vocab_size}")


def model_outline(config):
    """All weights as arrays with a shape and no memory: the form of a model of any size."""
    D, U = config.d_model, config.vocab_size
    layers = tuple(block_outline(config, dense=i < config.n_dense_layers) for i in range(config.n_layers))
    return ModelWeights(outline(U, D), layers, outline(D), outline(D, U), tuple(mtp_outline(config) for _ in range(config.n_mtp)))


def init(config, rng, *, std=0.006, head_std=None, dtype=np.float32):
    """Random weights: normal with one standard deviation, norms at 1, selection biases at 0.

    head_std: of W_head; None: std. The head reads vectors of length sqrt(D): its logits spread by head_std sqrt(D), and
    unless that is small the first loss is not ln(vocabulary).
    Source: DeepSeek-V3, arXiv:2412.19437, sec. 4.2, for the 0.006; a narrow model wants more, about 1 / sqrt(d_model).
    """
    form = model_outline(config)

    def leaf(name, shape):
        kind = name.split(".")[-1]
        if kind in CONSTANT:
            return np.zeros(shape, dtype)
        spread = head_std if kind == "W_head" and head_std is not None else std
        return np.ones(shape, dtype) if kind.startswith("g_") else (spread * rng.standard_normal(shape)).astype(dtype)

    return unflatten({name: leaf(name, like.shape) for name, like in flatten(form).items()}, form)


def trainable(weights):
    """The same weights as Tensors; what no gradient trains stays a plain array."""
    return tensors(weights, constant=CONSTANT)


def _dtype(leaf):
    return (leaf.data if isinstance(leaf, Tensor) else leaf).dtype


def loss_of_vector(theta, *, ids, config):
    """The whole model as one function of one vector, for gradcheck: all trained weights in a row -> loss, choices.

    theta: (weights,)   ids: (B, T) int   ->   loss: ()   chosen: one (B, T, top_k) for each block with experts
    """
    weights = _from_vector(theta, config)
    found = losses(ids, next_token_targets(ids), weights, config)
    total = sum(seed * loss.data for loss, seed in found.seeds(0.3).items())
    return (np.asarray(total, theta.dtype), *[routed.chosen.data for routed, _ in routers(found, weights)]), (theta, ids, config)


def gradient_of_vector(dloss, cache):
    """The tape's gradient of `loss_of_vector`, in a row again."""
    theta, ids, config = cache
    weights = trainable(_from_vector(theta, config))
    with Tape() as tape:
        found = losses(ids, next_token_targets(ids), weights, config)
    tape.backward({loss: seed * dloss for loss, seed in found.seeds(0.3).items()})
    return np.concatenate([gradient.reshape(-1) for gradient in gradients(weights).values()])


def _from_vector(theta, config):
    """Weights cut from one vector, in the order of the tree; the selection biases alternate."""
    form, flat, start = model_outline(config), {}, 0
    for name, leaf in flatten(form).items():
        if name.split(".")[-1] in CONSTANT:
            flat[name] = np.resize(np.array([0.3, -0.3], theta.dtype), leaf.shape)
        else:
            flat[name] = theta[start:start + leaf.size].reshape(leaf.shape)
            start += leaf.size
    return unflatten(flat, form)


def transformer_example(seed):
    """A model small enough to be differenced whole: theta, {ids, config}. Its choices are clear: gradcheck would say."""
    config = Config(vocab_size=23, d_model=12, n_layers=2, n_dense_layers=1, d_ff=14, max_positions=16, n_heads=2, q_rank=6, kv_rank=5,
                    d_nope=4, d_rope=2, d_value=3, yarn_factor=4.0, yarn_original=8, n_routed=4, top_k=2, d_expert=3, n_groups=1,
                    n_groups_kept=1)
    rng = np.random.default_rng(seed)
    trained = [leaf.size for name, leaf in flatten(model_outline(config)).items() if name.split(".")[-1] not in CONSTANT]
    return rng.standard_normal(sum(trained)) / 2, {"ids": rng.integers(0, config.vocab_size, (2, 5)), "config": config}


def demo():
    """Shapes and records, the gradient of all weights at once, and the loss of a model that knows nothing."""
    theta, case = transformer_example(seed=0)
    with Tape() as tape:
        found = losses(case["ids"], next_token_targets(case["ids"]), _from_vector(theta, case["config"]), case["config"])
    print(f"shapes    ids {case['ids'].shape}, {theta.size} weights in {len(flatten(model_outline(case['config'])))} arrays "
          f"-> loss {found.main.data.shape} and {len(found.mtp)} of a module")
    print("records   " + ", ".join(record.name for record in tape.records))
    errors = gradcheck(loss_of_vector, gradient_of_vector, (theta,), case)
    print(f"gradients of all weights, along ten random directions: {errors['theta']:.0e}")

    config = Config(vocab_size=1000, d_model=32, n_layers=2, n_dense_layers=1, d_ff=64, n_heads=2, q_rank=None, kv_rank=16, d_nope=8, d_rope=4,
                    d_value=8, n_routed=8, top_k=2, d_expert=16, n_groups=1, n_groups_kept=1)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 1000, (4, 32))
    loss = float(losses(ids, next_token_targets(ids), init(config, rng), config).main.data)
    print(f"claim     a fresh model knows nothing: loss {loss:.3f} nats, ln(1000) = {math.log(1000):.3f}")
    assert abs(loss / math.log(1000) - 1) < 0.02


if __name__ == "__main__":
    from minideepseek.model.transformer import demo  # the imported copy, so that every name exists once
    demo()
