"""The questions an engine must answer, one test each; whiteboard/autograd/tape.md answers them in words."""
import gc
import sys
import threading
import time
import weakref

import numpy as np
import pytest

from minideepseek.autograd.shapes import ShapeError
from minideepseek.autograd.tape import Tape, Tensor, op
from minideepseek.basics.embedding import embedding
from minideepseek.basics.linear import linear
from minideepseek.basics.residual import add
from minideepseek.basics.rmsnorm import rmsnorm


def scale_forward(x, *, by):
    """y = by x.

    x: (...)   ->   y: (...)
    """
    return x * by, by


def scale_backward(dy, by):
    return dy * by


def split_forward(x):
    """Two halves and where the larger one is.

    x: (..., D)   ->   a: (..., D//2)   b: (..., D//2)   which: (...)
    """
    h = x.shape[-1] // 2
    a, b = x[..., :h].copy(), x[..., h:].copy()
    return (a, b, (b.sum(-1) > a.sum(-1)).astype(int)), None


def split_backward(dy, cache):
    da, db = dy
    return np.concatenate([da, db], axis=-1)


scale, split = op(scale_forward, scale_backward), op(split_forward, split_backward)
ones = np.ones(3)


def leaf(name="x"):
    return Tensor(np.array([1.0, 2.0, 3.0]), name)


def test_reverse_order_b_is_a_plus_a_and_c_is_b_plus_b():
    a = leaf("a")
    with Tape() as tape:
        b = add(a, a)
        c = add(b, b)
    tape.backward({c: ones})
    assert (a.grad == 4).all()


def test_never_plus_equals_on_a_shared_array():
    """An op that hands the same array to both inputs: += on one would change the other."""
    shared = op(add.forward, lambda dy, cache: (dy, dy))
    x, r = leaf("x"), leaf("r")
    with Tape() as tape:
        y = shared(shared(x, r), x)
    seed = np.ones(3)
    tape.backward({y: seed})
    assert (x.grad == 2).all() and (r.grad == 1).all() and (seed == 1).all()


def test_the_diamond():
    x = leaf()
    with Tape() as tape:
        y = add(scale(x, by=3.0), scale(x, by=5.0))
    tape.backward({y: ones})
    assert (x.grad == 8).all()


def test_one_tensor_as_two_arguments():
    x = leaf()
    with Tape() as tape:
        y = add(x, x)
    tape.backward({y: ones})
    assert (x.grad == 2).all()


def test_scalars_stay_arrays_all_the_way():
    a = Tensor(np.array(3.0), "a")
    with Tape() as tape:
        c = add(add(a, a), scale(a, by=2.0))
    tape.backward(c)
    assert isinstance(a.grad, np.ndarray) and a.grad.shape == () and a.grad == 4


def test_an_output_nobody_used_counts_as_zero_and_an_integer_output_gets_no_dy():
    x = Tensor(np.arange(6.0))
    with Tape() as tape:
        a, b, which = split(x)
        y = scale(b, by=2.0)
    assert which.data == 1
    tape.backward({y: ones})
    assert x.grad.tolist() == [0, 0, 0, 2, 2, 2]


def test_a_record_that_reaches_no_loss_is_not_run():
    def explode(dy, cache):
        raise AssertionError("this backward was not needed")

    x, unused = leaf(), op(scale_forward, explode)
    with Tape() as tape:
        unused(x, by=1.0)
        y = scale(x, by=2.0)
    tape.backward({y: ones})
    assert (x.grad == 2).all()


def test_two_losses_each_with_its_weight():
    x = Tensor(np.array(2.0))
    with Tape() as tape:
        loss, balance = scale(x, by=3.0), scale(x, by=100.0)
    tape.backward({loss: 1.0, balance: 1e-2})
    assert x.grad == 4


def test_a_loss_that_feeds_another_loss():
    x = Tensor(np.array(2.0))
    with Tape() as tape:
        first = scale(x, by=3.0)
        second = scale(first, by=5.0)
    tape.backward({second: 1.0, first: 1.0})
    assert x.grad == 18


def test_gradients_of_leaves_add_up_over_tapes_until_they_are_zeroed():
    x = leaf()
    for expected in (2, 4):
        with Tape() as tape:
            y = scale(x, by=2.0)
        tape.backward({y: ones})
        assert (x.grad == expected).all()
    x.grad = None
    with Tape() as tape:
        y = scale(x, by=2.0)
    tape.backward({y: ones})
    assert (x.grad == 2).all()


def test_a_chain_of_50_000_ops_without_recursion():
    x, n = Tensor(np.array(1.0)), 50_000
    with Tape() as tape:
        y = x
        for _ in range(n):
            y = scale(y, by=1.0)
    assert n > sys.getrecursionlimit()
    tape.backward(y)
    assert x.grad == 1


