import copy
import io
import math

import numpy as np
import pytest

from minideepseek.autograd.params import flatten, gradients as tree_gradients
from minideepseek.autograd.tape import Tape, Tensor
from minideepseek.model.config import Config
from minideepseek.model.transformer import init, losses, model_outline, next_token_targets, trainable
from minideepseek.training.adamw import AdamWState, adamw_step, decays, new_state

SHAPES = {"E": (7, 4), "layers.0.attention.W_O": (4, 5), "layers.0.ffn.W_gate": (2, 4, 3), "g_final": (4,), "W_head": (4, 7)}


def random_arrays(rng, dtype=np.float64, shapes=SHAPES, scale=1.0):
    return {name: (scale * rng.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()}


def train(steps, dtype=np.float64, seed=0, **options):
    """Some steps on random gradients: the weights and the state."""
    rng = np.random.default_rng(seed)
    flat = random_arrays(rng, dtype)
    state = new_state(flat)
    for step in range(steps):
        adamw_step(flat, random_arrays(rng, dtype), state, lr=0.01 / (step + 1), **options)
    return flat, state


def scalar_adamw(theta, gradients, rates, decay, beta1, beta2, eps):
    """One number at a time, from the sums the moments stand for: no recursion shared with the code under test."""
    for t, lr in enumerate(rates, 1):
        m_hat = sum(beta1 ** (t - i) * g for i, g in enumerate(gradients[:t], 1)) / sum(beta1 ** (t - i) for i in range(1, t + 1))
        v_hat = sum(beta2 ** (t - i) * g * g for i, g in enumerate(gradients[:t], 1)) / sum(beta2 ** (t - i) for i in range(1, t + 1))
        theta = theta - lr * (m_hat / (math.sqrt(v_hat) + eps) + decay * theta)
    return theta


def test_two_steps_by_hand():
    flat = {"W": np.array([[1.0]])}
    state = new_state(flat)
    adamw_step(flat, {"W": np.array([[0.5]])}, state, lr=0.1, eps=1e-300)
    # m = 0.1 * 0.5 and v = 0.05 * 0.25, corrected: 0.5 and 0.25; 1 * 0.99 - 0.1 * 0.5 / 0.5
    assert state.step == 1 and state.m["W"].item() == pytest.approx(0.05) and state.v["W"].item() == pytest.approx(0.0125)
    assert flat["W"].item() == pytest.approx(0.89, rel=1e-14)
    adamw_step(flat, {"W": np.array([[-0.5]])}, state, lr=0.1, eps=1e-300)
    # m = 0.045 - 0.05, over 0.19: -0.5 / 19; v_hat = 0.25 again; 0.89 * 0.99 + 0.1 / 19
    assert state.step == 2 and state.m["W"].item() == pytest.approx(-0.005) and state.v["W"].item() == pytest.approx(0.024375)
    assert flat["W"].item() == pytest.approx(0.8811 + 0.1 / 19, rel=1e-14)


@pytest.mark.parametrize("seed", range(4))
def test_against_one_number_at_a_time(seed):
    rng = np.random.default_rng(seed)
    shapes = {"E": tuple(rng.integers(1, 5, 2)), "W": tuple(rng.integers(1, 5, 2)), "W3": tuple(rng.integers(1, 4, 3)), "g": (3,)}
    flat = random_arrays(rng, shapes=shapes)
    start = {name: theta.copy() for name, theta in flat.items()}
    grads = [random_arrays(rng, shapes=shapes, scale=10.0 ** rng.integers(-3, 2)) for _ in range(20)]
    rates = [0.02 * rng.random() for _ in grads]
    options = {"beta1": 0.8, "beta2": 0.97, "eps": 1e-4}
    state = new_state(flat)
    for g, lr in zip(grads, rates):
        adamw_step(flat, g, state, lr=lr, weight_decay=0.3, **options)
    for name, theta in flat.items():
        decay = 0.3 if name in ("W", "W3") else 0.0
        for where in np.ndindex(theta.shape):
            expected = scalar_adamw(start[name][where], [g[name][where] for g in grads], rates, decay, **options)
            assert theta[where] == pytest.approx(expected, rel=1e-12, abs=1e-13)


def test_which_weights_decay():
    config = Config(vocab_size=11, d_model=8, n_layers=2, n_dense_layers=1, d_ff=6, n_heads=2, q_rank=4, kv_rank=4, d_nope=4, d_rope=2, d_value=4,
                    n_routed=4, top_k=2, d_expert=3, n_groups=2, n_groups_kept=1)
    kinds = {True: set(), False: set()}
    for name, leaf in flatten(model_outline(config)).items():
        kinds[decays(name, leaf)].add(name.split(".")[-1])
    assert kinds[False] == {"E", "g_attention", "g_q", "g_kv", "g_ffn", "g_final", "g_hidden", "g_embedding", "b_select"}
    assert {"W_head", "W_router", "W_gate", "W_shared_down", "W_DKV", "W_merge"} <= kinds[True]
    assert all(name.startswith("W_") for name in kinds[True])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_with_no_gradient_a_weight_shrinks_by_lr_times_decay_exactly(dtype):
    flat = random_arrays(np.random.default_rng(0), dtype)
    start = {name: theta.copy() for name, theta in flat.items()}
    zero = {name: np.zeros_like(theta) for name, theta in flat.items()}
    state = new_state(flat)
    for _ in range(3):
        adamw_step(flat, zero, state, lr=0.25, weight_decay=0.5)
    for name, theta in flat.items():
        shrunk = start[name].copy()
        if decays(name, theta):
            for _ in range(3):
                shrunk = shrunk * (1 - 0.125)                                   # not one bit else
        assert np.array_equal(theta, shrunk)
        assert not state.m[name].any() and not state.v[name].any()


def test_decay_touches_neither_moment():
    (plain, without), (shrunk, with_decay) = train(10, weight_decay=0.0), train(10, weight_decay=0.5)
    for name in plain:
        assert without.m[name].tobytes() == with_decay.m[name].tobytes() and without.v[name].tobytes() == with_decay.v[name].tobytes()
        assert (plain[name].tobytes() != shrunk[name].tobytes()) == decays(name, plain[name])


def test_decay_takes_a_share_of_the_weight_before_the_step():
    rng = np.random.default_rng(1)
    theta, g = rng.standard_normal((2, 4, 5))
    ends = []
    for decay in (0.0, 0.2):
        flat = {"W": theta.copy()}
        adamw_step(flat, {"W": g}, new_state(flat), lr=0.1, weight_decay=decay)
        ends.append(flat["W"])
    assert np.allclose(ends[0] - ends[1], 0.1 * 0.2 * theta, rtol=0, atol=1e-16)


def test_the_first_step_is_lr_whatever_the_gradient():
    g = np.array([1e-6, -1.0, 1e6, 0.0])
    flat = {"g": np.zeros(4)}
    adamw_step(flat, {"g": g}, new_state(flat), lr=0.01, eps=1e-20)
    assert np.allclose(flat["g"], -0.01 * np.sign(g), rtol=1e-12, atol=0)


def test_memory_moves_a_weight_after_its_gradient_is_gone():
    flat = {"g": np.zeros(1)}
    state = new_state(flat)
    adamw_step(flat, {"g": np.ones(1)}, state, lr=0.1)
    after_one = flat["g"].copy()
    adamw_step(flat, {"g": np.zeros(1)}, state, lr=0.1)
    assert flat["g"] < after_one < 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_dtype_is_that_of_the_weight(dtype):
    flat = random_arrays(np.random.default_rng(0), dtype)
    state = new_state(flat)
    adamw_step(flat, random_arrays(np.random.default_rng(1), dtype), state, lr=np.float64(0.01), eps=np.float64(1e-20))
    assert {array.dtype for part in (flat, state.m, state.v) for array in part.values()} == {np.dtype(dtype)}
    assert all(np.isfinite(theta).all() for theta in flat.values())


def test_numpy_scalars_compute_what_python_numbers_do():
    """A float64 scalar would compute half of the step in float64: other bits, and twice the time."""
    options = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    flat, _ = train(5, np.float32, **options)
    same, _ = train(5, np.float32, **{name: np.float64(value) for name, value in options.items()})
    assert all(flat[name].tobytes() == same[name].tobytes() for name in flat)


def test_weights_and_state_change_in_place_and_gradients_do_not():
    rng = np.random.default_rng(0)
    flat, g = random_arrays(rng), random_arrays(rng)
    state = new_state(flat)
    held = [dict(flat), dict(state.m), dict(state.v)]
    before = [{name: array.copy() for name, array in part.items()} for part in held]
    for array in g.values():
        array.flags.writeable = False
    assert adamw_step(flat, g, state, lr=0.1) is None
    for now, arrays, old in zip((flat, state.m, state.v), held, before):
        for name, array in arrays.items():
            assert now[name] is array and (array != old[name]).all()
    assert not any(np.shares_memory(state.m[name], array) or np.shares_memory(state.v[name], array) for name, array in flat.items())


def test_byte_for_byte_the_same_in_any_order_of_names():
    flat, state = train(5, np.float32)
    again, state_again = train(5, np.float32)
    assert all(flat[name].tobytes() == again[name].tobytes() and state.m[name].tobytes() == state_again.m[name].tobytes() for name in flat)
    g = random_arrays(np.random.default_rng(9), np.float32)
    adamw_step(flat, g, state, lr=0.01)
    turned = {name: again[name] for name in reversed(again)}
    adamw_step(turned, g, state_again, lr=0.01)
    assert all(flat[name].tobytes() == turned[name].tobytes() for name in flat)


@pytest.mark.parametrize("way", ["file", "copy"])
def test_a_run_resumes_from_its_state(way):
    flat, state = train(3, np.float32)
    if way == "file":
        file = io.BytesIO()
        np.savez(file, step=state.step, **{f"{part} {name}": array for part, arrays in (("w", flat), ("m", state.m), ("v", state.v))
                                          for name, array in arrays.items()})
        file.seek(0)
        with np.load(file) as read:
            resumed, m, v = [{name: read[f"{part} {name}"] for name in flat} for part in "wmv"]
            resumed_state = AdamWState(m, v, int(read["step"]))
    else:
        resumed, resumed_state = copy.deepcopy((flat, state))
    rng = np.random.default_rng(5)
    for _ in range(3):
        g = random_arrays(rng, np.float32)
        adamw_step(flat, g, state, lr=0.01)
        adamw_step(resumed, g, resumed_state, lr=0.01)
    assert resumed_state.step == state.step == 6
    assert all(flat[name].tobytes() == resumed[name].tobytes() for name in flat)


def _gradients(**changes):
    return {name: np.zeros(shape) for name, shape in SHAPES.items()} | changes


@pytest.mark.parametrize("gradients, message", [
    ({name: np.zeros(shape) for name, shape in SHAPES.items() if name != "g_final"}, r"gradients and weights do not fit: missing \['g_final'\], unexpected none"),
    (_gradients(b_select=np.zeros(3)), r"missing none, unexpected \['b_select'\]"),
    (_gradients(g_final=np.zeros((4, 1))), r"g_final of gradients is float64 \(4, 1\), its weight is float64 \(4,\)"),
    (_gradients(g_final=np.zeros(())), r"g_final of gradients is float64 \(\)"),
    (_gradients(g_final=np.zeros(4, np.float32)), r"g_final of gradients is float32 \(4,\), its weight is float64"),
    (_gradients(g_final=None), "g_final of gradients is a NoneType, expected an array"),
    (_gradients(g_final=Tensor(np.zeros(4))), "g_final of gradients is a Tensor, expected an array")])
def test_gradients_that_do_not_fit_are_refused_before_anything_changes(gradients, message):
    flat, state = train(1)
    before = copy.deepcopy((flat, state))
    with pytest.raises(ValueError, match=message):
        adamw_step(flat, gradients, state, lr=0.1)
    assert state.step == before[1].step
    assert all(now[name].tobytes() == old[name].tobytes() for now, old in zip((flat, state.m, state.v), (before[0], before[1].m, before[1].v)) for name in flat)


def test_a_state_of_another_model_is_refused():
    flat, state = train(1)
    del state.v["E"]
    with pytest.raises(ValueError, match=r"state.v and weights do not fit: missing \['E'\]"):
        adamw_step(flat, _gradients(), state, lr=0.1)
    with pytest.raises(ValueError, match=r"E of state.m is float32 \(7, 4\), its weight is float64"):
        adamw_step(flat, _gradients(), new_state({name: theta.astype(np.float32) for name, theta in flat.items()}), lr=0.1)


def test_weights_that_cannot_be_written_or_are_no_arrays_are_refused():
    flat, state = train(1)
    start = flat["E"].copy()
    flat["g_final"].flags.writeable = False
    with pytest.raises(ValueError, match="g_final of the weights is read-only"):
        adamw_step(flat, _gradients(), state, lr=0.1)
    with pytest.raises(ValueError, match="g_final of the weights is a Tensor, expected an array"):
        adamw_step(flat | {"g_final": Tensor(np.zeros(4))}, _gradients(), state, lr=0.1)
    assert np.array_equal(flat["E"], start) and state.step == 1


@pytest.mark.parametrize("option, value", [
    ("lr", math.nan), ("lr", math.inf), ("lr", -math.inf), ("lr", -1e-3), ("beta1", 1.0), ("beta1", -0.1), ("beta2", 1.0), ("beta2", math.nan),
    ("eps", 0.0), ("eps", math.nan), ("eps", math.inf), ("weight_decay", -0.1), ("weight_decay", math.nan), ("weight_decay", math.inf)])
def test_numbers_out_of_range_are_refused(option, value):
    flat, state = train(1)
    with pytest.raises(ValueError, match=f"^{option} = {value} must be"):
        adamw_step(flat, _gradients(), state, **{"lr": 0.1, option: value})
    assert state.step == 1


def test_a_model_learns_a_sentence():
    """The whole way: tape, gradients of the tree, step; the arrays of the model are those that move."""
    config = Config(vocab_size=11, d_model=8, n_layers=1, n_dense_layers=0, d_ff=6, n_heads=2, q_rank=None, kv_rank=4, d_nope=4, d_rope=2, d_value=4,
                    n_routed=4, top_k=2, d_expert=3, n_groups=1, n_groups_kept=1, n_mtp=0, max_positions=16, yarn_factor=1.0)
    weights = trainable(init(config, np.random.default_rng(0), std=0.3))
    flat = {name: leaf.data for name, leaf in flatten(weights).items() if isinstance(leaf, Tensor)}
    state = new_state(flat)
    ids = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    found = []
    for _ in range(60):
        weights = trainable(weights)                                            # the same arrays, no old gradients
        with Tape() as tape:
            loss = losses(ids, next_token_targets(ids), weights, config).main
        tape.backward(loss)
        adamw_step(flat, tree_gradients(weights), state, lr=0.03)
        found.append(float(loss.data))
    assert found[0] > 1.5 and found[-1] < 0.1 and all(leaf.data is flat[name] for name, leaf in flatten(weights).items() if name in flat)
    assert "layers.0.b_select" not in flat and not weights.layers[0].b_select.any()


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-6), (np.float64, 1e-12)])
def test_against_torch(dtype, tolerance):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    flat = random_arrays(rng, dtype)
    leaves = {name: torch.tensor(theta, requires_grad=True) for name, theta in flat.items()}
    groups = [{"params": [leaf for name, leaf in leaves.items() if decays(name, leaf) is kind], "weight_decay": 0.1 * kind} for kind in (True, False)]
    theirs = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    state = new_state(flat)
    for step in range(25):
        lr = 1e-2 * (1 + step % 3)
        g = random_arrays(rng, dtype, scale=10.0 ** (step % 5 - 3))
        for name, leaf in leaves.items():
            leaf.grad = torch.tensor(g[name])
        for group in theirs.param_groups:
            group["lr"] = lr
        theirs.step()
        adamw_step(flat, g, state, lr=lr)
    for name, leaf in leaves.items():
        assert np.abs(leaf.detach().numpy() - flat[name]).max() <= tolerance
