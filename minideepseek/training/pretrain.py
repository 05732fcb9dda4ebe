"""Pre-training: a run from its first step to its last, in a folder that can be stopped, resumed and read.

Derivation: whiteboard/training/pretrain.md     Source: DeepSeek-V3, arXiv:2412.19437, sec. 4.2
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import codecs
import contextlib
import csv
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from minideepseek.autograd import params
from minideepseek.interop.safetensors import replacing
from minideepseek.model.config import Config
from minideepseek.model.generate import generate
from minideepseek.model.speculative import speculate
from minideepseek.model.transformer import model_outline
from minideepseek.plots.curves import plot_run
from minideepseek.tokenizer.bpe import Tokenizer
from minideepseek.training.adamw import new_state
from minideepseek.training.allocator import keep_freed_memory
from minideepseek.training.checkpoint import NAME, Checkpoint, load_checkpoint, save_checkpoint
from minideepseek.training.data import BEGIN, batch, bits_per_byte, text_data, town_data
from minideepseek.training.mixed_precision import moment_dtype
from minideepseek.training.recipe import Recipe
from minideepseek.training.step import counted, held_out_nats, model_config, new_model, schedules, train_step, trained_arrays

COLUMNS = ("step", "loss", "mtp_loss", "balance", "bits_per_byte", "held_bits_per_byte", "above_floor", "max_violation", "learning_rate", "norm")
SAMPLE_TOKENS = 160


def columns(recipe):
    """The columns of a run's log: at the end the held-out losses in nats per token, of the main model (0) and of each module."""
    return [*COLUMNS, *[f"held_loss_{k}" for k in range(1 + recipe.n_mtp)]]


class RunError(ValueError):
    """A run that cannot begin or go on; the message says why."""


class Run:
    """A run in progress. folder, recipe, config, weights (arrays), state, data; text: its file and checksum, or None; step: the next one."""

    def __init__(self, folder, recipe, data, text=None):
        self.folder, self.recipe, self.data, self.text, self.step = Path(folder), recipe, data, text, 0
        self.config = model_config(recipe, data.tokenizer.vocab_size)
        self.weights, self.state = new_model(recipe, self.config)

    def save(self):
        """Everything the next step depends on, in one file."""
        arrays = {f"weights.{name}": leaf for name, leaf in params.flatten(self.weights).items()}
        arrays |= {f"m.{name}": leaf for name, leaf in self.state.m.items()} | {f"v.{name}": leaf for name, leaf in self.state.v.items()}
        facts = {"config": self.config.to_dict(), "recipe": self.recipe.to_dict(), "text": self.text, "adamw_step": self.state.step}
        save_checkpoint(self.folder, Checkpoint(self.step, arrays, facts))

    def restore(self, checkpoint):
        """Go back to where a checkpoint was written."""
        self.weights = saved_weights(checkpoint, self.config)
        self.state = new_state(trained_arrays(self.weights), moment_dtype(self.recipe))
        for kind, moments in (("m.", self.state.m), ("v.", self.state.v)):
            for name, moment in moments.items():
                moment[...] = checkpoint.arrays[kind + name]
        self.state.step, self.step = checkpoint.facts["adamw_step"], checkpoint.step


def begin(folder, recipe, *, text=None):
    """A new run in a new folder. Raises RunError for a folder that exists; DataError for a text that cannot be used."""
    folder = Path(folder)
    if folder.exists():
        raise RunError(f"{folder} exists and is not overwritten: choose another folder, or --resume {folder}")
    data = text_data(text, recipe) if text else town_data(recipe)
    folder.parent.mkdir(parents=True, exist_ok=True)
    begun = folder.with_name(f".{folder.name}.{os.getpid()}.begun")
    begun.mkdir()
    try:
        run = Run(begun, recipe, data, {"file": str(Path(text).resolve()), "sha256": digest(text)} if text else None)
        data.tokenizer.save(begun / "tokenizer.json")
        with replacing(begun / "run.json") as file:
            file.write(json.dumps({"recipe": recipe.to_dict(), "config": run.config.to_dict(), "text": run.text}, indent=2).encode())
        with replacing(begun / "log.csv") as file:
            file.write((",".join(columns(recipe)) + "\n").encode())
        run.save()
        os.rename(begun, folder)
    except BaseException:
        shutil.rmtree(begun, ignore_errors=True)
        raise
    run.folder = folder
    return run


