from typing import NamedTuple

import numpy as np
import pytest

from minideepseek.autograd.params import arrays, count, flatten, gradients, nbytes, outline, tensors, unflatten, zero_grads
from minideepseek.autograd.tape import Tape, Tensor
from minideepseek.basics.linear import linear


class Attention(NamedTuple):
    W_DQ: np.ndarray | None
    W_DKV: np.ndarray


class Net(NamedTuple):
    layers: tuple
    E: np.ndarray


net = Net((Attention(None, np.ones((2, 3))), Attention(np.zeros((4, 2)), np.ones((2, 3)))), np.ones((5, 2), np.float32))


def test_names_are_paths_in_the_order_of_the_fields_and_absent_arrays_are_left_out():
    assert list(flatten(net)) == ["layers.0.W_DKV", "layers.1.W_DQ", "layers.1.W_DKV", "E"]


def test_flat_and_back():
    back = unflatten(flatten(net), net)
    assert back.layers[0].W_DQ is None and back.layers[1].W_DQ is net.layers[1].W_DQ and type(back) is Net


def test_a_leaf_lands_by_its_name_not_by_its_place():
    flat = dict(reversed(flatten(net).items()))
    assert unflatten(flat, net).E is net.E


def test_missing_unexpected_and_misshapen():
    flat = flatten(net)
    with pytest.raises(ValueError, match=r"missing \['E'\], unexpected \['F'\]"):
        unflatten({("F" if k == "E" else k): v for k, v in flat.items()}, net)
    with pytest.raises(ValueError, match=r"E has shape \(2, 5\), expected \(5, 2\)"):
        unflatten(flat | {"E": np.ones((2, 5))}, net)
    with pytest.raises(TypeError, match="layers.0 is of type str"):
        flatten(Net(("no",), net.E))


def test_counts_and_bytes():
    assert count(net) == 6 + 8 + 6 + 10
    assert nbytes(net) == 8 * 20 + 4 * 10


def test_tensors_carry_their_names_and_gradients_come_back_under_them():
    named = tensors(net)
    assert named.layers[1].W_DQ.name == "layers.1.W_DQ" and isinstance(named.E, Tensor)
    with Tape() as tape:
        y = linear(np.ones((1, 4)), named.layers[1].W_DQ)
    tape.backward({y: np.ones((1, 2))})
    assert (gradients(named)["layers.1.W_DQ"] == 1).all()
    assert (gradients(named)["E"] == 0).all() and gradients(named)["E"].dtype == np.float32
    zero_grads(named)
    assert named.layers[1].W_DQ.grad is None


def test_constant_fields_stay_arrays_and_have_no_gradient():
    class Layer(NamedTuple):
        W: np.ndarray
        b_select: np.ndarray

    tree = Layer(np.ones((2, 2)), np.zeros(2))
    trained = tensors(tree, constant=("b_select",))
    assert isinstance(trained.W, Tensor) and trained.b_select is tree.b_select
    assert list(gradients(trained)) == ["W"] and arrays(trained).W is tree.W
    zero_grads(trained)


def test_an_outline_has_a_shape_and_no_memory():
    huge = outline(10 ** 6, 10 ** 6)
    assert huge.shape == (10 ** 6, 10 ** 6) and huge.base.size == 1 and count((huge,)) == 10 ** 12
