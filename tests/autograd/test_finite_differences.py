import numpy as np
import pytest

from minideepseek.autograd.finite_differences import MOST_ENTRIES, GradcheckError, finite_differences


def cube_forward(x, ids=None):
    return x ** 3, None


def test_exact_for_a_cubic_and_fourth_order_beyond():
    x = np.array([2.0, -1.0, 0.5])
    rows = finite_differences(cube_forward, (x, np.array([1])))[0].rows
    np.testing.assert_allclose(rows, np.diag(3 * x ** 2), atol=1e-11)
    rows = finite_differences(lambda x: (np.exp(x), None), (x,))[0].rows
    np.testing.assert_allclose(rows, np.diag(np.exp(x)), atol=1e-11)


def test_only_floating_arguments_are_moved():
    assert list(finite_differences(cube_forward, (np.ones(2), np.array([1])))) == [0]


def test_small_inputs_get_small_steps():
    rows = finite_differences(lambda x: (np.sqrt(x), None), (np.array([1e-8]),))[0].rows
    np.testing.assert_allclose(rows, 0.5 / np.sqrt(1e-8), rtol=1e-9)


def test_an_array_of_zeros_is_moved_too():
    np.testing.assert_allclose(finite_differences(lambda x: (np.sin(x), None), (np.zeros(1),))[0].rows, 1, atol=1e-12)


def test_above_2000_entries_ten_directions():
    x = np.linspace(-1, 1, MOST_ENTRIES + 1)
    slopes = finite_differences(cube_forward, (x,))[0]
    assert slopes.directions.shape == (10, x.size) == slopes.rows.shape
    np.testing.assert_allclose(slopes.rows, slopes.directions * 3 * x ** 2, atol=1e-9)


def test_a_choice_that_flips_within_the_step_is_refused():
    def largest(x):
        return (x * 2, np.argmax(x)), None

    with pytest.raises(GradcheckError, match="wider gap"):
        finite_differences(largest, (np.array([1.0, 1.0 + 1e-5]),))
    finite_differences(largest, (np.array([1.0, 2.0]),))


def test_a_forward_that_leaves_its_domain():
    with np.errstate(invalid="ignore"), pytest.raises(GradcheckError, match="nan or inf"):
        finite_differences(lambda x: (np.sqrt(x), None), (np.array([1.0, 0.0]),))
