import copy

import numpy as np
import pytest

from minideepseek.classroom.assignments import assignment
from minideepseek.classroom.judge import NO_ANSWER, ask, checks, differs, expected, form

RMSNORM = assignment("2-norms").tasks[0]
CROSS_ENTROPY = assignment("2-norms").tasks[-1]
TABLES = assignment("3-rope").tasks[0]


@pytest.fixture(scope="module")
def asked():
    found = {}
    for task in (RMSNORM, CROSS_ENTROPY, TABLES):
        questions = ask(task, np.random.default_rng(1))
        found[task.name] = task, questions, expected(questions)
    return found


def passed(asked, name, change):
    """The checks that pass when every answer of the reference goes through change(part, result)."""
    task, questions, right = asked[name]
    given = {key: change(key[0], copy.deepcopy(result)) for key, result in right.items()}
    found = checks(task, questions, right, given)
    return {check.name for check in found if not check.fault}, sum(check.points for check in found if not check.fault), {check.name: check.fault for check in found}


def only(part, function):
    return lambda where, result: function(result) if where == part else result


def test_the_points_of_a_task_are_shared_out(asked):
    for task, questions, right in asked.values():
        found = checks(task, questions, right, right)
        assert sum(check.points for check in found) == pytest.approx(task.points) and not any(check.fault for check in found)
        assert not any(check.fault is None for check in checks(task, questions, right, {}))


def scaled(factor):
    """A forward that is a constant factor off, in all that it answers."""
    def change(part, result):
        if part == "slopes":
            return [[factor * y for y in row] for row in result]
        return [factor * x if x is not None else None for x in result]
    return change


@pytest.mark.parametrize("change, names, points", [
    (scaled(2.0), {"runs", "shapes and dtype", "finite differences"}, 6),                               # wrong, and consistent with itself
    (lambda part, result: result if part == "backward" else scaled(2.0)(part, result), {"runs", "shapes and dtype", "dx", "dg"}, 12),
    (only("backward", lambda result: [2 * x for x in result]), {"runs", "shapes and dtype", "forward values"}, 10),
    (only("backward", lambda result: [result[0], -result[1]]), {"runs", "shapes and dtype", "forward values", "dx"}, 14),
    (only("backward", lambda result: NO_ANSWER), {"runs", "forward values"}, 8),
    (only("forward", lambda result: "NotImplementedError: write it"), {"dx", "dg", "finite differences"}, 10),
    (only("backward", lambda result: result[::-1]), {"runs", "forward values"}, 8),
    (only("backward", lambda result: result[:1]), {"runs", "forward values"}, 8),
    (only("backward", lambda result: [x.astype(np.float32) for x in result]), {"runs", "forward values", "finite differences"}, 10),
    (only("backward", lambda result: [np.nan * x for x in result]), {"runs", "forward values"}, 8),
    (only("backward", lambda result: [None, result[1]]), {"runs", "forward values", "dg"}, 12),
    (only("backward", lambda result: [np.array(0.0), result[1]]), {"runs", "forward values", "dg"}, 12),
    (only("forward", lambda result: [result[0][..., None]]), {"runs", "dx", "dg", "finite differences"}, 12),
    (lambda part, result: [[0 * y for y in row] for row in result] if part == "slopes" else [0 * x for x in result], {"runs", "shapes and dtype"}, 4),
])
def test_partial_credit(asked, change, names, points):
    found, score, faults = passed(asked, "rmsnorm", change)
    assert found == names, faults
    assert score == pytest.approx(points)


@pytest.mark.parametrize("slopes", [[], [[]] * 9, "ValueError: no", [[np.zeros(1)]] * 9, [[np.array([1, 2])]] * 9, [[None]] * 9, [[np.array(np.nan)]] * 9])
def test_forwards_that_cannot_be_compared_are_a_fault(asked, slopes):
    found, _, faults = passed(asked, "rmsnorm", only("slopes", lambda result: slopes))
    assert "finite differences" not in found and "dx" in found, faults


def test_the_message_teaches(asked):
    _, _, faults = passed(asked, "rmsnorm", only("backward", lambda result: [result[0], result[1] / 3]))
    assert faults["dg"].startswith("case 'tokens': dg[") and "4 of 4 differ: looks 3 times too small, and x has 3 entries along axis 0" in faults["dg"]
    assert faults["dg"].endswith("; see whiteboard/basics/rmsnorm.md eq. 4")
    _, _, faults = passed(asked, "rmsnorm", only("forward", lambda result: [result[0] + 1]))
    assert faults["forward values"].endswith("; see whiteboard/basics/rmsnorm.md, eq. 1, 2, 3")
    _, _, faults = passed(asked, "rmsnorm", only("backward", lambda result: [2 * result[0], result[1]]))
    assert "along a direction of x your forward rises by" in faults["finite differences"]


def test_an_id_has_no_gradient(asked):
    found, score, _ = passed(asked, "cross_entropy", only("backward", lambda result: [result[0], np.zeros(3)]))
    assert "shapes and dtype" not in found and "dlogits" in found and score == 22.5


def test_an_error_that_is_due_must_be_of_the_right_kind(asked):
    right_words, _, _ = passed(asked, "tables", lambda part, result: "ValueError: in other words" if isinstance(result, str) else result)
    assert {"odd", "none"} <= right_words
    for other in ("TypeError: odd", [np.zeros(2)], "NotImplementedError: write frequencies"):
        found, _, faults = passed(asked, "tables", lambda part, result: other if isinstance(result, str) else result)
        assert not found & {"odd", "none"} and "expected ValueError" in faults["odd"], other
    found, _, _ = passed(asked, "tables", lambda part, result: result if isinstance(result, str) else "ValueError: always")
    assert found == {"odd", "none"}


@pytest.mark.parametrize("given, fault", [
    ([np.zeros(3)], None), ("words", "words"), ([np.zeros(3), np.zeros(3)], "2 values returned, expected 1"), ([np.zeros((3, 1))], "of shape (3, 1)"),
    ([np.zeros(3, int)], "int64"), ([np.array([0, np.inf, 0])], "nan or inf"), ([None], "value 0 is None")])
def test_form(given, fault):
    found = form(given, [np.zeros(3)])
    assert found is fault is None or fault in found


def test_a_whole_number_may_be_of_any_width_but_not_a_float():
    assert form([np.array(3, np.int32)], [np.array(3)]) is None
    assert form([np.array(3.0)], [np.array(3)]) and form([np.array([3], np.int32)], [np.array([3])])


def test_differs_is_relative_to_the_largest_value_and_nan_fails():
    right = [np.array([1e6, 1.0])]
    assert differs([right[0] + 9e-4], right, 1e-9) is None
    assert differs([right[0] + [0, 2e-3]], right, 1e-9) == "output[1] = 1.002, expected 1, 1 of 2 differ"
    assert "output[0] = nan" in differs([right[0] * [np.nan, 1]], right, 1e9)
    assert differs([np.array(1e-8)], [np.array(0.0)], 1e-9) and differs([np.array(True)], [np.array(False)], 0.5)