def digest(path):
    """The SHA-256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def resume(folder, recipe=None):
    """A run where its checkpoint left it. The log is cut back to the checkpoint's step.

    recipe: what the caller expects; None: whatever the run was begun with
    Raises RunError for a folder that is no run, or one of another recipe (it says which fields differ);
    CheckpointError for a damaged checkpoint.
    """
    folder = Path(folder)
    checkpoint = _checkpoint_of(folder)
    own = Recipe.from_dict(checkpoint.facts["recipe"])
    if recipe is not None and own != recipe:
        raise RunError(f"{folder} was begun with another recipe: " + "; ".join(own.differences(recipe)))
    tokenizer, text = Tokenizer.load(folder / "tokenizer.json"), checkpoint.facts["text"]
    if text and digest(text["file"]) != text["sha256"]:
        raise RunError(f"{text['file']} has changed since {folder} was begun: the batches would be others")
    data = text_data(text["file"], own, tokenizer) if text else town_data(own, tokenizer)
    run = Run(folder, own, data, text)
    run.restore(checkpoint)
    rows = (folder / "log.csv").read_text().splitlines(keepends=True)[1:]
    whole = [row for row in rows if row.endswith("\n")]                       # the last may be half written
    strange = [row for row in whole if not row.split(",")[0].isdecimal()]
    if strange:
        raise RunError(f"{folder / 'log.csv'} holds a line that is no row of a log: {strange[0]!r}")
    with replacing(folder / "log.csv") as file:
        file.write("".join([",".join(columns(own)) + "\n", *[row for row in whole if int(row.split(",")[0]) < checkpoint.step]]).encode())
    return run


def train(run, *, say=print, live=None, watch=None, workers=None, stop_at=None):
    """Train to the last step of the recipe; save now and then, at the end, and on Ctrl-C.

    say: prints a line   live: overwrites one line on a terminal; None: a line now and then instead
    watch: called as watch(step, report) after every step, to look and not to touch
    workers: how many pieces of a batch are computed at the same time; None: one for each core
    stop_at: stop, saved, before this step. Returns True when the run is complete.
    Raises TrainingError when a loss or a gradient is not finite; the last checkpoint stands.
    """
    recipe, data, began, first = run.recipe, run.data, time.perf_counter(), run.step
    keep_freed_memory()
    sys.setswitchinterval(5e-4)                                           # seconds a piece waits for the interpreter: less than an op takes
    workers = min(recipe.pieces, workers or os.cpu_count() or 1)
    floor = data.floor or 0.0
    per_token = data.held_bytes / (data.held_targets >= 0).sum()          # bytes, on average
    last = recipe.steps if stop_at is None else min(stop_at, recipe.steps)
    with (ThreadPoolExecutor(workers) if workers > 1 else contextlib.nullcontext() as pool, open(run.folder / "log.csv", "a", newline="") as log,
          _ctrl_c_waits() as asked):
        while run.step < last and not asked:
            step = run.step
            tokens, targets = batch(data, recipe, step)
            report = train_step(run.weights, run.state, tokens, targets, step=step, config=run.config, recipe=recipe, workers=pool)
            run.step += 1
            if watch:
                watch(step, report)
            done = run.step == recipe.steps
            held, held_losses = _held_out(run) if done or run.step % recipe.evaluate_every == 0 else (None, [None] * (1 + recipe.n_mtp))
            if held is not None or step % recipe.log_every == 0:
                bits = bits_per_byte(report.main, per_token)
                row = (step, report.main, float(np.mean(report.mtp or 0.0)), report.balance, bits, held, None if held is None or data.floor is None else held - floor,
                       float(np.mean(report.violations or 0.0)), schedules(step, recipe)["lr"], report.norm, *held_losses)
                csv.writer(log, lineterminator="\n").writerow([step, *["" if value is None else repr(float(value)) for value in row[1:]]])
                log.flush()
                _show(run, bits, held, first, began, live, say)
            if held is not None:
                _sample(run, held)
            if done or run.step % recipe.save_every == 0:
                run.save()
        if run.step < recipe.steps:
            run.save()
            say(f"\nstopped at step {run.step} of {recipe.steps}, saved. To go on: python -m minideepseek train --resume {run.folder}")
            return False
    draw_curves(run.folder)
    return True


def draw_curves(folder):
    """Draw curves.png from log.csv."""
    with open(Path(folder) / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    column = lambda name: np.array([float(row[name]) for row in rows])
    held = [row for row in rows if row["held_bits_per_byte"]]
    floors = [float(row["held_bits_per_byte"]) - float(row["above_floor"]) for row in held if row["above_floor"]]
    plot_run(Path(folder) / "curves.png", column("step"), train_bits=column("bits_per_byte"), held_steps=[float(row["step"]) for row in held],
             held_bits=[float(row["held_bits_per_byte"]) for row in held], floor=floors[-1] if floors else None,
             learning_rate=column("learning_rate"), violation=column("max_violation"))


def load_run(folder):
    """(Config, weights, Tokenizer) of a run, for generation and export. Raises as `resume` does."""
    folder = Path(folder)
    checkpoint = _checkpoint_of(folder)
    config = Config.from_dict(checkpoint.facts["config"])
    return config, saved_weights(checkpoint, config), Tokenizer.load(folder / "tokenizer.json")


def _checkpoint_of(folder):
    """The checkpoint of a run's folder. Raises RunError when the folder is none."""
    if not (folder / "run.json").exists():
        raise RunError(f"{folder} is not a run: it has no run.json")
    return load_checkpoint(folder)


