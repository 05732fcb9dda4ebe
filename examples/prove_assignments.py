"""Prove all eight assignments with all their mutants, and print what was measured.

    python examples/prove_assignments.py [--mutants N] [NAME ...]

For each: the points of the solution, those of the release as students get it, and how many mutants of the solution lose
points. With --mutants only so many, drawn at random. Two assignments at a time; about half a minute in all.
"""
if not __package__:  # run as a script: take the package from this repository
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../..")]

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

from minideepseek.classroom.assign import prove
from minideepseek.classroom.assignments import ASSIGNMENTS, assignment
from minideepseek.classroom.release import AssignmentError, release


def measure(name, sample):
    """-> (seconds, functions and pages cut, the Proof, or the words of the error)."""
    began = time.perf_counter()
    one = assignment(name)
    texts, cut = release(one)
    try:
        proof = prove(one, texts, sample=sample)
    except AssignmentError as error:
        proof = str(error)
    return time.perf_counter() - began, len(cut), proof


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ASSIGNMENTS)}; default: all")
    parser.add_argument("--mutants", type=int, help="how many of each; default: all")
    options = parser.parse_args()
    names = options.names or list(ASSIGNMENTS)
    print("assignment   solution  untouched  mutants losing points  equivalent  also cut  seconds")
    failed = made = lost = excused = 0
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        for name, (seconds, cut, proof) in zip(names, pool.map(measure, names, [options.mutants] * len(names))):
            if isinstance(proof, str):
                failed += 1
                print(f"{name:12s} {proof}")
            else:
                made, lost, excused = made + proof.mutants, lost + proof.lost, excused + len(proof.equivalent)
                print(f"{name:12s} {proof.solution:8g} {proof.stub:10g} {proof.lost:13d} / {proof.mutants:<7d} {len(proof.equivalent):9d} {cut:9d} {seconds:8.1f}")
    print(f"claim: {lost} of {made} mutants lose points, {excused} are listed as equivalent, {failed} of {len(names)} assignments fail")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
