"""Lowered by a program's own ``to_edge`` and ``to_backend``, layers are found again by the function they come of."""

import pytest
import torch
from torch import nn
from torch.fx.passes.utils.source_matcher_utils import get_source_partitions

import zeropoint as zp
from zeropoint.core.extras import import_extra
from zeropoint.numerics import ops
from zeropoint.numerics.sqnr import sqnr_db
from zeropoint.runtime.executorch import Program

exir = import_extra("executorch.exir", "executorch")
partition = import_extra("executorch.backends.xnnpack.partition.xnnpack_partitioner", "executorch")
theirs = import_extra("executorch.backends.xnnpack.quantizer.xnnpack_quantizer", "executorch")


def converted(model: nn.Module, x: torch.Tensor, strict: bool, **config: bool) -> torch.fx.GraphModule:
    graph = torch.export.export(model.eval(), (x,), strict=strict).module()
    quantizer = theirs.XNNPACKQuantizer().set_global(theirs.get_symmetric_quantization_config(**config))
    prepared = zp.prepare_pt2e(graph, quantizer)
    prepared(x)
    return zp.convert_pt2e(prepared)


CONFIGS = {
    "static": {},
    "per channel": {"is_per_channel": True},
    "dynamic": {"is_per_channel": True, "is_dynamic": True},
}
MODELS = {
    "linear": lambda bias: nn.Linear(8, 6, bias=bias),
    "linear and relu": lambda bias: nn.Sequential(nn.Linear(8, 6, bias=bias), nn.ReLU(), nn.Linear(6, 4, bias=bias)),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_the_file_gives_what_the_graph_gives(strict, model, bias, config):
    torch.manual_seed(0)
    x = torch.randn(3, 8)
    graph = converted(MODELS[model](bias), x, strict, **CONFIGS[config])
    edge = exir.to_edge(torch.export.export(graph, (x,), strict=strict)).to_backend(partition.XnnpackPartitioner())
    operators = [str(node.target) for node in edge.exported_program().graph.nodes if node.op == "call_function"]
    assert not [name for name in operators if "mm" in name or "linear" in name]
    (found,) = Program(bytes(edge.to_executorch().buffer))(x)
    assert sqnr_db(graph(x), found) > 40


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("strict", [True, False])
def test_quantize_and_dequantize_are_no_part_of_a_layer(strict, config):
    graph = converted(MODELS["linear and relu"](True), torch.randn(3, 8), strict, **CONFIGS[config])
    partitions = [each for found in get_source_partitions(graph.graph, [nn.Linear, nn.ReLU]).values() for each in found]
    assert len(partitions) == 3
    around = (*ops.QUANTIZE_OPS, *ops.DEQUANTIZE_OPS)
    assert not [node for each in partitions for node in each.nodes if node.target in around]
