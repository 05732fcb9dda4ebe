import dataclasses
import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from minideepseek.autograd import params
from minideepseek.autograd.tape import Tape
from minideepseek.basics.softmax import log_softmax_forward
from minideepseek.corpus.batches import whole
from minideepseek.model.transformer import IGNORE, losses, predict_further, routers, trainable, transformer
from minideepseek.moe.balance_loss import sequence_balance
from minideepseek.moe.bias_balance import expert_counts, max_violation
from minideepseek.training import step as step_file
from minideepseek.training.adamw import adamw_step, new_state
from minideepseek.training.clip import clip_by_global_norm, global_norm
from minideepseek.training.recipe import Recipe
from minideepseek.training.step import (TrainingError, expert_blocks, held_out_nats, model_config, new_model, schedules, train_step,
                                        trained_arrays)

RECIPE = Recipe(model="micro", steps=30, batch=4, length=24, pieces=2, vocab_size=300, warmup=3, decay=20, gamma_off=5)


def case(seed=0, dtype=np.float32, **changes):
    """(recipe, config, weights, state, tokens, targets), all of one seed."""
    recipe = dataclasses.replace(RECIPE, **changes)
    config = model_config(recipe, recipe.vocab_size)
    weights, _ = new_model(recipe, config)
    weights = params.unflatten({name: leaf.astype(dtype) for name, leaf in params.flatten(weights).items()}, weights)
    rows = np.random.default_rng(seed).integers(0, recipe.vocab_size, (recipe.batch, recipe.length + 1))
    return recipe, config, weights, new_state(trained_arrays(weights)), rows[:, :-1], rows[:, 1:]


def one_step(recipe, config, weights, state, tokens, targets, step=0, workers=None):
    return train_step(weights, state, tokens, targets, step=step, config=config, recipe=recipe, workers=workers)


def first_gradients(pieces, spoil=None, **changes):
    """The gradients of a first step: the memory of AdamW holds a tenth of them. clip is out of reach."""
    recipe, config, weights, state, tokens, targets = case(pieces=pieces, clip=1e9, **changes)
    report = one_step(recipe, config, weights, state, tokens, targets if spoil is None else spoil(targets))
    return {name: 10 * m for name, m in state.m.items()}, report


def distance(ours, theirs):
    """The length of the difference of two gradients, in lengths of the second."""
    assert ours.keys() == theirs.keys()
    return global_norm({name: ours[name] - theirs[name] for name in ours}) / global_norm(theirs)


def everything(weights, state):
    """All that a step may change, as bytes."""
    return ({name: leaf.tobytes() for name, leaf in params.flatten(weights).items()}, {name: m.tobytes() for name, m in state.m.items()},
            {name: v.tobytes() for name, v in state.v.items()}, state.step)


def biases(weights):
    return [block.b_select.copy() for block in expert_blocks(weights)]


def counts_of(tokens, targets, weights, config):
    """Tokens per expert of every layer with experts, by a forward of its own."""
    trained = trainable(weights)
    return [expert_counts(route.chosen.data, config.n_routed) for route, _ in routers(losses(tokens, targets, trained, config), trained)]


def test_one_batch_is_learnt_by_heart():
    recipe, config, weights, state, tokens, targets = case(steps=300, warmup=10, decay=200, gamma_off=50, balance_weight=0.0, n_mtp=0, pieces=1)
    tokens[:, 0] = np.arange(4)                                  # every row can be told from the first token on
    for step in range(300):
        report = one_step(recipe, config, weights, state, tokens, targets, step)
        if report.main < 0.05:
            break
    assert report.main < 0.05 and 20 < step < 150, (step, report.main)
    assert held_out_nats(tokens, targets, weights, config)[0][0] / targets.size < 0.05


@pytest.mark.parametrize("seed, vocab_size", [(0, 300), (1, 300), (0, 1000)])
def test_a_fresh_model_knows_nothing(seed, vocab_size):
    report = one_step(*case(seed=seed, vocab_size=vocab_size, n_mtp=2))
    for loss in (report.main, *report.mtp):
        assert abs(loss / math.log(vocab_size) - 1) < 0.02
    assert len(report.mtp) == 2 and 1 <= report.balance < 1.5 and report.norm > 0 and len(report.violations) == 4


