"""Mistakes that public code of this architecture really makes, planted here: that file's own tests must notice.

The numbers are those of the museum; a file's bugs are planted as soon as the file exists.
"""
import pytest

from tests.house import plant

BUGS = {
    "33 in-place += on a gradient two parents share": (
        "minideepseek/autograd/tape.py",
        "                    grads[x] = np.asarray(grads[x] + dx) if x in grads else dx   # never +=: the array may be shared",
        "                    if x in grads:\n                        grads[x] += dx\n                    else:\n                        grads[x] = dx"),
    "34 no topological order: replayed as recorded": (
        "minideepseek/autograd/tape.py", "        yield records.pop()", "        yield records.pop(0)"),
    "35 a set of parents": (
        "minideepseek/autograd/tape.py", "            for x, dx in zip(record.inputs, dxs):",
        "            for x, dx in {id(x): (x, dx) for x, dx in zip(record.inputs, dxs)}.values():"),
    "36 all-ones cotangent": (
        "minideepseek/autograd/gradcheck.py", "return self.rng.standard_normal(sum(y.size for y in self.outputs))",
        "return np.ones(sum(y.size for y in self.outputs))"),
    "37 dE[ids] += dy loses duplicates": (
        "minideepseek/basics/embedding.py", "    dE = P.T @ dy.reshape(M, D)",
        "    dE = np.zeros((U, D), dy.dtype); dE[ids] += dy"),
    "36b nan passes a comparison written the wrong way round": (
        "minideepseek/autograd/causes.py", "bool((np.abs(a - b) <= 1e-6 * np.abs(b).max(initial=0)).all())",
        "not (np.abs(a - b) > 1e-6 * np.abs(b).max(initial=0)).any()"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_noticed(bug, tmp_path):
    plant(tmp_path, *BUGS[bug])


def test_planting_needs_exactly_one_place(tmp_path):
    with pytest.raises(AssertionError, match="stands there 0 times"):
        plant(tmp_path, "minideepseek/basics/linear.py", "no such line", "")


def test_planting_a_harmless_change_is_itself_a_failure(tmp_path):
    with pytest.raises(AssertionError, match="was not noticed"):
        plant(tmp_path, "minideepseek/basics/residual.py", "Both roads get all of dy.", "Both roads get all of it.")
