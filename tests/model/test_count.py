import sys

import numpy as np
import pytest

from minideepseek.autograd.params import count as numbers
from minideepseek.model import count
from minideepseek.model.config import Config
from minideepseek.model.presets import PRESETS, PUBLISHED
from minideepseek.model.transformer import init

SMALL = Config(vocab_size=13, d_model=12, n_layers=3, n_dense_layers=1, d_ff=10, n_heads=2, q_rank=6, kv_rank=5, d_nope=4, d_rope=2, d_value=3,
               n_routed=6, top_k=2, d_expert=5, n_groups=3, n_groups_kept=2, n_mtp=2)


def test_the_published_totals():
    assert {name: count.total(PRESETS[name]) for name in PUBLISHED} == \
        {"v3": 671_026_404_352, "v2": 235_741_434_880, "v2-lite": 15_706_484_224}
    assert count.parameters(PRESETS["v3"])["mtp"] == 11_610_067_968


@pytest.mark.parametrize("name, everything, no_embedding, neither", [
    ("v2-lite", 2_661_150_208, 2_451_435_008, 2_241_719_808), ("v2", 21_375_800_320, 20_851_512_320, 20_327_224_320),
    ("v3", 37_552_282_624, 36_625_603_584, 35_698_924_544)])
def test_active_parameters_under_each_convention(name, everything, no_embedding, neither):
    config = PRESETS[name]
    assert count.active(config) == everything and count.active(config, embedding=False) == no_embedding
    assert count.active(config, embedding=False, head=False) == neither


def test_attention_per_layer():
    per_layer = {name: count.parameters(PRESETS[name])["attention"] // PRESETS[name].n_layers for name in PUBLISHED}
    assert per_layer == {"v2-lite": 13_763_072, "v2": 149_227_520, "v3": 187_107_328}


def test_cache_bytes():
    assert count.cache_bytes_per_token(PRESETS["v3"]) == 70_272 and count.cache_bytes_per_token(PRESETS["v2"]) == 69_120
    assert count.cache_bytes_per_token(PRESETS["v3"], 1) == 35_136


def test_the_counts_are_those_of_a_real_model():
    weights = init(SMALL, np.random.default_rng(0))
    biases = sum(block.b_select.size for block in [*weights.layers, *[m.block for m in weights.mtp]] if block.b_select is not None)
    assert count.total(SMALL) + count.parameters(SMALL)["mtp"] == numbers(weights) - biases
    assert count.total(SMALL) == numbers(weights._replace(mtp=())) - 2 * 6


def test_flops_against_a_forward_that_counts():
    """Every projection of one token, counted by a gemm of its own; router and head are not behind it and are added."""
    from minideepseek.basics.linear import matmul
    from minideepseek.model.transformer import transformer

    flops = 0

    def counting(A, B, *, role):
        nonlocal flops
        flops += 2 * A.shape[0] * A.shape[1] * B.shape[1]
        return matmul(A, B, role=role)

    weights = init(SMALL, np.random.default_rng(0))
    transformer(np.array([[5]]), weights, SMALL, gemm=counting)
    outside = 2 * (2 * 12 * 6 + 12 * 13)                                  # two routers, the head
    norms = count.parameters(SMALL)["norms"] + 3 * (6 + 5)                # counted as numbers, not multiplied by a matrix
    assert flops + outside == count.flops_per_token(SMALL, context=0) - 2 * norms
    assert count.flops_per_token(SMALL, context=10) - count.flops_per_token(SMALL, context=0) == 3 * 2 * 2 * (4 + 2 + 3) * 10


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["count", "v3"])
    count.demo()
    printed = capsys.readouterr().out
    assert "v3: 671,026,404,352 parameters" in printed and "11,610,067,968" in printed and "70,272" in printed and "v2" not in printed.split("claim")[0]
    monkeypatch.setattr(sys, "argv", ["count", "v5"])
    with pytest.raises(SystemExit, match="preset 'v5' does not exist; there are v2-lite, v2, v3, micro, tiny, small"):
        count.demo()
