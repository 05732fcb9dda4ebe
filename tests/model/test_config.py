import dataclasses
import json
import math

import pytest

from minideepseek.model.config import Config, ConfigError


def test_the_defaults_are_v3_and_survive_json():
    v3 = Config()
    assert (v3.d_model, v3.n_layers, v3.n_routed, v3.reachable) == (7168, 61, 256, 128)
    assert Config.from_dict(json.loads(json.dumps(v3.to_dict()))) == v3


def test_v2_lite():
    lite = Config(q_rank=None, n_heads=16, scoring="softmax", n_groups=1, n_groups_kept=1, n_routed=64, top_k=6)
    assert lite.reachable == 64


@pytest.mark.parametrize("wrong, message", [
    ({"d_rope": 7}, "d_rope = 7 must be even"),
    ({"top_k": 129}, "top_k = 129 exceeds the 128 experts a token can reach: 4 of 8 groups of 32"),
    ({"n_groups": 7}, "n_groups = 7 does not divide n_routed = 256"),
    ({"n_groups_kept": 9}, "n_groups_kept = 9 exceeds n_groups = 8"),
    ({"n_dense_layers": 62}, "n_dense_layers = 62 exceeds n_layers = 61"),
    ({"attention": "gqa", "n_kv_heads": 3}, "n_kv_heads = 3 does not divide n_heads = 128"),
    ({"attention": "gqa"}, "n_kv_heads = None must be positive: gqa needs it"),
    ({"attention": "gqa", "n_kv_heads": 0}, "n_kv_heads = 0 must be positive"),
    ({"attention": "gqa", "n_kv_heads": 2.0}, "n_kv_heads = 2.0 must be a whole number"),
    ({"attention": "mqa", "n_kv_heads": 2}, "n_kv_heads = 2 must be None: attention = 'mqa' leaves no choice"),
    ({"n_kv_heads": 8}, "n_kv_heads = 8 must be None: attention = 'mla' leaves no choice"),
    ({"attention": "linear"}, "attention = 'linear' must be one of mla, mha, gqa, mqa"),
    ({"balance": "yes"}, "balance = 'yes' must be one of none, aux, bias"),
    ({"scoring": "tanh"}, "scoring = 'tanh' must be one of"),
    ({"q_rank": 0}, "q_rank = 0 must be positive, or None"),
    ({"yarn_factor": 0.5}, "yarn_factor = 0.5 must be at least 1"),
    ({"scaling": math.nan}, "scaling = nan must be a finite number"),
    ({"mscale": math.inf}, "mscale = inf must be a finite number"),
    ({"eps": 0.0}, "eps = 0.0 must be positive"),
    ({"d_model": 0}, "d_model = 0 must be positive"),
    ({"n_shared": -1}, "n_shared = -1 must not be negative"),
    ({"n_layers": 2.0}, "n_layers = 2.0 must be a whole number"),
    ({"n_layers": True}, "n_layers = True must be a whole number"),
    ({"normalise": 1}, "normalise = 1 must be True or False"),
    ({"attention": None}, "attention = None must be a string"),
])
def test_impossible_models_are_refused_by_name_and_value(wrong, message):
    with pytest.raises(ConfigError) as caught:
        Config(**wrong)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Config) if isinstance(f.default, int) and not isinstance(f.default, bool)])
def test_no_count_may_be_negative(name):
    with pytest.raises(ConfigError, match=f"{name} = -1"):
        Config(**{name: -1})


def test_unknown_fields_are_listed():
    with pytest.raises(ConfigError, match="unknown fields: heads, layers"):
        Config.from_dict({"layers": 3, "heads": 2, "d_model": 64})


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().d_model = 3
