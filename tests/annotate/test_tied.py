"""Rules that want different things of one parameter contradict each other."""

from __future__ import annotations

import models
import pytest
import quantizers
import torch
from torch import nn
from torch.nn import functional as F

from zeropoint.annotate.patterns import ACT, Pattern, Table, Weight
from zeropoint.annotate.table_quantizer import TableQuantizer
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from zeropoint.core.errors import AnnotationError
from zeropoint.core.policy import BackendPolicy
from zeropoint.workflow import convert_pt2e, prepare_pt2e

INT8 = get_symmetric_quantization_config(is_per_channel=True)
INT4 = get_symmetric_quantization_config(is_per_channel=True, weight_qmin=-8, weight_qmax=7)
PER_TENSOR = get_symmetric_quantization_config()
X = torch.randn(2, 8)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x).relu())


def stored(model: nn.Module, quantizer: object, x: torch.Tensor = X) -> list[torch.dtype]:
    prepared = prepare_pt2e(models.export(model.eval(), x), quantizer)
    prepared(x)
    return [value.dtype for value in convert_pt2e(prepared).state_dict().values() if value.dim() > 1]


def test_two_specs():
    first, second = r"linear\.weight is quantized to int8 \[-127, 127\]", r"linear_1\.weight is quantized to int8 "
    with pytest.raises(AnnotationError, match=rf"linear_1 .*\[b.*weight is tied: {first}.* and {second}\[-8, 7\].* by"):
        stored(Tied(), XNNPACKQuantizer().set_global(INT8).set_module_name("b", INT4))
    with pytest.raises(AnnotationError, match=rf"{first} per_channel.* and {second}.*per_tensor.*Give both .* same"):
        stored(Tied(), XNNPACKQuantizer().set_global(INT8).set_module_name("b", PER_TENSOR))


@pytest.mark.parametrize("reversed_", [False, True])
def test_a_rule_for_one_reader_only(reversed_):
    name = "b" if reversed_ else "a"
    with pytest.raises(
        AnnotationError, match=r"weight is tied: .*quantized to int8 .* left float \(no rule selects it"
    ):
        stored(Tied(), XNNPACKQuantizer().set_module_name(name, INT8))


def test_a_rule_that_leaves_one_reader_out():
    quantizer = XNNPACKQuantizer().set_global(INT8).set_filter_function(lambda node: node.name != "linear_1")
    with pytest.raises(AnnotationError, match=r"linear_1\.weight is left float \(the filter function leaves it out"):
        stored(Tied(), quantizer)


def test_equal_rules_store_one_tensor():
    quantizer = XNNPACKQuantizer().set_module_name("a", INT8).set_module_name("b", INT8)
    assert stored(Tied(), quantizer) == [torch.int8]


def test_activations_may_be_chosen_otherwise():
    dynamic = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    assert stored(Tied(), XNNPACKQuantizer().set_global(INT8).set_module_name("b", dynamic)) == [torch.int8]


def test_an_embedding_reads_a_float_copy():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(8, 8), nn.Linear(8, 8, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.table(ids))

    ids = torch.arange(4)
    for quantizer in (XNNPACKQuantizer().set_global(INT8), XNNPACKQuantizer().set_module_name("head", INT8)):
        assert sorted(map(str, stored(Words(), quantizer, ids))) == ["torch.float32", "torch.int8"]


def test_the_channel_axis_of_the_operator_is_no_choice():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))

        def forward(self, x):
            return F.conv_transpose2d(F.conv2d(x, self.weight), self.weight)

    assert stored(Both(), XNNPACKQuantizer().set_global(INT8), torch.randn(1, 4, 6, 6))[0] is torch.int8


def test_what_counts_is_who_leaves_a_reader_out_not_in_which_words():
    class Device(TableQuantizer):
        table = Table(
            "tiny",
            (
                Pattern(
                    "linear",
                    ((torch.ops.aten.linear.default,),),
                    {"input": ACT, "weight": Weight(0)},
                    when=(lambda match: "the device leaves it out" if "_1" in match.head.name else None,),
                ),
            ),
        )
        policy = BackendPolicy("tiny", "float")

    assert len(stored(Tied(), Device().set_global(INT8))) == 2
    assert len(stored(Tied(), Device().set_module_name("a", INT8).set_module_name("b", INT8))) == 2


@pytest.mark.parametrize("second", [None, quantizers.weight(quant_min=-8, quant_max=7)])
def test_annotations_without_rules_may_differ(second):
    def annotate(model):
        for index, spec in enumerate((quantizers.weight(), second)):
            quantizers.annotate(models.find(model, "linear", index), {"weight": spec})

    assert len(stored(Tied(), quantizers.ByHand(annotate))) == 2
