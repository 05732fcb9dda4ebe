import dataclasses
import json
import math

import numpy as np
import pytest

from minideepseek.model.presets import PRESETS
from minideepseek.training import recipe as module
from minideepseek.training.recipe import RECIPES, Recipe, RecipeError, recipe
from minideepseek.training.schedule import balance_speed, learning_rate, mtp_weight

FIELDS = {field.name: field.type for field in dataclasses.fields(Recipe)}
POSITIVE = {"fp8_tile", "steps", "batch", "length", "pieces", "corpus_bytes", "warmup", "log_every", "evaluate_every", "save_every", "evaluation_stories",
            "init_std", "head_std", "peak", "clip"}
NOT_NEGATIVE = {"seed", "decay", "floor", "weight_decay", "gamma", "gamma_off", "balance_weight", "n_mtp", "mtp_first", "mtp_then"}
OF_A_KIND = {int: ("a whole number", [1.0, "5", None, True, math.nan]), float: ("a finite number", ["0.1", None, True, math.nan, math.inf, -math.inf, 1j]),
             str: ("a string", [5, None, True, b"tiny"])}


def change(name, value):
    return Recipe(**{name: value})


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_a_kind(name):
    kind, others = OF_A_KIND[FIELDS[name]]
    for value in others:
        with pytest.raises(RecipeError) as caught:
            change(name, value)
        assert str(caught.value) == f"{name} = {value!r} must be {kind}"


@pytest.mark.parametrize("name", sorted(POSITIVE | NOT_NEGATIVE))
def test_every_number_has_a_least_value(name):
    kind, word = FIELDS[name], "must be positive" if name in POSITIVE else "must not be negative"
    for value in [kind(-1)] + [kind(0)] * (name in POSITIVE):
        with pytest.raises(RecipeError) as caught:
            change(name, value)
        assert str(caught.value) == f"{name} = {value!r} {word}"


def test_zero_switches_off():
    for name in NOT_NEGATIVE:
        assert getattr(change(name, FIELDS[name](0)), name) == 0


def test_no_number_is_forgotten():
    numbers = {name for name, kind in FIELDS.items() if kind is not str}
    assert POSITIVE | NOT_NEGATIVE == numbers - {"vocab_size"} and not POSITIVE & NOT_NEGATIVE


RUN = {"steps": 100, "warmup": 10, "decay": 60, "gamma_off": 5, "batch": 8, "pieces": 2, "peak": 3e-3, "floor": 1e-4, "length": 16, "n_mtp": 1}


@pytest.mark.parametrize("fields, message", [
    ({"pieces": 3}, "pieces = 3 does not divide batch = 8"),
    ({"batch": 4, "pieces": 8}, "pieces = 8 does not divide batch = 4"),
    ({"floor": 4e-3}, "floor = 0.004 exceeds peak = 0.003"),
    ({"length": 2}, "length = 2 is too short for n_mtp = 1 modules"),
    ({"length": 4, "n_mtp": 3}, "length = 4 is too short for n_mtp = 3 modules"),
    ({"balance": "biased"}, "balance = 'biased' must be one of bias, aux, none"),
    ({"balance": ""}, "balance = '' must be one of"),
    ({"warmup": 41}, "warmup = 41 and decay = 60 do not fit into steps = 100"),
    ({"steps": 69}, "warmup = 10 and decay = 60 do not fit into steps = 69"),
    ({"gamma_off": 101}, "gamma_off = 101"),
    ({"vocab_size": 260}, "vocab_size = 260"),                           # 256 bytes and five special tokens
])
def test_fields_that_contradict_each_other(fields, message):
    with pytest.raises(RecipeError, match="^" + message):
        Recipe(**RUN | fields)


@pytest.mark.parametrize("fields", [{"pieces": 8}, {"batch": 3, "pieces": 3}, {"pieces": 1}, {"floor": 3e-3}, {"floor": 0}, {"length": 3}, {"length": 2, "n_mtp": 0},
                                    {"balance": "aux"}, {"balance": "none"}, {"peak": 1, "clip": 2}, {"warmup": 40}, {"steps": 70}, {"gamma_off": 100},
                                    {"vocab_size": 261}])
def test_what_stands_just_inside_the_rules(fields):
    one = Recipe(**RUN | fields)
    assert all(getattr(one, name) == value for name, value in fields.items()) and valid(one)


def test_the_error_is_a_value_error_and_a_recipe_is_frozen():
    assert issubclass(RecipeError, ValueError)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().steps = 5
    with pytest.raises(TypeError):
        Recipe("tiny")                                                   # by name only: an order of thirty fields is no order
    assert len({Recipe(), Recipe(), Recipe(seed=1)}) == 2


