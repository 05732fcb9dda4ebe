"""One training step: losses, gradients, clip, AdamW, then the selection biases; and the loss on held-out texts.

Derivation: whiteboard/training/step.md     Source: DeepSeek-V3, arXiv:2412.19437, sec. 2.2 and 4.2
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from minideepseek.autograd import params
from minideepseek.autograd.tape import Tape
from minideepseek.basics.linear import matmul
from minideepseek.basics.softmax import log_softmax_forward
from minideepseek.model.block import CONSTANT
from minideepseek.model.presets import preset
from minideepseek.model.transformer import IGNORE, init, losses, predict_further, routers, trainable, transformer
from minideepseek.moe.balance_loss import sequence_balance
from minideepseek.moe.bias_balance import expert_counts, max_violation, update_bias
from minideepseek.training.adamw import adamw_step, new_state
from minideepseek.training.clip import clip_by_global_norm
from minideepseek.training.mixed_precision import gemm_of, moment_dtype
from minideepseek.training.recipe import Recipe
from minideepseek.training.schedule import balance_speed, learning_rate, mtp_weight


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the step and the place."""


class Report(NamedTuple):
    """What one step says of itself: losses in nats per token, before its update."""
    main: float
    mtp: tuple               # of each module
    balance: float           # mean over layers of the sequence-wise loss; 1 is perfect balance
    norm: float              # of the whole gradient, before clipping
    counts: tuple            # of each layer with experts: the tokens each of them served, (E,)

    @property
    def violations(self):
        """MaxVio of each layer with experts, over the batch."""
        return tuple(max_violation(count) for count in self.counts)


def model_config(recipe, vocab_size):
    """The model of a recipe, with the vocabulary of the tokenizer."""
    return dataclasses.replace(preset(recipe.model), vocab_size=vocab_size, n_mtp=recipe.n_mtp, balance=recipe.balance, attention=recipe.attention,
                               n_kv_heads=2 if recipe.attention == "gqa" else None)


def new_model(recipe, config):
    """Fresh weights, as arrays, and the optimiser's state."""
    weights = init(config, np.random.default_rng([recipe.seed, 0, 2]), std=recipe.init_std, head_std=recipe.head_std)
    return weights, new_state(trained_arrays(weights), moment_dtype(recipe))


def trained_arrays(weights):
    """{name: array} of what the optimiser moves."""
    return {name: leaf for name, leaf in params.flatten(weights).items() if name.split(".")[-1] not in CONSTANT}


def train_step(weights, state, tokens, targets, *, step, config, recipe, workers=None):
    """One step on one batch; weights, state and selection biases are changed in place.

    weights: ModelWeights of arrays   tokens, targets: (B, T) int   step: 0-based
    workers: an executor whose map runs the pieces of the batch at the same time. It changes the speed and not one bit:
    the pieces are those of the recipe, and their gradients are added in order.
    Raises TrainingError when a loss or a gradient is not finite; nothing has been changed then.
    """
    speeds, totals = schedules(step, recipe), counted(targets, config.n_mtp)
    if not totals[0]:
        raise TrainingError(f"step {step}: no target of the batch counts")
    rows = np.split(np.arange(len(tokens)), recipe.pieces)
    one = functools.partial(piece, weights=weights, step=step, config=config, speeds=speeds, totals=totals, n_rows=len(tokens),
                            gemm=gemm_of(recipe))
    done = list((workers.map if workers else map)(one, [tokens[r] for r in rows], [targets[r] for r in rows]))
    gradients = {name: functools.reduce(np.add, [part.gradients[name] for part in done]) for name in done[0].gradients}
    counts = [sum(of_layer) for of_layer in zip(*[part.counts for part in done])]

    clipped, norm = clip_by_global_norm(gradients, recipe.clip)
    if not np.isfinite(norm):
        bad = next((name for name, gradient in gradients.items() if not np.isfinite(gradient).all()), "all weights together")
        raise TrainingError(f"step {step}: the gradient of {bad} is not finite")
    adamw_step(trained_arrays(weights), clipped, state, lr=speeds["lr"], weight_decay=recipe.weight_decay)
    for block, count in zip(expert_blocks(weights), counts):
        if block.b_select is not None:
            block.b_select[...] = update_bias(block.b_select, count, speeds["gamma"])     # after the step, from the whole batch
    main, balance, *mtp = np.sum([part.values for part in done], axis=0).tolist()
    return Report(main, tuple(mtp), balance, norm, tuple(tuple(count.tolist()) for count in counts))


class Piece(NamedTuple):
    """What a part of the batch gives; each loss and its gradient are weighted by its share of what that loss is a mean of."""
    gradients: dict          # {name: array}
    counts: list             # of each layer with experts: tokens per expert
    values: list             # main loss, mean balance, the modules' losses


