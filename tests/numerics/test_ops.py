"""The operators of converted graphs: torch's own, and the fallback that must give the same bits."""

import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from zeropoint.core.errors import SpecError
from zeropoint.numerics import ops

SPACE = "zeropoint_fallback_test"
INT8, UINT8 = (-128, 127, torch.int8), (0, 255, torch.uint8)
X = torch.cat([torch.linspace(-40, 40, 41), torch.tensor([0.5, 1.5, -2.5, -0.0, 1e30, float("inf"), float("-inf")])])
X = X.reshape(6, 8)
ROWS = torch.linspace(0.05, 1.3, 6)
ZEROS = torch.tensor([0, 1, 2, 3, 4, 5])
GROUPS = torch.linspace(0.05, 1.3, 12).reshape(6, 2)
GROUP_ZEROS = torch.arange(12).reshape(6, 2)
Q = torch.arange(-24, 24, dtype=torch.int8).reshape(6, 8)
U = (Q.to(torch.int16) + 100).to(torch.uint8)
BOUNDED = torch.linspace(-3, 5, 48).reshape(6, 8)

CASES = [
    ("quantize_per_tensor.default", (X, 0.1, 3, *INT8), {}),
    ("quantize_per_tensor.default", (X.bfloat16(), 1 / 3, 128, *UINT8), {}),
    ("quantize_per_tensor.default", (X, 0.3, 100, 0, 65535, torch.uint16), {}),
    ("quantize_per_tensor.tensor", (X, torch.tensor([0.3]), torch.tensor([5]), *INT8), {}),
    ("quantize_per_tensor.tensor", (X, torch.tensor(0.3, dtype=torch.float64), torch.tensor(5), *INT8), {}),
    ("dequantize_per_tensor.default", (Q, 0.1, 3, *INT8), {}),
    ("dequantize_per_tensor.default", (U, 1 / 3, 128, *UINT8), {"out_dtype": torch.float16}),
    ("dequantize_per_tensor.default", (U, 1 / 3, 128, *UINT8), {"out_dtype": torch.bfloat16}),
    ("dequantize_per_tensor.tensor", (Q, torch.tensor([0.3]), torch.tensor([5]), *INT8), {}),
    ("quantize_per_channel.default", (X, ROWS, ZEROS, 0, *INT8), {}),
    ("quantize_per_channel.default", (X.t().half(), ROWS.double(), ZEROS, 1, *INT8), {}),
    ("quantize_per_channel.default", (X.t(), ROWS, ZEROS.int(), -1, *UINT8), {}),
    ("dequantize_per_channel.default", (Q, ROWS, ZEROS, 0, *INT8), {}),
    ("dequantize_per_channel.default", (Q, ROWS, None, 0, *INT8), {"out_dtype": torch.float16}),
    ("dequantize_per_channel.default", (Q.t(), ROWS.double(), ZEROS, 1, *INT8), {}),
    ("quantize_per_token.default", (X, ROWS[:, None], ZEROS[:, None], *INT8), {}),
    ("quantize_per_token.default", (BOUNDED.half(), ROWS[:, None].half(), ZEROS[:, None], *INT8), {}),
    ("quantize_per_token.default", (X, ROWS[:, None].double(), ZEROS[:, None], *INT8), {}),
    ("dequantize_per_token.default", (Q, ROWS[:, None].double(), ZEROS[:, None], *INT8, torch.float32), {}),
    ("dequantize_per_token.default", (Q, ROWS[:, None], ZEROS[:, None].float(), *INT8, torch.float16), {}),
    ("quantize_per_channel_group.default", (X, GROUPS, GROUP_ZEROS, -8, 7, torch.int8, 4), {}),
    ("quantize_per_channel_group.default", (X, ROWS[:, None], ZEROS[:, None], -8, 7, torch.int8, 128), {}),
    ("dequantize_per_channel_group.default", (Q, GROUPS, GROUP_ZEROS, *INT8, 4, torch.float32), {}),
    ("dequantize_per_channel_group.default", (Q, GROUPS, None, *INT8, 4, torch.bfloat16), {}),
    ("choose_qparams.tensor", (BOUNDED, -128, 127, 2**-12, torch.int8), {}),
    ("choose_qparams.tensor", (torch.zeros(4), 0, 255, 2**-12, torch.uint8), {}),
    ("choose_qparams_symmetric.tensor", (BOUNDED, -127, 127, 2**-12, torch.int8), {}),
    ("choose_qparams_symmetric.tensor", (BOUNDED, 0, 255, 2**-12, torch.uint8), {}),
    ("choose_qparams_per_token_asymmetric.default", (BOUNDED, torch.int8), {}),
    ("choose_qparams_per_token_asymmetric.default", (BOUNDED.half(), torch.int8), {}),
    ("choose_qparams_per_token_asymmetric.default", (-BOUNDED.abs(), torch.int8), {}),
]


@pytest.fixture(scope="module")
def fallback():
    ops.define_ops(SPACE)
    return getattr(torch.ops, SPACE)


def overload(space, name):
    packet, _, kind = name.partition(".")
    return getattr(getattr(space, packet), kind)


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def on(device, arguments):
    return tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments)


