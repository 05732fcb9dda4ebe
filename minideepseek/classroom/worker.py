"""The worker: answers the judge's questions with a student's functions. Arrays in, arrays out; nothing else comes back.

Derivation: whiteboard/classroom/worker.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import base64
import importlib
import json
import os
import traceback

import numpy as np

PARTS = ("forward", "slopes", "backward")     # the forwards first: a backward that hangs must not cost them
DTYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64")
MOST_NUMBERS = 200_000                        # in one array of an answer


def main(ask, reply):
    """Read the questions from one descriptor, write each answer to the other as soon as it is there: a line of JSON.

    Left in place of the questions is how well this process is shut in; that descriptor is closed before a student's first line.
    """
    with os.fdopen(ask, "r+") as asked:
        questions = unpack(json.load(asked))
        asked.seek(0)
        asked.truncate()
        json.dump({"files": os.getcwd() == "/", "network": os.getpid() == 1}, asked)
    with os.fdopen(reply, "w") as out:
        for part, number, result in answers(questions):
            print(json.dumps([part, number, pack(result)]), file=out, flush=True)


def answers(questions):
    """Yield (part, number of the question, result): a list of arrays, for "slopes" a list of such lists, or words for what was raised."""
    for part in PARTS:
        for number, question in enumerate(questions):
            if part == "forward" or question["dy"]:
                try:
                    yield part, number, answer(question, part)
                except (KeyboardInterrupt, GeneratorExit):
                    raise
                except BaseException as error:     # a student's sys.exit() is an answer too
                    yield part, number, words(error)


def answer(question, part):
    """One part of a question: {module, name, args, config, dy, moved}.

    dy: of every floating output of a component, or None for a plain function   moved: its args, a little to the side
    Arrays come read-only from the judge, so a function that writes into its arguments raises.
    """
    module, args, config, dy = importlib.import_module(question["module"]), question["args"], question["config"], question["dy"]
    if dy is None:
        return arrays(getattr(module, question["name"])(*args, **config))
    forward, backward = [getattr(module, f"{question['name']}_{half}") for half in ("forward", "backward")]
    if part == "slopes":
        return [arrays(_pair(forward(*moved, **config))[0]) for moved in question["moved"]]
    y, cache = _pair(forward(*args, **config))
    return arrays(y if part == "forward" else backward(dy[0] if len(dy) == 1 else tuple(dy), cache))


def _pair(returned):
    if not (isinstance(returned, tuple) and len(returned) == 2):
        raise TypeError(f"the forward must return (output, cache), it returned {type(returned).__name__}")
    return returned


def arrays(value):
    """One result, or a tuple of them, as a list of arrays of numbers; None stays. Raises TypeError for anything else."""
    found = []
    for part in value if isinstance(value, tuple) else (value,):
        if part is not None and not isinstance(part, (np.ndarray, np.generic, bool, int, float)):
            raise TypeError(f"it returned an object of type {type(part).__name__}, expected an array")
        part = part if part is None else np.array(part, subok=False)
        if part is not None and (part.dtype.name not in DTYPES or part.size > MOST_NUMBERS):
            raise TypeError(f"it returned {part.size} entries of dtype {part.dtype}, expected at most {MOST_NUMBERS} numbers")
        found.append(part)
    return found


def words(error):
    """'ValueError: what it says (rmsnorm.py:25: the line)'; an error of the package's own goes by the name of Python's below it."""
    kind = next(base.__name__ for base in type(error).__mro__ if base.__module__ == "builtins")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "minideepseek/" in frame.filename and "/classroom/" not in frame.filename]
    at = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno}: {frames[-1].line})" if frames and not isinstance(error, NotImplementedError) else ""
    return f"{kind}: {str(error)[:400]}{at[:200]}"


def pack(value):
    """Arrays, and what holds them, as JSON: an array is its dtype, shape and bytes. Nothing in it can run when it is read."""
    if isinstance(value, np.ndarray):
        return {"dtype": value.dtype.name, "shape": value.shape, "bytes": base64.b64encode(np.ndarray.tobytes(value)).decode()}
    if isinstance(value, dict):
        return {key: pack(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [pack(part) for part in value]
    return value.item() if isinstance(value, np.generic) else value


def unpack(value):
    """What `pack` packed; tuples come back as lists, arrays read-only. Raises ValueError for another dtype, or bytes that do not fit."""
    if isinstance(value, list):
        return [unpack(part) for part in value]
    if not isinstance(value, dict) or "bytes" not in value:
        return {key: unpack(part) for key, part in value.items()} if isinstance(value, dict) else value
    if value["dtype"] not in DTYPES:
        raise ValueError(f"dtype {value['dtype']!r:.40}: an array of numbers has one of {', '.join(DTYPES)}")
    return np.frombuffer(base64.b64decode(value["bytes"]), value["dtype"]).reshape(value["shape"])


def demo():
    """One question, its answers, and the way of an array to the judge and back."""
    x = np.array([[3.0, 4.0]])
    question = {"module": "minideepseek.basics.residual", "name": "add", "args": [x, -x], "config": {}, "dy": [x], "moved": [[x + 1, -x]]}
    for part, _, result in answers([question, question | {"args": [x]}]):
        print(f"{part:9s} {result}")
    text = json.dumps(pack(x))
    print(f"claim     {text} is the array again: {(unpack(json.loads(text)) == x).all()}")
    assert (unpack(json.loads(text)) == x).all()


if __name__ == "__main__":
    from minideepseek.classroom.worker import demo  # the imported copy, so that every name exists once
    demo()
