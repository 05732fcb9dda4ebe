import math

import numpy as np
import pytest

from minideepseek.training.clip import clip_by_global_norm, global_norm


def random_gradients(seed=0, dtype=np.float64, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.standard_normal(shape)).astype(dtype) for name, shape in
            {"E": (7, 4), "W": (4, 5), "experts": (2, 3, 4), "g": (5,)}.items()}


def test_the_norm_is_that_of_all_arrays_in_a_row():
    gradients = random_gradients()
    row = np.concatenate([g.reshape(-1) for g in gradients.values()])
    assert global_norm(gradients) == pytest.approx(np.linalg.norm(row), rel=1e-15)
    assert global_norm({"a": np.array([3.0]), "b": np.array([[-4.0]])}) == 5
    assert type(global_norm(random_gradients(dtype=np.float32))) is float
    assert global_norm({}) == 0 and global_norm({"a": np.zeros((0, 3))}) == 0


def test_squares_and_sums_are_float64():
    assert global_norm({"a": np.array([3e30], np.float32), "b": np.array([4e30], np.float32)}) == pytest.approx(5e30)      # squares pass 3e38
    assert global_norm({"a": np.array([3e-30], np.float32), "b": np.array([4e-30], np.float32)}) == pytest.approx(5e-30)   # ... and 1e-45
    many = {str(i): np.full(1000, 0.1, np.float32) for i in range(100)}
    assert global_norm(many) == pytest.approx(float(np.float32(0.1)) * math.sqrt(100_000), rel=1e-14)


@pytest.mark.parametrize("dtype, rel", [(np.float32, 1e-6), (np.float64, 1e-14)])
def test_clipped_to_the_bound_with_direction_and_dtype_kept(dtype, rel):
    gradients = random_gradients(dtype=dtype, scale=10)
    before = {name: g.copy() for name, g in gradients.items()}
    clipped, norm = clip_by_global_norm(gradients, 2.5)
    assert norm == global_norm(gradients) > 2.5
    assert global_norm(clipped) == pytest.approx(2.5, rel=rel)
    assert list(clipped) == list(gradients)
    for name, g in gradients.items():
        assert clipped[name].dtype == dtype and clipped[name] is not g
        assert np.array_equal(g, before[name])                                  # never written to
        assert np.allclose(clipped[name] * (norm / 2.5), g, rtol=4 * rel, atol=0)   # one factor for all


def test_numpy_scalars_as_bound_do_not_promote():
    clipped, _ = clip_by_global_norm(random_gradients(dtype=np.float32), np.float64(0.5))
    assert {g.dtype for g in clipped.values()} == {np.dtype(np.float32)}


def test_short_enough_means_the_same_arrays():
    gradients = random_gradients()
    norm = global_norm(gradients)
    for most in (norm, norm + 1, math.inf):                                     # equal is short enough
        clipped, measured = clip_by_global_norm(gradients, most)
        assert measured == norm and all(clipped[name] is g for name, g in gradients.items())
    zero = {"W": np.zeros((2, 3))}
    assert clip_by_global_norm(zero, 1e-300)[0]["W"] is zero["W"]


@pytest.mark.parametrize("most", [1.0, math.inf])
def test_a_nan_is_seen(most):
    gradients = random_gradients()
    gradients["W"][2, 1] = np.nan
    clipped, norm = clip_by_global_norm(gradients, most)
    assert math.isnan(norm) and math.isnan(global_norm(gradients))
    assert all(np.isnan(g).all() for g in clipped.values())                     # one nan cannot hide


@pytest.mark.filterwarnings("ignore:invalid value")
def test_an_infinity_is_seen():
    gradients = random_gradients() | {"g": np.array([-np.inf])}
    clipped, norm = clip_by_global_norm(gradients, 1.0)
    assert norm == math.inf and np.isnan(clipped["g"]).all()


@pytest.mark.parametrize("most", [0, 0.0, -1.0, math.nan, -math.inf])
def test_a_bound_that_is_not_positive_is_refused(most):
    with pytest.raises(ValueError, match=r"most = .* must be positive"):
        clip_by_global_norm(random_gradients(), most)


def test_against_torch():
    """torch adds 1e-6 to the norm before it divides; apart from that, the same."""
    torch = pytest.importorskip("torch")
    gradients = random_gradients(scale=3)
    leaves = [torch.zeros(g.shape, dtype=torch.float64, requires_grad=True) for g in gradients.values()]
    for leaf, g in zip(leaves, gradients.values()):
        leaf.grad = torch.tensor(g)
    norm = torch.nn.utils.clip_grad_norm_(leaves, 1.5)
    clipped, ours = clip_by_global_norm(gradients, 1.5)
    assert ours == pytest.approx(float(norm), rel=1e-14)
    for leaf, g in zip(leaves, clipped.values()):
        assert np.allclose(leaf.grad.numpy() * (ours + 1e-6) / ours, g, rtol=1e-13, atol=0)
