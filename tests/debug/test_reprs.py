"""Short reprs: one line, nothing else changes, and it can be taken back."""
import subprocess
import sys
import warnings

import ml_dtypes
import numpy as np
import pytest

from minideepseek.autograd.tape import Tensor
from minideepseek.debug.reprs import short, short_reprs, values
from tests.house import ROOT


@pytest.mark.parametrize("array, expected", [
    (np.arange(12.0).reshape(3, 4), "float64 (3, 4) [0, 1, 2, ... 11] mean 5.5 std 3.45"),
    (np.array([[1.0, -2.5]], np.float32), "float32 (1, 2) [1, -2.5]"),
    (np.array([0.1234567, 1e-9, 12345.678]), "float64 (3,) [0.123, 1e-09, 1.23e+04]"),
    (np.arange(8), "int64 (8,) [0, 1, 2, 3, 4, 5, 6, 7]"),
    (np.arange(9), "int64 (9,) [0, 1, 2, ... 8] from 0 to 8"),
    (np.array([1.0, np.nan, -np.inf]), "float64 (3,) [1, nan, -inf] 1 nan 1 inf"),
    (np.array([1.0, 3.0] * 5 + [np.nan] * 2), "float64 (12,) [1, 3, 1, ... nan] mean 2 std 1 2 nan"),
    (np.full(9, np.nan), "float64 (9,) [nan, nan, nan, ... nan] 9 nan"),
    (np.array(3.0), "float64 () [3]"),
    (np.zeros((0, 4)), "float64 (0, 4) []"),
    (np.ones((2, 5), bool), "bool (2, 5) [True, True, True, ... True]"),
    (np.ones(9, ml_dtypes.float8_e4m3fn), "float8_e4m3fn (9,) [1, 1, 1, ... 1] mean 1 std 0"),
    (np.array([1, np.nan, 449] * 3).astype(ml_dtypes.float8_e4m3fn), "float8_e4m3fn (9,) [1, nan, 448, ... 448] mean 224 std 224 3 nan"),
    (np.array([3.14159, np.nan, -np.inf], ml_dtypes.bfloat16), "bfloat16 (3,) [3.14, nan, -inf] 1 nan 1 inf"),
    (np.array([1, np.inf], ml_dtypes.float8_e5m2), "float8_e5m2 (2,) [1, inf] 1 inf"),
    (np.array(["a", "b"]), "str32 (2,) [a, b]"),
])
def test_what_an_array_shows(array, expected):
    assert short(array) == expected


@pytest.mark.parametrize("array", [
    np.full(9, 1e308), np.ones(9) + 1j, np.array([None] * 20), np.zeros(20, [("a", "i4")]), np.array("2020", "M8"), np.ones((3, 4)).T,
    np.broadcast_to(1.0, (3, 4)), np.ones(9, np.longdouble), np.full(12, np.inf)])
def test_looking_neither_fails_nor_warns(array):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "\n" not in short(array)


def test_values_of_a_smaller_window():
    assert values(np.arange(5), 4) == "[0, 1, 2, ... 4]" and values(np.arange(5)) == "[0, 1, 2, 3, 4]"


def test_only_the_repr_changes_and_only_until_it_is_taken_back():
    x, options = np.arange(100.0).reshape(4, 25) / 7, np.get_printoptions()
    shown = repr(x), str(x), f"{x}", str([x[0, :2]]), repr(x[0, 0]), np.array2string(x)
    with short_reprs():
        inside = repr(x), str(x), f"{x}", str([x[0, :2]]), repr(x[0, 0]), np.array2string(x)
        assert inside[0] == short(x) != shown[0]
        assert inside[1:3] == shown[1:3] and inside[4:] == shown[4:]
        assert inside[3] == "[float64 (2,) [0, 0.143]]", "inside a list an array shows its repr"
        assert "float64 (2,)" in repr({"x": x[0, :2]}) and repr(Tensor(x, "x")) == "(4, 25) float64 x"
    assert (repr(x), str(x), f"{x}", str([x[0, :2]]), repr(x[0, 0]), np.array2string(x)) == shown and np.get_printoptions() == options


def test_without_with_it_lasts_until_it_is_closed_and_nests():
    outer = short_reprs()
    with short_reprs():
        pass
    assert repr(np.arange(3)) == "int64 (3,) [0, 1, 2]"
    outer.close()
    assert repr(np.arange(3)) == "array([0, 1, 2])"


def test_importing_it_changes_nothing():
    code = "import numpy as np, minideepseek.debug.reprs; print(repr(np.arange(3)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == "array([0, 1, 2])\n"
