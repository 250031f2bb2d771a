"""The names of ``torchao.quantization.pt2e``, where programs that migrate look for them."""

import importlib
import pkgutil

import pytest
import torchao.quantization.pt2e.fake_quantize
import torchao.quantization.pt2e.observer

import zeropoint.pt2e

MODULES = ["zeropoint.pt2e", *(m.name for m in pkgutil.iter_modules(zeropoint.pt2e.__path__, "zeropoint.pt2e."))]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_has_the_names_that_it_lists_and_no_others(name):
    module = importlib.import_module(name)
    submodules = {found.rpartition(".")[2] for found in MODULES}
    found = {each for each in vars(module) if not each.startswith("_")} - submodules
    assert found == set(module.__all__)


@pytest.mark.parametrize(
    ("theirs", "missing"),
    [
        (
            torchao.quantization.pt2e.fake_quantize,
            {
                "AffineFakeQuantize", "default_affine_fake_quant", "default_groupwise_fake_quant",
                "default_affine_per_axis_fake_quant",
            },
        ),
        (
            torchao.quantization.pt2e.observer,
            {
                "AffineQuantizedObserverBase", "Granularity", "MappingType", "PerAxis", "PerBlock", "PerGroup",
                "PerRow", "PerTensor", "PerToken", "TorchAODType", "ZeroPointDomain", "get_block_size",
                "get_observer_state_dict", "load_observer_state_dict",
            },
        ),
    ],
)  # fmt: skip
def test_names_that_torchao_has_and_this_package_has_not(theirs, missing):
    ours = importlib.import_module(theirs.__name__.replace("torchao.quantization", "zeropoint"))
    assert set(theirs.__all__) - set(ours.__all__) <= missing
