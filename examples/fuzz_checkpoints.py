"""Fuzz the doors: spoil a valid checkpoint file and a valid config.json in 100,000 ways and see what the readers say.

    python examples/fuzz_checkpoints.py [--files 100000] [--seed 0]

Every spoilt file must be read or refused with CheckpointError: any other error is a fault, and so is a file we accept
and the public `safetensors` library refuses (compared when it is installed). Peak memory is printed and bounded.
"""
if not __package__:  # run as a script: take the package from this repository
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../..")]

import argparse
import copy
import json
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from minideepseek.interop.public_config import read_blocks, read_config, write_config
from minideepseek.interop.safetensors import DTYPES, CheckpointError, SafeTensors
from minideepseek.model.config import Config

MOST_MEMORY = 400        # megabytes at the peak, everything imported
PIECES = ["-1", "0", "1", "3", "18446744073709551615", "18446744073709551616", "9223372036854775807", "1e3", "1.0", "-0", "NaN", "null", "true", "[]",
          "{}", '""', '"a"', "[0,8]", "[8,0]", '"F32"', '"F8_E4M3"', '"\\ud800"', "\x00", "\u2028", " ", "\n", ",", ":", "[", "]", "{", "}", '"']
VALUES = [None, True, -1, 0, 1, 2, 3, 7, 10 ** 9, 2 ** 70, 0.5, -0.5, 1e308, "", "x", [], {}, [128, 128], {"type": "yarn"}, {"rope_type": "yarn", "factor": 0}]


def valid_file(rng):
    """A small valid file: header and data."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for k in range(rng.integers(1, 4)):
        dtype = list(DTYPES)[rng.integers(len(DTYPES))]
        shape = rng.integers(0, 4, rng.integers(0, 3)).tolist()
        size = int(np.prod(shape, dtype=int)) * np.dtype(DTYPES[dtype]).itemsize
        header[f"t{k}"] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return json.dumps(header), rng.bytes(end)


def spoilt_file(rng):
    """A valid file with one to three things wrong in it."""
    text, data = valid_file(rng)
    length = None
    for _ in range(rng.integers(1, 4)):
        kind, at = rng.integers(8), int(rng.integers(len(text) + 1))
        if kind == 0:
            text = text[:at] + PIECES[rng.integers(len(PIECES))] + text[at:]
        elif kind == 1:
            text = text[:at] + text[at + int(rng.integers(1, 6)):]
        elif kind == 2:
            text = text[:at] + chr(int(rng.integers(32, 127))) + text[at + 1:]
        elif kind == 3:
            numbers = [i for i, c in enumerate(text) if c.isdigit()] or [0]
            at = numbers[rng.integers(len(numbers))]
            text = text[:at] + PIECES[rng.integers(16)] + text[at + 1:]
        elif kind == 4:
            data = data[:-1] if rng.random() < 0.5 else data + b"\0"
        elif kind == 5:
            length = int(rng.choice([0, 1, len(text) - 1, len(text) + 1, 2 ** 31, 2 ** 62]))
        elif kind == 6:
            start, stop = sorted(rng.integers(0, len(text) + 1, 2))
            text += text[start:stop]
        else:
            text += " " * int(rng.integers(9))
    encoded = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.1 and encoded:
        at = rng.integers(len(encoded))
        encoded = encoded[:at] + bytes([rng.integers(256)]) + encoded[at + 1:]
    return (len(encoded) if length is None else max(length, 0)).to_bytes(8, "little") + encoded + data


def spoilt_config(rng):
    """A valid config.json with a few values, keys or characters changed."""
    public = write_config(Config())
    for _ in range(rng.integers(1, 4)):
        table = public["rope_parameters"] if rng.random() < 0.3 and isinstance(public.get("rope_parameters"), dict) else public
        key = list(table)[rng.integers(len(table))] if table else "x"
        if rng.random() < 0.2:
            table.pop(key, None)
        else:
            table[key] = copy.deepcopy(VALUES[rng.integers(len(VALUES))])
    text = json.dumps(public).encode()
    if rng.random() < 0.3:
        at = rng.integers(len(text))
        text = text[:at] + PIECES[rng.integers(len(PIECES))].encode("utf-8", "surrogatepass") + text[at + rng.integers(3):]
    return text


def read_all(path):
    """Open a file and look at every tensor in it."""
    for array in SafeTensors(path).values():
        array.tobytes()


def read_both(path):
    read_config(path)
    read_blocks(path)


def public_reader():
    """A function that raises what the public library raises, or None when it is not installed."""
    try:
        from safetensors import deserialize
    except ImportError:
        return None
    return deserialize


def peak_megabytes():
    """The most memory this process has had. On Linux not from getrusage, which counts the process that started this one."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024 ** 2)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=100_000, help="half of them checkpoints, half configurations")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, counts, faults, began = np.random.default_rng(options.seed), Counter(), [], time.time()
    deserialize = public_reader()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file")
        for number in range(options.files):
            kind, spoil, read = (("checkpoint", spoilt_file, read_all), ("config", spoilt_config, read_both))[number % 2]
            content = spoil(rng)
            path.write_bytes(content)
            try:
                read(path)
                verdict = "accepted"
            except CheckpointError:
                verdict = "refused"
            except Exception as error:
                verdict = "fault"
                faults.append(f"{kind} {number}: {type(error).__name__}: {error}\n    {content[:400]!r}")
            counts[kind, verdict] += 1
            if kind == "checkpoint" and verdict == "accepted" and deserialize is not None:
                try:
                    deserialize(content)
                except Exception as error:
                    faults.append(f"checkpoint {number}: accepted here, refused by the public library: {error}\n    {content[:400]!r}")
    peak = peak_megabytes()
    for (kind, verdict), n in sorted(counts.items()):
        print(f"{kind:12s} {verdict:9s} {n:7d}")
    print(f"compared with the public library: {'yes' if deserialize else 'no, not installed'}; peak memory {peak:.0f} MB; {time.time() - began:.0f} s")
    for fault in faults[:10]:
        print("FAULT", fault)
    print(f"claim: {len(faults)} faults in {options.files} files")
    return int(bool(faults) or peak > MOST_MEMORY)


if __name__ == "__main__":
    raise SystemExit(main())