def test_a_step_is_losses_backward_clip_and_adamw():
    """The same, put together by hand from the parts: the same bytes."""
    recipe, config, weights, state, tokens, targets = case(pieces=1, clip=0.5, balance_weight=0.01)
    _, _, other, memory, _, _ = case()
    for step in (0, 25):                                         # 25: past the change of the mtp weight, balance speed 0
        report = one_step(recipe, config, weights, state, tokens, targets, step)
        trained, now = trainable(other), schedules(step, recipe)
        with Tape() as tape:
            loss = losses(tokens, targets, trained, config)
            balance = [sequence_balance(route.x, block.ffn.W_router, top_k=config.top_k) for route, block in routers(loss, trained)]
        tape.backward({loss.main: 1.0, loss.mtp[0]: 0.3 if step == 0 else 0.1} | dict.fromkeys(balance, 0.01))
        clipped, norm = clip_by_global_norm(params.gradients(trained), 0.5)
        assert norm == report.norm > 0.5
        adamw_step(trained_arrays(other), clipped, memory, lr=now["lr"], weight_decay=0.1)
        assert report.main == pytest.approx(float(loss.main.data)) and report.mtp[0] == pytest.approx(float(loss.mtp[0].data))
        assert report.balance == pytest.approx(np.mean([float(each.data) for each in balance]))
        for block, found in zip(expert_blocks(other), biases(weights)):
            block.b_select[...] = found
        assert everything(weights, state) == everything(other, memory)


def test_a_batch_in_pieces_has_the_gradient_of_the_whole():
    for dtype, rounding in ((np.float64, 1e-12), (np.float32, 1e-6)):
        gradients, report = first_gradients(1, dtype=dtype)
        for pieces in (2, 4):
            found, said = first_gradients(pieces, dtype=dtype)
            assert distance(found, gradients) < rounding
            assert (said.main, *said.mtp, said.balance, said.norm) == pytest.approx((report.main, *report.mtp, report.balance, report.norm), rel=rounding)
            assert said.violations == report.violations          # of the batch, not of a piece


class Backwards:
    """An executor that computes the last piece first and hands them out in order."""

    def map(self, function, *columns):
        rows = list(zip(*columns))
        return reversed([function(*row) for row in reversed(rows)])


def test_workers_change_the_speed_and_not_one_bit():
    results = []
    for workers in (None, ThreadPoolExecutor(1), ThreadPoolExecutor(2), ThreadPoolExecutor(4), Backwards()):
        recipe, config, weights, state, tokens, targets = case(pieces=4, steps=30)
        reports = [one_step(recipe, config, weights, state, tokens, targets, step, workers) for step in range(3)]
        results.append((reports, everything(weights, state)))
        if isinstance(workers, ThreadPoolExecutor):
            workers.shutdown()
    assert all(result == results[0] for result in results)


def short_rows(targets):
    """24, 24, 3 and 2 targets that count: the second piece has a tenth of the first."""
    spoilt = targets.copy()
    spoilt[2, 3:], spoilt[3, 2:] = IGNORE, IGNORE
    return spoilt


def no_second_piece(targets):
    spoilt = targets.copy()
    spoilt[2:] = IGNORE
    return spoilt


@pytest.mark.parametrize("spoil", [short_rows, no_second_piece])
def test_a_piece_counts_as_much_as_it_has_targets(spoil):
    options = {"spoil": spoil, "dtype": np.float64, "n_mtp": 0, "balance_weight": 0.0}
    (unsplit, report), (split, said) = first_gradients(1, **options), first_gradients(2, **options)
    assert distance(split, unsplit) < 1e-12 and said.main == pytest.approx(report.main, rel=1e-12)


@pytest.mark.parametrize("options", [{"n_mtp": 1, "balance_weight": 0.0}, {"n_mtp": 0, "balance_weight": 0.1}])
def test_the_other_losses_of_a_piece_have_shares_of_their_own(options):
    (unsplit, report), (split, said) = [first_gradients(pieces, spoil=short_rows, dtype=np.float64, **options) for pieces in (1, 2)]
    assert distance(split, unsplit) < 1e-12 and (*said.mtp, said.balance) == pytest.approx((*report.mtp, report.balance), rel=1e-12)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_batch_without_targets_is_refused_for_what_it_is():
    recipe, config, weights, state, tokens, targets = case()
    with pytest.raises((TrainingError, ValueError), match="target"):
        one_step(recipe, config, weights, state, tokens, np.full_like(targets, IGNORE))


def test_biases_move_by_gamma_by_the_counts_of_the_whole_batch():
    recipe, config, weights, state, tokens, targets = case(gamma=0.01)
    whole_batch = counts_of(tokens, targets, weights, config)
    first_piece = counts_of(tokens[:2], targets[:2], weights, config)
    report = one_step(recipe, config, weights, state, tokens, targets)
    found = biases(weights)
    assert len(found) == len(whole_batch) == 3                                           # two layers, and the module's
    for bias, counts in zip(found, whole_batch):
        assert np.array_equal(bias, np.float32(0.01) * np.sign(counts.mean() - counts).astype(np.float32))
    assert any((np.sign(a.mean() - a) != np.sign(b.mean() - b)).any() for a, b in zip(whole_batch, first_piece))      # else this proves little
    assert report.violations == tuple(max_violation(counts) for counts in whole_batch)
    assert [list(counts) for counts in report.counts] == [list(counts) for counts in whole_batch]
    assert not set(trained_arrays(weights)) & {name for name in params.flatten(weights) if name.endswith("b_select")}


