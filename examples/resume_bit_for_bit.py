"""Stop a run at twenty random steps, go on in another process, and compare every byte with the run that was never stopped.

    python examples/resume_bit_for_bit.py [--stops 20] [--steps 40] [--seed 0]

The run is small, but has everything: experts, a prediction module, biases that move, samples, evaluations. Each half is a
process of its own: other hash seeds, other addresses, and one or two workers by turns. Compared are the checkpoint
(weights, biases, both moments, in float32), the log and every sample.
"""
import os
import sys

sys.path[0:1] = [os.path.abspath(__file__ + "/../..")]   # run as a script: take the package from this repository
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")       # before NumPy comes: the pieces of a batch run side by side instead

import argparse
import random
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from minideepseek.autograd import params
from minideepseek.training import pretrain
from minideepseek.training.checkpoint import NAME
from minideepseek.training.recipe import Recipe


def small(steps):
    """A recipe whose schedules all change on the way."""
    return Recipe(model="micro", steps=steps, batch=4, length=24, corpus_bytes=20_000, vocab_size=300, warmup=max(steps // 8, 1), decay=steps // 2,
                  gamma_off=steps // 8, log_every=1, evaluate_every=max(steps // 3, 1), save_every=max(steps // 5, 1), evaluation_stories=4)


def train_in_a_process(folder, *, stop_at, workers, hash_seed):
    """Resume a run in a new process, up to a step."""
    command = [sys.executable, __file__, "--go-on", str(folder), "--stop-at", str(stop_at), "--workers", str(workers)]
    done = subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": str(hash_seed)}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the run in {folder} broke off:\n{done.stderr}")


def differing(one, other):
    """The files in which two runs differ."""
    names = [NAME, "log.csv", *sorted(str(path.relative_to(one)) for path in (one / "samples").iterdir())]
    return [name for name in names if not (other / name).exists() or (one / name).read_bytes() != (other / name).read_bytes()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stops", type=int, default=20, help="how many runs are stopped, each at a step of its own while there are enough")
    parser.add_argument("--steps", type=int, default=40, help="of the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--go-on", help=argparse.SUPPRESS)
    parser.add_argument("--stop-at", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.go_on:
        pretrain.draw_curves = lambda folder: None              # a picture is not compared
        pretrain.train(pretrain.resume(options.go_on), say=lambda line: None, workers=options.workers, stop_at=options.stop_at)
        return 0
    rng, began, same = random.Random(options.seed), time.time(), 0
    steps = options.steps
    stops = [step for _ in range(options.stops // (steps - 1) + 1) for step in rng.sample(range(1, steps), steps - 1)][:options.stops]
    with tempfile.TemporaryDirectory() as parent:
        fresh, whole = Path(parent, "fresh"), Path(parent, "whole")
        run = pretrain.begin(fresh, small(steps))
        shutil.copytree(fresh, whole)
        train_in_a_process(whole, stop_at=steps, workers=1, hash_seed=0)
        n_bytes = sum((whole / name).stat().st_size for name in [NAME, "log.csv"])
        print(f"{params.count(run.weights):,} weights and biases, {steps} steps; the run that was never stopped: {n_bytes:,} bytes of checkpoint and log")
        print("stopped at   workers before, after   checkpoint, log, samples")
        for number, stop in enumerate(sorted(stops)):
            cut = shutil.copytree(fresh, Path(parent, f"cut{number}"))
            workers = rng.choice([1, 2]), rng.choice([1, 2])
            train_in_a_process(cut, stop_at=stop, workers=workers[0], hash_seed=rng.randrange(2 ** 32))
            train_in_a_process(cut, stop_at=steps, workers=workers[1], hash_seed=rng.randrange(2 ** 32))
            wrong = differing(whole, cut)
            same += not wrong
            print(f"{stop:10d}   {workers[0]:14d}, {workers[1]:5d}   {'the same bytes' if not wrong else 'OTHER BYTES in ' + ', '.join(wrong)}", flush=True)
            shutil.rmtree(cut)
    print(f"{time.time() - began:.0f} s")
    print(f"claim: {same} of {len(stops)} runs end in the same bytes as the run that was never stopped")
    return int(same != len(stops))


if __name__ == "__main__":
    raise SystemExit(main())
