"""The command line: train, generate and export, what they print, and the exit codes: 0 right, 1 wrong, 2 cannot be used."""
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from minideepseek.__main__ import main
from minideepseek.autograd import params
from minideepseek.interop import huggingface
from minideepseek.tokenizer.bpe import Tokenizer
from minideepseek.training import pretrain
from minideepseek.training.checkpoint import NAME, PREVIOUS, load_checkpoint
from minideepseek.training.pretrain import load_run
from minideepseek.training.recipe import RECIPES, Recipe
from minideepseek.training.step import TrainingError
from tests.house import ROOT

SMALL = Recipe(model="micro", steps=6, batch=2, length=24, corpus_bytes=20_000, vocab_size=300, warmup=2, decay=3, gamma_off=1, log_every=1,
               evaluate_every=3, save_every=2, evaluation_stories=2)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """The micro preset with a corpus that is made in no time; the test's own folder as the current one."""
    monkeypatch.setitem(RECIPES, "micro", SMALL)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_picture(monkeypatch):
    """Drawing takes longer than these runs."""
    monkeypatch.setattr(pretrain, "draw_curves", lambda folder: None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run, made by the command line."""
    folder = tmp_path_factory.mktemp("command") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "micro", SMALL)
        assert main(["train", "--preset", "micro", "--steps", "3", "--out", str(folder)]) == 0
    return folder


def refused(capsys, *command, code=2):
    """What a command prints on stderr that must return `code`; nothing else may be there."""
    assert main([str(part) for part in command]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    return error


def test_train_says_what_it_does(capsys, tmp_path):
    assert main(["train", "--preset", "micro", "--steps", "3", "--out", "deep/run"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "preparing the text and its tokenizer" and lines[1].startswith("deep/run: ") and "3 steps, floor 0." in lines[1]
    assert lines[2].startswith("step     1/3") and lines[-2].startswith("step     3/3") and "held-out +" in lines[-2]
    assert lines[-1] == "done. python -m minideepseek generate deep/run" and err == "" and "\r" not in out
    assert load_checkpoint("deep/run").step == 3 and load_checkpoint("deep/run").facts["recipe"]["decay"] == 2       # half of the steps, as in SMALL
    assert sorted(os.listdir("deep/run")) == [PREVIOUS, NAME, "curves.png", "log.csv", "run.json", "samples", "tokenizer.json"]


def test_train_finds_a_folder_of_its_own(capsys, no_picture):
    for n in range(2):
        assert main(["train", "--preset", "micro", "--steps", "3", "--seed", "7"]) == 0
        assert load_checkpoint(f"runs/micro-{n}").facts["recipe"]["seed"] == 7
    assert (load_run("runs/micro-0")[1].E == load_run("runs/micro-1")[1].E).all()


def test_train_stopped_and_resumed(capsys, monkeypatch, no_picture, trained):
    real, calls = pretrain.train_step, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "train_step", interrupted)
        assert main(["train", "--preset", "micro", "--steps", "3", "--out", "run"]) == 0
    step = load_checkpoint("run").step
    assert step in (1, 2)                                              # the second step is given up, or finished first
    assert f"stopped at step {step} of 3, saved. To go on: python -m minideepseek train --resume run" in capsys.readouterr().out
    assert main(["train", "--resume", "run", "--workers", "1"]) == 0
    for name in (NAME, "log.csv", "samples/step_000003.txt"):
        assert (trained / name).read_bytes() == open(f"run/{name}", "rb").read()
    before = open(f"run/{NAME}", "rb").read()
    assert main(["train", "--resume", "run"]) == 0                     # it is done already
    assert "done." in capsys.readouterr().out and open(f"run/{NAME}", "rb").read() == before


def test_train_on_a_text(capsys, no_picture, tmp_path):
    (tmp_path / "text.txt").write_text("Anna is in the mill. " * 200)
    assert main(["train", "--preset", "micro", "--steps", "3", "--text", "text.txt", "--out", "run"]) == 0
    out = capsys.readouterr().out
    assert "floor" not in out and "bits per byte: batch " in out


def test_generate_tells_a_story(capsys, trained):
    def told(*options):
        assert main(["generate", str(trained), "--max-new-tokens", "12", *options]) == 0
        return capsys.readouterr().out

    assert told() == told("--seed", "0") != told("--seed", "1")
    assert told("--prompt", "Long ago, ").startswith("Long ago, ") and told("--prompt", "Long ago, ") != "Long ago, \n"
    assert told("--temperature", "0") == told("--temperature", "0", "--seed", "5") == told("--top-k", "1") and told("--top-p", "0.5").endswith("\n")


def test_export_writes_what_the_loader_reads(capsys, trained):
    assert main(["export", str(trained), "out/public"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "out/public: config.json, model.safetensors, tokenizer.json"
    assert sorted(os.listdir("out/public")) == ["config.json", "model.safetensors", "tokenizer.json"]
    config, weights, tokenizer = load_run(trained)
    public, back = huggingface.load("out/public")
    assert (public.n_layers, public.n_mtp, public.vocab_size) == (config.n_layers, 1, 300)
    for name, ours in params.flatten(weights).items():
        np.testing.assert_array_equal(ours, params.flatten(back)[name])
    assert Tokenizer.load("out/public/tokenizer.json").merges == tokenizer.merges
    assert main(["export", str(trained), "narrow", "--fp8"]) == 0
    assert os.path.getsize("narrow/model.safetensors") < 0.6 * os.path.getsize("out/public/model.safetensors")
    assert np.abs(huggingface.load("narrow")[1].layers[0].attention.W_O - weights.layers[0].attention.W_O).max() > 0


def test_an_unknown_preset_lists_those_there_are(capsys):
    assert refused(capsys, "train", "--preset", "huge") == "error: preset 'huge' does not exist; there are micro, tiny, small\n"
    assert os.listdir() == []


@pytest.mark.parametrize("options, message", [
    (["--steps", "0"], "steps = 0 must be positive"),
    (["--steps", "-3"], "steps = -3 must be positive"),
    (["--seed", "-1"], "seed = -1 must not be negative"),
    (["--text", "nowhere.txt"], "No such file or directory: 'nowhere.txt'"),
    (["--text", "empty.txt"], "empty.txt is empty"),
    (["--out", "taken"], "taken exists and is not overwritten: choose another folder, or --resume taken"),
    (["--resume", "taken"], "taken is not a run: it has no run.json"),
    (["--resume", "nowhere"], "nowhere is not a run: it has no run.json"),
])
def test_train_refuses(capsys, tmp_path, options, message):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "taken").mkdir()
    preset = [] if "--resume" in options else ["--preset", "micro"]
    assert message in refused(capsys, "train", *preset, *options)
    assert sorted(os.listdir()) == ["empty.txt", "taken"] and os.listdir("taken") == []


def test_every_number_of_steps_can_be_trained(capsys, no_picture):
    for steps in (1, 2):
        assert main(["train", "--preset", "micro", "--steps", str(steps), "--out", f"run{steps}"]) == 0
    assert load_checkpoint("run1").step == 1


def test_a_gradient_that_is_not_finite_is_exit_code_1(capsys, monkeypatch):
    def diverged(*args, step, **options):
        raise TrainingError(f"step {step}: the gradient of E is not finite")

    monkeypatch.setattr(pretrain, "train_step", diverged)
    error = refused(capsys, "train", "--preset", "micro", "--out", "run", code=1)
    assert error == "training stopped: step 0: the gradient of E is not finite; the last checkpoint stands\n" and load_checkpoint("run").step == 0


def test_generate_with_drafts_says_what_they_came_to(capsys, trained):
    assert main(["generate", str(trained), "--max-new-tokens", "12", "--temperature", "0"]) == 0
    plain = capsys.readouterr().out
    for depth in ([], ["2"]):
        assert main(["generate", str(trained), "--max-new-tokens", "12", "--temperature", "0", "--speculative", *depth]) == 0
        text, report = capsys.readouterr().out.rsplit("\n\n", 1)
        assert text.strip() == plain.strip() and " forwards, " in report and report.strip().endswith(" tokens/s")


def test_generate_and_export_refuse(capsys, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    assert "temperature = -1.0 must be" in refused(capsys, "generate", run, "--temperature", "-1")
    assert "exceed max_positions = 1024" in refused(capsys, "generate", run, "--max-new-tokens", "1100")
    assert "exists: choose another folder" in refused(capsys, "export", run, tmp_path)
    (run / NAME).write_bytes((run / NAME).read_bytes()[:-1])
    for command in (["generate", run], ["export", run, "out"], ["train", "--resume", run]):
        error = refused(capsys, *command)
        assert "is it cut off" in error and f"the one before is {run / PREVIOUS}" in error
        assert "nowhere is not a run" in refused(capsys, command[0], *["--resume"][:command[0] == "train"], "nowhere", *command[2:] if command[0] == "export" else [])
    (run / "tokenizer.json").write_text("{}")
    os.replace(run / PREVIOUS, run / NAME)
    assert "tokenizer.json: is not one of our tokenizers" in refused(capsys, "generate", run)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [["--steps", "99"], ["--preset", "tiny"], ["--seed", "3"], ["--text", "other.txt"], ["--out", "elsewhere"]])
def test_resume_with_an_option_it_cannot_follow_is_refused(capsys, no_picture, trained, options):
    try:
        code = main(["train", "--resume", str(trained), *options])
    except SystemExit as error:
        code = error.code
    assert code == 2


def test_without_a_command_it_says_how_to_begin():
    run = subprocess.run([sys.executable, "-m", "minideepseek"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "python -m minideepseek train" in run.stdout and run.stderr == ""


def test_an_unknown_command_or_option_is_exit_code_2(capsys):
    for command in (["fly"], ["train", "--height", "3"], ["train", "--steps", "many"], ["generate"]):
        with pytest.raises(SystemExit) as caught:
            main(command)
        assert caught.value.code == 2 and "usage: python -m minideepseek" in capsys.readouterr().err


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and all(f"--{name}" in out for name in ("preset", "text", "steps", "seed", "out", "resume", "workers"))
    assert "micro, tiny, small" in out
