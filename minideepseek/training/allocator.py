"""Memory that is given back and fetched again costs more than the arithmetic on it: one setting that keeps it.

Derivation: whiteboard/training/allocator.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import ctypes
import time

import numpy as np

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4        # of glibc's mallopt


def keep_freed_memory():
    """Tell glibc to keep freed memory in the process instead of unmapping it; True when it listened.

    A training step frees and takes the same arrays again and again. By default a large one goes back to the system and
    its pages are zeroed and mapped anew every time. Elsewhere than on glibc nothing happens: False.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return mallopt(M_MMAP_MAX, 0) == 1 and mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1) == 1


def touch(n_bytes, times=20):
    """Seconds to allocate, fill and free an array of n_bytes, in the median."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        np.ones(n_bytes, np.uint8)
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[times // 2]


def demo():
    """A fresh array of 32 MB, before and after."""
    before = touch(2 ** 25)
    listened = keep_freed_memory()
    touch(2 ** 25, 3)
    after = touch(2 ** 25)
    print(f"shapes    an array of {2 ** 25:,} bytes, filled with ones")
    print(f"by hand   {before * 1e3:.2f} ms before, {after * 1e3:.2f} ms after, {before / after:.1f} times faster")
    print(f"claim     glibc listened: {listened}" + ("" if listened else " (there is no glibc here: nothing changes)"))
    assert not listened or after < 2 * before


if __name__ == "__main__":
    from minideepseek.training.allocator import demo  # the imported copy, so that every name exists once
    demo()
