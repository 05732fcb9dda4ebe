"""The command line: python -m minideepseek blank | check | parity."""
import argparse
import sys

from minideepseek.classroom.blank import ExerciseError, blank
from minideepseek.classroom.check import check_all, check_file
from minideepseek.interop import parity
from minideepseek.interop.safetensors import CheckpointError

FIRST_COMMANDS = """\
minideepseek: DeepSeek-V3 in plain NumPy, every backward pass by hand. Three commands to begin with:

  python -m minideepseek check            the gradient table: every component against finite differences
  python -m minideepseek blank rmsnorm    your first exercise: rmsnorm without its backward
  python -m minideepseek check FILE       check what you wrote
"""


def main(argv=None):
    """Run one command; return its exit code: 0 right, 1 wrong, 2 a command or file that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m minideepseek")
    commands = parser.add_subparsers(dest="command")
    blank_parser = commands.add_parser("blank", help="write a copy of a component with a function left to you")
    blank_parser.add_argument("file", help="rmsnorm, basics/rmsnorm or a path")
    blank_parser.add_argument("function", nargs="?", help="rmsnorm_forward or rmsnorm_backward; default: every backward")
    blank_parser.add_argument("--out", help="where to write it; default: <name>_exercise.py here")
    check_parser = commands.add_parser("check", help="check a component or an exercise; without a file, all components")
    check_parser.add_argument("file", nargs="?")
    check_parser.add_argument("--seeds", type=int, default=3, help="how many random draws of every case, for the table of all components")
    parity_parser = commands.add_parser("parity", help="compare checkpoint folders with the golden.npz in each")
    parity_parser.add_argument("folder", nargs="+")
    parity_parser.add_argument("--every", action="store_true", help="a line for every comparison")
    options = parser.parse_args(argv)
    try:
        if options.command == "blank":
            out, functions = blank(options.file, options.function, options.out)
            print(f"{out}: write {' and '.join(functions)}, then run: python -m minideepseek check {out}")
        elif options.command == "check":
            return check_file(options.file) if options.file else check_all(range(options.seeds))
        elif options.command == "parity":
            return parity.report(options.folder, every=options.every)
        else:
            print(FIRST_COMMANDS, end="")
    except (ExerciseError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
