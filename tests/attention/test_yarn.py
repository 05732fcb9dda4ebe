import math

import numpy as np
import pytest

from minideepseek.attention.rope import frequencies
from minideepseek.attention.yarn import softmax_scale, temperature, yarn_frequencies, yarn_range


@pytest.mark.parametrize("base, original, expected", [(10_000, 4096, (10, 23)), (160_000, 65_536, (15, 25))])
def test_published_ranges(base, original, expected):
    assert yarn_range(64, base, original) == expected


def test_published_ratios():
    ratio = yarn_frequencies(64, factor=40, original=4096) / frequencies(64)
    np.testing.assert_allclose(ratio[[0, 10, 11, 12, 23, 31]], [1, 1, 0.925, 0.85, 0.025, 0.025], rtol=1e-12)
    ratio = yarn_frequencies(64, 160_000, factor=16, original=65_536) / frequencies(64, 160_000)
    np.testing.assert_allclose(ratio[[15, 16, 25]], [1, 1 - 0.9375 / 10, 1 / 16], rtol=1e-12)


def test_published_temperatures_and_scales():
    assert temperature(40) == pytest.approx(1.36889, abs=5e-6)
    assert temperature(40, 0.707) == pytest.approx(1.26080, abs=5e-6)
    assert softmax_scale(192, 40) == pytest.approx(0.135234, abs=5e-7)
    assert softmax_scale(192, 40, 0.707) == pytest.approx(0.114721, abs=5e-7)
    assert softmax_scale(192) == 1 / math.sqrt(192)


def test_factor_one_is_plain_rope():
    assert (yarn_frequencies(8, factor=1, original=32) == frequencies(8)).all()
    assert temperature(1.0) == 1


def test_a_ramp_of_no_width_stays_finite():
    theta = yarn_frequencies(4, factor=8, original=2 * math.pi, beta_fast=1, beta_slow=1)
    assert np.isfinite(theta).all() and (theta <= frequencies(4)).all()


def test_an_original_length_of_a_few_tokens_stretches_nothing_as_in_the_public_code():
    assert yarn_range(64, 10_000, 4) == (0, -1)
    assert (yarn_frequencies(64, factor=8, original=4) == frequencies(64)).all()


@pytest.mark.parametrize("options, message", [
    (dict(factor=0.5, original=32), "factor = 0.5"),
    (dict(factor=float("nan"), original=32), "factor = nan"),
    (dict(factor=2, original=0), "original = 0"),
])
def test_bad_configuration(options, message):
    with pytest.raises(ValueError, match=message):
        yarn_frequencies(8, **options)