def test_a_wide_fan_out_takes_linear_time():
    def seconds(n):
        x = Tensor(np.array(1.0))
        with Tape() as tape:
            y = scale(x, by=1.0)
            for _ in range(n):
                y = add(y, x)
        start = time.perf_counter()
        tape.backward(y)
        assert x.grad == n + 1
        return time.perf_counter() - start

    assert min(seconds(4000) for _ in range(3)) < 12 * min(seconds(1000) for _ in range(3))


def test_the_order_of_sums_is_the_order_of_the_list():
    """1e16, 1, -1e16 add up to 0 or 1, depending on the order: it must be the reverse order of the records."""
    for factors, expected in ([(1e16, 1.0, -1e16), 0.0], [(1.0, 1e16, -1e16), 1.0], [(-1e16, 1e16, 1.0), 0.0]):
        x = Tensor(np.array(1.0))
        with Tape() as tape:
            a, b, c = [scale(x, by=f) for f in factors]
            y = add(add(a, b), c)
        tape.backward(y)
        total = np.float64(factors[2])
        for factor in (factors[1], factors[0]):
            total = total + factor
        assert x.grad == total


def test_backward_twice_is_an_error():
    x = leaf()
    with Tape() as tape:
        y = scale(x, by=2.0)
    tape.backward({y: ones}, keep=True)
    with pytest.raises(RuntimeError, match="replayed already"):
        tape.backward({y: ones})
    assert (x.grad == 2).all()
    with pytest.raises(RuntimeError, match="new Tape"), tape:
        pass


def test_a_tape_cannot_be_entered_while_it_records():
    with Tape() as tape:
        with pytest.raises(RuntimeError, match="recording already"):
            tape.__enter__()
    scale(leaf(), by=1.0)
    assert len(tape.records) == 0


@pytest.mark.parametrize("returned, message", [
    (lambda dy: (dy[:2],), r"the gradient of argument 0 is \(2,\) float64"),
    (lambda dy: (dy.astype(np.float32),), r"is \(3,\) float32"),
    (lambda dy: (None,), "is None"),
    (lambda dy: (dy, dy), "returned 2 gradients for 1 arguments"),
    (lambda dy: (), "returned 0 gradients for 1 arguments"),
])
def test_a_gradient_of_the_wrong_count_shape_or_dtype(returned, message):
    x = leaf()
    wrong = op(scale_forward, lambda dy, cache: returned(dy))
    with Tape() as tape:
        y = wrong(x, by=2.0)
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        tape.backward({y: ones})
    assert "record 0, scale" in caught.value.__notes__[0] and "test_tape.py" in caught.value.__notes__[0]
    assert x.grad is None


def test_a_gradient_for_integers_is_an_error():
    wrong = op(embedding.forward, lambda dy, cache: (np.zeros(2), np.zeros((3, 2))))
    with Tape() as tape:
        y = wrong(np.array([0, 1]), Tensor(np.zeros((3, 2))))
    with pytest.raises(TypeError, match="must be None"):
        tape.backward({y: np.ones((2, 2))})


def test_an_error_inside_a_backward_notes_the_forward_line_and_leaves_the_leaves():
    def explode(dy, cache):
        raise ZeroDivisionError("inside")

    x, bad = leaf(), op(scale_forward, explode)
    with Tape() as tape:
        z = bad(x, by=1.0); line = sys._getframe().f_lineno
        y = add(z, x)
    with pytest.raises(ZeroDivisionError) as caught:
        tape.backward({y: ones})
    assert "record 0, scale, whose forward was called at" in caught.value.__notes__[0]
    assert caught.value.__notes__[0].endswith(f"test_tape.py:{line}")
    assert x.grad is None, "an error must leave every leaf as it was"


def test_memory_is_freed_while_replaying_unless_kept():
    alive = []

    def watch(dy, cache):
        gc.collect()
        alive.append(sum(ref() is not None for ref in refs))
        return dy * 1.0

    class Cache:
        pass

    def forward(x):
        """y = x.

        x: (...)   ->   y: (...)
        """
        cache = Cache()
        refs.append(weakref.ref(cache))
        return x * 1.0, cache

    watched = op(forward, watch)
    for keep, expected in ((False, [4, 3, 2, 1]), (True, [4, 4, 4, 4])):
        refs = []
        alive.clear()
        with Tape() as tape:
            y = leaf()
            for _ in range(4):
                y = watched(y)
        tape.backward({y: ones}, keep=keep)
        assert alive == expected
        assert len(tape.records) == (4 if keep else 0)


