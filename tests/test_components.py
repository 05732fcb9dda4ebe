"""Every component, every case, every floating argument, three seeds: the gradient check of the whole house."""
import numpy as np
import pytest

from minideepseek.autograd.gradcheck import gradcheck
from tests.house import COMPONENTS, NAMES


@pytest.mark.parametrize("seed", (0, 1, 2))
@pytest.mark.parametrize("component", COMPONENTS, ids=NAMES)
def test_gradients(component, seed):
    for args, config in component.examples(np.random.default_rng(seed)).values():
        gradcheck(component.forward, component.backward, args, config, seed=seed)


@pytest.mark.parametrize("component", COMPONENTS, ids=NAMES)
def test_examples_are_float64_and_their_sizes_differ(component):
    """In the largest array of a case no two axes may be equal: a swapped axis could hide."""
    for case, (args, config) in component.examples(np.random.default_rng(0)).items():
        arrays = [a for a in args if isinstance(a, np.ndarray)]
        assert arrays and all(a.dtype == np.float64 or a.dtype.kind in "iu" for a in arrays), case
        largest = max(arrays, key=np.size).shape
        assert len(set(largest)) == len(largest), f"{case}: {largest}"


@pytest.mark.parametrize("component", COMPONENTS, ids=NAMES)
def test_op_carries_the_name_and_the_functions(component):
    made = getattr(component.module, component.name)
    assert (made.name, made.forward, made.backward) == (component.name, component.forward, component.backward)
