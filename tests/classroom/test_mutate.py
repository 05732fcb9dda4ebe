import ast

import pytest

from minideepseek.classroom.mutate import mutants
from tests.house import read

ALL = """def f(x, y, *, axis=0):
    '''Words.'''
    if x is None:
        raise ValueError(f"{x} - {y}")
    total = np.sum(x @ y.T, axis=-1) - 2 * x
    total[0] += y
    note(x)
    low, high = (x, y) if axis else (y, x)
    return -total, g(low, high, gemm=1)
"""


def described(source, name="f"):
    return [what.split(": ", 1)[1] for what in mutants(source, name)]


@pytest.mark.parametrize("what", [
    "x is None -> ((x) is not (None))  in  if x is None:",
    "raise ValueError(f'{x} - {y}') -> pass  in  raise ValueError(f'{x} - {y}')",
    "np.sum -> (np).mean  in  total = np.sum(x @ y.T, axis=-1) - 2 * x",
    "-1 -> 0  in  total = np.sum(x @ y.T, axis=-1) - 2 * x",
    "np.sum(x @ y.T, axis=-1) -> np.sum(x @ y.T)  in  total = np.sum(x @ y.T, axis=-1) - 2 * x",
    "x @ y.T -> ((y.T) @ (x))  in  total = np.sum(x @ y.T, axis=-1) - 2 * x",
    "y.T -> (y)  in  total = np.sum(x @ y.T, axis=-1) - 2 * x",
    "2 -> 3  in  total = np.sum(x @ y.T, axis=-1) - 2 * x",
    "total[0] += y -> pass  in  total[0] += y",
    "y -> x  in  total[0] += y",
    "note(x) -> pass  in  note(x)",
    "(x, y) if axis else (y, x) -> ((x, y))  in  low, high = (x, y) if axis else (y, x)",
    "-total -> (total)  in  return (-total, g(low, high, gemm=1))",
    "g(low, high, gemm=1) -> g(high, low, gemm=1)  in  return (-total, g(low, high, gemm=1))",
    "(-total, g(low, high, gemm=1)) -> (g(low, high, gemm=1), -total)  in  return (-total, g(low, high, gemm=1))",
])
def test_every_kind_of_mistake_is_made(what):
    assert what in described(ALL)


def test_nothing_else_is_touched():
    made = described(ALL)
    assert not any("ValueError" in what and "-> pass" not in what for what in made), "what an error says is no mistake"
    assert "g(low, high, gemm=1) -> g(low, high)  in  return (-total, g(low, high, gemm=1))" not in made
    assert not any(what.startswith("Words") for what in made)


@pytest.mark.parametrize("file, name", [("minideepseek/autograd/tape.py", "Tape.backward"), ("minideepseek/attention/mla.py", "mla_forward"),
                                        ("minideepseek/moe/router.py", "choose")])
def test_a_mutant_is_python_and_differs_in_that_function_alone(file, name):
    source = read(file)
    made = mutants(source, name)
    whole = ast.dump(ast.parse(source))
    trees = [ast.parse(text) for text in made.values()]
    assert len(made) > 30 and all(ast.dump(tree) != whole for tree in trees)
    for tree in trees[::10]:
        changed = [a for a, b in zip(tree.body, ast.parse(source).body, strict=True) if ast.dump(a) != ast.dump(b)]
        assert [node.name for node in changed] == [name.split(".")[0]]


def test_both_places_of_one_name_in_a_line():
    assert described("def f(a, b):\n    return b * b\n").count("b -> a  in  return b * b") == 2


def test_letters_of_more_than_one_byte():
    (text,) = [text for what, text in mutants('def f(a, b):\n    c = "ä" + a; return a - b\n', "f").items() if "a - b -> ((a) + (b))" in what]
    assert text == 'def f(a, b):\n    c = "ä" + a; return ((a) + (b))\n'
