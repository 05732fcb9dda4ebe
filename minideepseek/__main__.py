"""The command line: python -m minideepseek train | generate | export | parity | check | trace | blank | assign | grade."""
import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")   # before NumPy comes: the pieces of a batch run side by side instead

import argparse
import dataclasses
import itertools
import shutil
import sys
import time
from pathlib import Path

from minideepseek.autograd.stop import UnknownName
from minideepseek.classroom.assign import assign
from minideepseek.classroom.assignments import ASSIGNMENTS
from minideepseek.classroom.blank import ExerciseError, blank
from minideepseek.classroom.check import check_all, check_assignment, check_file
from minideepseek.classroom.grade import SECONDS, grade_submission
from minideepseek.debug.equations import trace
from minideepseek.interop import huggingface, parity
from minideepseek.interop.safetensors import CheckpointError
from minideepseek.model.config import ATTENTION
from minideepseek.model.speculative import speculation_report
from minideepseek.tokenizer.bpe import TokenizerError
from minideepseek.training import pretrain
from minideepseek.training.data import DataError
from minideepseek.training.recipe import PRECISIONS, RECIPES, RecipeError, recipe
from minideepseek.training.step import TrainingError

FIRST_COMMANDS = """\
minideepseek: DeepSeek-V3 in plain NumPy, every backward pass by hand. Three commands to begin with:

  python -m minideepseek train            train a small model in a few minutes, and watch it learn
  python -m minideepseek generate RUN     what it tells now; RUN is the folder that train named
  python -m minideepseek check            the gradient table: every component against finite differences
"""
WRONG_INPUT = (UnknownName, ExerciseError, CheckpointError, TokenizerError, DataError, RecipeError, pretrain.RunError, OSError)


def main(argv=None):
    """Run one command; return its exit code: 0 right, 1 wrong, 2 a command, file or option that cannot be used."""
    options = _parser().parse_args(argv)
    if options.command is None:
        print(FIRST_COMMANDS, end="")
        return 0
    try:
        return options.run(options)
    except WRONG_INPUT as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"training stopped: {error}; the last checkpoint stands", file=sys.stderr)
        return 1


def _parser():
    parser = argparse.ArgumentParser(prog="python -m minideepseek")
    commands = parser.add_subparsers(dest="command")

    def command(name, run, help):
        one = commands.add_parser(name, help=help)
        one.set_defaults(run=run)
        return one

    one = command("train", _train, "train a model from text")
    one.add_argument("--preset", help=f"{', '.join(RECIPES)}; default: tiny")
    one.add_argument("--attention", choices=ATTENTION, help="mla is DeepSeek's; mha, gqa and mqa are the baselines below it")
    one.add_argument("--precision", choices=PRECISIONS, help="of the products of linear layers; fp8 as V3 does it, simulated; default: fp32")
    one.add_argument("--text", help="a UTF-8 text file; default: stories of the town, whose entropy is known")
    one.add_argument("--steps", type=int, help="how many steps, instead of the preset's")
    one.add_argument("--seed", type=int, help="default: 0")
    one.add_argument("--out", help="a new folder for the run; default: runs/<preset>-0 or the next number")
    one.add_argument("--resume", metavar="RUN", help="go on with a run that was stopped")
    one.add_argument("--workers", type=_positive, help="pieces of a batch at the same time; default: one for each core")

    one = command("generate", _generate, "what a trained model tells")
    one.add_argument("folder", metavar="RUN")
    one.add_argument("--prompt", default="", help="how the text begins")
    one.add_argument("--temperature", type=float, default=1.0, help="0: always the most likely token")
    one.add_argument("--top-k", type=int)
    one.add_argument("--top-p", type=float)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--max-new-tokens", type=int, default=300)
    one.add_argument("--speculative", type=_positive, nargs="?", const=1, default=0, metavar="DEPTH",
                     help="the prediction modules draft DEPTH tokens at a time (default: 1), and the model judges them in one forward")

    one = command("export", _export, "write a run in the public checkpoint layout")
    one.add_argument("folder", metavar="RUN")
    one.add_argument("out", metavar="FOLDER", help="a new folder")
    one.add_argument("--fp8", action="store_true", help="matrices as float8_e4m3fn with a scale per block")

    one = command("parity", lambda o: parity.report(o.folder, every=o.every), "compare checkpoint folders with the golden.npz in each")
    one.add_argument("folder", nargs="+")
    one.add_argument("--every", action="store_true", help="a line for every comparison")

    one = command("check", _check, "check a component, an exercise, or an assignment by its name; without one, all components")
    one.add_argument("file", nargs="?", help="rmsnorm, a path, or an assignment such as 2-norms")
    one.add_argument("--pdb", action="store_true", help="of an assignment: stop in the debugger at the first fault")
    one.add_argument("--seeds", type=int, default=3, help="how many random draws of every case, for the table of all components")

    one = command("trace", lambda o: trace(o.name, markdown=o.markdown), "every equation of a component, in numbers")
    one.add_argument("name", help="attention.mla, or mla")
    one.add_argument("--markdown", action="store_true", help="as a table for a whiteboard page")

    one = command("blank", _blank, "write a copy of a component with a function left to you")
    one.add_argument("file", help="rmsnorm, basics/rmsnorm or a path")
    one.add_argument("function", nargs="?", help="rmsnorm_forward or rmsnorm_backward; default: every backward")
    one.add_argument("--out", help="where to write it; default: <name>_exercise.py here")

    one = command("assign", lambda o: assign(o.name, o.out) and 0, "write an assignment: what students get, the solution, an autograder; and prove it")
    one.add_argument("name", help=", ".join(ASSIGNMENTS))
    one.add_argument("--out", required=True, metavar="DIR", help="a new folder")

    one = command("grade", lambda o: grade_submission(o.submission, o.assignment, o.results, seconds=o.seconds), "grade a submission in a sandbox")
    one.add_argument("submission", help="the folder that was handed in")
    one.add_argument("--assignment", required=True, metavar="NAME", help=", ".join(ASSIGNMENTS))
    one.add_argument("--seconds", type=float, default=SECONDS, help=f"wall clock of each task; default: {SECONDS}")
    one.add_argument("--results", default="results.json", metavar="FILE", help="as Gradescope reads it; default: results.json here")
    return parser


