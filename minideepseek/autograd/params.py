"""Weights as a tree of NamedTuples, and the same weights as a flat dictionary of names.

    weights.layers[0].attention.W_DKV   <->   flat["layers.0.attention.W_DKV"]

Derivation: whiteboard/autograd/params.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

from typing import NamedTuple

import numpy as np

from minideepseek.autograd.tape import Tensor


def flatten(weights, prefix=""):
    """Name every array of a tree: {"layers.0.attention.W_DKV": leaf}, in the order of the fields; None is left out.

    weights: nested NamedTuples, tuples and lists of arrays or Tensors.
    Raises TypeError for a leaf of another kind.
    """
    if weights is None:
        return {}
    if isinstance(weights, (np.ndarray, Tensor)):
        return {prefix: weights}
    if not isinstance(weights, (tuple, list)):
        raise TypeError(f"{prefix or 'weights'} is of type {type(weights).__name__}, expected arrays in tuples")
    flat = {}
    for name, part in zip(getattr(weights, "_fields", range(len(weights))), weights):
        flat |= flatten(part, f"{prefix}.{name}" if prefix else str(name))
    return flat


def unflatten(flat, like):
    """Put the leaves of `flat` into a tree of the form of `like`, whose own leaves only give names and shapes.

    Raises ValueError that lists the missing and the unexpected names, or names the leaf of another shape.
    """
    expected = flatten(like)
    missing, extra = [sorted(a - b) for a, b in ((expected.keys(), flat.keys()), (flat.keys(), expected.keys()))]
    if missing or extra:
        raise ValueError(f"the names do not fit: missing {missing or 'none'}, unexpected {extra or 'none'}")
    for name, leaf in expected.items():
        if _array(flat[name]).shape != _array(leaf).shape:
            raise ValueError(f"{name} has shape {_array(flat[name]).shape}, expected {_array(leaf).shape}")
    leaves = iter([flat[name] for name in expected])
    return _rebuild(like, leaves)


def tensors(weights, *, constant=()):
    """The same tree with every array as a Tensor that carries its name.

    constant: fields, by the last part of their name, that stay plain arrays: state that no gradient ever changes.
    """
    return unflatten({name: _array(leaf) if name.split(".")[-1] in constant else Tensor(_array(leaf), name)
                      for name, leaf in flatten(weights).items()}, weights)


def arrays(weights):
    """The same tree with plain arrays: the inverse of `tensors`. Nothing is copied."""
    return unflatten({name: _array(leaf) for name, leaf in flatten(weights).items()}, weights)


def gradients(weights):
    """{name: gradient} of the Tensors of a tree; zeros where nothing reached a weight."""
    return {name: np.zeros_like(t.data) if t.grad is None else t.grad for name, t in _trained(weights).items()}


def zero_grads(weights):
    """Forget the gradients, so that the next tape starts afresh."""
    for tensor in _trained(weights).values():
        tensor.grad = None


def count(weights):
    """How many numbers the tree holds."""
    return sum(_array(leaf).size for leaf in flatten(weights).values())


def nbytes(weights):
    """How many bytes the arrays of the tree take."""
    return sum(_array(leaf).nbytes for leaf in flatten(weights).values())


def outline(*shape):
    """An array that has a shape and no memory (every entry is the same zero): the stuff of a tree that only gives form."""
    return np.broadcast_to(np.float32(0), shape)


def _trained(weights):
    return {name: leaf for name, leaf in flatten(weights).items() if isinstance(leaf, Tensor)}


def _array(leaf):
    return leaf.data if isinstance(leaf, Tensor) else leaf


def _rebuild(like, leaves):
    if like is None:
        return None
    if isinstance(like, (np.ndarray, Tensor)):
        return next(leaves)
    parts = [_rebuild(part, leaves) for part in like]
    return type(like)(*parts) if hasattr(like, "_fields") else type(like)(parts)


def demo():
    """A two-layer tree, flat and back again."""

    class Layer(NamedTuple):
        W: np.ndarray
        b: np.ndarray | None

    class Net(NamedTuple):
        layers: tuple
        g: np.ndarray

    net = Net((Layer(np.ones((4, 3)), None), Layer(np.ones((3, 2)), np.ones(2))), np.ones(4))
    flat = flatten(net)
    for name, array in flat.items():
        print(f"{name:12s} {array.shape}")
    back = unflatten(flat, net)
    same = all(a is b for a, b in zip(flatten(back).values(), flat.values()))
    print(f"claim: {count(net)} numbers in {nbytes(net)} bytes; flat and back gives the same arrays: {same}")
    assert same and count(net) == 24 and nbytes(net) == 192


if __name__ == "__main__":
    from minideepseek.autograd.params import demo  # the imported copy, so that every name exists once
    demo()
