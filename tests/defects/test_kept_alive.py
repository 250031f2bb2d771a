"""What torchao keeps in memory and in files, and zeropoint does not."""

import copy
import gc
import io
import weakref

import models
import pytest
import quantizers
import torch
from peer import BY_TORCHAO, quantizer, workflow
from torch import nn

from zeropoint.annotate.quantizer import ComposableQuantizer
from zeropoint.workflow import convert_pt2e, prepare_pt2e

OURS = prepare_pt2e, convert_pt2e, quantizers.STATIC
THEIRS = workflow.prepare_pt2e, workflow.convert_pt2e, BY_TORCHAO


def both(build):
    """Returns what we and what torchao make of a model: prepared, and a converted copy."""
    inputs, found = build()[1], []
    for prepare, convert, by in (OURS, THEIRS):
        prepared = prepare(models.exported(build), by)
        prepared(*inputs)
        found.append((prepared, convert(copy.deepcopy(prepared))))
    return found


@pytest.fixture
def _empty_caches():
    """Empties torchao's caches after the test: they hold models."""
    yield
    from torch.ao.quantization.fx.utils import assert_and_get_unique_device
    from torchao.utils import _assert_and_get_unique_device

    for cached in (assert_and_get_unique_device, _assert_and_get_unique_device):
        cached.cache_clear()


@pytest.mark.usefixtures("_empty_caches")
def test_a_cache_of_devices_keeps_every_model_alive():
    """torchao caches the device of each model that it prepares or converts, and with it the model and its weights."""
    ours, theirs = both(models.mlp)
    held = [[weakref.ref(each) for model in pair for each in (model, *model.parameters())] for pair in (ours, theirs)]
    del ours, theirs
    gc.collect()
    of_ours, of_theirs = ([ref() is not None for ref in refs] for refs in held)
    assert not any(of_ours)
    assert all(of_theirs)


@pytest.mark.usefixtures("_empty_caches")
def test_the_cached_device_is_stale_after_a_move():
    """torchao makes observers for the device on which a model was when it was first asked."""
    from torchao.utils import _assert_and_get_unique_device

    model = models.exported(models.linear)
    assert _assert_and_get_unique_device(model) == prepared_on(copy.deepcopy(model)) == torch.device("cpu")
    model.to("meta")
    assert _assert_and_get_unique_device(model) == torch.device("cpu")
    assert prepared_on(model) == torch.device("meta")


def prepared_on(model):
    (device,) = {buffer.device for buffer in prepare_pt2e(model, quantizers.STATIC).buffers()}
    return device


def test_float_weights_of_nested_modules_stay():
    """torchao removes the float weight of a root module only: hasattr and delattr know no names with dots."""
    ours, theirs = (converted.state_dict() for _, converted in both(models.mlp))
    weights = {"0.weight", "2.weight"}
    assert weights <= theirs.keys()
    assert not weights & ours.keys()
    assert [tensor.dtype for name, tensor in ours.items() if "frozen" in name] == [torch.int8] * 2


@models.seeded
def wide():
    return nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(4))), (torch.randn(1, 128),)


def test_a_saved_program_is_larger_than_the_float_one():
    """torchao's quantized program holds the float weights beside the integers: 5.33 MB of 4.23 MB."""
    inputs, sizes = wide()[1], []
    for model in (wide()[0], *(converted for _, converted in both(wide))):
        file = io.BytesIO()
        torch.export.save(torch.export.export(model, inputs), file)
        sizes.append(file.getbuffer().nbytes)
    floats, ours, theirs = sizes
    assert ours < 0.6 * floats < floats < theirs


def test_a_composed_quantizer_keeps_the_nodes_of_all_models():
    """torchao's ComposableQuantizer remembers each node that it annotated, and so every graph it has seen."""
    alive = []
    for kind, by in ((ComposableQuantizer, quantizers.STATIC), (quantizer.ComposableQuantizer, BY_TORCHAO)):
        composed, model = kind([by]), models.exported(models.linear)
        composed.annotate(model)
        held = weakref.ref(model.graph)
        del model
        gc.collect()
        alive.append(held() is not None)
    assert alive == [False, True]
