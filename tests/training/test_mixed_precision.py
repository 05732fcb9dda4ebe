"""Which tensor lives where, read off real steps; and runs in every precision."""
import dataclasses
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from minideepseek.autograd import params
from minideepseek.basics.linear import matmul
from minideepseek.precision.formats import E4M3, E5M2, round_to
from minideepseek.precision.fp8_gemm import bf16_gemm
from minideepseek.training import mixed_precision
from minideepseek.training.adamw import adamw_step, new_state
from minideepseek.training.mixed_precision import demo, formats_of, gemm_of, moment_dtype, observe
from minideepseek.training.recipe import Recipe, RecipeError
from minideepseek.training.step import TrainingError, model_config, new_model, train_step, trained_arrays

BF16 = np.dtype(ml_dtypes.bfloat16)
RECIPE = Recipe(model="micro", batch=4, length=16, steps=20, warmup=2, decay=2, gamma_off=1, vocab_size=300, fp8_tile=16)


def case(**changes):
    recipe = dataclasses.replace(RECIPE, **changes)
    config = model_config(recipe, recipe.vocab_size)
    weights, state = new_model(recipe, config)
    rows = np.random.default_rng(0).integers(0, 300, (4, 17))
    return recipe, config, weights, state, rows[:, :-1], rows[:, 1:]


def step(recipe, config, weights, state, tokens, targets, n=0, workers=None):
    return train_step(weights, state, tokens, targets, step=n, config=config, recipe=recipe, workers=workers)


def test_each_precision_has_its_gemm_and_its_moments():
    assert gemm_of(RECIPE) is matmul and moment_dtype(RECIPE) is None
    assert gemm_of(dataclasses.replace(RECIPE, precision="bf16")) is bf16_gemm
    fp8 = dataclasses.replace(RECIPE, precision="fp8")
    assert gemm_of(fp8).keywords == {"tile": 16, "gradient_fmt": E4M3} and moment_dtype(fp8) is ml_dtypes.bfloat16
    old = dataclasses.replace(fp8, fp8_scales="tensor", fp8_gradients="E5M2")
    assert gemm_of(old).keywords == {"tile": None, "gradient_fmt": E5M2}


@pytest.mark.parametrize("field, value", [("precision", "fp16"), ("fp8_tile", 0), ("fp8_scales", "row"), ("fp8_gradients", "E5M6")])
def test_a_recipe_that_cannot_be_is_named(field, value):
    with pytest.raises(RecipeError, match=f"^{field} = "):
        dataclasses.replace(RECIPE, **{field: value})


@pytest.mark.parametrize("precision", ("bf16", "fp8"))
def test_weights_and_gradients_stay_in_float32_and_moments_are_bfloat16(precision):
    recipe, config, weights, state, tokens, targets = one = case(precision=precision)
    before = {name: array.copy() for name, array in trained_arrays(weights).items()}
    step(*one)
    for name, array in trained_arrays(weights).items():
        assert array.dtype == np.float32 and state.m[name].dtype == state.v[name].dtype == BF16
        off_the_grid = round_to(array, mixed_precision.E4M3, overflow="saturate") != array
        assert (array != before[name]).any() and off_the_grid.any(), f"{name}: master weights are not rounded"


def test_high_precision_is_what_it_was():
    """fp32 asks nothing of the gemm door: the same bytes as a step without a recipe for precision."""
    plain, again = case(), case(fp8_scales="tensor", fp8_gradients="E5M2", fp8_tile=3)      # options of fp8, which is off
    for one in (plain, again):
        step(*one)
    for a, b in zip(trained_arrays(plain[2]).values(), trained_arrays(again[2]).values()):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("options", [{}, {"fp8_scales": "tensor"}, {"fp8_gradients": "E5M2"}])
def test_the_options_of_fp8_change_a_step(options):
    plain, other = case(precision="fp8"), case(precision="fp8", **options)
    for one in (plain, other):
        step(*one)
    same = all(np.array_equal(a, b) for a, b in zip(trained_arrays(plain[2]).values(), trained_arrays(other[2]).values()))
    assert same == (not options)


def test_workers_change_not_one_bit():
    alone, shared = case(precision="fp8"), case(precision="fp8")
    with ThreadPoolExecutor(2) as pool:
        for n in range(2):
            assert step(*alone, n=n) == step(*shared, n=n, workers=pool)
    for a, b in zip(trained_arrays(alone[2]).values(), trained_arrays(shared[2]).values()):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("precision", ("fp32", "bf16", "fp8"))
def test_a_model_learns_in_every_precision(precision):
    one = case(precision=precision)
    reports = [step(*one, n=n) for n in range(20)]
    assert reports[-1].main < 0.8 * reports[0].main


