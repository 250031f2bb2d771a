"""Two converted models side by side: where they dequantize, and by which numbers."""

from __future__ import annotations

import torch

from zeropoint.graph.attributes import get_attribute
from zeropoint.numerics import ops


def sites(model):
    """Returns how each place is dequantized: operator and dtype by name of the reader and position."""
    found = {}
    for node in model.graph.nodes:
        if node.target in (*ops.QUANTIZE_OPS, *ops.DEQUANTIZE_OPS) or "choose_qparams" in str(node.target):
            continue
        for place, read in enumerate(node.all_input_nodes):
            if read.target in ops.DEQUANTIZE_OPS:
                found[node.name if node.op != "output" else "output", place] = read
    return found


def numbers(model, dequantize):
    """Returns what a dequantize holds: tensors of scale and zero point, its integers, and all other arguments."""

    def value(argument):
        if not isinstance(argument, torch.fx.Node):
            return argument
        return get_attribute(model, str(argument.target)) if argument.op == "get_attr" else argument.name

    integers, scale, zero_point, *rest = (value(argument) for argument in dequantize.args)
    return scale, zero_point, integers if isinstance(integers, torch.Tensor) else None, rest


def assert_equal_numbers(ours, theirs, place):
    (scale, zero_point, integers, rest), (scale_2, zero_point_2, integers_2, rest_2) = ours, theirs
    assert rest == rest_2, place
    if isinstance(scale, str):  # It is found at run time.
        assert isinstance(scale_2, str), place
        return
    scale, scale_2 = torch.as_tensor(scale).double(), torch.as_tensor(scale_2).double()
    assert torch.allclose(scale, scale_2, rtol=1e-6, atol=0), place
    assert torch.equal(torch.as_tensor(zero_point).long(), torch.as_tensor(zero_point_2).long()), place
    assert (integers is None) == (integers_2 is None), place
    if integers is not None:
        assert integers.dtype == integers_2.dtype, place
        assert (integers.int() - integers_2.int()).abs().max() <= 1, place


def step_of(model, found):
    """Returns one step of the output, or of the coarsest activation where the output is float; 0 if there is none."""
    scales = {place: read.args[1] for place, read in found.items() if isinstance(read.args[1], float)}
    of_output = [scale for (name, _), scale in scales.items() if name == "output"]
    of_activations = [s for place, s in scales.items() if found[place].args[0].op != "get_attr"]
    return max(of_output or of_activations or [0.0])
