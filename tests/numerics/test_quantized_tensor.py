"""QuantizedTensor: what it holds, what it weighs, how it prints, what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zeropoint.core.errors import NonFiniteError, SpecError
from zeropoint.numerics.affine import dequantize, quantize
from zeropoint.numerics.granularity import PerAxis, PerGroup, PerTensor, PerToken
from zeropoint.numerics.quantized_tensor import QuantizedTensor


def weight(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_holds_what_affine_computes():
    x = weight(4, 6)
    t = QuantizedTensor.quantize(x, torch.int8, quant_min=-127, granularity=PerAxis(-2))
    assert (t.dtype, t.quant_min, t.quant_max, t.shape, t.axis) == (torch.int8, -127, 127, (4, 6), 0)
    assert torch.equal(t.scale, x.abs().amax(1) / 127)
    assert torch.equal(t.zero_point, torch.zeros(4, dtype=torch.int32))
    assert torch.equal(t.int_repr(), quantize(x, t.scale, 0, torch.int8, quant_min=-127, granularity=PerAxis(0)))
    assert torch.equal(t.dequantize(), dequantize(t.int_repr(), t.scale, t.zero_point, granularity=PerAxis(0)))
    assert t.dequantize(torch.bfloat16).dtype == torch.bfloat16


@given(
    st.sampled_from([(torch.int8, -8, 7), (torch.uint8, 0, 15), (torch.int8, -7, 7), (torch.int8, -128, 127)]),
    st.sampled_from([PerTensor(), PerAxis(0), PerGroup(3), PerToken()]),
    st.sampled_from(["symmetric", "affine"]),
    st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_packed_or_not_the_integers_are_the_same(integers, granularity, scheme, rows):
    dtype, low, high = integers
    x = weight(rows, 3)
    t = QuantizedTensor.quantize(x, dtype, quant_min=low, quant_max=high, granularity=granularity, scheme=scheme)
    again = QuantizedTensor.from_int_repr(
        t.int_repr(), t.scale, t.zero_point, quant_min=low, quant_max=high, granularity=granularity
    )
    plain = quantize(x, t.scale, t.zero_point, dtype, quant_min=low, quant_max=high, granularity=granularity)
    assert t.is_packed == (high - low <= 15)
    assert torch.equal(t.int_repr(), plain)
    assert torch.equal(again.data, t.data)
    assert (t.dequantize() - x).abs().max() <= 1.001 * t.scale.max()


def test_bytes_of_four_bit_values_are_half():
    x = weight(8, 32)
    eight = QuantizedTensor.quantize(x, granularity=PerGroup(16))
    four = QuantizedTensor.quantize(x, quant_min=-8, quant_max=7, granularity=PerGroup(16))
    qparams = 16 * (4 + 4)
    assert (eight.nbytes, four.nbytes) == (256 + qparams, 128 + qparams)
    odd = QuantizedTensor.quantize(weight(3), quant_min=-8, quant_max=7)
    assert odd.data.nbytes == 2
    assert odd.int_repr().shape == (3,)


def test_a_scalar_and_every_dtype():
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32):
        t = QuantizedTensor.quantize(torch.tensor(-2.0), dtype, scheme="affine")
        assert t.dtype == t.int_repr().dtype == dtype
        assert t.dequantize().item() == pytest.approx(-2.0)
    four = QuantizedTensor.quantize(torch.tensor(-2.0), quant_min=-8, quant_max=7)
    assert four.int_repr().shape == ()
    assert QuantizedTensor.quantize(weight(3), torch.quint8).dtype == torch.uint8


def test_it_prints_in_one_line():
    x = torch.tensor([[1.27, 0.0], [0.0, -2.54]])
    t = QuantizedTensor.quantize(x, quant_min=-127, granularity=PerAxis(0))
    line = "QuantizedTensor((2, 2), int8 -127..127, PerAxis(axis=0), scale 0.01..0.02, zero_point 0, 20 bytes)"
    assert repr(t) == line
    t = QuantizedTensor.quantize(x, torch.uint8, quant_max=15, scheme="affine")
    assert repr(t) == "QuantizedTensor((2, 2), uint8 0..15, PerTensor(), scale 0.254, zero_point 10, 10 bytes)"
    t = QuantizedTensor.quantize(torch.tensor([0.0, 1.0]), torch.int16, scheme="affine")
    assert "zero_point -32768, " in repr(t)
    assert "no scale" in repr(t.to("meta"))


def test_it_moves_between_devices_and_is_a_value():
    t = QuantizedTensor.quantize(weight(4, 4), quant_min=-8, quant_max=7)
    moved = t.to("meta")
    assert (moved.device.type, moved.scale.device.type, moved.int_repr().shape) == ("meta", "meta", (4, 4))
    assert t.to("cpu").dequantize().equal(t.dequantize())
    with pytest.raises(AttributeError):
        t.quant_min = 0
    assert t == t
    assert t != t.to("cpu")


def test_a_parameter_is_detached():
    assert not QuantizedTensor.quantize(torch.nn.Parameter(weight(3))).dequantize().requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
def test_values_that_are_not_finite_are_refused(bad, scheme):
    with pytest.raises(NonFiniteError, match=r"quantize: 1 of 2 values are NaN or infinite\. Find the operator"):
        QuantizedTensor.quantize(torch.tensor([1.0, bad]), scheme=scheme)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"dtype": torch.float16}, "cannot quantize to torch.float16"),
        ({"quant_min": 5, "quant_max": 5}, "quant_min=5, quant_max=5 is no range within torch.int8"),
        ({"scheme": "odd"}, 'scheme=\'odd\' is unknown. Use "symmetric" or "affine"'),
        ({"granularity": PerGroup(4)}, "3 is no multiple of 4"),
        ({"x": [1.0, 2.0]}, "x is list, not a tensor"),
        ({"eps": -1.0}, "eps=-1.0 is not a positive finite number"),
        ({"x": torch.empty(0)}, "has no element to measure"),
    ],
)
def test_quantize_refuses(keywords, words):
    with pytest.raises(SpecError, match=words):
        QuantizedTensor.quantize(**({"x": weight(2, 3)} | keywords))


@pytest.mark.parametrize(
    ("integers", "keywords", "words"),
    [
        (
            torch.tensor([9], dtype=torch.int8),
            {"quant_min": -8, "quant_max": 7},
            r"integers in 9\.\.9 do not fit -8\.\.7",
        ),
        (torch.tensor([9]), {}, r"from_int_repr: the integers are torch\.int64"),
        (torch.tensor([9], dtype=torch.int8), {"scale": 0.0}, r"scale=0\.0 is not a positive"),
        (torch.tensor([9], dtype=torch.int8), {"scale": "a"}, r"scale='a' is not a positive"),
        (torch.tensor([9], dtype=torch.int8), {"scale": torch.tensor(0.0)}, r"scale=0\.0 is not usable"),
        ([9], {}, r"from_int_repr: the integers are list, not a tensor"),
        (torch.tensor([9], dtype=torch.int8), {"zero_point": 0.5}, r"zero_point=0\.5 is no integer"),
        (torch.tensor([9], dtype=torch.int8), {"zero_point": 300}, "zero_point=300 lies outside"),
        (torch.tensor([9], dtype=torch.int8), {"zero_point": torch.tensor(0.5)}, r"zero_point is torch\.float32"),
    ],
)
def test_from_int_repr_refuses(integers, keywords, words):
    with pytest.raises(SpecError, match=words):
        QuantizedTensor.from_int_repr(integers, **({"scale": 1.0, "zero_point": 0} | keywords))


def test_from_int_repr_of_no_channels():
    t = QuantizedTensor.from_int_repr(torch.empty(0, 3, dtype=torch.int8), torch.empty(0), 0, granularity=PerAxis(0))
    assert t.dequantize().shape == (0, 3)
    assert "no scale" in repr(t)
