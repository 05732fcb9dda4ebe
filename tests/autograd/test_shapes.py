import numpy as np
import pytest

from minideepseek.autograd.shapes import ShapeError, ShapeLine


def heads(x, W, b=None, ids=None, *, n_heads, mask=None, ignore_index=-1):
    """Everything the grammar knows.

    x: (..., D)   W: (D, H*(N+R))   b: (2*N,) or None   ids: (...) int < D or ignore_index or None
    n_heads: H   mask: (..., D)   ->   y: (..., H, N+R)   chosen: (...)
    """


line = ShapeLine(heads)
x, W = np.zeros((2, 5, 4)), np.zeros((4, 15))
b = np.zeros(6)


def test_letters_products_sums_numbers_and_leading_axes():
    assert line.bind((x, W, b, None), {"n_heads": 3}) == {"...": (2, 5), "D": 4, "H": 3, "N": 3, "R": 2}


def test_outputs_are_read_as_well():
    assert [item.name for item in line.outputs] == ["y", "chosen"]
    assert line.outputs[0].dims == ("H", "N+R") and line.outputs[0].leading


@pytest.mark.parametrize("change, error, message", [
    (dict(W=np.zeros((5, 15))), ShapeError, "W has D = 5, but the other arguments give D = 4"),
    (dict(n_heads=4), ShapeError, r"W has H\*\(N\+R\) = 15"),
    (dict(b=np.zeros(7)), ShapeError, "(b has|W has) .* which cannot be"),
    (dict(x=np.zeros(())), ShapeError, "has 0 axes"),
    (dict(W=np.zeros((1, 4, 15))), ShapeError, "has 3 axes"),
    (dict(W=None), TypeError, "W is None"),
    (dict(x=np.zeros((2, 5, 4), int)), TypeError, "x has dtype int64, expected floating point"),
    (dict(x=np.zeros((2, 5, 4), bool)), TypeError, "x has dtype bool"),
    (dict(ids=np.zeros((2, 5))), TypeError, "ids has dtype float64, expected integer"),
    (dict(ids=np.zeros((2, 6), int)), ShapeError, "ids has ... ="),
    (dict(ids=np.full((2, 5), 4)), ShapeError, r"ids\[0, 0\] = 4 is not in 0 .. 3"),
    (dict(mask=np.zeros((2, 5, 3))), ShapeError, "mask has D = 3"),
    (dict(x=[1.0]), TypeError, "x is of type list"),
])
def test_a_call_that_does_not_fit(change, error, message):
    call = dict(x=x, W=W, b=b, ids=None, n_heads=3) | change
    config = {name: call.pop(name) for name in ("n_heads", "mask") if name in call}
    with pytest.raises(error, match=message):
        line.bind(tuple(call.values()), config)


def test_ids_may_be_the_exempt_value_or_absent():
    line.bind((x, W, b, np.full((2, 5), -1)), {"n_heads": 3})
    line.bind((x, W, b, np.full((2, 5), 3)), {"n_heads": 3})
    with pytest.raises(ShapeError):
        line.bind((x, W, b, np.full((2, 5), -1)), {"n_heads": 3, "ignore_index": -7})
    line.bind((x, W, b, np.zeros((2, 5), np.int16)), {"n_heads": 3})


def test_a_wrong_number_of_arguments():
    with pytest.raises(TypeError, match="takes 4 positional arguments, got 2"):
        line.bind((x, W), {})


def test_a_function_without_a_shape_line_or_with_a_forgetful_one_is_refused_when_the_op_is_made():
    def bare(x):
        """Nothing about shapes."""

    def forgetful(x, W):
        """x: (D,)   ->   y: (D,)"""

    with pytest.raises(TypeError, match="no shape line"):
        ShapeLine(bare)
    with pytest.raises(TypeError, match="says nothing about W"):
        ShapeLine(forgetful)
