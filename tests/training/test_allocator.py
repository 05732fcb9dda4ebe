import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from minideepseek.training import allocator
from minideepseek.training.allocator import keep_freed_memory, touch
from tests.house import ROOT


class Library:
    """A C library that writes down what it is asked and says what it is told to."""

    def __init__(self, *answers):
        self.asked, self.answers = [], list(answers)

    def mallopt(self, parameter, value):
        self.asked.append((parameter, value))
        return self.answers.pop(0)


@pytest.mark.parametrize("answers, listened", [((1, 1), True), ((0,), False), ((1, 0), False)])
def test_true_means_that_both_settings_were_taken(monkeypatch, answers, listened):
    library = Library(*answers)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert keep_freed_memory() is listened
    assert library.asked == [(-4, 0), (-1, 2 ** 31 - 1)][:len(answers)]    # M_MMAP_MAX: map nothing; M_TRIM_THRESHOLD: an int's largest


def no_library(name):
    raise OSError(f"{name}: cannot open shared object file")


@pytest.mark.parametrize("load", [no_library, lambda name: object()], ids=["no glibc", "a library without mallopt"])
def test_elsewhere_nothing_happens(monkeypatch, load):
    monkeypatch.setattr(ctypes, "CDLL", load)
    assert keep_freed_memory() is False


PROBE = """
import resource
import numpy as np
from minideepseek.training.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2 ** 25, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

rng = np.random.default_rng(0)
old = rng.standard_normal(300_000)                # made before: it lives in a mapping of its own
total, product = old.sum(), (old.reshape(300, 1000) @ old.reshape(1000, 300))
before = [faults(), faults()]
first, second = keep_freed_memory(), keep_freed_memory()
faults()
after = [faults(), faults()]
assert old.sum() == total and np.array_equal(old.reshape(300, 1000) @ old.reshape(1000, 300), product)
del old                                           # freed after the setting was changed
assert np.array_equal(np.random.default_rng(0).standard_normal(300_000).sum(), total)
print(type(first).__name__, first, second, *before, *after)
"""


def test_the_real_one_keeps_memory_and_does_no_harm():
    """In a process of its own: twice is fine, arrays and results stay, and what was freed is not mapped anew."""
    pytest.importorskip("resource")
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OPENBLAS_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    kind, first, second, *faults = done.stdout.split()
    assert kind == "bool" and first == second
    if first == "True":
        before, after = [int(n) for n in faults[:2]], [int(n) for n in faults[2:]]
        assert min(before) >= 8 and max(after) <= min(before) // 4, f"page faults before {before}, after {after}"


def test_touch_is_a_time(monkeypatch):
    assert 0 < touch(1_000, times=3) < 1
    clock = iter([0, 5, 10, 11, 20, 22])                                 # three rounds: 5, 1 and 2 seconds
    monkeypatch.setattr(allocator, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert touch(8, times=3) == 2                                        # the one in the middle
