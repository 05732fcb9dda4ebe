import numpy as np

from minideepseek.autograd.tape import Tape, Tensor
from minideepseek.basics.embedding import embedding, embedding_backward, embedding_forward
from minideepseek.basics.linear import linear_backward, linear_forward
from minideepseek.basics.tied_head import tied_head, tied_head_backward, tied_head_forward

rng = np.random.default_rng(0)
ids = np.array([[4, 1, 4], [0, 4, 2]])
table, dlogits = rng.standard_normal((6, 5)), rng.standard_normal((2, 3, 6))


def taped(E):
    with Tape() as tape:
        h = embedding(ids, E)
        logits = tied_head(h, E)
    tape.backward({logits: dlogits})
    return h.data


def test_by_hand():
    logits, cache = tied_head_forward(np.array([2.0, 3.0]), np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    assert logits.tolist() == [2, 3, 5]
    dh, dE = tied_head_backward(np.array([1.0, 0.0, 10.0]), cache)
    assert dh.tolist() == [11, 10]
    assert dE.tolist() == [[2, 3], [0, 0], [20, 30]]


def test_it_is_a_linear_layer_whose_matrix_is_the_transposed_table():
    h = rng.standard_normal((2, 3, 5))
    logits, cache = tied_head_forward(h, table)
    y, linear_cache = linear_forward(h, table.T)
    (dh, dE), (dx, dW) = tied_head_backward(dlogits, cache), linear_backward(dlogits, linear_cache)
    for ours, theirs in ((logits, y), (dh, dx), (dE, dW.T)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-14)


def test_the_gradient_of_one_table_is_sparse_plus_dense():
    E = Tensor(table, "E")
    h = taped(E)
    dh, dense = tied_head_backward(dlogits, (h, table))
    _, sparse = embedding_backward(dh, (ids, table.shape))
    np.testing.assert_allclose(E.grad, sparse + dense, rtol=1e-13, atol=1e-14)
    assert (np.abs(sparse).sum(-1) > 0).tolist() == [True, True, True, False, True, False]      # the ids that occur
    assert (np.abs(dense).sum(-1) > 0).all()


def test_the_gradient_of_one_table_equals_finite_differences():
    E = Tensor(table, "E")
    taped(E)

    def loss(E):
        return (tied_head_forward(embedding_forward(ids, E)[0], E)[0] * dlogits).sum()

    numeric = np.zeros_like(table)
    for index in np.ndindex(table.shape):
        nudge = np.zeros_like(table)
        nudge[index] = 1e-3
        numeric[index] = (loss(table + nudge) - loss(table - nudge)) / 2e-3     # exact: the loss is quadratic in E
    np.testing.assert_allclose(E.grad, numeric, rtol=1e-8, atol=1e-9)


def test_what_tying_would_save_in_deepseek_v3():
    assert 129_280 * 7_168 == 926_679_040
