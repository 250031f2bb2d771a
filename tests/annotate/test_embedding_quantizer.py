"""Embedding tables in 8 bits, alone and next to other quantizers."""

import models
import pytest
import quantizers
import torch
from quantizers import KEY
from torch import nn
from torch.nn import functional

from zeropoint.annotate.annotation import QuantizationAnnotation
from zeropoint.annotate.embedding_quantizer import WEIGHT, EmbeddingQuantizer
from zeropoint.annotate.quantizer import ComposableQuantizer
from zeropoint.backends.xnnpack import XNNPACKQuantizer, get_symmetric_quantization_config
from zeropoint.core.configs import QuantizationConfig
from zeropoint.core.errors import AnnotationError
from zeropoint.report.record import policy_of, record_of
from zeropoint.workflow import convert_pt2e, prepare_pt2e

aten = torch.ops.aten


class Texts(nn.Module):
    """Two tables, one of them read twice, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(50, 8, padding_idx=0)
        self.places = nn.Embedding(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        places = torch.arange(x.shape[1])
        return self.head(self.words(x) + functional.embedding(places, self.places.weight) + self.words(x // 2))


@models.seeded
def texts():
    return Texts(), (torch.randint(0, 50, (2, 6)),)


def test_tables_become_bytes_without_calibration():
    module, (x,) = texts()
    converted = convert_pt2e(prepare_pt2e(models.exported(texts), EmbeddingQuantizer()))
    assert (converted(x) - module(x)).abs().max() < 0.03
    dequantize = [node for node in converted.graph.nodes if "dequantize" in str(node.target)]
    assert len({node.args[0].target for node in dequantize}) == 2
    for node in dequantize:
        assert node.target is torch.ops.quantized_decomposed.dequantize_per_channel.default
        integers, scale, zero_point = (converted.get_buffer(arg.target) for arg in node.args[:3])
        assert (integers.dtype, scale.dtype, zero_point.dtype) == (torch.uint8, torch.float32, torch.float32)
        assert node.args[3:] == (0, 0, 255, torch.uint8)
    floats = {name for name, tensor in converted.state_dict().items() if tensor.is_floating_point()}
    assert not [name for name in floats if "words" in name or "places" in name]


def test_what_it_supports():
    (config,) = EmbeddingQuantizer.get_supported_quantization_configs()
    assert config == QuantizationConfig(None, None, WEIGHT, None)
    operators = [[nn.Embedding], [functional.embedding]]
    assert EmbeddingQuantizer.get_supported_operator_for_quantization_config(config) == operators
    assert EmbeddingQuantizer.get_supported_operator_for_quantization_config(None) == []
    (supported,) = EmbeddingQuantizer.get_supported_operators()
    assert supported.config == config


@pytest.mark.parametrize("first", [True, False])
def test_next_to_a_backends_quantizer(first):
    both = [EmbeddingQuantizer(), XNNPACKQuantizer().set_global(get_symmetric_quantization_config())]
    quantizer = ComposableQuantizer(both if first else both[::-1])
    assert policy_of(quantizer) is both[1].policy
    module, (x,) = texts()
    prepared = prepare_pt2e(models.exported(texts), quantizer)
    prepared(x)
    converted = convert_pt2e(prepared)
    assert (converted(x) - module(x)).abs().max() < 0.06
    assert sum(tensor.dtype == torch.uint8 for tensor in converted.state_dict().values()) == 2
    rows = {row.node: row for row in record_of(converted).coverage}
    assert rows["linear"].is_quantized
    assert rows["embedding"].reason == "it is computed in float: only its weight is quantized"


def other(annotated):
    spec = quantizers.weight(dtype=torch.int8)

    def annotate(model):
        for node in model.graph.nodes:
            if node.target is aten.embedding.default:
                node.meta[KEY] = QuantizationAnnotation({node.args[0]: spec}, _annotated=annotated)

    return quantizers.ByHand(annotate)


def test_a_table_that_another_quantizer_dealt_with_is_its():
    model = models.exported(texts)
    prepared = prepare_pt2e(model, ComposableQuantizer([other(True), EmbeddingQuantizer()]))
    converted = convert_pt2e(prepared)
    assert all(tensor.dtype != torch.uint8 for tensor in converted.state_dict().values())


def test_an_annotation_that_is_changed_is_an_error():
    words = (
        r"embedding.*: EmbeddingQuantizer changed the annotation that ByHand made\. Put the quantizer that is to win"
    )
    with pytest.raises(AnnotationError, match=words):
        prepare_pt2e(models.exported(texts), ComposableQuantizer([other(False), EmbeddingQuantizer()]))


@pytest.mark.parametrize("flag", [True, False])
def test_torchaos_annotates_the_same(flag):
    theirs = pytest.importorskip("torchao.quantization.pt2e.quantizer.embedding_quantizer")
    quantize_pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    _, (x,) = texts()
    expected = quantize_pt2e.prepare_pt2e(models.exported(texts), theirs.EmbeddingQuantizer())
    expected(x)  # Every weight is observed by running the model.
    expected = quantize_pt2e.convert_pt2e(expected)
    prepared = prepare_pt2e(models.exported(texts), EmbeddingQuantizer())
    if flag:
        prepared(x)
    converted = convert_pt2e(prepared)
    assert torch.equal(converted(x), expected(x))
    tables = [sorted(map(str, (t for t in m.buffers() if t.dtype == torch.uint8))) for m in (converted, expected)]
    assert tables[0] == tables[1]