def test_intermediates_keep_a_gradient_only_when_asked():
    for keep in (False, True):
        x = leaf()
        with Tape() as tape:
            a = scale(x, by=2.0)
            y = scale(a, by=3.0)
        tape.backward({y: ones}, keep=keep)
        assert (x.grad == 6).all()
        assert (a.grad is not None) is keep


@pytest.mark.parametrize("make, message", [
    (lambda x, y: x, "was not made by an op of this tape"),
    (lambda x, y: y, "needs a seed of shape"),
    (lambda x, y: {y: np.ones(2)}, "needs a seed of shape"),
])
def test_a_loss_that_cannot_be_differentiated(make, message):
    x = leaf()
    with Tape() as tape:
        y = scale(x, by=2.0)
    with pytest.raises(ValueError, match=message):
        tape.backward(make(x, y))
    tape.backward({y: ones})                     # a refused call has not used up the tape
    assert (x.grad == 2).all()


def test_an_integer_output_is_no_loss():
    with Tape() as tape:
        a, b, which = split(Tensor(np.arange(6.0)))
    with pytest.raises(ValueError, match="integers"):
        tape.backward(which)


def test_without_a_tape_nothing_is_kept_and_an_inner_tape_shadows_the_outer():
    x = leaf()
    scale(x, by=2.0)
    with Tape() as outer:
        scale(x, by=2.0)
        with Tape() as inner:
            scale(x, by=3.0)
        scale(x, by=2.0)
    assert (len(outer.records), len(inner.records)) == (2, 1)


def test_each_thread_has_its_own_tape():
    x = leaf()
    with Tape() as tape:
        thread = threading.Thread(target=lambda: scale(x, by=2.0))
        thread.start()
        thread.join()
    assert len(tape.records) == 0


def test_plain_arrays_are_constants():
    x = leaf()
    with Tape() as tape:
        y = add(x, np.array([5.0, 5.0, 5.0]))
    tape.backward({y: ones})
    assert (x.grad == 1).all()


def test_wrong_shapes_into_an_op_name_the_op_the_shapes_and_the_callers_line():
    x, W = Tensor(np.zeros((2, 5))), Tensor(np.zeros((4, 3)))
    with pytest.raises(ShapeError) as caught:
        linear(x, W)
    message = str(caught.value)
    assert message.startswith("linear: W has D = 4, but the other arguments give D = 5")
    assert "(2, 5) float64, (4, 3) float64" in message and "x: (..., D) W: (D, F)" in message
    assert f"{__file__}:" in message


@pytest.mark.parametrize("ids, error, message", [
    (np.array([[0.0, 1.0]]), TypeError, "ids has dtype float64, expected integer ids"),
    (np.array([[0, 2], [5, 9]]), ShapeError, r"ids\[1, 0\] = 5 is not in 0 .. 4"),
    (np.array([[0, -1]]), ShapeError, r"ids\[0, 1\] = -1 is not in 0 .. 4"),
    ([0, 1], TypeError, "ids is of type list"),
])
def test_bad_ids(ids, error, message):
    with pytest.raises(error, match=message):
        embedding(ids, Tensor(np.zeros((5, 2))))


def test_the_figure_of_a_tape():
    x, g = Tensor(np.ones((2, 4)), "x"), Tensor(np.ones(4), "g")
    with Tape() as tape:
        y = add(rmsnorm(x, g), x)
    text = str(tape)
    lines = text.splitlines()
    assert len(lines) == 3 and "rmsnorm" in lines[1] and "x(2, 4) g(4)" in lines[1] and "test_tape.py:" in lines[1]
    assert "|dy|" not in text
    tape.backward({y: np.ones((2, 4))}, keep=True)
    assert "|dy|" in str(tape) and "2.83" in str(tape).splitlines()[2]
    with Tape() as tape:
        y = add(x, x)
    tape.backward({y: np.ones((2, 4))})
    assert "replayed" in str(tape)


def test_the_repr_of_a_tensor_is_short_and_begins_with_its_shape():
    big = Tensor(np.zeros((1000, 1000), np.float32), "W_DQ")
    assert repr(big) == "(1000, 1000) float32 W_DQ"
    big.grad = big.data
    assert repr(big).endswith("with grad")
    assert repr(rmsnorm).startswith("op rmsnorm: x: (..., D) g: (D,) -> y: (..., D)")


def test_a_tensor_has_no_arithmetic():
    with pytest.raises(TypeError):
        leaf() + leaf()


def test_a_tensor_as_a_keyword_is_refused_by_name():
    with pytest.raises(TypeError, match="eps is a Tensor: a keyword argument is never differentiated"):
        rmsnorm(np.ones((2, 3)), np.ones(3), eps=Tensor(np.array(1e-6)))