def valid(one):
    """Does a run with this recipe know all its numbers at every step? The schedules refuse what does not fit."""
    for step in {0, one.steps // 2, one.steps - 1}:
        learning_rate(step, peak=one.peak, total=one.steps, warmup=one.warmup, decay=one.decay, floor=one.floor)
        balance_speed(step, gamma=one.gamma, total=one.steps, off=one.gamma_off)
        mtp_weight(step, first=one.mtp_first, then=one.mtp_then, total=one.steps, change=2 * one.steps // 3)
    return True


@pytest.mark.parametrize("name", RECIPES)
def test_with_steps_keeps_the_schedules_valid(name):
    for steps in range(1, 10_001, 1 if name == "micro" else 25):          # micro spends the largest part of its steps on the decay
        other = RECIPES[name].with_steps(steps)
        assert other.steps == steps and 1 <= other.warmup and other.warmup + other.decay <= steps and other.gamma_off <= steps
    assert all(valid(RECIPES[name].with_steps(steps)) for steps in (1, 2, 3, 4, 5, 10, 99, 100, 296, 10_000))


@pytest.mark.parametrize("name", RECIPES)
def test_with_steps_stretches_the_end_and_keeps_everything_else(name):
    one = RECIPES[name]
    assert one.with_steps(one.steps) == one
    for factor in (2, 7):
        longer = one.with_steps(factor * one.steps)
        assert (longer.decay, longer.gamma_off) == (factor * one.decay, factor * one.gamma_off) and longer.warmup == one.warmup and valid(longer)
    for other in (one.with_steps(997), one.with_steps(5_000)):
        assert {line.split(":")[0] for line in other.differences(one)} <= {"steps", "warmup", "decay", "gamma_off"} and valid(other)
    assert one.with_steps(4).warmup == 1 and one.with_steps(40).warmup <= 10       # at most a quarter of a short run


@pytest.mark.parametrize("steps, message", [(0, "steps = 0 must be positive"), (-5, "steps = -5 must be positive"), (2.5, "steps = 2.5 must be a whole number")])
def test_with_steps_checks_like_everything_else(steps, message):
    with pytest.raises(RecipeError, match=message):
        Recipe().with_steps(steps)


@pytest.mark.parametrize("name", RECIPES)
def test_the_presets_can_run(name):
    one = recipe(name)
    assert one is RECIPES[name] and valid(one)
    model = PRESETS[one.model]
    assert one.length < model.max_positions and one.vocab_size > 256 and one.n_mtp == model.n_mtp == 1


def test_the_names_there_are():
    assert recipe("tiny") == Recipe() and set(RECIPES) == {"micro", "tiny", "small"}
    with pytest.raises(RecipeError, match="preset 'huge' does not exist; there are micro, tiny, small"):
        recipe("huge")


@pytest.mark.parametrize("one", [*RECIPES.values(), Recipe(**RUN | {"peak": 1, "seed": 10 ** 12, "gamma": 0.1 + 0.2})], ids=[*RECIPES, "odd numbers"])
def test_through_a_dictionary_and_json_and_back(one):
    fields = one.to_dict()
    assert list(fields) == list(FIELDS) and Recipe.from_dict(fields) == one
    assert Recipe.from_dict(json.loads(json.dumps(fields))) == one
    fields["steps"] = "changed"
    assert one.steps != "changed"                                        # a copy


def test_a_dictionary_is_checked_like_everything_else():
    with pytest.raises(RecipeError, match="^unknown fields: momentum, optimiser$"):
        Recipe.from_dict(Recipe().to_dict() | {"optimiser": "muon", "momentum": 0.9})
    with pytest.raises(RecipeError, match="unknown fields: 5, steps "):
        Recipe.from_dict({"steps ": 5, 5: "five"})
    with pytest.raises(RecipeError, match="steps = '5' must be a whole number"):
        Recipe.from_dict({"steps": "5"})
    assert Recipe.from_dict(RUN) == Recipe(**RUN)


def test_differences():
    one, other = Recipe(**RUN | {"seed": 1, "balance": "aux"}), Recipe(**RUN | {"seed": 2, "peak": 1e-3})
    assert one.differences(other) == ["seed: 1 here, 2 there", "peak: 0.003 here, 0.001 there", "balance: 'aux' here, 'bias' there"]
    assert other.differences(one)[0] == "seed: 2 here, 1 there" and one.differences(Recipe(**RUN | {"seed": 1, "balance": "aux"})) == []


def test_numpy_floats_are_welcome():
    assert Recipe(peak=np.float64(1e-3)) == Recipe(peak=1e-3) and json.dumps(Recipe(peak=np.float64(1e-3)).to_dict())


def test_demo(capsys):
    module.demo()
    assert "2 of 2 refused" in capsys.readouterr().out
