import numpy as np
import pytest

from minideepseek.model.config import Config
from minideepseek.model.decode import module_decode, new_caches, transformer_decode
from minideepseek.model.transformer import init, predict_further, transformer

SMALL = dict(vocab_size=13, d_model=12, n_layers=3, n_dense_layers=1, d_ff=10, max_positions=12, n_heads=2, q_rank=6, kv_rank=5, d_nope=4, d_rope=2,
             d_value=3, yarn_original=8, n_routed=6, top_k=2, d_expert=5, n_groups=3, n_groups_kept=2, n_mtp=0)


def model(**fields):
    config, rng = Config(**SMALL | fields), np.random.default_rng(0)
    return config, init(config, rng, std=0.4, dtype=np.float64), rng.integers(0, 13, (2, 9))


@pytest.mark.parametrize("fields", [{}, {"q_rank": None}, {"rope_interleaved": False}, {"scoring": "softmax", "normalise": False}],
                         ids=["V3", "no query latent", "half-split", "V2"])
@pytest.mark.parametrize("cuts", [[9], [1] * 9, [4, 5], [1, 3, 1, 4], [8, 1]], ids=str)
def test_in_pieces_of_any_size_the_logits_are_those_of_the_whole(fields, cuts):
    config, weights, ids = model(**fields)
    out = transformer(ids, weights, config)
    caches, start, logits, hidden = new_caches(config, 2, 9, np.float64), 0, [], []
    for n in cuts:
        piece = transformer_decode(ids[:, start:start + n], weights, config, caches)
        logits.append(piece[0])
        hidden.append(piece[1])
        start += n
    assert np.abs(np.concatenate(logits, axis=1) - out.logits.data).max() < 1e-12
    assert np.abs(np.concatenate(hidden, axis=1) - out.hidden.data).max() < 1e-12


@pytest.mark.parametrize("fields", [{"n_mtp": 1}, {"n_mtp": 2, "mtp_reads_normed": False}, {"n_mtp": 2, "mtp_embedding_first": False}],
                         ids=["one", "two, before the norm", "two, hidden first"])
@pytest.mark.parametrize("size", [9, 4, 1])
def test_modules_in_pieces_of_any_size(fields, size):
    """What the model hands them, what they predict and what each hands to the next are those of `predict_further`."""
    config, weights, ids = model(**fields)
    out = transformer(ids, weights, config)
    caches = new_caches(config, 2, 9, np.float64)
    hidden = np.concatenate([transformer_decode(ids[:, start:start + size], weights, config, caches)[1] for start in range(0, 9, size)], axis=1)
    assert np.abs(hidden - (out.hidden if config.mtp_reads_normed else out.stream).data).max() < 1e-12
    caches = new_caches(config, 2, 9, np.float64, config.n_mtp)
    for k, (module, cache, whole) in enumerate(zip(weights.mtp, caches, predict_further(out, ids, weights, config), strict=True)):
        hidden, ahead = hidden[:, :8 - k], ids[:, k + 1:]
        logits, states = zip(*[module_decode(hidden[:, start:start + size], ahead[:, start:start + size], module, weights, config, cache)
                               for start in range(0, 8 - k, size)])
        hidden = np.concatenate(states, axis=1)
        assert cache.length == 8 - k and np.abs(np.concatenate(logits, axis=1) - whole.logits.data).max() < 1e-12
        assert np.abs(hidden - whole.hidden.data).max() < 1e-12


def test_after_forgetting_it_goes_on_from_there():
    config, weights, ids = model()
    whole = transformer(ids, weights, config).logits.data
    caches = new_caches(config, 2, 9, np.float64)
    transformer_decode((ids[:, :8] + 1) % 13, weights, config, caches)
    for cache in caches:
        cache.truncate(0)
    transformer_decode(ids[:, :5], weights, config, caches)
    transformer_decode((ids[:, 5:7] + 1) % 13, weights, config, caches)
    for cache in caches:
        cache.truncate(5)
    assert np.abs(transformer_decode(ids[:, 5:], weights, config, caches)[0] - whole[:, 5:]).max() < 1e-12


def test_float32_stays_float32():
    config, weights, ids = model()
    weights32 = init(config, np.random.default_rng(0))
    logits, hidden = transformer_decode(ids, weights32, config, new_caches(config, 2, 9, np.float32))
    assert logits.dtype == hidden.dtype == np.float32


def test_beyond_the_cache_and_beyond_the_position_table():
    config, weights, ids = model()
    caches = new_caches(config, 2, 4, np.float64)
    with pytest.raises(ValueError, match="the cache holds 2 sequences of 4 tokens, 0 are filled: 9 more of 2 sequences do not fit"):
        transformer_decode(ids, weights, config, caches)
    caches = new_caches(config, 2, 20, np.float64)
    transformer_decode(ids, weights, config, caches)
    with pytest.raises(ValueError, match="9 tokens in the cache and 9 new ones exceed the position table, max_positions = 12"):
        transformer_decode(ids, weights, config, caches)
    with pytest.raises(ValueError, match="an empty batch"):
        transformer_decode(ids[:, :0], weights, config, caches)
    with pytest.raises(ValueError, match="ids must be an integer array"):
        transformer_decode([[1]], weights, config, caches)


@pytest.mark.parametrize("spoil, message", [
    (lambda caches: caches[0].truncate(1), r"3 of lengths \[1, 2\]"), (lambda caches: caches.pop(), "2 of lengths .* expected 3"),
    (lambda caches: caches.clear(), "0 of lengths"), (lambda caches: [setattr(c, "c_kv", c.c_kv.astype("f4")) for c in caches], "float32.* of dtype float64")])
def test_caches_that_do_not_fit_are_refused(spoil, message):
    config, weights, ids = model()
    caches = new_caches(config, 2, 9, np.float64)
    transformer_decode(ids[:, :2], weights, config, caches)
    spoil(caches)
    with pytest.raises(ValueError, match=message):
        transformer_decode(ids[:, 2:], weights, config, caches)
