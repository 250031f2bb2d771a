"""torchao's quantizers for Inductor, as they are, in torchao's workflow and in ours: the same sites and numbers."""

import copy
import warnings

import models
import pytest
import small_models
import torch
from qat_quantizers import in_eval_mode
from same_numbers import assert_equal_numbers, numbers, sites, step_of
from torch import nn
from torch.utils._pytree import tree_leaves

from zeropoint.workflow import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

torchao = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchao.quantization.pt2e.quantizer import arm_inductor_quantizer as arm
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantizer import xpu_inductor_quantizer as xpu

pytestmark = pytest.mark.filterwarnings("ignore:The input of maxpool2d is not quantized")
x86_config, arm_config = (
    x86.get_default_x86_inductor_quantization_config,
    arm.get_default_arm_inductor_quantization_config,
)


def with_products(kind, config):
    """Returns the quantizer with products of matrices, which are quantized by request only."""
    return kind().set_global(config).set_function_type_qconfig(torch.matmul, config)


QUANTIZERS = {
    "x86": lambda: with_products(x86.X86InductorQuantizer, x86_config()),
    "x86_dynamic": lambda: x86.X86InductorQuantizer().set_global(x86_config(is_dynamic=True)),
    "arm": lambda: with_products(arm.ArmInductorQuantizer, arm_config()),
    "arm_dynamic": lambda: arm.ArmInductorQuantizer().set_global(arm_config(is_dynamic=True)),
    "xpu": lambda: xpu.XPUInductorQuantizer().set_global(xpu.get_default_xpu_inductor_quantization_config()),
}
MODELS = (
    "mlp", "called_twice", "tied", "conv2d_relu6", "conv_batch_norm_relu", "residual", "inverted_residual",
    "classifier", "concatenation", "average_pools", "attention", "u_net", "squeeze_excite", "product", "recurrent_cell",
)  # fmt: skip


def calibrated(workflow, model, inputs, quantizer):
    prepare, convert = workflow
    prepared = prepare(copy.deepcopy(model), quantizer)
    with torch.no_grad():
        for factor in (1.0, 1.7, 0.3):
            prepared(*(x * factor for x in inputs))
    return convert(prepared)


OURS, THEIRS = (prepare_pt2e, convert_pt2e), (torchao.prepare_pt2e, torchao.convert_pt2e)


def assert_same_sites(ours, theirs):
    found, other = sites(ours), sites(theirs)
    assert found
    assert {place: read.target for place, read in found.items()} == {p: read.target for p, read in other.items()}
    return found, other


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_same_sites_scales_and_outputs(name, quantizer):
    module, inputs = small_models.build(name)
    model = models.export(module, *inputs)
    ours, theirs = (calibrated(each, model, inputs, QUANTIZERS[quantizer]()) for each in (OURS, THEIRS))
    found, other = assert_same_sites(ours, theirs)
    for place, read in found.items():
        assert_equal_numbers(numbers(ours, read), numbers(theirs, other[place]), place)
    for output, wanted in zip(tree_leaves(ours(*inputs)), tree_leaves(theirs(*inputs)), strict=True):
        # A value at run time that is a tie may be rounded the other way, since folded weights differ in the last bit.
        slack = 0.01 if "dynamic" in quantizer else 1e-5
        assert (output - wanted).abs().max() <= step_of(ours, found) * 1.001 + slack * wanted.abs().max()


def test_a_reduced_range_is_searched_for_the_levels_that_it_has():
    """torchao's histogram is searched for 256 levels, though 128 are used: the error of ours is smaller."""
    module, (x,) = small_models.build("conv2d")
    model = models.export(module, x)
    errors = []
    for each in (OURS, THEIRS):
        quantizer = x86.X86InductorQuantizer().set_global(x86_config(reduce_range=True))
        converted = calibrated(each, model, (x,), quantizer)
        dequantize = sites(converted)["conv2d", 0]
        _, scale, zero_point, low, high, _ = dequantize.args
        assert (low, high) == (0, 127)
        errors.append(
            sum((torch.fake_quantize_per_tensor_affine(v, scale, zero_point, low, high) - v).square().sum()
                for v in (x, x * 1.7, x * 0.3))
        )  # fmt: skip
    assert errors[0] < errors[1]


class Trained(nn.Module):
    """Each form in which the quantizers know a convolution with batch norm, and linear layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.added = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.last = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Hardtanh(), nn.MaxPool2d(2))
        self.head = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))

    def forward(self, x):
        y = self.first(x)
        y = self.last((self.added(y) + y).relu())
        return self.head(y.mean((2, 3)))


TRAINED = {
    "x86": lambda: x86.X86InductorQuantizer().set_global(x86_config(is_qat=True)),
    "x86_dynamic": lambda: x86.X86InductorQuantizer().set_global(x86_config(is_qat=True, is_dynamic=True)),
    "arm": lambda: arm.ArmInductorQuantizer().set_global(arm_config(is_qat=True)),
}


def data(step):
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))


def trained(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for step in range(3):
        optimizer.zero_grad()
        model(data(step)).square().mean().backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def to_train():
    torch.manual_seed(0)
    module = Trained()
    models.randomize_norms(module)
    return torch.export.export(module.train(), (data(0),)).module()


def forms(model):
    """Returns operator, position and dequantize of each place, sorted: torchao gives new names to what it fused."""
    readers = {node.name: str(node.target) for node in model.graph.nodes}
    return sorted((readers[name], place, str(read.target)) for (name, place), read in sites(model).items())


@pytest.mark.parametrize("quantizer", ["x86", "x86_dynamic"])
def test_training_with_torchaos_fake_quantizers_gives_what_torchao_gives(to_train, quantizer):
    ours = prepare_qat_pt2e(copy.deepcopy(to_train), TRAINED[quantizer](), stock_observers="keep")
    theirs = torchao.prepare_qat_pt2e(copy.deepcopy(to_train), TRAINED[quantizer]())
    mine, other = trained(ours).state_dict(), trained(theirs).state_dict()
    for name, _ in (*Trained().named_parameters(), *Trained().named_buffers()):
        assert torch.allclose(mine[name].float(), other[name].float(), atol=1e-5), name
    ours, theirs = convert_pt2e(ours), torchao.convert_pt2e(theirs)
    assert forms(ours) == forms(theirs)
    assert torch.allclose(ours(data(7)), theirs(data(7)), atol=0.005)


@pytest.mark.parametrize("quantizer", ["x86", "arm"])
def test_training_with_ours_in_their_place_gives_what_was_trained(to_train, quantizer):
    """torchao's fused fake quantizer trains with scales that differ by up to 1/256 from those that convert writes."""
    prepared = trained(prepare_qat_pt2e(copy.deepcopy(to_train), TRAINED[quantizer]()))
    wanted = in_eval_mode(prepared)(data(7))
    assert torch.allclose(convert_pt2e(prepared)(data(7)), wanted, atol=1e-5)
