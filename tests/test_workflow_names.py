"""The workflow under the names and in the places that programs for torchao look for."""

import zeropoint
from zeropoint.pt2e import learnable_fake_quantize, quantize_pt2e
from zeropoint.pt2e.observer import MinMaxObserver


def test_training_is_where_torchao_has_it():
    assert quantize_pt2e.prepare_qat_pt2e is zeropoint.prepare_qat_pt2e
    assert set(quantize_pt2e.__all__) == {"convert_pt2e", "prepare_pt2e", "prepare_qat_pt2e"}
    assert learnable_fake_quantize.LearnableFakeQuantize(MinMaxObserver).learning_enabled.item() == 0