def test_biases_move_after_the_step():
    """However far they move, it is the next batch that notices."""
    still, moved = case(gamma=0.0), case(gamma=5.0)
    first = [one_step(*each, step=0) for each in (still, moved)]
    assert first[0] == first[1]
    for a, b in zip(trained_arrays(still[2]).values(), trained_arrays(moved[2]).values()):
        assert np.array_equal(a, b)
    assert one_step(*still, step=1).main != one_step(*moved, step=1).main


@pytest.mark.parametrize("changes, step", [({"balance": "none"}, 0), ({"balance": "aux"}, 0), ({"gamma": 0.0}, 0), ({}, 25), ({}, 29)])
def test_biases_stand_still(changes, step):
    """Without the rule, and in the last gamma_off steps of it."""
    recipe, config, weights, state, tokens, targets = case(**changes)
    for block in expert_blocks(weights):
        block.b_select[...] = np.linspace(-0.3, 0.3, config.n_routed)
    before = biases(weights)
    one_step(recipe, config, weights, state, tokens, targets, step)
    assert np.array_equal(biases(weights), before)


def test_what_changes_over_a_run():
    assert schedules(24, RECIPE)["gamma"] == 0.01 and schedules(25, RECIPE)["gamma"] == 0
    assert schedules(19, RECIPE)["mtp_weight"] == 0.3 and schedules(20, RECIPE)["mtp_weight"] == 0.1
    assert [schedules(step, RECIPE)["lr"] for step in (0, 2, 9, 29)] == [0.001, 0.003, 0.003, 0.0001]
    weights = {balance: schedules(0, dataclasses.replace(RECIPE, balance=balance))["balance_weight"] for balance in ("bias", "aux", "none")}
    assert weights == {"bias": 1e-4, "aux": 1e-4, "none": 0.0}


PLACES = [("E", "embedding"), ("layers.0.attention.W_UK", "mla"), ("layers.0.ffn.W_gate", "swiglu"), ("layers.1.g_ffn", "rmsnorm"),
          ("layers.2.ffn.W_router", "deepseek_moe"), ("g_final", "rmsnorm"), ("W_head", "linear"), ("mtp.0.block.attention.W_O", "mla")]


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("name, op", PLACES)
def test_a_nan_in_a_weight_is_named_and_nothing_is_changed(name, op):
    recipe, config, weights, state, tokens, targets = case()
    one_step(recipe, config, weights, state, tokens, targets)                    # so that moments and biases are not all zero
    params.flatten(weights)[name][...] = np.nan
    before = everything(weights, state)
    with ThreadPoolExecutor(2) as pool:
        for workers in (None, pool):
            with pytest.raises(TrainingError) as caught:
                one_step(recipe, config, weights, state, tokens, targets, 7, workers)
            found = re.fullmatch(r"step 7: record \d+, (\w+), called at (.+):(\d+), made the first value that is not finite", str(caught.value))
            assert found and found[1] == op, caught.value
            line = Path(found[2]).read_text(encoding="utf-8").splitlines()[int(found[3]) - 1]
            assert f"{op}(" in line or f"{op}_module(" in line, line
    assert everything(weights, state) == before and state.step == 1


@pytest.mark.filterwarnings("ignore:invalid value")
def test_the_record_is_the_number_on_the_tape():
    recipe, config, weights, state, tokens, targets = case(pieces=1)
    params.flatten(weights)["layers.1.attention.W_O"][0, 0] = np.nan             # after the embedding and six records of layer 0: norm, attention
    with pytest.raises(TrainingError, match="step 0: record 8, mla, "):
        one_step(recipe, config, weights, state, tokens, targets)


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
@pytest.mark.parametrize("value, message", [(np.inf, "step 3: the gradient of layers.1.ffn.W_down is not finite"),
                                            (np.nan, "step 3: the gradient of layers.1.ffn.W_down is not finite"),
                                            (1e200, "step 3: the gradient of all weights together is not finite")])