def saved_weights(checkpoint, config):
    """The ModelWeights that a run saved."""
    flat = {name.removeprefix("weights."): leaf for name, leaf in checkpoint.arrays.items() if name.startswith("weights.")}
    return params.unflatten(flat, model_outline(config))


def story(weights, config, tokenizer, *, prompt="", seed=0, temperature=1.0, max_new_tokens=SAMPLE_TOKENS, depth=0, watch=None, **options):
    """An iterator over the text that a model tells, piece by piece, until it would begin another story.

    depth: how many tokens its prediction modules draft at a time, see model/speculative; 0: none, one token after another
    watch: called with each Round of drafts   options: of `generate`, or of `speculate`
    """
    first = tokenizer.special[BEGIN]
    ids = np.append(first, tokenizer.encode(prompt))
    options = options | {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "stop": [first]}
    tokens = _drafted(speculate(ids, weights, config, depth=depth, **options), watch) if depth else generate(ids, weights, config, **options)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")         # a character may be spread over tokens
    for token in tokens:
        if token == first:
            break
        if piece := decoder.decode(tokenizer.token_bytes(token)):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest


def _drafted(rounds, watch):
    """The tokens of all rounds, one after another."""
    for one in rounds:
        if watch:
            watch(one)
        yield from one.tokens


@contextlib.contextmanager
def _ctrl_c_waits():
    """A list that is empty until somebody presses Ctrl-C: the step is finished first. The second time it breaks off, unsaved."""
    asked = []

    def ask(*_):
        asked.append(True)
        if len(asked) > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():          # signals reach the main thread only
        yield asked
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _held_out(run):
    """Bits per byte of the held-out texts, and the losses of main model and modules in nats per token."""
    nats, _ = held_out_nats(run.data.held_tokens, run.data.held_targets, run.weights, run.config)
    return bits_per_byte(nats[0], run.data.held_bytes), [sum_ / max(n, 1) for sum_, n in zip(nats, counted(run.data.held_targets, run.config.n_mtp))]


def _sample(run, held):
    text = "".join(story(run.weights, run.config, run.data.tokenizer, seed=run.step))
    (run.folder / "samples").mkdir(exist_ok=True)
    with replacing(run.folder / "samples" / f"step_{run.step:06d}.txt") as file:
        file.write(f"after {run.step} steps, {held:.3f} bits per byte held out\n\n{text.rstrip()}\n".encode())


def _show(run, bits, held, first, began, live, say):
    """The live line, or a plain one at every evaluation."""
    seconds = time.perf_counter() - began
    rate = (run.step - first) * run.recipe.batch * run.recipe.length / seconds
    left = seconds / (run.step - first) * (run.recipe.steps - run.step)
    floor = run.data.floor
    above = f"{bits - floor:+.3f} above the floor" if floor is not None else f"{bits:.3f}"
    line = (f"step {run.step:5d}/{run.recipe.steps}  bits per byte: batch {above}" + (f", held-out {held - (floor or 0):+.3f}" if held is not None else "")
            + f"  lr {schedules(run.step - 1, run.recipe)['lr']:.1e}  {rate:,.0f} tokens/s  {left:.0f} s left")
    if live and held is None:
        live(line)
    elif live or held is not None or run.step == 1:
        say(("\r\033[K" if live else "") + line)


def demo():
    """A run of four steps, stopped in the middle and resumed: the same bytes as the run that was never stopped."""
    recipe = Recipe(model="micro", steps=4, batch=2, length=24, corpus_bytes=10_000, vocab_size=300, warmup=1, decay=2, gamma_off=1, log_every=1,
                    evaluate_every=4, save_every=2, evaluation_stories=2)
    quiet = lambda line: None
    with tempfile.TemporaryDirectory() as parent:
        whole, cut = begin(Path(parent, "whole"), recipe), begin(Path(parent, "cut"), recipe)
        train(whole, say=quiet, workers=1)
        train(cut, say=quiet, workers=1, stop_at=3)
        train(resume(Path(parent, "cut"), recipe), say=quiet, workers=2)
        files = sorted(path.name for path in Path(parent, "whole").iterdir())
        same = [Path(parent, "whole", name).read_bytes() == Path(parent, "cut", name).read_bytes() for name in (NAME, "log.csv")]
        print("shapes    a run's folder:", *files)
        print("log      ", *Path(parent, "cut", "log.csv").read_text().splitlines()[:2], sep="\n          ")
    print(f"claim     stopped at step 3 and resumed with other workers: checkpoint and log are the same bytes: {all(same)}")
    assert all(same)


if __name__ == "__main__":
    from minideepseek.training.pretrain import demo  # the imported copy, so that every name exists once
    demo()
