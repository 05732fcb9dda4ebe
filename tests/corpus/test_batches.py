import numpy as np
import pytest

from minideepseek.corpus.batches import IGNORE, whole, windows

IDS = np.arange(1_000, 1_500)                                            # every token tells where it stands
STARTS = np.array([0, 7, 30, 31, 100, 250, 400, 480, 495])


def test_seed_and_step_determine_the_batch():
    batches = {(seed, step): windows(IDS, seed=seed, step=step, batch=8, length=16)[0] for seed in range(5) for step in range(20)}
    for (seed, step), tokens in reversed(batches.items()):               # in any order, and whatever came before
        np.random.seed(step)
        assert np.array_equal(windows(IDS, seed=seed, step=step, batch=8, length=16)[0], tokens)
    assert len({tokens.tobytes() for tokens in batches.values()}) == 100      # (0, 1) is not (1, 0)


def test_the_same_batch_on_every_machine():
    assert (windows(IDS, seed=0, step=0, batch=4, length=3)[0][:, 0] - 1_000).tolist() == [422, 316, 254, 134]
    assert (windows(IDS, seed=7, step=1_000, batch=4, length=3, starts=STARTS)[0][:, 0] - 1_000).tolist() == [100, 7, 7, 250]


@pytest.mark.parametrize("starts", [None, STARTS])
def test_targets_are_the_next_tokens_and_the_windows_are_whole(starts):
    tokens, targets = windows(IDS, seed=1, step=2, batch=300, length=16, starts=starts)
    assert tokens.shape == targets.shape == (300, 16) and tokens.dtype == targets.dtype == np.int64
    assert np.array_equal(targets, tokens + 1) and (np.diff(tokens, axis=1) == 1).all()
    assert tokens.min() >= 1_000 and targets.max() <= 1_499


def test_any_corpus_is_read_as_it_stands():
    ids = np.random.default_rng(0).integers(0, 50, 200)
    before = ids.copy()
    tokens, targets = windows(ids, seed=0, step=0, batch=64, length=10)
    row = ids.tobytes()
    for token, target in zip(tokens, targets):
        assert np.concatenate([token[:1], target]).tobytes() in row and np.array_equal(token[1:], target[:-1])
    assert np.array_equal(ids, before) and not np.shares_memory(ids, tokens)


def test_windows_begin_at_starts_that_leave_room():
    tokens, _ = windows(IDS, seed=0, step=0, batch=2_000, length=16, starts=STARTS)
    assert set(tokens[:, 0] - 1_000) == {0, 7, 30, 31, 100, 250, 400, 480}      # 480 + 16 + 1 = 497 fits, 495 does not
    edge, _ = windows(IDS, seed=0, step=0, batch=2_000, length=19, starts=STARTS)
    assert 480 in edge[:, 0] - 1_000 and windows(IDS, seed=0, step=0, batch=200, length=20, starts=STARTS)[0][:, 0].max() == 1_400


@pytest.mark.parametrize("n, starts, possible", [(40, None, range(31)), (500, STARTS, [0, 7, 30, 31, 100, 250, 400, 480])])
def test_every_start_is_equally_likely(n, starts, possible):
    """Over many steps, as a run draws them; the first place and the last come like the others."""
    drawn = np.concatenate([windows(IDS[:n], seed=0, step=step, batch=8, length=9, starts=starts)[0][:, 0] - 1_000 for step in range(1_000)])
    counts = np.array([(drawn == start).sum() for start in possible])
    assert counts.sum() == 8_000
    chi_square, degrees = ((counts - 8_000 / len(counts)) ** 2).sum() * len(counts) / 8_000, len(counts) - 1
    assert abs(chi_square - degrees) < 4 * np.sqrt(2 * degrees)              # neither uneven nor suspiciously even


def test_a_corpus_of_one_window():
    tokens, targets = windows(IDS[:5], seed=0, step=0, batch=3, length=4)
    assert tokens.tolist() == [[1_000, 1_001, 1_002, 1_003]] * 3 and targets[0].tolist() == [1_001, 1_002, 1_003, 1_004]


@pytest.mark.parametrize("n, starts, message", [
    (4, None, "ids has 4 tokens: a window takes 4 and one more"),
    (0, None, "ids has 0 tokens: a window takes 4"),
    (4, np.array([0]), "ids has 4 tokens: a window takes 4"),
    (20, np.array([17, 19]), "no window of 4 tokens begins at one of the 2 starts"),
    (20, np.array([], np.int64), "no window of 4 tokens begins at one of the 0 starts"),
])
def test_no_window_fits(n, starts, message):
    with pytest.raises(ValueError, match=message):
        windows(IDS[:n], seed=0, step=0, batch=2, length=4, starts=starts)


def test_whole_texts_by_hand():
    tokens, targets = whole([np.array([9, 1, 2, 3]), np.array([9, 4]), np.array([9, 5, 6])])
    assert tokens.tolist() == [[9, 1, 2], [9, 0, 0], [9, 5, 0]]
    assert targets.tolist() == [[1, 2, 3], [4, IGNORE, IGNORE], [5, 6, IGNORE]] and IGNORE == -100
    assert tokens.dtype == targets.dtype == np.int64


def test_every_text_is_whole():
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 300, n) for n in rng.integers(2, 40, 50)]
    tokens, targets = whole(texts)
    assert tokens.shape == targets.shape == (50, max(map(len, texts)) - 1)
    for text, row, goal in zip(texts, tokens, targets):
        n = len(text) - 1
        assert np.array_equal(row[:n], text[:-1]) and np.array_equal(goal[:n], text[1:])
        assert (goal[n:] == IGNORE).all() and ((row >= 0) & (row < 300)).all()     # what fills up must be an id that can be looked up
    assert (targets != IGNORE).sum() == sum(map(len, texts)) - 50


@pytest.mark.parametrize("texts, message", [
    ([], "texts is empty"),
    ([np.array([1, 2]), np.array([1])], r"texts\[1\] has 1 tokens: at least 2 are needed"),
    ([np.array([], np.int64)], r"texts\[0\] has 0 tokens: at least 2 are needed"),
])
def test_texts_that_predict_nothing_are_refused(texts, message):
    with pytest.raises(ValueError, match=message):
        whole(texts)


def test_what_is_ignored_is_what_the_loss_ignores():
    from minideepseek.model.transformer import IGNORE as of_the_loss
    assert IGNORE == of_the_loss
