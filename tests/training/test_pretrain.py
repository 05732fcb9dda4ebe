import csv
import dataclasses
import json
import math
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest

from minideepseek.autograd import params
from minideepseek.interop.safetensors import CheckpointError
from minideepseek.training import pretrain
from minideepseek.training import step as step_file
from minideepseek.training.checkpoint import NAME, PREVIOUS, load_checkpoint
from minideepseek.training.data import BEGIN, DataError
from minideepseek.training.pretrain import RunError, begin, columns, load_run, resume, story, train
from minideepseek.training.recipe import Recipe
from minideepseek.training.step import TrainingError, held_out_nats, schedules

RECIPE = Recipe(model="micro", steps=8, batch=2, length=24, pieces=1, corpus_bytes=20_000, vocab_size=300, warmup=2, decay=4, gamma_off=2, n_mtp=0,
                log_every=1, evaluate_every=4, save_every=3, evaluation_stories=2)
PNG = bytes([137, 80, 78, 71, 13, 10, 26, 10])


def quiet(line):
    pass


def go_on(folder, workers=1, **options):
    return train(resume(folder), say=quiet, workers=workers, **options)


def record(folder):
    """What must not differ by a byte: the checkpoint, the log, the samples."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in [folder / NAME, folder / "log.csv", *sorted((folder / "samples").iterdir())]}


@pytest.fixture(scope="module", autouse=True)
def short_samples():
    """Two dozen tokens instead of SAMPLE_TOKENS: the time goes to the steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(story.__kwdefaults__, "max_new_tokens", 24)
        yield


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A run that has begun and made no step. Tests work on copies."""
    folder = tmp_path_factory.mktemp("pretrain") / "fresh"
    begin(folder, RECIPE)
    return folder


@pytest.fixture(scope="module")
def whole(fresh):
    """The run that was never stopped."""
    folder = shutil.copytree(fresh, fresh.with_name("whole"))
    assert go_on(folder)
    return folder


@pytest.fixture
def cut(fresh, tmp_path, monkeypatch):
    """A copy to stop and resume. Its picture is not drawn: that takes longer than the run."""
    monkeypatch.setattr(pretrain, "draw_curves", quiet)
    return shutil.copytree(fresh, tmp_path / "cut")


def test_the_folder_of_a_run(fresh, whole):
    assert sorted(os.listdir(fresh)) == [NAME, "log.csv", "run.json", "tokenizer.json"]
    assert sorted(os.listdir(whole)) == [PREVIOUS, NAME, "curves.png", "log.csv", "run.json", "samples", "tokenizer.json"]
    assert sorted(os.listdir(whole / "samples")) == ["step_000004.txt", "step_000008.txt"]
    about = json.loads((whole / "run.json").read_text())
    assert Recipe.from_dict(about["recipe"]) == RECIPE and about["config"]["n_mtp"] == 0 and about["text"] is None
    assert (whole / "curves.png").read_bytes()[:8] == PNG
    first, blank, *text = (whole / "samples/step_000008.txt").read_text().split("\n")
    assert first.startswith("after 8 steps, ") and first.endswith(" bits per byte held out") and blank == "" and text
    checkpoint = load_checkpoint(whole)
    assert checkpoint.step == checkpoint.facts["adamw_step"] == 8 and checkpoint.facts["recipe"] == RECIPE.to_dict()
    assert load_checkpoint(whole / PREVIOUS).step == 6 and load_checkpoint(fresh).step == 0


def test_the_log(whole):
    run = resume(whole)
    rows = list(csv.DictReader((whole / "log.csv").open()))
    assert list(rows[0]) == columns(run.recipe) and [int(row["step"]) for row in rows] == list(range(8))
    assert [i for i, row in enumerate(rows) if row["held_bits_per_byte"]] == [3, 7] == [i for i, row in enumerate(rows) if row["above_floor"]]
    per_token = run.data.held_bytes / (run.data.held_targets >= 0).sum()
    for step, row in enumerate(rows):
        assert float(row["bits_per_byte"]) == pytest.approx(float(row["loss"]) / math.log(2) / per_token)
        assert float(row["learning_rate"]) == schedules(step, RECIPE)["lr"]
        assert float(row["norm"]) > 0 and float(row["max_violation"]) >= 0 and float(row["balance"]) >= 1 and float(row["mtp_loss"]) == 0
    assert abs(float(rows[0]["loss"]) / math.log(300) - 1) < 0.02 and float(rows[-1]["loss"]) < float(rows[0]["loss"])
    nats, _ = held_out_nats(run.data.held_tokens, run.data.held_targets, run.weights, run.config)     # after the last step, of the saved weights
    held = float(rows[-1]["held_bits_per_byte"])
    assert held == nats[0] / math.log(2) / run.data.held_bytes and float(rows[-1]["above_floor"]) == held - run.data.floor
    assert float(rows[-1]["held_loss_0"]) == nats[0] / (run.data.held_targets >= 0).sum() and not rows[0]["held_loss_0"]


def test_every_step_is_watched_with_its_report(fresh, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "draw_curves", quiet)
    seen = []
    run = begin(tmp_path / "run", RECIPE)
    train(run, say=quiet, workers=1, stop_at=3, watch=lambda step, report: seen.append((step, report)))
    rows = list(csv.DictReader((run.folder / "log.csv").open()))
    assert [step for step, _ in seen] == [0, 1, 2]
    for (_, report), row in zip(seen, rows):
        assert report.main == float(row["loss"]) and report.norm == float(row["norm"])


def test_a_story_with_drafts_is_the_same_story(tmp_path):
    run = begin(tmp_path / "run", dataclasses.replace(RECIPE, n_mtp=1))
    tell = lambda **options: "".join(story(run.weights, run.config, run.data.tokenizer, temperature=0.0, max_new_tokens=12, **options))
    rounds = []
    assert tell() == tell(depth=3, watch=rounds.append)
    assert max(len(one.drafts) for one in rounds) == 3 and sum(len(one.tokens) for one in rounds) <= 12


def test_rows_of_the_log_and_saves_come_as_told(fresh, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "draw_curves", quiet)
    saves = []
    run = begin(tmp_path / "run", dataclasses.replace(RECIPE, log_every=3, evaluate_every=5, save_every=4))
    real = run.save
    run.save = lambda: (saves.append(run.step), real())
    assert train(run, say=quiet, workers=1)
    rows = (run.folder / "log.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == [0, 3, 4, 6, 7]          # every third, the evaluation after five steps, the last
    assert saves == [4, 8] and sorted(os.listdir(run.folder / "samples")) == ["step_000005.txt", "step_000008.txt"]


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5, 7])
def test_stopped_and_resumed_it_is_the_same_run(cut, whole, stop):
    assert go_on(cut, stop_at=stop) is False
    assert load_checkpoint(cut).step == stop
    assert go_on(cut) is True
    assert record(cut) == record(whole)


def test_with_a_module_and_other_workers_it_is_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "draw_curves", quiet)
    alone, shared = begin(tmp_path / "alone", dataclasses.replace(RECIPE, pieces=2, n_mtp=1)).folder, tmp_path / "shared"
    shutil.copytree(alone, shared)
    assert go_on(alone, workers=1)
    go_on(shared, workers=2, stop_at=3)
    go_on(shared, workers=1, stop_at=6)
    assert go_on(shared, workers=2) and record(shared) == record(alone)
    assert all(4 < float(row["mtp_loss"]) < 7 for row in csv.DictReader((alone / "log.csv").open()))


def test_stopped_again_and_again(cut, whole):
    for stop in (1, 4, 4, 6, 7):
        go_on(cut, stop_at=stop)
    assert go_on(cut) and record(cut) == record(whole)
    assert go_on(cut) and record(cut) == record(whole)                          # a finished run has nothing to do


def at_call(monkeypatch, module, name, number, error):
    """Raise `error` at call `number` (from 0) of a function, before it does anything."""
    real, calls = getattr(module, name), []

    def call(*args, **options):
        calls.append(name)
        if len(calls) == number + 1:
            raise error
        return real(*args, **options)

    monkeypatch.setattr(module, name, call)


def press_ctrl_c(monkeypatch, name, number=0):
    """Ctrl-C at call `number` (from 0) of a function of the run. The handler decides what becomes of it."""
    real, calls = getattr(pretrain, name), []

    def call(*args, **options):
        calls.append(name)
        if len(calls) == number + 1:
            signal.raise_signal(signal.SIGINT)
        return real(*args, **options)

    monkeypatch.setattr(pretrain, name, call)


def test_ctrl_c_saves_and_says_how_to_go_on(cut, whole, monkeypatch):
    said = []
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, "train_step", 5)
        try:
            assert train(resume(cut), say=said.append, workers=1) is False
        except KeyboardInterrupt:                                # it would end pytest, not the test
            pytest.fail("Ctrl-C went through")
    step = load_checkpoint(cut).step
    assert step in (5, 6)                                        # this step is given up, or finished first
    assert said[-1] == f"\nstopped at step {step} of 8, saved. To go on: python -m minideepseek train --resume {cut}"
    assert go_on(cut) and record(cut) == record(whole)


class Interrupted(dict):
    """Weights whose owner presses Ctrl-C when half of them have been updated."""

    def items(self):
        for number, item in enumerate(super().items()):
            if self.state.step == 5 and number == len(self) // 2:              # adamw_step counts up before it begins
                signal.raise_signal(signal.SIGINT)
            yield item


def test_ctrl_c_in_the_middle_of_an_update(cut, whole, monkeypatch):
    def halfway(flat, gradients, state, **options):
        flat = Interrupted(flat)
        flat.state = state
        real(flat, gradients, state, **options)

    real = step_file.adamw_step
    with monkeypatch.context() as patch:
        patch.setattr(step_file, "adamw_step", halfway)
        assert go_on(cut) is False
    assert go_on(cut) and record(cut) == record(whole)


@pytest.mark.parametrize("name", ["_held_out", "_sample"])
def test_ctrl_c_in_the_middle_of_an_evaluation(cut, whole, monkeypatch, name):
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, name)
        assert go_on(cut) is False
    assert go_on(cut) and record(cut) == record(whole)


class Killed(BaseException):
    """Stands for a process that is gone: nobody catches it."""


@pytest.mark.parametrize("name, number", [("train_step", 7), ("_held_out", 0), ("_sample", 1), ("_show", 4), ("save_checkpoint", 2)])
def test_killed_it_goes_on_from_the_last_checkpoint(cut, whole, monkeypatch, name, number):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_call(patch, pretrain, name, number, Killed)
        go_on(cut)
    assert load_checkpoint(cut).step in (3, 6)
    assert go_on(cut) and record(cut) == record(whole)


def test_a_log_that_ran_ahead_is_cut_back(cut, whole):
    go_on(cut, stop_at=6)
    before = (cut / "log.csv").read_bytes()
    for tail in ("6,5.1,4.9", "6", "6,5.1,5.2,1.0,4.1,,,0.5,0.003,2.0\n7,5.1,5.2,1.0,4.1,,,0.5,0.003,2.0\n8,1", "\0\0\0\0"):
        with (cut / "log.csv").open("a") as log:
            log.write(tail)
        run = resume(cut)
        assert (cut / "log.csv").read_bytes() == before and run.step == 6
    assert train(run, say=quiet, workers=1) and record(cut) == record(whole)


def test_a_log_with_a_line_that_is_no_row(cut):
    with (cut / "log.csv").open("a") as log:
        log.write("Long ago\n")
    with pytest.raises(RunError, match="log.csv"):
        resume(cut)


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(cut, whole, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(TrainingError, match="step 5: the gradient of E is not finite"):
        at_call(patch, pretrain, "train_step", 5, TrainingError("step 5: the gradient of E is not finite"))
        go_on(cut)
    assert load_checkpoint(cut).step == 3
    assert go_on(cut) and record(cut) == record(whole)


def test_a_full_disk_leaves_the_last_checkpoint(cut, whole, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        at_call(patch, pretrain, "save_checkpoint", 1, OSError("No space left on device"))
        go_on(cut)
    assert load_checkpoint(cut).step == 3
    assert go_on(cut) and record(cut) == record(whole)


def test_a_folder_of_another_recipe_says_what_differs(cut):
    with pytest.raises(RunError) as caught:
        resume(cut, dataclasses.replace(RECIPE, steps=20, peak=1e-3))
    assert str(caught.value) == f"{cut} was begun with another recipe: steps: 8 here, 20 there; peak: 0.003 here, 0.001 there"
    assert resume(cut, RECIPE).recipe == RECIPE


def test_what_is_no_run(tmp_path, cut):
    (tmp_path / "empty").mkdir()
    for function in (resume, load_run):
        for folder in (tmp_path / "nowhere", tmp_path / "empty"):
            with pytest.raises(RunError, match="is not a run: it has no run.json"):
                function(folder)
        (cut / NAME).write_bytes((cut / NAME).read_bytes()[:-1])
        with pytest.raises(CheckpointError, match="is it cut off"):
            function(cut)
    (cut / NAME).unlink()
    with pytest.raises(FileNotFoundError, match=NAME):
        resume(cut)


def test_the_one_before_can_take_the_place_of_a_damaged_checkpoint(cut, whole):
    go_on(cut, stop_at=5)
    (cut / NAME).write_bytes(b"damaged!" * 10)
    with pytest.raises(CheckpointError, match=f"the one before is .*{PREVIOUS}: rename it to {NAME}"):
        resume(cut)
    os.replace(cut / PREVIOUS, cut / NAME)
    assert resume(cut).step == 3 and go_on(cut) and record(cut) == record(whole)


def test_what_exists_is_never_overwritten(tmp_path):
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    file.write_text("mine")
    for path in (folder, file):
        with pytest.raises(RunError, match=f"{path} exists and is not overwritten: choose another folder, or --resume {path}"):
            begin(path, RECIPE)
    assert os.listdir(folder) == [] and file.read_text() == "mine"


def test_a_text_of_ones_own(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The {n}th café is as good as the {n + 1}th.\n" for n in range(300)), encoding="utf-8")
    run = begin(tmp_path / "new/run", RECIPE, text=text)
    assert run.data.floor is None and run.text["file"] == str(text)
    go_on(run.folder, stop_at=5)
    assert resume(run.folder).data.ids.tolist() == run.data.ids.tolist()
    assert go_on(run.folder) and (run.folder / "curves.png").read_bytes()[:8] == PNG
    rows = list(csv.DictReader((run.folder / "log.csv").open()))
    assert [bool(row["held_bits_per_byte"]) for row in rows] == [False] * 3 + [True] + [False] * 3 + [True]
    assert not any(row["above_floor"] for row in rows)                           # nobody knows the floor
    assert "".join(story(*[load_run(run.folder)[i] for i in (1, 0, 2)], prompt="The", max_new_tokens=20))


@pytest.mark.parametrize("content, message", [(b"", "is empty"), (b"caf\xe9" * 99, "is not UTF-8"), (b"too short", "fewer than one batch")])
def test_a_text_that_cannot_be_used_makes_no_folder(tmp_path, content, message):
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(DataError, match=message):
        begin(tmp_path / "run", RECIPE, text=tmp_path / "text")
    assert os.listdir(tmp_path) == ["text"]


def test_a_run_that_could_not_begin_leaves_no_folder(tmp_path, monkeypatch):
    at_call(monkeypatch, pretrain, "save_checkpoint", 0, OSError("No space left on device"))
    with pytest.raises(OSError, match="No space"):
        begin(tmp_path / "run", RECIPE)
    assert os.listdir(tmp_path) == []


def test_a_text_that_changed_is_noticed(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Anna is in the mill. " * 300)
    begin(tmp_path / "run", RECIPE, text=text)
    text.write_text("Ben is in the park. " * 300)
    with pytest.raises((RunError, DataError), match="text.txt"):
        resume(tmp_path / "run")


def test_what_is_said(cut):
    said, shown = [], []
    train(resume(cut), say=said.append, workers=1)
    assert [line[:11] for line in said] == ["step     1/", "step     4/", "step     8/"]       # the first, and the evaluations
    assert "held-out +" in said[-1] and "above the floor" in said[0] and said[-1].endswith("tokens/s  0 s left")
    shutil.rmtree(cut)
    train(begin(cut, RECIPE), say=said.append, live=shown.append, workers=1, stop_at=4)
    assert [line[:11] for line in shown] == ["step     1/", "step     2/", "step     3/"]
    assert said[3].startswith("\r\033[Kstep     4/") and said[4].startswith("\nstopped at step 4 of 8") and len(said) == 5


def test_load_run_gives_what_was_trained(whole):
    config, weights, tokenizer = load_run(whole)
    run = resume(whole)
    assert config == run.config and tokenizer.vocab_size == config.vocab_size == 300
    for ours, theirs in zip(params.flatten(weights).values(), params.flatten(run.weights).values(), strict=True):
        assert np.array_equal(ours, theirs) and ours.flags.writeable
    assert run.state.step == 8 and any(block.any() for name, block in params.flatten(weights).items() if name.endswith("b_select"))


def test_a_story(whole):
    config, weights, tokenizer = load_run(whole)
    tell = lambda **options: "".join(story(weights, config, tokenizer, **{"max_new_tokens": 12} | options))
    assert tell(seed=1) == tell(seed=1) != tell(seed=2) and tell(temperature=0.0, seed=1) == tell(temperature=0.0, seed=2)
    assert tell(max_new_tokens=0) == "" and BEGIN not in tell()
    assert tell(prompt="Long ago, ", temperature=0.0) != tell(temperature=0.0)
    with pytest.raises(ValueError, match="temperature = -1"):
        tell(temperature=-1.0)


def spelt(monkeypatch, tokenizer, ids, prompt=""):
    """The pieces of a story whose model says these ids."""
    monkeypatch.setattr(pretrain, "generate", lambda prompt, *args, **options: (asked.append(prompt), iter(ids))[1])
    asked = []
    return list(story(None, None, tokenizer, prompt=prompt)), asked[0].tolist()


def test_a_story_ends_where_another_begins(whole, monkeypatch):
    tokenizer = load_run(whole)[2]
    begin_id = tokenizer.special[BEGIN]
    pieces, asked = spelt(monkeypatch, tokenizer, [*b"Hi", begin_id, *b"more"], prompt="Ben")
    assert pieces == ["H", "i"] and asked == [begin_id, *tokenizer.encode("Ben")]


def test_a_character_may_be_spread_over_tokens(whole, monkeypatch):
    pieces, _ = spelt(monkeypatch, load_run(whole)[2], "café €".encode())
    assert "".join(pieces) == "café €"


def test_the_curves_of_half_a_run(fresh, tmp_path):
    folder = shutil.copytree(fresh, tmp_path / "run")
    go_on(folder, stop_at=3)                                     # no evaluation yet
    assert not (folder / "curves.png").exists()
    pretrain.draw_curves(folder)
    assert (folder / "curves.png").read_bytes()[:8] == PNG


def test_the_number_of_workers_is_at_most_that_of_the_pieces(cut, monkeypatch):
    asked = []
    real = pretrain.ThreadPoolExecutor
    monkeypatch.setattr(pretrain, "ThreadPoolExecutor", lambda n: asked.append(n) or real(n))
    for pieces, workers, cores in ((2, 1, 9), (2, 2, 9), (2, 7, 9), (2, None, 9), (2, None, 1), (2, None, None), (1, 2, 9)):
        monkeypatch.setattr(pretrain, "os", SimpleNamespace(cpu_count=lambda: cores))
        run = resume(cut)
        run.recipe = dataclasses.replace(RECIPE, pieces=pieces)
        train(run, say=quiet, workers=workers, stop_at=0)
    assert asked == [2, 2, 2]
