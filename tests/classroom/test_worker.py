import json
import os
import sys

import numpy as np
import pytest

from minideepseek.classroom.worker import DTYPES, MOST_NUMBERS, answers, arrays, main, pack, unpack, words


def way(value):
    return unpack(json.loads(json.dumps(pack(value))))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_an_array_arrives_bit_for_bit_and_read_only(dtype, shape):
    x = np.arange(6)[:int(np.prod(shape))].reshape(shape).astype(dtype)
    y = way(x)
    assert (y.dtype, y.shape, y.tobytes()) == (x.dtype, x.shape, x.tobytes())
    with pytest.raises(ValueError, match="read-only"):
        y[...] = 1


def test_nan_inf_and_turned_arrays_arrive():
    x = np.array([[np.nan, -np.inf], [-0.0, 5e-324]]).T
    assert way(x).tobytes() == x.tobytes()


def test_what_holds_arrays_arrives():
    value = {"args": [np.arange(3), None, 2.5], "config": {"way": "kept", "flag": True, "block": (1, 2), "number": np.float64(2)}}
    back = way(value)
    assert (back["args"][0] == [0, 1, 2]).all() and back["args"][1:] == [None, 2.5]
    assert back["config"] == {"way": "kept", "flag": True, "block": [1, 2], "number": 2.0}


@pytest.mark.parametrize("dtype, shape, data", [("object", [1], "AAAAAAAAAAA="), ("float64", [2], "AAAAAAAAAAA="), ("float64", [1], "A"), ("V8", [1], "AAAAAAAAAAA="),
                                                ("datetime64[s]", [1], "AAAAAAAAAAA=")])
def test_other_bytes_are_refused(dtype, shape, data):
    with pytest.raises(ValueError):
        unpack({"dtype": dtype, "shape": shape, "bytes": data})


class Equal:
    def __eq__(self, other):
        return True


class Loud(np.ndarray):
    tobytes = __eq__ = lambda self, *_: 1 / 0


@pytest.mark.parametrize("value", [Equal(), [1.0], "1", {}, np.array([Equal()]), np.array(["a"]), np.zeros(MOST_NUMBERS + 1), 1j, np.zeros(1, "datetime64[s]")])
def test_only_arrays_of_numbers_leave(value):
    with pytest.raises(TypeError, match="it returned"):
        arrays(value)


def test_numbers_count_as_arrays_and_kinds_of_array_lose_theirs():
    first, second, third, none = arrays((1.5, np.float32(2), np.ones(2).view(Loud), None))
    assert (first.dtype, first.shape, second.dtype, type(third), none) == (np.float64, (), np.float32, np.ndarray, None)


def test_an_answer_is_no_view_of_what_changes_later():
    x = np.zeros(3)
    (copy,) = arrays(x)
    x += 1
    assert not copy.any()


@pytest.fixture
def student(monkeypatch):
    """A module of a student's, made of these functions."""
    def make(**functions):
        monkeypatch.setitem(sys.modules, "student", type(sys)("student"))
        vars(sys.modules["student"]).update(functions)
        return {"module": "student", "name": "double", "args": [np.ones(2)], "config": {}, "dy": [np.ones(2)], "moved": [[np.ones(2)]] * 3}
    return make


def test_forwards_come_first_and_a_backward_that_exits_costs_only_itself(student):
    question = student(double_forward=lambda x: (2 * x, None), double_backward=lambda dy, cache: sys.exit(0))
    plain = question | {"name": "double_forward", "dy": None}
    found = list(answers([question, plain, question]))
    assert [(part, number) for part, number, _ in found] == [("forward", 0), ("forward", 1), ("forward", 2), ("slopes", 0), ("slopes", 2), ("backward", 0), ("backward", 2)]
    assert (found[0][2][0] == 2).all() and len(found[3][2]) == 3 and found[5][2] == "SystemExit: 0"
    assert (found[1][2][0] == 2).all() and found[1][2][1] is None, "of a plain function all that it returns is the answer"


@pytest.mark.parametrize("forward, what", [(lambda x: 2 * x, "must return (output, cache)"), (lambda x: (x.__iadd__(1), 0), "read-only"), (lambda: 0, "TypeError"),
                                           (lambda x: 1 / 0, "ZeroDivisionError")])
def test_what_is_raised_becomes_words(student, forward, what):
    question = student(double_forward=forward, double_backward=lambda dy, cache: dy)
    question["args"] = [way(np.ones(2))]
    (_, _, result), *_ = answers([question])
    assert isinstance(result, str) and what in result, result


def test_several_outputs_get_a_tuple_of_dy(student):
    got = []
    question = student(double_forward=lambda x: ((x, x), 0), double_backward=lambda dy, cache: got.append(dy) or dy[0])
    list(answers([question | {"dy": [np.ones(2), np.zeros(2)]}]))
    assert isinstance(got[0], tuple) and len(got[0]) == 2


def test_ctrl_c_goes_through(student):
    def stop(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(answers([student(double_forward=stop, double_backward=stop)]))


def test_words_name_the_students_line_and_are_short():
    try:
        exec(compile("\n\n1 / 0", "/x/minideepseek/basics/mine.py", "exec"))
    except ZeroDivisionError as error:
        assert words(error).startswith("ZeroDivisionError: division by zero (mine.py:3:")
    assert len(words(ValueError("x" * 9999))) < 700
    assert words(type("Special", (ValueError,), {})("no")) == "ValueError: no", "a student may raise the plain kind"


def test_main_writes_a_line_for_each_answer_and_leaves_its_walls(tmp_path, student):
    question = student(double_forward=lambda x: (2 * x, None), double_backward=lambda dy, cache: 2 * dy)
    (tmp_path / "asked").write_text(json.dumps(pack([question])))
    main(os.open(tmp_path / "asked", os.O_RDWR), os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT))
    lines = [unpack(json.loads(line)) for line in (tmp_path / "out").read_text().splitlines()]
    assert [line[:2] for line in lines] == [["forward", 0], ["slopes", 0], ["backward", 0]] and (lines[2][2][0] == 2).all()
    assert json.loads((tmp_path / "asked").read_text()) == {"files": False, "network": False}
