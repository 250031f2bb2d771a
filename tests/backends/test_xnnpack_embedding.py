"""Embedding tables stay bytes in the file, and are looked up as such by the runtime."""

import pytest
import torch
from torch import nn

from tests.models import export, find, seeded
from tests.quantizers import ByHand, annotate
from zeropoint.annotate.embedding_quantizer import WEIGHT, EmbeddingQuantizer
from zeropoint.annotate.quantizer import ComposableQuantizer
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config, lower_float
from zeropoint.backends.xnnpack.lower import lower_program
from zeropoint.core.errors import LoweringError
from zeropoint.core.specs import QuantizationSpec
from zeropoint.numerics.granularity import PerGroup
from zeropoint.numerics.mapping import MappingType
from zeropoint.numerics.observers import (
    AffineQuantizedMinMaxObserver,
    MinMaxObserver,
    PerChannelMinMaxObserver,
    PerGroupMinMaxObserver,
)
from zeropoint.runtime.child import run_in_child
from zeropoint.workflow import convert_pt2e, prepare_pt2e

BYTES = (("quantized_decomposed.embedding_byte.default", 1),)


class Texts(nn.Module):
    def __init__(self, rows=1000, **settings):
        super().__init__()
        self.words = nn.Embedding(rows, 32, **settings)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        return self.head(self.words(x))


@seeded
def texts(rows=1000, dtype=torch.int64, **settings):
    return Texts(rows, **settings), (torch.randint(0, rows, (2, 6), dtype=dtype),)


def everything():
    config = get_symmetric_quantization_config(is_per_channel=True)
    return ComposableQuantizer([EmbeddingQuantizer(), XNNPACKQuantizer().set_global(config)])


def converted(module, x, quantizer, dynamic_shapes=None):
    exported = torch.export.export(module, (x,), dynamic_shapes=dynamic_shapes).module()
    prepared = prepare_pt2e(exported, quantizer)
    prepared(x)
    return convert_pt2e(prepared)


@pytest.mark.parametrize("settings", [{}, {"padding_idx": 0}, {"dtype": torch.int32}], ids=str)
@torch.no_grad()
def test_the_file_has_bytes_and_computes_what_the_graph_does(settings):
    module, (x,) = texts(**settings)
    model = converted(module, x, everything())
    program = lower_program(model, (x,))
    assert program.delegates == 1
    assert [each for each in program.outside if "to_dim_order" not in each[0]] == list(BYTES)
    assert len(program.pte) < 0.34 * len(lower_float(module, (x,)).pte)
    ((actual,),) = run_in_child(program.pte, [(x,)])
    torch.testing.assert_close(actual, model(x))
    assert (actual - module(x)).abs().max() < 0.05


@torch.no_grad()
def test_only_the_table_is_quantized_and_needs_no_data():
    module, (x,) = texts()
    model = convert_pt2e(prepare_pt2e(export(module, x), EmbeddingQuantizer()))
    program = lower_program(model, (x,))
    assert program.outside == BYTES
    ((actual,),) = run_in_child(program.pte, [(x,)])
    torch.testing.assert_close(actual, model(x))


GROUPS = AffineQuantizedMinMaxObserver.with_args(granularity=PerGroup(8), target_dtype=torch.int8)
SPECS = {
    "symmetric": QuantizationSpec(torch.int8, PerChannelMinMaxObserver, qscheme=torch.per_channel_symmetric, ch_axis=0),
    "affine": QuantizationSpec(torch.uint8, PerChannelMinMaxObserver, qscheme=torch.per_channel_affine, ch_axis=0),
    "groups": QuantizationSpec(
        torch.int8, PerGroupMinMaxObserver.with_args(group_size=8), -8, 7, torch.per_channel_symmetric
    ),
    "affine groups": QuantizationSpec(torch.int8, GROUPS.with_args(mapping_type=MappingType.ASYMMETRIC)),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@torch.no_grad()
def test_tables_of_other_quantizers(spec):
    module, (x,) = texts(50)
    model = converted(module, x, ByHand(lambda m: annotate(find(m, "embedding"), {"weight": spec})))
    program = lower_program(model, (x,))
    assert BYTES[0] in program.outside
    ((actual,),) = run_in_child(program.pte, [(x,)])
    torch.testing.assert_close(actual, model(x))


@torch.no_grad()
def test_one_scale_for_the_table_stays_a_dequantize():
    module, (x,) = texts(50)
    spec = QuantizationSpec(torch.int8, MinMaxObserver, qscheme=torch.per_tensor_affine)
    model = converted(module, x, ByHand(lambda m: annotate(find(m, "embedding"), {"weight": spec})))
    program = lower_program(model, (x,))
    assert ("aten.embedding.default", 1) in program.outside
    ((actual,),) = run_in_child(program.pte, [(x,)])
    torch.testing.assert_close(actual, model(x))


@torch.no_grad()
def test_sizes_that_are_free():
    module, (x,) = texts()
    sizes = {0: torch.export.Dim("batch", min=2, max=8), 1: torch.export.Dim("time", min=2, max=16)}
    model = converted(module, x, everything(), (sizes,))
    program = lower_program(model, (x,))
    assert program.free == (("x[0]", 8), ("x[1]", 16))
    batches = [(torch.randint(0, 1000, shape),) for shape in ((8, 16), (2, 3), (3, 11))]
    for batch, (actual,) in zip(batches, run_in_child(program.pte, batches), strict=True):
        torch.testing.assert_close(actual, model(*batch))


class Tied(Texts):
    """The table is the weight of a linear layer too."""

    def forward(self, x):
        return nn.functional.linear(self.words(x), self.words.weight)


@torch.no_grad()
def test_a_table_that_a_layer_reads_too():
    torch.manual_seed(0)
    module, x = Tied(40).eval(), torch.randint(0, 40, (2, 6))
    model = convert_pt2e(prepare_pt2e(export(module, x), EmbeddingQuantizer()))
    program = lower_program(model, (x,))
    assert program.outside == BYTES
    ((actual,),) = run_in_child(program.pte, [(x,)])
    torch.testing.assert_close(actual, model(x))


def test_float_zero_points_of_a_layer_are_refused():
    module, (x,) = texts(50)
    model = converted(module, x, ByHand(lambda m: annotate(find(m, "linear"), {"weight": WEIGHT})))
    words = (
        r"its zero points are torch\.float32; there is a kernel for embedding tables only, and linear reads it\. Use"
    )
    with pytest.raises(LoweringError, match=words):
        lower_program(model, (x,))
