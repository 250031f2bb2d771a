"""Lowering a converted model to each backend that needs packages only, and running it where that works here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench._quantizer_policies import of
from zeropoint.core.extras import import_extra
from zeropoint.runtime.executorch import Program

Inputs = tuple[torch.Tensor, ...]
Run = Callable[[Inputs], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Lowered:
    """What lowering gave: how many delegates, how many operators outside of them, bytes of the file, how to run it."""

    delegates: int
    outside: int
    size: int | None = None
    run: Run | None = None
    custom: int = 0


def count(edge: Any) -> tuple[int, int]:
    """Returns the number of delegates in a lowered graph, and of operators outside of them."""
    calls = [node for node in edge.exported_program().graph.nodes if node.op == "call_function"]
    delegates = sum("call_delegate" in str(node.target) for node in calls)
    getitems = sum("getitem" in str(node.target) for node in calls)
    return delegates, len(calls) - delegates - getitems


def to_delegate(converted: torch.fx.GraphModule, inputs: Inputs, partitioner: Any, passes: Any = None) -> Any:
    """Returns the edge program with the nodes that the partitioner takes in delegates."""
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    program = torch.export.export(converted, inputs)
    config = EdgeCompileConfig(_check_ir_validity=False)
    return to_edge_transform_and_lower(
        program, partitioner=[partitioner], transform_passes=passes, compile_config=config
    )


def on_the_runtime(edge: Any) -> Lowered:
    """Returns what runs on ExecuTorch's runtime, which holds the backend."""
    delegates, outside = count(edge)
    buffer = in_a_file(edge)
    return Lowered(delegates, outside, len(buffer), lambda inputs: Program(buffer)(*inputs)[0])


def in_a_file(edge: Any) -> bytes:
    """Returns the bytes of the ``.pte`` file."""
    import_extra("executorch.kernels.quantized", "executorch")  # It registers the quantized operators.
    return edge.to_executorch().buffer


def only_lowered(edge: Any) -> Lowered:
    """Returns what lowering gave where nothing here runs it."""
    delegates, outside = count(edge)
    return Lowered(delegates, outside, len(in_a_file(edge)))


def xnnpack(converted: torch.fx.GraphModule, inputs: Inputs) -> Lowered:
    partitioner = of("xnnpack.partition.xnnpack_partitioner", "XnnpackPartitioner")()
    passes = of("xnnpack.utils.configs", "get_transform_passes")()
    return on_the_runtime(to_delegate(converted, inputs, partitioner, passes))


def tosa(converted: torch.fx.GraphModule, inputs: Inputs) -> Lowered:
    """Runs delegates in Arm's reference model of TOSA."""
    spec = of("arm.tosa.compile_spec", "TosaCompileSpec")("TOSA-1.0+INT")
    edge = to_delegate(converted, inputs, of("arm.tosa.partitioner", "TOSAPartitioner")(spec))
    delegates, outside = count(edge)

    def run(inputs: Inputs) -> torch.Tensor:
        with of("arm.test.runner_utils", "TosaReferenceModelDispatch")():
            result = edge.exported_program().module(check_guards=False)(*inputs)
        return result[0] if isinstance(result, (tuple, list)) else result

    return Lowered(delegates, outside, run=run)


def ethos_u(converted: torch.fx.GraphModule, inputs: Inputs) -> Lowered:
    """Compiles with Vela."""
    spec = of("arm.ethosu", "EthosUCompileSpec")("ethos-u55-128")
    return only_lowered(to_delegate(converted, inputs, of("arm.ethosu", "EthosUPartitioner")(spec)))


def vgf(converted: torch.fx.GraphModule, inputs: Inputs) -> Lowered:
    spec = of("arm.vgf", "VgfCompileSpec")("TOSA-1.0+INT")
    return only_lowered(to_delegate(converted, inputs, of("arm.vgf", "VgfPartitioner")(spec)))


def cortex_m(converted: torch.fx.GraphModule, inputs: Inputs) -> Lowered:
    """Runs the operators of CMSIS-NN as ExecuTorch implements them in PyTorch."""
    from executorch.exir import EdgeCompileConfig, to_edge

    aten = torch.ops.aten
    config = EdgeCompileConfig(
        preserve_ops=[aten.linear.default, aten.hardsigmoid.default, aten.hardswish.default],
        _check_ir_validity=False,
        _core_aten_ops_exception_list=[aten.max_pool2d.default],
    )
    edge = to_edge(torch.export.export(converted, inputs), compile_config=config)
    program = of("cortex_m.passes.cortex_m_pass_manager", "CortexMPassManager")(edge.exported_program()).transform()
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    own = sum("cortex_m" in target for target in targets)
    others = sum("getitem" not in target and "cortex_m" not in target for target in targets)

    def run(inputs: Inputs) -> torch.Tensor:
        result = program.module(check_guards=False)(*inputs)
        return result[0] if isinstance(result, (tuple, list)) else result

    return Lowered(0, others, run=run, custom=own)


def coreml(converted: torch.fx.GraphModule, inputs: Inputs) -> Lowered:
    import coremltools

    backend = of("apple.coreml.compiler", "CoreMLBackend")
    specs = backend.generate_compile_specs(minimum_deployment_target=coremltools.target.iOS17)
    partitioner = of("apple.coreml.partition", "CoreMLPartitioner")(compile_specs=specs, take_over_mutable_buffer=False)
    return only_lowered(to_delegate(converted, inputs, partitioner))


def vulkan(converted: torch.fx.GraphModule, inputs: Inputs) -> Lowered:
    partitioner = of("vulkan.partitioner.vulkan_partitioner", "VulkanPartitioner")()
    return only_lowered(to_delegate(converted, inputs, partitioner))


def openvino(converted: torch.fx.GraphModule, inputs: Inputs) -> Lowered:
    from executorch.exir.backend.backend_details import CompileSpec

    partitioner = of("openvino.partitioner", "OpenvinoPartitioner")([CompileSpec("device", b"CPU")])
    return on_the_runtime(to_delegate(converted, inputs, partitioner))


LOWERINGS: dict[str, Callable[[torch.fx.GraphModule, Inputs], Lowered]] = {
    "xnnpack": xnnpack,
    "tosa": tosa,
    "ethos-u": ethos_u,
    "vgf": vgf,
    "cortex-m": cortex_m,
    "coreml": coreml,
    "vulkan": vulkan,
    "openvino": openvino,
}
"""How a converted model is lowered, by the name that a policy gives."""
