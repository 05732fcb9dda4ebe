import dataclasses
import math

import numpy as np
import pytest

from minideepseek.autograd.gradcheck import gradcheck
from minideepseek.autograd.params import count, flatten, nbytes
from minideepseek.autograd.tape import Tape, Tensor
from minideepseek.model.config import Config, ConfigError
from minideepseek.model.transformer import (gradient_of_vector, init, loss_of_vector, losses, model_outline, next_token_targets,
                                            trainable, transformer, transformer_example)

SMALL = dict(vocab_size=19, d_model=12, n_layers=3, n_dense_layers=1, d_ff=14, max_positions=16, n_heads=2, q_rank=6, kv_rank=5, d_nope=4,
             d_rope=2, d_value=3, n_routed=6, top_k=2, d_expert=5, n_groups=3, n_groups_kept=2)
DENSE = SMALL | {"n_dense_layers": 3}


def model(fields, seed=0):
    config, rng = Config(**fields), np.random.default_rng(seed)
    return config, init(config, rng, std=0.5, dtype=np.float64), rng.integers(0, config.vocab_size, (3, 7))


@pytest.mark.parametrize("seed", range(3))
def test_gradient_of_the_whole_model_along_ten_random_directions(seed):
    theta, case = transformer_example(seed)
    assert theta.size > 2000
    gradcheck(loss_of_vector, gradient_of_vector, (theta,), case)


def test_the_gradient_reaches_every_weight_but_no_bias():
    config, weights, ids = model(SMALL)
    trained = trainable(weights)
    with Tape() as tape:
        found = losses(ids, next_token_targets(ids), trained, config)
    tape.backward(found.seeds(0.3))
    for name, leaf in flatten(trained).items():
        if name.endswith("b_select"):
            assert isinstance(leaf, np.ndarray)
        else:
            assert leaf.grad is not None and leaf.grad.any(), name


@pytest.mark.parametrize("fields, tolerance", [(DENSE, 0), (SMALL, 1e-12)], ids=["dense, bit for bit", "experts"])
def test_no_logit_knows_a_later_token(fields, tolerance):
    config, weights, ids = model(fields)
    before = transformer(ids, weights, config).logits.data
    for j in range(1, ids.shape[1]):
        changed = ids.copy()
        changed[:, j] = (changed[:, j] + 1) % config.vocab_size
        after = transformer(changed, weights, config).logits.data
        assert np.abs(after - before)[:, :j].max() <= tolerance
        assert (np.abs(after - before)[:, j:].max(axis=(1, 2)) > 1e-6).all()


@pytest.mark.parametrize("fields", [DENSE, SMALL], ids=["dense", "experts"])
def test_a_permuted_batch_gives_permuted_logits(fields):
    config, weights, ids = model(fields)
    order = [2, 0, 1]
    straight, permuted = [transformer(rows, weights, config).logits.data for rows in (ids, ids[order])]
    np.testing.assert_allclose(permuted, straight[order], rtol=0, atol=1e-12)


def test_both_pair_layouts_are_one_model_up_to_a_permutation():
    """Half-split with the rope columns of every head reordered = interleaved."""
    config, weights, ids = model(SMALL | {"d_rope": 6})
    order = np.concatenate([np.arange(0, 6, 2), np.arange(1, 6, 2)])
    layers = [layer._replace(attention=layer.attention._replace(
        W_QR=layer.attention.W_QR.reshape(-1, 2, 6)[:, :, order].reshape(-1, 12), W_KR=layer.attention.W_KR[:, order])) for layer in weights.layers]
    half = Config(**SMALL | {"d_rope": 6, "rope_interleaved": False})
    np.testing.assert_allclose(transformer(ids, weights._replace(layers=tuple(layers)), half).logits.data,
                               transformer(ids, weights, config).logits.data, rtol=0, atol=1e-12)


def test_two_runs_are_bit_for_bit_equal_and_the_tape_changes_nothing():
    config, weights, ids = model(SMALL)
    first = transformer(ids, weights, config).logits.data
    with Tape():
        second = transformer(ids, trainable(weights), config).logits.data
    assert first.tobytes() == second.tobytes()


def test_the_last_position_has_no_target():
    assert next_token_targets(np.array([[3, 4, 5]])).tolist() == [[4, 5, -100]]


def test_a_fresh_model_knows_nothing_and_keeps_float32():
    config, _, ids = model(SMALL | {"vocab_size": 500})
    weights = init(config, np.random.default_rng(0))
    loss = losses(ids, next_token_targets(ids), weights, config).main
    assert loss.data.dtype == np.float32 and abs(loss.data / math.log(500) - 1) < 0.02
    assert all(leaf.dtype == np.float32 for leaf in flatten(weights).values())


