import ml_dtypes
import numpy as np
import pytest

from minideepseek.precision.formats import E2M1, E4M3, E5M2
from minideepseek.precision.online import delayed_scale, drift, online_scale

ENTRIES = 64 * 256


def step_at(at, during, after, n=30):
    """Sizes 1, then `during` at step `at`, then `after`."""
    sizes = np.ones(n)
    sizes[at], sizes[at + 1:] = during, after
    return sizes


def test_by_hand():
    assert online_scale(np.array([[1.0, -14.0], [3.0, 0.0]])) == 14 / 448 and online_scale([3.0], E2M1) == 0.5
    assert delayed_scale([2, 7, 3]) == 7 / 448 and delayed_scale([7.0], E5M2) == 7 / 57_344
    assert online_scale(np.zeros(3)) == delayed_scale([0, 0]) == np.float32(1e-4) / np.float32(448)        # the floor of tiles


def test_the_delayed_scale_knows_the_past_and_not_the_order():
    rng = np.random.default_rng(0)
    history = rng.random(16)
    assert delayed_scale(history) == delayed_scale(rng.permutation(history)) == np.float32(history.max()) / np.float32(448)


@pytest.mark.parametrize("n", [1, 4, 16])
def test_a_jump_saturates_one_step_of_the_delayed_scale_however_long_the_history(n):
    run = drift(step_at(6, 8, 8), n=n)
    assert 0.5 < run.saturated[6, 1] / ENTRIES < 0.65 and run.error[6, 1] > 0.5
    others = np.delete(run.saturated[:, 1], 6)
    assert others.max() / ENTRIES < 1e-3 and np.delete(run.error[:, 1], 6).max() < 0.03                    # chance alone: two maxima differ
    assert not run.saturated[:, 0].any() and run.error[:, 0].max() < 0.03


@pytest.mark.parametrize("n", [1, 4, 16])
def test_a_spike_is_remembered_for_n_steps_and_no_longer(n):
    run = drift(step_at(6, 1e5, 1), n=n)
    ratio = run.scale[:, 1] / run.scale[:, 0]
    assert np.flatnonzero(ratio > 1e4).tolist() == list(range(7, 7 + n)) and ratio[7 + n:].max() < 2
    bad = np.flatnonzero(run.error[:, 1] > 0.2).tolist()
    assert bad == list(range(6, 7 + n)) and (run.vanished[7:7 + n, 1] > ENTRIES / 4).all() and run.vanished[7 + n:, 1].max() < 10
    assert run.error[:, 0].max() < 0.03 and not run.saturated[:, 0].any()


def test_wasted_range_costs_e4m3_little_and_e2m1_much():
    after = slice(7, 23)
    wide, narrow = drift(step_at(6, 1e3, 1)), drift(step_at(6, 8, 1), fmt=E2M1)
    assert wide.error[after, 1].max() < 1.03 * wide.error[after, 0].min() and 0 < wide.vanished[after, 1].mean() < ENTRIES / 100
    assert narrow.error[after, 1].min() > 4 * narrow.error[after, 0].max()


def test_growth_keeps_the_delayed_scale_behind():
    calm, growing = drift(np.ones(40), n=4), drift(1.3 ** np.arange(40), n=4)
    assert (growing.saturated[:, 1] > 0).mean() > 0.8 > (calm.saturated[:, 1] > 0).mean()
    assert growing.saturated[:, 0].sum() == calm.saturated[:, 0].sum() == 0


@pytest.mark.parametrize("fmt, dtype", [(E4M3, ml_dtypes.float8_e4m3fn), (E5M2, ml_dtypes.float8_e5m2)])
def test_drift_equals_a_plain_loop(fmt, dtype):
    sizes, n, shape = np.array([1.0, 30, 1, 0.01]), 2, (8, 16)
    run = drift(sizes, n=n, fmt=fmt, shape=shape, seed=3)
    rng = np.random.default_rng(3)
    seen = [np.abs(rng.standard_normal(shape)).max() for _ in range(n)]
    for t, size in enumerate(sizes):
        x = size * rng.standard_normal(shape)
        for column, amax in enumerate((np.abs(x).max(), max(seen[-n:]))):
            scale = float(np.float32(amax) / np.float32(fmt.max))
            back = scale * np.clip(x / scale, -fmt.max, fmt.max).astype(dtype).astype(float)
            assert run.scale[t, column] == scale and run.vanished[t, column] == (back == 0).sum()
            assert run.saturated[t, column] == (np.abs(x) > amax * (1 + 1e-6)).sum()
            assert run.error[t, column] == pytest.approx(np.sqrt(((back - x) ** 2).sum() / (x ** 2).sum()), rel=1e-12)
        seen.append(np.abs(x).max())


def test_a_hair_above_the_history_is_clamped_and_counted():
    """One entry a step, a history of one: it is clamped exactly when it is larger than the last, be it by less than 1 %."""
    steps, rng = 600, np.random.default_rng(0)
    run = drift(np.ones(steps), n=1, shape=(1, 1))
    size = np.abs([rng.standard_normal() for _ in range(steps + 1)])
    ratio = size[1:] / size[:-1]
    assert ((1.0001 < ratio) & (ratio < 1.01)).any() and run.saturated[:, 1].tolist() == (ratio > 1).tolist()


def test_a_history_of_what_was_left_never_learns():
    """The trap of the page: record the largest entry after clamping, and a jump saturates for ever."""
    history, x = [1.0] * 4, np.array([8.0, -2.0])
    for _ in range(20):
        limit = 448 * delayed_scale(history)
        history = [*history[1:], np.abs(np.clip(x, -limit, limit)).max()]
    assert delayed_scale(history) == pytest.approx(1 / 448)
    run = drift(step_at(3, 8, 8, n=12), n=4)
    assert run.scale[4, 1] > 6 * run.scale[3, 1]                                                           # ours learns in one step


@pytest.mark.parametrize("call, message", [
    (lambda: delayed_scale([]), r"history = \[\] must be"),
    (lambda: delayed_scale([1, -2]), r"history = \[ 1. -2.\] must be"),
    (lambda: delayed_scale([1, np.nan]), "history = .* must be"),
    (lambda: delayed_scale([[1, 2]]), "history = .* must be"),
    (lambda: delayed_scale([1, np.inf]), "numbers that float32 cannot hold"),
    (lambda: online_scale([1, np.nan]), "numbers that float32 cannot hold"),
    (lambda: drift([]), r"sizes = \[\], n = 16"),
    (lambda: drift([1, 0]), r"sizes = \[1. 0.\], n = 16"),
    (lambda: drift([1, np.nan]), "sizes = "),
    (lambda: drift([[1.0]]), "sizes = "),
    (lambda: drift([1.0], n=0), "n = 0"),
])
def test_what_cannot_be_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