@pytest.mark.parametrize(("name", "arguments", "keywords"), CASES)
def test_the_fallback_gives_the_bits_of_torch(fallback, name, arguments, keywords):
    theirs = as_tuple(overload(torch.ops.quantized_decomposed, name)(*arguments, **keywords))
    mine = as_tuple(overload(fallback, name)(*arguments, **keywords))
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        wide = torch.float64 if a.is_floating_point() else torch.int64
        assert torch.equal(a.to(wide), b.to(wide))


@pytest.mark.parametrize(("name", "arguments", "keywords"), CASES)
def test_meta_and_fake_tensors_have_the_shape_and_dtype_of_the_real_result(fallback, name, arguments, keywords):
    op = overload(fallback, name)
    real = as_tuple(op(*arguments, **keywords))
    meta = as_tuple(op(*on("meta", arguments), **keywords))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        held = (mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments)
        fake = as_tuple(op(*held, **keywords))
    for a, b, c in zip(real, meta, fake, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype) == (c.shape, c.dtype)
        assert b.device.type == "meta"


def test_schemas_are_those_of_torch(fallback):
    for name in sorted({name for name, _, _ in CASES}):
        theirs = overload(torch.ops.quantized_decomposed, name)._schema
        mine = overload(fallback, name)._schema
        assert [a.name for a in mine.arguments] == [a.name for a in theirs.arguments]
        assert str(mine).partition("(")[2] == str(theirs).partition("(")[2]


def test_nothing_is_registered_twice(fallback):
    assert ops.define_ops(SPACE) == ()
    assert ops.define_ops(ops.NAMESPACE) == ()
    assert ops.ensure_registered() is torch.ops.quantized_decomposed


def test_only_what_is_missing_is_registered():
    space = "zeropoint_partial_test"
    torch.library.define(f"{space}::quantize_per_tensor.tensor", "(Tensor x) -> Tensor")
    defined = ops.define_ops(space)
    assert f"{space}::quantize_per_tensor" in defined
    assert f"{space}::quantize_per_tensor.tensor" not in defined


def test_a_torch_without_the_module_gets_the_fallback(monkeypatch):
    monkeypatch.setattr(ops, "TORCH_MODULE", "torch.ao.quantization_of_old.fx._decomposed")
    monkeypatch.setattr(ops, "NAMESPACE", "zeropoint_without_torch_test")
    space = ops.ensure_registered()
    assert space.quantize_per_tensor(torch.tensor([0.26]), 0.1, 0, *INT8).tolist() == [3]


def test_an_error_inside_of_the_module_is_not_hidden(monkeypatch):
    def broken(name):
        raise ModuleNotFoundError("No module named 'sympy'", name="sympy")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="sympy"):
        ops.ensure_registered()


def test_export_with_a_dynamic_batch(fallback):
    class Model(torch.nn.Module):
        def forward(self, x):
            scale, zero_point = fallback.choose_qparams.tensor(x, -128, 127, 2**-12, torch.int8)
            q = fallback.quantize_per_tensor.tensor(x, scale, zero_point, *INT8)
            x = fallback.dequantize_per_tensor.tensor(q, scale, zero_point, *INT8)
            scale, zero_point = fallback.choose_qparams_per_token_asymmetric(x, torch.int8)
            q = fallback.quantize_per_token(x, scale, zero_point, *INT8)
            x = fallback.dequantize_per_token(q, scale, zero_point, *INT8, torch.float32)
            q = fallback.quantize_per_channel(x, ROWS[:4], ZEROS[:4], 1, *INT8)
            return fallback.dequantize_per_channel(q, ROWS[:4], ZEROS[:4], 1, *INT8)

    dynamic = ({0: torch.export.Dim("batch", min=2, max=64)},)
    exported = torch.export.export(Model(), (torch.randn(3, 4),), dynamic_shapes=dynamic)
    assert sum(node.op == "call_function" and SPACE in str(node.target) for node in exported.graph.nodes) == 8
    x = torch.randn(7, 4)
    assert torch.equal(exported.module()(x), Model()(x))


def test_the_fallback_refuses_what_does_not_fit(fallback):
    with pytest.raises(SpecError, match=r"scale has shape \(5,\)"):
        fallback.quantize_per_channel(X, ROWS[:5], ZEROS, 0, *INT8)
    with pytest.raises(SpecError, match=r"the integers are torch\.int8, the operator says torch\.uint8"):
        fallback.dequantize_per_tensor(Q, 0.1, 3, *UINT8)
    with pytest.raises(SpecError, match=r"x is torch\.float64"):
        fallback.quantize_per_tensor(X.double(), 0.1, 3, *INT8)
    with pytest.raises(SpecError, match="quant_max=256 is no range"):
        fallback.quantize_per_tensor(X, 0.1, 3, 0, 256, torch.uint8)
    with pytest.raises(SpecError, match="8 is no multiple of 3"):
        fallback.quantize_per_channel_group(X, GROUPS, GROUP_ZEROS, -8, 7, torch.int8, 3)


def test_the_tables_hold_the_overloads_of_torch():
    assert torch.ops.quantized_decomposed.quantize_per_tensor.default in ops.QUANTIZE_OPS
    assert torch.ops.quantized_decomposed.dequantize_per_channel.default in ops.DEQUANTIZE_OPS
    assert torch.ops.quantized_decomposed.choose_qparams.tensor in ops.CHOOSE_QPARAMS_OPS
    for op in (*ops.QUANTIZE_OPS, *ops.DEQUANTIZE_OPS):
        assert op._schema.arguments[1].name.startswith("scale")
        assert op._schema.arguments[2].name.startswith("zero_point")
