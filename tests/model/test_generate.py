import dataclasses

import numpy as np
import pytest

from minideepseek.model.config import Config
from minideepseek.model.decode import new_caches
from minideepseek.model.generate import distribution, draw, generate
from minideepseek.model.transformer import init, trainable, transformer

CONFIG = Config(vocab_size=50, d_model=24, n_layers=2, n_dense_layers=1, d_ff=20, max_positions=40, n_heads=2, q_rank=8, kv_rank=6, d_nope=4, d_rope=4,
                d_value=4, n_routed=4, top_k=2, d_expert=8, n_groups=1, n_groups_kept=1, n_mtp=0)
WEIGHTS = init(CONFIG, np.random.default_rng(0), std=0.3, dtype=np.float64)
PROMPT = [3, 1, 4, 1, 5]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 5}, {"temperature": 1.3, "top_p": 0.8}])
@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_with_and_without_a_cache_the_same_text(options, chunk):
    cached = list(generate(PROMPT, WEIGHTS, CONFIG, max_new_tokens=20, chunk=chunk, **options))
    assert cached == list(generate(PROMPT, WEIGHTS, CONFIG, max_new_tokens=20, use_cache=False, **options)) and len(cached) == 20


def test_greedy_is_the_argmax_at_every_step():
    ids = np.array([PROMPT])
    for token in generate(PROMPT, WEIGHTS, CONFIG, max_new_tokens=8):
        assert token == transformer(ids, WEIGHTS, CONFIG).logits.data[0, -1].argmax()
        ids = np.concatenate([ids, [[token]]], axis=1)


def test_a_model_without_latent_attention_recomputes():
    config = dataclasses.replace(CONFIG, attention="mqa")
    weights = init(config, np.random.default_rng(0), std=0.3, dtype=np.float64)
    ids, texts = np.array([PROMPT]), [list(generate(PROMPT, weights, config, max_new_tokens=5, use_cache=use)) for use in (True, False)]
    assert texts[0] == texts[1] and texts[0][0] == transformer(ids, weights, config).logits.data[0, -1].argmax()
    with pytest.raises(ValueError, match="attention = 'mqa': latent caches are those of 'mla'"):
        new_caches(config, 1, 5, np.float64)


def test_seeds_repeat_and_differ():
    texts = [list(generate(PROMPT, WEIGHTS, CONFIG, max_new_tokens=20, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_it_streams_and_stops_after_a_stop_token():
    options = {"max_new_tokens": 20, "temperature": 1.0, "seed": 3}
    stream = generate(PROMPT, WEIGHTS, CONFIG, **options)
    first, second, third = next(stream), next(stream), next(stream)
    assert len({first, second, third}) == 3
    assert list(generate(PROMPT, WEIGHTS, CONFIG, stop=[third], **options)) == [first, second, third]
    assert list(generate(PROMPT, trainable(WEIGHTS), CONFIG, max_new_tokens=0)) == []


def test_it_fills_the_position_table_to_the_last_place():
    assert len(list(generate(PROMPT, WEIGHTS, CONFIG, max_new_tokens=35))) == 35


@pytest.mark.parametrize("prompt, options, message", [
    ([], {}, r"prompt has shape \(0,\): it must be a row of at least one token"),
    ([[1, 2]], {}, r"prompt has shape \(1, 2\)"),
    ([1, 50], {}, r"ids\[0, 1\] = 50 is not a token: vocab_size = 50"),
    ([1.5], {}, "ids must be an integer array"),
    (PROMPT, {"max_new_tokens": 36}, "a prompt of 5 tokens and 36 new ones exceed max_positions = 40"),
    ([1] * 50, {}, "a prompt of 50 tokens and 4 new ones exceed max_positions = 40"),
    (PROMPT, {"max_new_tokens": -1}, "max_new_tokens = -1 must be a whole number, not negative"),
    (PROMPT, {"temperature": -0.1}, "temperature = -0.1 must be 0 or a positive number"),
    (PROMPT, {"temperature": float("nan")}, "temperature = nan must be"),
    (PROMPT, {"temperature": float("inf")}, "temperature = inf must be"),
    (PROMPT, {"top_p": 0.0}, "top_p = 0.0 must be above 0 and at most 1"),
    (PROMPT, {"top_p": 1.5}, "top_p = 1.5 must be"),
    (PROMPT, {"top_k": 0}, "top_k = 0 must be a whole number of at least 1"),
    (PROMPT, {"max_new_tokens": 2.0}, "max_new_tokens = 2.0 must be a whole number"),
    (PROMPT, {"top_k": 2.5}, "top_k = 2.5 must be a whole number"),
    (PROMPT, {"chunk": 0}, "chunk = 0 must be a positive whole number"),
])
def test_bad_input_is_refused_at_the_call(prompt, options, message):
    with pytest.raises(ValueError, match=message):
        generate(prompt, WEIGHTS, CONFIG, **{"max_new_tokens": 4} | options)


def test_distributions_by_hand():
    p = np.array([0.1, 0.4, 0.3, 0.2])
    np.testing.assert_allclose(distribution(np.log(p)), p)
    np.testing.assert_allclose(distribution(np.log(p), temperature=0.5), p ** 2 / (p ** 2).sum())
    np.testing.assert_allclose(distribution(np.log(p), top_k=2), [0, 4 / 7, 3 / 7, 0])
    np.testing.assert_allclose(distribution(np.log(p), top_p=0.7), [0, 4 / 7, 3 / 7, 0])
    np.testing.assert_allclose(distribution(np.log(p), top_p=0.71), [0, 4 / 9, 3 / 9, 2 / 9])
    np.testing.assert_allclose(distribution(np.log(p), top_p=1e-9), [0, 1, 0, 0])
    assert distribution(np.log([0.5, 0.2, 0.2, 0.1]), top_p=0.5).tolist() == [1, 0, 0, 0]           # reached exactly is reached
    assert np.array_equal(distribution(np.append(np.zeros(9), -40.0), top_p=1.0) > 0, np.ones(10, bool))
    assert distribution(np.array([0.0, -800.0]), temperature=1e-320).tolist() == [1, 0]
    with pytest.raises(ValueError, match="hold nan"):
        draw(distribution(np.array([np.nan, 0.0])), np.random.default_rng(0))
    np.testing.assert_allclose(distribution(np.log(p), top_k=3, top_p=0.7), [0, 4 / 7, 3 / 7, 0])
    assert distribution(np.log(p), temperature=0).tolist() == [0, 1, 0, 0]
    assert distribution(np.zeros(4), temperature=0).tolist() == [1, 0, 0, 0] == distribution(np.zeros(4), top_k=1).tolist()


def test_distributions_of_a_batch_are_those_of_its_rows():
    logits = np.random.default_rng(0).standard_normal((2, 3, 7))
    together = distribution(logits, 0.8, 4, 0.9)
    for index in np.ndindex(2, 3):
        np.testing.assert_allclose(together[index], distribution(logits[index], 0.8, 4, 0.9))


def test_draws_follow_the_probabilities_and_never_leave_them():
    p, rng = np.array([0.0, 0.5, 0.0, 0.3, 0.2, 0.0]), np.random.default_rng(0)
    counts = np.bincount([draw(p, rng) for _ in range(20_000)], minlength=6)
    expected = 20_000 * p[p > 0]
    assert not counts[p == 0].any() and ((counts[p > 0] - expected) ** 2 / expected).sum() < 13.8      # chi-square, 2 degrees, 0.001

    class AlmostOne:
        def random(self):
            return 1 - 2 ** -53

    assert draw(p, AlmostOne()) == 4