@pytest.mark.parametrize("precision", ("fp32", "bf16", "fp8"))
def test_a_nan_is_named_by_its_step_and_record_in_every_precision(precision):
    one = case(precision=precision)
    one[2].layers[0].attention.W_O[0, 0] = np.nan
    with pytest.raises(TrainingError, match="step 0: record 2, mla, "):
        step(*one)


def test_moments_are_rounded_once_when_they_are_put_back():
    rng = np.random.default_rng(0)
    flat = {"W": rng.standard_normal((3, 5)).astype(np.float32)}
    kept, fine = new_state(flat, ml_dtypes.bfloat16), new_state(flat)
    theta = {"W": flat["W"].copy()}
    for _ in range(5):
        g = {"W": rng.standard_normal((3, 5)).astype(np.float32)}
        fine.m, fine.v = [{"W": moment["W"].astype(np.float32)} for moment in (kept.m, kept.v)]      # from the same rounded memory
        theta["W"][...], fine.step = flat["W"], kept.step
        adamw_step(theta, g, fine, lr=0.01)                           # all of it in float32
        adamw_step(flat, g, kept, lr=0.01)
        assert np.array_equal(flat["W"], theta["W"])                  # this step has not seen the new rounding
        for rounded, moment in ((kept.m, fine.m), (kept.v, fine.v)):
            assert rounded["W"].dtype == BF16 and np.array_equal(rounded["W"], moment["W"].astype(BF16)) and (rounded["W"] != moment["W"]).any()


def test_bfloat16_second_moments_move_with_v3s_beta_and_stall_with_a_slower_one():
    """A gradient half as large as before: at beta2 = 0.95 the memory forgets, at 0.999 its steps are below the last bit."""
    for beta2, moves in ((0.95, True), (0.999, False)):
        flat = {"W": np.zeros((1, 1), np.float32)}
        state = new_state(flat, ml_dtypes.bfloat16)
        state.v["W"][...], state.step = 1.0, 100
        adamw_step(flat, {"W": np.full((1, 1), 0.5, np.float32)}, state, lr=0.0, beta2=beta2)
        assert (float(state.v["W"][0, 0]) != 1.0) == moves


def test_only_bfloat16_may_differ_from_the_weight():
    flat = {"W": np.zeros((2, 2), np.float32)}
    with pytest.raises(ValueError, match="W of state.m is float16"):
        adamw_step(flat, {"W": np.zeros((2, 2), np.float32)}, new_state(flat, np.float16), lr=0.1)
    with pytest.raises(ValueError, match="W of gradients is bfloat16"):
        adamw_step(flat, {"W": np.zeros((2, 2), BF16)}, new_state(flat), lr=0.1)


def test_every_product_of_a_step_is_observed_and_belongs_to_a_weight():
    recipe, config, weights, _, tokens, targets = case(precision="fp8")
    products = observe(weights, tokens, targets, config, gemm_of(recipe))
    by_role = {role: [product for product in products if product.role == role] for role in ("forward", "dx", "dW")}
    assert len(by_role["forward"]) == len(by_role["dx"]) == len(by_role["dW"]) > 50
    names = {product.weight for role in ("forward", "dx") for product in by_role[role]}
    assert None not in names and all(product.weight is None for product in by_role["dW"])
    flat = params.flatten(weights)
    outside = {name.split(".")[-1] for name in flat.keys() - names}
    assert outside == {"E", "W_head", "W_router", "b_select", "g_attention", "g_ffn", "g_q", "g_kv", "g_final", "g_hidden", "g_embedding"}
    for product in by_role["forward"]:
        assert product.shape[1:] == flat[product.weight].shape[-2:]


@pytest.mark.parametrize("precision, expected", [("fp32", "float32"), ("bf16", "BF16"), ("fp8", "E4M3")])
def test_the_table_says_what_a_step_did(precision, expected):
    recipe, config, weights, state, tokens, targets = case(precision=precision)
    gradients = {name: np.ones_like(array) for name, array in trained_arrays(weights).items()}
    adamw_step(trained_arrays(weights), gradients, state, lr=1e-3)
    rows = formats_of(recipe, weights, state, gradients, observe(weights, tokens, targets, config, gemm_of(recipe)))
    table = {what: (fmt, scales) for what, fmt, scales in rows}
    assert table["master weights"][0] == table["gradients of weights"][0] == "float32"
    assert table["moments m, v"][0] == ("float32" if precision == "fp32" else "bfloat16")
    inside = [what for what in table if what.startswith(("forward", "dx", "dW", "both"))]
    assert {table[what][0] for what in inside} == {expected}
    if precision == "fp8":
        assert table["dW: gradient dy"][1].startswith("scales for 16 x 1,") and table["forward: weight W"][1].startswith("scales for 16 x 16,")


def test_demo(capsys):
    demo()
    assert "moments m, v" in capsys.readouterr().out
