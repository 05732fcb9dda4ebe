import numpy as np
import pytest

from minideepseek.classroom.assignments import ASSIGNMENTS, assignment
from minideepseek.classroom.blank import ExerciseError, functions
from minideepseek.classroom.judge import ask, expected
from tests.house import NAMES, ROOT, read

TASKS = {f"{one.name} {task.name}": task for one in ASSIGNMENTS.values() for task in one.tasks}


def test_eight_assignments_of_100_points_in_their_order():
    assert [name[:2] for name in ASSIGNMENTS] == [f"{n}-" for n in range(1, 9)]
    assert all(sum(task.points for task in one.tasks) == 100 for one in ASSIGNMENTS.values())
    assert not ASSIGNMENTS.keys() & set(NAMES), "check NAME must mean one thing"


def test_no_function_is_written_twice():
    written = [(task.file, name) for task in TASKS.values() for name in task.written]
    assert len(set(written)) == len(written)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_functions_of_a_task_are_there(task):
    assert set(task.written) <= functions(read(f"minideepseek/{task.file}")).keys()
    assert task.cases or task.name in NAMES


def test_hidden_files_are_there_and_nobody_has_to_write_in_them():
    hidden = [file for one in ASSIGNMENTS.values() for file in one.hides]
    assert all((ROOT / "minideepseek" / file).is_file() for file in hidden)
    assert not set(hidden) & {task.file for task in TASKS.values()}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_case_has_an_answer_of_numbers_or_an_error_of_its_own(task):
    """A reference that fails for a reason nobody meant would teach students to fail alike."""
    questions = ask(task, np.random.default_rng(3))
    for (part, number), result in expected(questions).items():
        if isinstance(result, str):
            assert not questions[number]["dy"] and result.startswith(("ValueError:", "RuntimeError:", "AssertionError:")), (questions[number]["case"], result)
            assert "could not be broadcast" not in result and "object" not in result.split("(")[0]
        else:
            assert result and all(x is None or np.isfinite(x).all() for row in (result if part == "slopes" else [result]) for x in row)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_numbers_of_a_case_come_from_the_seed(task):
    draws = [[repr(question["args"]) for question in ask(task, np.random.default_rng(seed))] for seed in (0, 0, 1)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2] or task.name == "visible" or task.name == "verify"


def test_an_unknown_name():
    with pytest.raises(ExerciseError, match="no assignment 'rope': there are 1-tape, 2-norms"):
        assignment("rope")