def piece(tokens, targets, *, weights, step, config, speeds, totals, n_rows, gemm=matmul):
    """Forward and backward of some rows of the batch."""
    trained = trainable(weights)
    with Tape() as tape:
        loss = losses(tokens, targets, trained, config, gemm=gemm)
        routed = routers(loss, trained)
        balance = [sequence_balance(route.x, block.ffn.W_router, top_k=config.top_k, scoring=config.scoring) for route, block in routed]
    seeds = loss.seeds(speeds["mtp_weight"]) | (dict.fromkeys(balance, speeds["balance_weight"]) if speeds["balance_weight"] else {})
    if not all(np.isfinite(each.data) for each in seeds):
        raise TrainingError(f"step {step}: {first_bad(tape)}")
    of_main, *of_modules = [float(mine / max(total, 1)) for mine, total in zip(counted(targets, config.n_mtp), totals)]
    of_rows = len(tokens) / n_rows                                  # the balance loss is a mean over rows
    shares = {loss.main: of_main} | dict(zip(loss.mtp, of_modules)) | dict.fromkeys(balance, of_rows)
    tape.backward({each: seed * shares[each] for each, seed in seeds.items()})
    values = [of_main * loss.main.data, of_rows * np.mean([each.data for each in balance] or [0.0]),
              *[share * each.data for share, each in zip(of_modules, loss.mtp)]]
    return Piece(params.gradients(trained), [expert_counts(route.chosen.data, config.n_routed) for route, _ in routed],
                 [float(value) for value in values])


def counted(targets, n_mtp):
    """How many targets count: for the main model, and for each module, which predicts one place further."""
    return [(targets[:, k:] != IGNORE).sum() for k in range(n_mtp + 1)]


def expert_blocks(weights):
    """The BlockWeights of every layer with experts, the modules' last."""
    return [block for block in [*weights.layers, *[module.block for module in weights.mtp]] if hasattr(block.ffn, "W_router")]


def schedules(step, recipe):
    """{name: value} of everything that changes over a run."""
    bias = recipe.balance == "bias"
    return {
        "lr": learning_rate(step, peak=recipe.peak, total=recipe.steps, warmup=recipe.warmup, decay=recipe.decay, floor=recipe.floor),
        "gamma": balance_speed(step, gamma=recipe.gamma, total=recipe.steps, off=recipe.gamma_off) if bias else 0.0,
        "mtp_weight": mtp_weight(step, first=recipe.mtp_first, then=recipe.mtp_then, total=recipe.steps, change=2 * recipe.steps // 3),
        "balance_weight": 0.0 if recipe.balance == "none" else recipe.balance_weight,
    }


def first_bad(tape):
    """Which record made the first value that is not finite."""
    for number, record in enumerate(tape.records):
        for y in record.outputs:
            if y.data.dtype.kind == "f" and not np.isfinite(y.data).all():
                return f"record {number}, {record.name}, called at {record.where}, made the first value that is not finite"
    return "the loss is not finite"


def held_out_nats(tokens, targets, weights, config, *, rows=32):
    """Cross entropies summed over all targets that count, in nats: of the main model, then of each module; and the main
    model's expert counts (E,) of each layer, over all rows. How many targets those sums have: see `counted`.

    Changes nothing: selection biases stand still in evaluation. In the precision of the weights, whatever they are trained in.
    """
    nats, counts = np.zeros(1 + config.n_mtp), []
    for start in range(0, len(tokens), rows):
        piece = slice(start, start + rows)
        used = (targets[piece] != IGNORE).any(axis=0).nonzero()[0]
        if not used.size:
            continue
        width = max(used[-1], config.n_mtp) + 1                                       # cut what is padding in every row
        ids, goal = tokens[piece, :width], targets[piece, :width]
        out = transformer(ids, weights, config)
        further = predict_further(out, ids, weights, config) if ids.shape[1] > config.n_mtp else ()
        for k, logits in enumerate([out.logits, *[prediction.logits for prediction in further]]):
            nats[k] += _nats(logits.data, goal[:, k:])
        valid = goal != IGNORE
        here = [expert_counts(route.chosen.data[valid], config.n_routed) for route in out.routed if route is not None]
        counts = [a + b for a, b in zip(counts or [0] * len(here), here)]
    return nats.tolist(), counts


def _nats(logits, goal):
    """The sum of -log p of the targets that count, in float64."""
    log_p, _ = log_softmax_forward(logits.astype(np.float64))
    valid = goal != IGNORE
    return -np.take_along_axis(log_p, np.where(valid, goal, 0)[..., None], axis=-1)[..., 0][valid].sum()


def demo():
    """One batch, learnt by heart."""
    recipe = Recipe(model="micro", batch=4, length=24, steps=100, warmup=10, decay=50, balance_weight=0.0, n_mtp=0, vocab_size=300)
    config = model_config(recipe, recipe.vocab_size)
    weights, state = new_model(recipe, config)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 300, (4, 25))
    rows[:, 0] = np.arange(4)                                  # distinct first tokens: every row can be told from the first on
    reports = [train_step(weights, state, rows[:, :-1], rows[:, 1:], step=step, config=config, recipe=recipe) for step in range(60)]
    print(f"shapes    tokens {rows[:, :-1].shape}, {params.count(weights):,} weights")
    print("by hand   loss at steps 0, 20, 40, 59:", *[f"{reports[step].main:.3f}" for step in (0, 20, 40, 59)], f"; ln(300) = {np.log(300):.3f}")
    print(f"claim     96 random tokens are learnt by heart: loss {reports[0].main:.2f} -> {reports[-1].main:.3f} nats")
    assert abs(reports[0].main / np.log(300) - 1) < 0.02 and reports[-1].main < 0.1


if __name__ == "__main__":
    from minideepseek.training.step import demo  # the imported copy, so that every name exists once
    demo()
