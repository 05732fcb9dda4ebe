import pytest

from minideepseek.model.config import Config
from minideepseek.model.presets import PRESETS, preset


def test_the_defaults_are_v3():
    assert preset("v3") == Config()


def test_v2_and_v2_lite_differ_where_the_reports_say():
    v2, lite = preset("v2"), preset("v2-lite")
    assert (v2.scoring, v2.normalise, v2.scaling, v2.n_groups, v2.n_groups_kept, v2.n_shared) == ("softmax", False, 16.0, 8, 3, 2)
    assert (lite.q_rank, lite.n_heads, lite.n_groups, lite.top_k, lite.d_expert) == (None, 16, 1, 6, 1408)


def test_a_preset_that_does_not_exist():
    with pytest.raises(ValueError, match="preset 'huge' does not exist; there are " + ", ".join(PRESETS)):
        preset("huge")
