"""Mixed precision: which tensor of a training step lives in which format, and the gemm that makes it so.

Derivation: whiteboard/training/mixed_precision.md     Source: DeepSeek-V3, arXiv:2412.19437, sec. 3.3
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import dataclasses
import functools
from typing import NamedTuple

import ml_dtypes
import numpy as np

from minideepseek.autograd import params
from minideepseek.autograd.tape import Tape
from minideepseek.basics.linear import matmul
from minideepseek.model.presets import preset
from minideepseek.model.transformer import init, losses, trainable
from minideepseek.precision.formats import E4M3, E5M2
from minideepseek.precision.fp8_gemm import bf16_gemm, fp8_gemm, tiling
from minideepseek.training.recipe import Recipe


def gemm_of(recipe):
    """The products of all linear layers but the head and the router, see `linear`: plain, in BF16, or in FP8.

    Embedding, head, router, norms, the core of attention and everything elementwise stay in the precision of the weights.
    dx and dW in FP8 are surrogates: the slope of rounding is taken for 1.
    """
    if recipe.precision == "fp32":
        return matmul
    return bf16_gemm if recipe.precision == "bf16" else functools.partial(fp8_gemm, **_fp8_options(recipe))


def moment_dtype(recipe):
    """In what AdamW keeps its moments: V3 rounds them to BF16, its weights and gradients stay in float32. None: as the weights."""
    return None if recipe.precision == "fp32" else ml_dtypes.bfloat16


def _fp8_options(recipe):
    return {"tile": recipe.fp8_tile if recipe.fp8_scales == "tiles" else None, "gradient_fmt": {"E4M3": E4M3, "E5M2": E5M2}[recipe.fp8_gradients]}


class Product(NamedTuple):
    """One matrix product of a step, as the gemm door saw it."""
    role: str                # forward, dx or dW
    weight: str | None       # the name of the weight in it; None for dW, which multiplies two others
    shape: tuple             # M, K, N


def observe(weights, tokens, targets, config, gemm):
    """Every product that passes the gemm door in one forward and backward: a list of Product."""
    names = {id(leaf): name for name, leaf in params.flatten(weights).items()}
    seen = []

    def spy(A, B, *, role):
        owner = B
        while isinstance(owner.base, np.ndarray) and id(owner) not in names:       # an expert's slice, a transpose: whose memory is it?
            owner = owner.base
        seen.append(Product(role, names.get(id(owner)), (*A.shape, B.shape[1])))
        return gemm(A, B, role=role)

    with Tape() as tape:
        loss = losses(tokens, targets, trainable(weights), config, gemm=spy)
    tape.backward(loss.seeds(0.1))
    return seen


def formats_of(recipe, weights, state, gradients, products):
    """Which tensor lives where: rows (tensor, format, scales). Dtypes and products are those of a step that was made, tiles and formats the recipe's.

    weights: ModelWeights   state: AdamWState after the step   gradients: {name: array}   products: of `observe`
    """
    flat = params.flatten(weights)
    inside = {product.weight for product in products if product.weight}
    kinds = lambda names: ", ".join(dict.fromkeys(name.split(".")[-1] for name in names))
    dtypes = lambda arrays: ", ".join(sorted({str(array.dtype) for array in arrays}))
    stay = dtypes(flat.values())
    rows = [("master weights", stay, ""), ("gradients of weights", dtypes(gradients.values()), ""), ("moments m, v", dtypes([*state.m.values(), *state.v.values()]), "")]
    if recipe.precision != "fp8":
        rows.append(("both operands of every product", "BF16" if recipe.precision == "bf16" else stay, ""))
    else:
        for role, (a, b) in (("forward", ("input x", "weight W")), ("dx", ("gradient dy", "weight W")), ("dW", ("input x, transposed", "gradient dy"))):
            n = sum(product.role == role for product in products)
            for what, (block, fmt) in zip((a, b), tiling(role, **_fp8_options(recipe), fmt=E4M3)):
                rows.append((f"{role}: {what}", fmt.name, f"{_size(block)}, {n} products"))
    rows += [(f"in such products: {kinds(name for name in flat if name in inside)}", "as above", ""),
             (f"in none: {kinds(name for name in flat if name not in inside)}", stay, ""),
             ("results of products, core of attention, gates, norms, stream, loss", stay, "")]
    return rows


def _size(block):
    return "one scale" if block == (None, None) else "scales for " + " x ".join(map(str, block))


def demo():
    """The table of one FP8 step of a small model, and its gradients beside those in float32."""
    from minideepseek.training.adamw import adamw_step, new_state

    config = dataclasses.replace(preset("micro"), vocab_size=300)
    weights = init(config, np.random.default_rng(0), std=0.12, head_std=0.03)
    ids = np.random.default_rng(1).integers(0, 300, (2, 33))
    found = {}
    for precision in ("fp32", "bf16", "fp8"):
        recipe = Recipe(model="micro", precision=precision, fp8_tile=16)
        trained = trainable(weights)
        with Tape() as tape:
            loss = losses(ids[:, :-1], ids[:, 1:], trained, config, gemm=gemm_of(recipe))
        tape.backward(loss.seeds(0.1))
        found[precision] = float(loss.main.data), params.gradients(trained)
    length = lambda gradients: np.sqrt(sum(float((gradient**2).sum()) for gradient in gradients.values()))
    away = {precision: length({name: gradient - found["fp32"][1][name] for name, gradient in gradients.items()}) / length(found["fp32"][1])
            for precision, (_, gradients) in found.items()}

    recipe = Recipe(model="micro", precision="fp8", fp8_tile=16)
    products = observe(weights, ids[:, :-1], ids[:, 1:], config, gemm_of(recipe))
    flat = {name: leaf for name, leaf in params.flatten(weights).items() if name in found["fp8"][1]}
    state = new_state(flat, moment_dtype(recipe))
    adamw_step(flat, found["fp8"][1], state, lr=1e-3)
    for row in formats_of(recipe, weights, state, found["fp8"][1], products):
        print("          {:66s} {:12s} {}".format(*row))
    print(f"shapes    tokens {ids[:, :-1].shape} -> {len(products)} products, {sum(product.role == 'forward' for product in products)} of each role")
    first = next(product for product in products if product.role == "forward")
    print(f"by hand   the first: x ({first.shape[0]}, {first.shape[1]}) times {first.weight} ({first.shape[1]}, {first.shape[2]}): "
          f"{first.shape[0] * first.shape[1] // 16} scales for x, {first.shape[1] * first.shape[2] // 256} for the weight")
    print("claim     against float32, loss and gradient of one step: " + ", ".join(
        f"{precision} {abs(found[precision][0] / found['fp32'][0] - 1):.1e}, {away[precision]:.3f}" for precision in ("bf16", "fp8")))
    assert 2 * away["bf16"] < away["fp8"] < 0.4 and abs(found["fp8"][0] / found["fp32"][0] - 1) < 0.01


if __name__ == "__main__":
    from minideepseek.training.mixed_precision import demo  # the imported copy, so that every name exists once
    demo()