def test_a_gradient_that_is_not_finite_is_named(monkeypatch, value, message):
    def spoilt(*args, **options):
        part = real(*args, **options)
        wide = part.gradients["layers.1.ffn.W_down"].astype(np.float64)
        wide[0, 0, 0] = value
        return part._replace(gradients=part.gradients | {"layers.1.ffn.W_down": wide})

    real = step_file.piece
    recipe, config, weights, state, tokens, targets = case()
    one_step(recipe, config, weights, state, tokens, targets)
    before = everything(weights, state)
    monkeypatch.setattr(step_file, "piece", spoilt)
    with pytest.raises(TrainingError) as caught:
        one_step(recipe, config, weights, state, tokens, targets, 3)
    assert str(caught.value) == message and everything(weights, state) == before


def held_out(config, seed=0):
    rng = np.random.default_rng(seed)
    return whole([rng.integers(0, config.vocab_size, n) for n in (9, 25, 2, 14, 20)])


@pytest.mark.parametrize("rows", [1, 2, 3, 32])
def test_held_out_nats_are_the_plain_sum_whatever_the_rows(rows):
    _, config, weights, _, _, _ = case(n_mtp=1, dtype=np.float64)
    tokens, targets = held_out(config)
    nats, counts = 0.0, 0
    for row, goal in zip(tokens, targets):                       # text by text, without padding
        n = int((goal != IGNORE).sum())
        out = transformer(row[None, :n], weights, config)
        log_p, _ = log_softmax_forward(out.logits.data[0])
        nats -= sum(log_p[i, goal[i]] for i in range(n))
        counts = counts + np.array([expert_counts(route.chosen.data, config.n_routed) for route in out.routed[1:]])
    found, loads = held_out_nats(tokens, targets, weights, config, rows=rows)
    assert found[0] == pytest.approx(nats, rel=1e-12) and np.array_equal(loads, counts)
    other = np.where(targets == IGNORE, 7, tokens)               # what stands in the padding cannot matter
    found, loads = held_out_nats(other, targets, weights, config, rows=rows)
    assert found[0] == pytest.approx(nats, rel=1e-12) and np.array_equal(loads, counts)


@pytest.mark.parametrize("rows", [1, 2, 32])
def test_each_depth_is_scored_on_its_own_targets(rows):
    """Module k at position i predicts token i + k + 2, text by text; a text too short for a depth has no target there."""
    _, config, weights, _, _, _ = case(n_mtp=2, dtype=np.float64)
    tokens, targets = held_out(config)
    nats = [0.0, 0.0]
    for row, goal in zip(tokens, targets):
        n = int((goal != IGNORE).sum())
        if n <= 2:
            continue                                             # nothing at depth 2; the rest is looked at below
        text = row[None, :n]
        for k, prediction in enumerate(predict_further(transformer(text, weights, config), text, weights, config)):
            log_p, _ = log_softmax_forward(prediction.logits.data[0])
            nats[k] -= sum(log_p[i, goal[i + k + 1]] for i in range(n - k - 1))
    (_, *found), _ = held_out_nats(tokens, targets, weights, config, rows=rows)
    assert min((targets != IGNORE).sum(axis=1)) < 3 and found[1] == pytest.approx(nats[1], rel=1e-12)
    longer = (targets != IGNORE).sum(axis=1) > 2
    (_, first, _), _ = held_out_nats(tokens[longer], targets[longer], weights, config, rows=rows)
    assert first == pytest.approx(nats[0], rel=1e-12)


def test_texts_without_a_target_add_nothing():
    _, config, weights, _, _, _ = case(n_mtp=1, dtype=np.float64)
    tokens, targets = held_out(config)
    silent = np.vstack([targets, np.full((4, targets.shape[1]), IGNORE)])
    (nats, counts), (again, loads) = [held_out_nats(np.vstack([tokens, tokens[:4]])[:len(goal)], goal, weights, config, rows=2) for goal in (targets, silent)]
    assert again == pytest.approx(nats, rel=1e-12) and np.array_equal(loads, counts)


def test_evaluation_changes_nothing():
    """Bug 19: a bias that moves in evaluation."""
    recipe, config, weights, state, tokens, targets = case(gamma=0.3)
    one_step(recipe, config, weights, state, tokens, targets)
    before = everything(weights, state)
    (nats, loads), *others = [held_out_nats(*held_out(config), weights, config) for _ in range(3)]
    assert all(again == nats and np.array_equal(counts, loads) for again, counts in others) and everything(weights, state) == before


def test_a_dense_model_has_no_violation():
    recipe, config, weights, state, tokens, targets = case(n_mtp=0)
    dense = dataclasses.replace(config, n_dense_layers=config.n_layers)
    weights, state = new_model(recipe, dense)
    report = one_step(recipe, dense, weights, state, tokens, targets)
    assert report.balance == 0 and report.violations == () and expert_blocks(weights) == []
    assert held_out_nats(tokens, targets, weights, dense)[1] == []
