import math
import sys

import numpy as np
import pytest

from minideepseek.training import schedule
from minideepseek.training.schedule import balance_speed, batch_size, learning_rate, mtp_weight

RUN = {"peak": 3e-4, "total": 1000, "warmup": 100, "decay": 300, "floor": 3e-5}


def rates(**changes):
    run = RUN | changes
    return np.array([learning_rate(s, **run) for s in range(run["total"])])


def test_learning_rate_by_hand():
    by_hand = rates(peak=1.0, total=10, warmup=2, decay=4, floor=0.1)
    r = math.sqrt(0.5)
    assert np.allclose(by_hand, [0.5, 1, 1, 1, 1, 1, 0.1 + 0.45 * (1 + r), 0.55, 0.1 + 0.45 * (1 - r), 0.1], rtol=1e-15, atol=0)


@pytest.mark.parametrize("warmup", [1, 3, 7, 100, 700])
def test_the_warm_up_reaches_the_peak_exactly_and_begins_above_zero(warmup):
    lr = rates(warmup=warmup)
    assert lr[0] == pytest.approx(3e-4 / warmup, rel=1e-15) and lr[warmup - 1] == 3e-4 == lr.max()
    assert (np.diff(lr[:warmup]) > 0).all() and np.allclose(np.diff(lr[:warmup]), 3e-4 / warmup, rtol=1e-9, atol=0)


@pytest.mark.parametrize("decay", [1, 2, 300, 900])
def test_the_decay_ends_at_the_floor_exactly_and_leaves_from_the_peak(decay):
    lr = rates(decay=decay)
    assert lr[-1] == 3e-5 and lr[1000 - decay - 1] == 3e-4 and lr[1000 - decay] < 3e-4
    assert (np.diff(lr[1000 - decay - 1:]) < 0).all()
    if decay % 2 == 0:
        assert lr[1000 - decay // 2 - 1] == pytest.approx((3e-4 + 3e-5) / 2, rel=1e-14)      # halfway in steps, halfway down


def test_no_jump_at_either_seam():
    lr = rates()
    assert np.abs(np.diff(lr)).max() <= 3e-4 / 100 * (1 + 1e-9)
    before, after = lr[699] - lr[700], lr[700] - lr[701]                      # a cosine leaves a plateau with slope zero
    assert before < after < (3e-4 - 3e-5) / 300 / 20
    assert lr[998] - lr[999] == pytest.approx(before, rel=1e-6)               # ... and arrives with slope zero, symmetric


def test_without_one_phase_or_the_other():
    assert (rates(warmup=0, decay=0) == 3e-4).all()
    assert rates(decay=0)[-1] == 3e-4 and rates(warmup=0)[0] == 3e-4
    whole = rates(warmup=400, decay=600)
    assert whole.argmax() == 399 and (np.diff(whole)[:399] > 0).all() and (np.diff(whole)[399:] < 0).all()
    assert learning_rate(0, peak=1.0, total=1, warmup=1, decay=0, floor=0.0) == 1
    assert (rates(floor=3e-4)[99:] == 3e-4).all()


def test_balance_speed():
    speed = [balance_speed(s, gamma=0.001, total=148, off=5) for s in range(148)]
    assert speed == [0.001] * 143 + [0.0] * 5
    assert balance_speed(9, gamma=0.001, total=10, off=0) == 0.001 and balance_speed(0, gamma=0.001, total=10, off=10) == 0


def test_mtp_weight():
    weight = [mtp_weight(s, first=0.3, then=0.1, total=148, change=100) for s in range(148)]
    assert weight == [0.3] * 100 + [0.1] * 48
    assert mtp_weight(9, first=0.3, then=0.1, total=10, change=10) == 0.3 and mtp_weight(0, first=0.3, then=0.1, total=10, change=0) == 0.1


def test_batch_size():
    assert [batch_size(s, first=4, last=10, ramp=3) for s in range(5)] == [4, 6, 8, 10, 10]
    assert [batch_size(s, first=1, last=3, ramp=5) for s in range(7)] == [1, 1, 1, 2, 2, 3, 3]
    sizes = [batch_size(s, first=3_072, last=15_360, ramp=1_000) for s in range(1_200)]
    assert sizes[0] == 3_072 and sizes[999] < sizes[1_000] == 15_360 == sizes[-1] and set(map(type, sizes)) == {int}
    assert set(np.diff(sizes[:1_001])) == {12, 13} and set(np.diff(sizes[1_000:])) == {0}       # 12.288 a step, no jump at the seam
    assert batch_size(0, first=4, last=10, ramp=0) == 10 and batch_size(50, first=4, last=4, ramp=9) == 4


def test_numpy_numbers_are_welcome_and_python_numbers_come_back():
    run = RUN | {"total": np.int64(1000)}
    for step in (0, 500, 999):
        value = learning_rate(np.int64(step), **run)
        assert type(value) is float and value == learning_rate(step, **RUN)
    assert type(batch_size(np.int64(2), first=np.int64(4), last=10, ramp=3)) is int


CALLS = {learning_rate: RUN | {"step": 5}, balance_speed: {"step": 5, "gamma": 0.001, "total": 10, "off": 2},
         mtp_weight: {"step": 5, "first": 0.3, "then": 0.1, "total": 10, "change": 4}, batch_size: {"step": 5, "first": 2, "last": 8, "ramp": 10}}
WRONG = [(function, name, value)
         for function, call in CALLS.items() for name in call
         for value in ([-1, math.nan, math.inf, "5", True, None] if isinstance(call[name], float) else [-1, 2.5, 5.0, "5", True, None])]


@pytest.mark.parametrize("function, name, value", WRONG, ids=lambda item: getattr(item, "__name__", repr(item)))
def test_every_argument_is_checked_and_named(function, name, value):
    with pytest.raises(ValueError, match=rf"^{name} = {value!r} must be"):
        function(**CALLS[function] | {name: value})


@pytest.mark.parametrize("function, changes, message", [
    (learning_rate, {"step": 1000}, "step = 1000 is past the last step: total = 1000"),
    (balance_speed, {"step": 10}, "step = 10 is past the last step: total = 10"),
    (mtp_weight, {"step": 10}, "step = 10 is past the last step: total = 10"),
    (learning_rate, {"total": 0}, "total = 0 must be a whole number of at least 1"),
    (learning_rate, {"warmup": 701}, "warmup = 701 and decay = 300 do not fit into total = 1000"),
    (learning_rate, {"floor": 4e-4}, "floor = 0.0004 exceeds peak = 0.0003"),
    (balance_speed, {"off": 11}, "off = 11 exceeds total = 10"),
    (mtp_weight, {"change": 11}, "change = 11 exceeds total = 10"),
    (batch_size, {"first": 9}, "first = 9 exceeds last = 8"),
    (batch_size, {"first": 0}, "first = 0 must be a whole number of at least 1")])
def test_arguments_that_contradict_each_other(function, changes, message):
    with pytest.raises(ValueError, match=message):
        function(**CALLS[function] | changes)


def test_the_picture(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "schedules.png"
    monkeypatch.setattr(sys, "argv", ["schedule.py", "--plot", str(picture)])
    schedule.demo()
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and str(picture) in capsys.readouterr().out
