"""What a backend may want of a graph."""

import pytest

from zeropoint.core.errors import SpecError
from zeropoint.core.policy import BIASES, BackendPolicy


@pytest.mark.parametrize("bias", BIASES)
def test_each_kind_of_bias(bias):
    assert BackendPolicy("b", bias).bias == bias


@pytest.mark.parametrize("bias", ["int32", "", None])
def test_a_bias_that_nothing_comes_of(bias):
    words = (
        rf"BackendPolicy: bias={bias!r} is unknown. Use one of 'float', 'float on the int32 grid'; a bias of integers"
    )
    with pytest.raises(SpecError, match=words):
        BackendPolicy("b", bias)
