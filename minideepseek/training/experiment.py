"""Experiments: a table of runs that grows row by row, and goes on where it was cut off.

Derivation: whiteboard/training/experiment.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import csv
import io
import statistics
import tempfile
from pathlib import Path

from minideepseek.interop.safetensors import replacing


class ExperimentError(ValueError):
    """A table that belongs to another experiment; the message names the file."""


def table(path, columns, jobs, run, *, say=print):
    """The rows of a CSV file, after `run(*job)` for every job that has none yet.

    columns: names; the first ones, as many as a job has parts, say which job a row is of   jobs: tuples of strings and numbers
    run: (*job) -> the other values of its row, in the order of columns; floats are written with four digits after the point
    Returns the rows of these jobs, in their order, each a dictionary of strings.

    A row is in the file as soon as its run ends: who is cut off loses the run under way and nothing else.
    Raises ExperimentError when the file has other columns; it is left as it is.
    """
    rows = _read(path, columns)
    found = []
    for job in jobs:
        key = [str(part) for part in job]
        row = next((row for row in rows if row[:len(key)] == key), None)
        if row is None:
            row = key + [f"{value:.4f}" if isinstance(value, float) else str(value) for value in run(*job)]
            if len(row) != len(columns):
                raise ExperimentError(f"the run of {', '.join(key)} gave {len(row) - len(key)} values, expected {len(columns) - len(key)}")
            rows.append(row)
            _write(path, [columns, *rows])
            say(", ".join(f"{name} {value}" for name, value in zip(columns, row)))
        found.append(dict(zip(columns, row)))
    return found


def put(path, key, rows):
    """Put rows that begin with the parts of `key` into a CSV file without a header line, in place of those that begin so already.

    For what a run leaves beside its row of the table, such as its steps: a run that was cut off may have left some of it.
    """
    key = [str(part) for part in key]
    others = [line for line in _lines(path) if line[:len(key)] != key]
    _write(path, [*others, *[[*key, *row] for row in rows]])


def spread(rows, column):
    """'0.171 (0.162 to 0.176)': the median over some rows, and their range, with three digits after the point."""
    values = [float(row[column]) for row in rows]
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _read(path, columns):
    """The rows of a table, each a list of strings; none when there is no file yet."""
    if not Path(path).exists():
        return []
    lines = _lines(path)
    if lines[:1] != [list(columns)] or any(len(line) != len(columns) for line in lines):
        raise ExperimentError(f"{path} is another table: its first line is {lines[:1]}, expected the columns {list(columns)}, and as many values in each row")
    return lines[1:]


def _lines(path):
    """All lines of a CSV file, none of one that is not there."""
    if not Path(path).exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def _write(path, lines):
    """All of it anew, in place of what stood there: a row is never half written."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def demo():
    """Squares and cubes, cut off in the middle."""
    made = []

    def run(base, power):
        if len(made) == 3:
            raise KeyboardInterrupt                         # the machine stops in the fourth run
        made.append((base, power))
        return [base**power]

    jobs = [(base, power) for base in (2, 3) for power in (2, 3)]
    quiet = lambda line: None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "powers.csv")
        try:
            table(path, ("base", "power", "value"), jobs, run, say=quiet)
        except KeyboardInterrupt:
            print("cut off  ", *path.read_text().splitlines())
        first, made = made, []
        rows = table(path, ("base", "power", "value"), jobs, run, say=quiet)
        print("gone on  ", *path.read_text().splitlines())
    print("spread   ", spread(rows, "value"))
    print(f"claim     {len(first)} runs before, {len(made)} after, none twice: {len(rows)} rows")
    assert len(first) == 3 and made == [(3, 3)] and [row["value"] for row in rows] == ["4", "8", "9", "27"]


if __name__ == "__main__":
    from minideepseek.training.experiment import demo  # the imported copy, so that every name exists once
    demo()