def test_the_outline_of_v3_takes_no_memory_and_has_its_671_billion_weights():
    outline = model_outline(Config())
    biases = sum(leaf.size for name, leaf in flatten(outline).items() if name.endswith("b_select"))
    assert count(outline) - biases == 671_026_404_352 + 11_610_067_968 and biases == 14_848 + 256
    assert nbytes(outline) > 1e12 and all(leaf.base.size == 1 for leaf in flatten(outline).values())


def test_init_is_normal_with_the_given_spread_norms_one_biases_zero():
    weights = init(Config(**SMALL | {"vocab_size": 2000}), np.random.default_rng(0), std=0.02)
    assert abs(weights.E.std() / 0.02 - 1) < 0.02 and abs(weights.E.mean()) < 1e-3
    assert (weights.layers[0].g_ffn == 1).all() and not weights.layers[1].b_select.any()


@pytest.mark.parametrize("ids, message", [
    (np.zeros((0, 4), int), r"ids has shape \(0, 4\): an empty batch"),
    (np.zeros((2, 0), int), r"ids has shape \(2, 0\): an empty batch"),
    (np.zeros(4, int), r"ids must be an integer array \(B, T\), got int64 \(4,\)"),
    (np.zeros((1, 4)), r"ids must be an integer array \(B, T\), got float64"),
    ([[1, 2]], r"ids must be an integer array \(B, T\), got list"),
    (np.zeros((1, 17), int), "ids has 17 tokens in a row, the position table max_positions = 16"),
    (np.array([[0, 3, 19]]), r"ids\[0, 2\] = 19 is not a token: vocab_size = 19"),
    (np.array([[0, -1, 2]]), r"ids\[0, 1\] = -1 is not a token"),
])
def test_bad_ids_are_refused_at_the_door(ids, message):
    config, weights, _ = model(SMALL)
    with pytest.raises(ValueError, match=message):
        transformer(ids, weights, config)


BASELINES = [{"attention": "mha"}, {"attention": "mqa"}, {"attention": "gqa", "n_kv_heads": 2, "n_heads": 4}]


@pytest.mark.parametrize("fields", BASELINES, ids=["mha", "mqa", "gqa"])
def test_the_rungs_below_latent_attention_are_models_too(fields):
    """Every weight gets a gradient, no logit knows a later token, the gradient is right along ten random directions."""
    config, weights, ids = model(DENSE | {"n_mtp": 1} | fields)
    trained = trainable(weights)
    with Tape() as tape:
        found = losses(ids, next_token_targets(ids), trained, config)
    tape.backward(found.seeds(0.3))
    assert all(leaf.grad.any() for leaf in flatten(trained).values() if isinstance(leaf, Tensor))
    before = found.out.logits.data
    changed = ids.copy()
    changed[:, 4] = (changed[:, 4] + 1) % config.vocab_size
    assert np.array_equal(transformer(changed, weights, config).logits.data[:, :4], before[:, :4])
    theta, case = transformer_example(0)
    other = dataclasses.replace(case["config"], **fields | {"d_model": 24})
    size = sum(leaf.size for name, leaf in flatten(model_outline(other)).items() if "b_select" not in name)
    gradcheck(loss_of_vector, gradient_of_vector, (np.random.default_rng(1).standard_normal(size) / 2,), case | {"config": other})


def test_a_head_of_odd_size_cannot_be_turned():
    with pytest.raises(ConfigError, match="d_nope = 3 and d_rope = 2 make a head of odd size"):
        Config(**SMALL | {"attention": "mha", "d_nope": 3})


def test_weights_may_be_tensors_or_arrays():
    config, weights, ids = model(SMALL)
    assert isinstance(transformer(ids, weights, config).hidden, Tensor)


def test_module_k_reads_token_i_k_1_and_is_scored_on_token_i_k_2():
    """Bug 1. Modules that only copy what they are shown: the head names the very token they read. That token must not
    be the answer: the loss is that of a wrong guess, and it is nearly 0 against the token shown."""
    config, weights, ids = model(SMALL | {"n_mtp": 2, "d_model": 19})
    copying = tuple(copier(module) for module in weights.mtp)
    weights = weights._replace(E=np.eye(19), W_head=60 * np.eye(19), mtp=copying)
    ids = np.stack([np.arange(7), np.arange(7, 14), np.arange(12, 19)])
    found = losses(ids, next_token_targets(ids), weights, config)
    for k, (prediction, loss) in enumerate(zip(found.predictions, found.mtp)):
        assert prediction.logits.data.shape == (3, 7 - 1 - k, 19)
        assert (prediction.logits.data.argmax(axis=-1) == ids[:, k + 1:]).all()
        assert loss.data > 50


