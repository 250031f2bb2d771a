"""Embedding tables that stay float are stored as float16 in models of which no activation has a fixed scale."""

import pytest
import torch
from torch import nn

import zeropoint as zp
from zeropoint.backends import xnnpack
from zeropoint.core.errors import RuleError, SpecError
from zeropoint.core.policy import BackendPolicy

aten = torch.ops.aten
TOKENS = (torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]]),)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(500, 16, padding_idx=1), nn.Embedding(4, 16)
        self.layer = nn.Linear(16, 50)

    def forward(self, tokens):
        return self.layer(self.words(tokens) + self.places(torch.arange(tokens.shape[1])))


def quantizer(**settings) -> xnnpack.XNNPACKQuantizer:
    config = xnnpack.get_symmetric_quantization_config(is_per_channel=True, **{"is_dynamic": True, **settings})
    return xnnpack.XNNPACKQuantizer().set_global(config)


def converted(model: nn.Module, by, *inputs) -> torch.fx.GraphModule:
    inputs = inputs or TOKENS
    prepared = zp.prepare_pt2e(torch.export.export(model.eval(), inputs).module(), by)
    prepared(*inputs)
    return zp.convert_pt2e(prepared)


def tables(model: torch.fx.GraphModule) -> list[torch.dtype]:
    reads = [node.args[0] for node in model.graph.nodes if node.target is aten.embedding.default]
    return [model.get_buffer(read.target).dtype if "half" in read.target else torch.float32 for read in reads]


def test_rows_are_those_of_the_rounded_table():
    model = Encoder()
    quantized = converted(model, quantizer())
    assert tables(quantized) == [torch.float16, torch.float16]
    assert {name for name, t in quantized.state_dict().items() if t.dtype == torch.float32 and t.numel() > 100} == set()
    with torch.no_grad():
        for table in (model.words, model.places):
            table.weight.copy_(table.weight.half().float())
    rounded = converted(model, quantizer().set_float_tables(torch.float32))
    assert tables(rounded) == [torch.float32, torch.float32]
    assert torch.equal(quantized(*TOKENS), rounded(*TOKENS))


def test_metadata():
    quantized = converted(Encoder(), quantizer())
    for node in quantized.graph.nodes:
        if node.target is aten.embedding.default:
            (wide,) = node.users
            assert node.meta["val"].dtype == torch.float16
            assert wide.meta["val"].dtype == torch.float32
            assert wide.meta["nn_module_stack"] == node.meta["nn_module_stack"]


def test_fixed_scales_leave_tables_alone():
    assert tables(converted(Encoder(), quantizer(is_dynamic=False))) == [torch.float32, torch.float32]


def test_tables_that_other_operators_read_stay():
    class Added(Encoder):
        def forward(self, tokens):
            return self.layer(self.words(tokens) + self.words.weight.sum())

    assert tables(converted(Added(), quantizer())) == [torch.float32]


def test_values_beyond_float16_stay():
    model = Encoder()
    with torch.no_grad():
        model.words.weight[7, 7] = 70_000.0
    assert tables(converted(model, quantizer())) == [torch.float32, torch.float16]


def test_other_types_stay():
    class Short(Encoder):
        def forward(self, tokens):
            return self.layer(self.words(tokens).float())

    model = Short()
    model.words.bfloat16()
    assert tables(converted(model, quantizer())) == [torch.float32]  # Of no half type, that is.


def test_tables_of_bytes_are_the_embedding_quantizers():
    quantized = converted(Encoder(), zp.ComposableQuantizer([quantizer(), zp.EmbeddingQuantizer()]))
    stored = [t for t in quantized.state_dict().values() if t.dim() == 2]
    assert {t.dtype for t in stored} == {torch.int8, torch.uint8}


def test_the_file_has_half_tables():
    sizes = {}
    for dtype in (torch.float16, torch.float32):
        result = zp.quantize(Encoder(), TOKENS, quantizer=quantizer().set_float_tables(dtype))
        sizes[dtype] = len(result.pte)
        assert result.runtime_sqnr_db > 40
    assert sizes[torch.float32] - sizes[torch.float16] > 0.9 * 500 * 16 * 2


def test_other_settings_are_refused():
    with pytest.raises(RuleError, match=r"torch.int8 is no type of float tables.*Use torch.float16 or torch.float32"):
        quantizer().set_float_tables(torch.int8)
    with pytest.raises(SpecError, match="tables='int8' is unknown"):
        BackendPolicy("other", "float", tables="int8")