def _check(options):
    if options.file in ASSIGNMENTS:
        return check_assignment(options.file, debug=options.pdb)
    return check_file(options.file) if options.file else check_all(range(options.seeds))


def _positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def _train(options):
    if options.resume:
        others = [f"--{name}" for name in ("preset", "attention", "precision", "text", "steps", "seed", "out") if getattr(options, name) is not None]
        if others:
            raise pretrain.RunError(f"--resume goes on with what the run was begun with: leave out {', '.join(others)}")
        run = pretrain.resume(options.resume)
    else:
        name = options.preset or "tiny"
        chosen = dataclasses.replace(recipe(name), seed=options.seed or 0, attention=options.attention or "mla", precision=options.precision or "fp32")
        if options.steps is not None:
            if options.steps < 1:
                raise RecipeError(f"steps = {options.steps} must be positive")
            chosen = chosen.with_steps(options.steps)
        print("preparing the text and its tokenizer", flush=True)
        run = pretrain.begin(options.out or _next_folder(name), chosen, text=options.text)
    live = (lambda line: print(f"\r\033[K{line}", end="", flush=True)) if sys.stdout.isatty() else None
    floor = run.data.floor
    print(f"{run.folder}: {len(run.data.ids):,} tokens, {run.recipe.steps} steps" + (f", floor {floor:.3f} bits per byte" if floor else ""), flush=True)
    if pretrain.train(run, live=live, workers=options.workers, say=lambda line: print(line, flush=True)):
        print(f"done. python -m minideepseek generate {run.folder}")
    return 0


def _next_folder(name):
    """runs/tiny-0, or the first number that is free."""
    return next(path for path in (Path("runs", f"{name}-{n}") for n in itertools.count()) if not path.exists())


def _generate(options):
    config, weights, tokenizer = pretrain.load_run(options.folder)
    rounds, began = [], time.perf_counter()
    try:
        pieces = pretrain.story(weights, config, tokenizer, prompt=options.prompt, temperature=options.temperature, top_k=options.top_k,
                                top_p=options.top_p, seed=options.seed, max_new_tokens=options.max_new_tokens,
                                depth=options.speculative, watch=rounds.append)
        print(options.prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print()
    if rounds:
        print(f"\n{speculation_report(rounds)}, {sum(len(one.tokens) for one in rounds) / (time.perf_counter() - began):.0f} tokens/s")
    return 0


def _export(options):
    config, weights, _ = pretrain.load_run(options.folder)
    huggingface.save(options.out, config, weights, fp8=options.fp8)
    shutil.copy(Path(options.folder, "tokenizer.json"), options.out)
    print(f"{options.out}: config.json, model.safetensors, tokenizer.json")
    return 0


def _blank(options):
    out, functions = blank(options.file, options.function, options.out)
    print(f"{out}: write {' and '.join(functions)}, then run: python -m minideepseek check {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