def copier(module):
    """A module whose output is the (normed) embedding of the token it is shown."""
    D = len(module.g_final)
    block = module.block
    silent = block._replace(attention=block.attention._replace(W_O=0 * block.attention.W_O),
                            ffn=block.ffn._replace(W_down=0 * block.ffn.W_down, W_shared_down=0 * block.ffn.W_shared_down))
    return module._replace(W_merge=np.vstack([np.eye(D), np.zeros((D, D))]), block=silent)


def test_no_prediction_of_a_module_knows_a_later_token():
    config, weights, ids = model(DENSE | {"n_mtp": 2})
    before = [p.logits.data for p in losses(ids, next_token_targets(ids), weights, config).predictions]
    for j in range(1, 7):
        changed = ids.copy()
        changed[:, j] = (changed[:, j] + 1) % config.vocab_size
        after = [p.logits.data for p in losses(changed, next_token_targets(changed), weights, config).predictions]
        for k in range(2):
            seen = max(j - k - 1, 0)                     # the first position that is shown token j
            assert np.array_equal(after[k][:, :seen], before[k][:, :seen])
            assert (after[k][:, seen:] != before[k][:, seen:]).any()


def test_the_gradients_of_shared_tables_are_the_sum_over_main_model_and_modules():
    """Bug 3: embedding and head are one table each."""
    config, weights, ids = model(SMALL | {"n_mtp": 2})
    found = {}
    for part in ("main", "mtp", "both"):
        trained = trainable(weights)
        with Tape() as tape:
            loss = losses(ids, next_token_targets(ids), trained, config)
        seeds = loss.seeds(0.3)
        tape.backward({t: s for t, s in seeds.items() if part == "both" or (t is loss.main) == (part == "main")})
        found[part] = trained.E.grad, trained.W_head.grad
    for main, mtp, both in zip(*found.values()):
        assert mtp.any() and np.abs(main + mtp - both).max() < 1e-12


def test_the_weight_of_the_modules_is_shared_between_them():
    config, weights, ids = model(SMALL | {"n_mtp": 2})
    found = losses(ids, next_token_targets(ids), weights, config)
    assert list(found.seeds(0.3).values()) == [1.0, 0.15, 0.15]
    alone = losses(ids, next_token_targets(ids), weights._replace(mtp=()), config)
    assert list(alone.seeds(0.3)) == [alone.main] and alone.main.data == found.main.data


@pytest.mark.parametrize("fields", [{"mtp_embedding_first": False}, {"mtp_reads_normed": False}])
def test_the_other_conventions_are_other_models_with_right_gradients(fields):
    config, weights, ids = model(SMALL | {"n_mtp": 2})
    other = Config(**SMALL | {"n_mtp": 2} | fields)
    usual, different = [losses(ids, next_token_targets(ids), weights, c) for c in (config, other)]
    assert usual.main.data == different.main.data and usual.mtp[0].data != different.mtp[0].data


def test_too_short_for_the_modules_and_wrong_targets():
    config, weights, ids = model(SMALL | {"n_mtp": 2})
    with pytest.raises(ValueError, match="ids has 2 tokens in a row: 2 modules need at least 3"):
        losses(ids[:, :2], next_token_targets(ids[:, :2]), weights, config)
    with pytest.raises(ValueError, match=r"targets must be integers in the form of ids, \(3, 7\), got int64 \(3, 6\)"):
        losses(ids, ids[:, 1:], weights, config)
    with pytest.raises(ValueError, match=r"targets\[1, 2\] = 19 is neither a token nor IGNORE"):
        wrong = ids.copy()
        wrong[1, 2] = 19
        losses(ids, wrong, weights, config)


def test_with_flash_attention_the_same_model():
    config, weights, ids = model(SMALL | {"n_mtp": 1})
    results = []
    for one in (config, dataclasses.replace(config, flash_tile=3)):
        trained = trainable(weights)
        with Tape() as tape:
            found = losses(ids, next_token_targets(ids), trained, one)
        tape.backward(found.seeds(0.3))
        results.append([found.out.logits.data, *[leaf.grad for leaf in flatten(trained).values() if isinstance(leaf, Tensor)]])
    for dense, flash in zip(*results, strict=True):
        np.testing.assert_allclose(flash, dense, rtol=0, atol=1e-12)
    with pytest.raises(ConfigError, match="flash_tile = 0 must be positive"):
        Config(flash_tile=0)
